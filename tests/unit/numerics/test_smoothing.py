"""One suite over all label smoothings, then the numbers and facts of each."""

from __future__ import annotations

import pytest
import torch
from public_classes import assert_covered
from pydantic import ValidationError
from torch import Tensor

from softseg_dist import SVLS, GeoLS, Recipe, Smoothing, UniformSmoothing, factorial

SMOOTHINGS: list[Smoothing] = [UniformSmoothing(), UniformSmoothing(epsilon=0.4), SVLS(), SVLS(sigma=3), GeoLS(), GeoLS(alpha=1)]
every_smoothing = pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=str)
SPACING_MM = (0.5, 0.7, 2.0)


def scene(*size: int, classes: int = 2, samples: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Targets [B K *S] with a box each, the last sample soft, and noisy images [B 2 *S] in which the boxes are seen."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(samples, classes, *size)
    for sample in range(samples):
        for k in range(classes):
            target[(sample, k, *(slice(n // 4 + k, max(n // 4 + k + 1, n - 2 - sample)) if n > 1 else 0 for n in size))] = 1
    target[-1] *= 0.8
    noise = torch.randn(samples, 2, *size, generator=generator)
    return target, target[:, :1] + 0.3 * noise


def test_the_suite_runs_over_every_public_smoothing() -> None:
    assert_covered(Smoothing, SMOOTHINGS)


@every_smoothing
@pytest.mark.parametrize("size", [(12, 11), (9, 8, 7), (12, 11, 1), (1, 1)])
def test_a_target_keeps_its_shape_and_stays_in_0_to_1(smoothing: Smoothing, size: tuple[int, ...]) -> None:
    target, image = scene(*size)
    before = target.clone()
    smooth = smoothing(target, image, SPACING_MM[: len(size)])
    assert smooth.shape == target.shape
    assert smooth.dtype == target.dtype
    assert float(smooth.min()) >= 0
    assert float(smooth.max()) <= 1
    assert torch.equal(target, before)


@every_smoothing
def test_a_volume_of_one_slice_is_smoothed_as_the_slice(smoothing: Smoothing) -> None:
    target, image = scene(12, 11)
    flat = smoothing(target, image, SPACING_MM[:2])
    for axis in (2, 3, 4):
        spacing = [*SPACING_MM[:2]]
        spacing.insert(axis - 2, 9.0)
        volume = smoothing(target.unsqueeze(axis), image.unsqueeze(axis), spacing)
        torch.testing.assert_close(volume.squeeze(axis), flat, atol=1e-6, rtol=0)


@every_smoothing
@pytest.mark.parametrize("size", [(12, 11), (9, 8, 7)])
def test_a_sample_does_not_depend_on_its_batch(smoothing: Smoothing, size: tuple[int, ...]) -> None:
    target, image = scene(*size)
    target[1] = 1
    together = smoothing(target, image, SPACING_MM[: len(size)])
    alone = [smoothing(target[i : i + 1], image[i : i + 1], SPACING_MM[: len(size)]) for i in range(len(target))]
    assert torch.equal(together, torch.cat(alone))


@every_smoothing
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_target_stays_as_it_is_but_for_uniform_smoothing(smoothing: Smoothing, value: float) -> None:
    target = torch.full((1, 1, 8, 9), value)
    smooth = smoothing(target, scene(8, 9, samples=1)[1], (1, 1))
    epsilon = smoothing.epsilon if isinstance(smoothing, UniformSmoothing) else 0
    torch.testing.assert_close(smooth, target * (1 - epsilon) + epsilon / 2, atol=1e-6, rtol=0)


@every_smoothing
def test_a_constant_image_does_no_harm(smoothing: Smoothing) -> None:
    target, _ = scene(12, 11)
    assert smoothing(target, torch.zeros(3, 1, 12, 11), (1, 1)).isfinite().all()


@every_smoothing
def test_mirrored_input_gives_mirrored_output(smoothing: Smoothing) -> None:
    target, image = scene(12, 11)
    smooth = smoothing(target, image, SPACING_MM[:2])
    mirrored = smoothing(target.flip(2), image.flip(2), SPACING_MM[:2])
    torch.testing.assert_close(mirrored.flip(2), smooth, atol=1e-5, rtol=0)


@every_smoothing
def test_single_precision_agrees_with_double(smoothing: Smoothing) -> None:
    target, image = scene(12, 11)
    exact = smoothing(target.double(), image.double(), (1, 1))
    torch.testing.assert_close(smoothing(target, image, (1, 1)), exact.float(), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- each


def test_uniform_smoothing_changes_the_sum_by_its_formula() -> None:
    target, image = scene(10, 10)
    smooth = UniformSmoothing(epsilon=0.2)(target, image, (1, 1))
    torch.testing.assert_close(smooth.sum(), 0.8 * target.sum() + 0.2 / 2 * target.numel())


@pytest.mark.parametrize("size", [(12, 12), (12, 12, 12)])
def test_svls_keeps_the_sum_of_what_lies_inside_the_field_of_view(size: tuple[int, ...]) -> None:
    target, image = scene(*size)
    smooth = SVLS()(target, image, (1,) * len(size))
    torch.testing.assert_close(smooth.sum(), target.sum())


@pytest.mark.parametrize(("size", "corner_steps"), [((5, 5), 2), ((5, 5, 5), 3)])
def test_svls_of_a_single_voxel_is_its_filter_with_a_half_in_the_middle(size: tuple[int, ...], corner_steps: int) -> None:
    target = torch.zeros(1, 1, *size)
    middle = (0, 0, *[2] * len(size))
    target[middle] = 1
    smooth = SVLS()(target, target, (1,) * len(size))
    assert smooth[middle].item() == pytest.approx(0.5)
    assert smooth.sum().item() == pytest.approx(1)
    beside, corner = smooth[(0, 0, 1, *[2] * (len(size) - 1))], smooth[(0, 0, *[1] * len(size))]
    ratio = torch.tensor(-0.5 * (corner_steps - 1)).exp()  # exp(-|o|^2 / 2) for |o|^2 = corner_steps, over |o|^2 = 1
    torch.testing.assert_close(corner / beside, ratio)


def test_geols_follows_the_image_and_not_the_label_where_they_disagree() -> None:
    image = torch.zeros(1, 1, 20, 20)
    image[..., 4:16, 4:16] = 1
    target = torch.zeros(1, 1, 20, 20)
    target[..., 4:16, 4:13] = 1  # the rater stopped three voxels before the edge that the image shows
    smooth = GeoLS(alpha=0.3)(target, image, (1, 1))[0, 0]
    torch.testing.assert_close(smooth[4:16, 4:13], torch.ones(12, 9), atol=1e-3, rtol=0)
    torch.testing.assert_close(smooth[4:16, 13:16], torch.full((12, 3), 0.3), atol=1e-3, rtol=0)
    assert smooth[:3].max() < 1e-3


def test_geols_has_the_values_of_its_formula_on_a_line() -> None:
    image = torch.tensor([0.0, 0, 0, 1, 3]).reshape(1, 1, 1, 5)
    target = torch.tensor([1.0, 1, 1, 0, 0]).reshape(1, 1, 1, 5)
    step = 2 * 1e-5  # 2 mm
    distance = torch.tensor([step, 0, step, 2 * 1 + 2 * step, 2 * 1 + 2 * 2 + 3 * step])  # from the middle of the object
    near = torch.exp(-distance / distance.mean())
    geodesic = (near - near.min()) / (1 - near.min())
    smooth = GeoLS(alpha=0.4)(target, image, (2.0, 2.0))
    torch.testing.assert_close(smooth.flatten(), 0.6 * target.flatten() + 0.4 * geodesic)


def test_geols_of_several_channels_is_the_mean_over_them() -> None:
    target, image = scene(12, 11)
    both = GeoLS()(target, image, (1, 1))
    each = [GeoLS()(target, image[:, c : c + 1], (1, 1)) for c in range(2)]
    torch.testing.assert_close(both, torch.stack(each).mean(0))


def test_smoothings_name_their_cells_in_a_factorial() -> None:
    cells = factorial(Recipe(), label=("hard", "soft"), smoothing=(None, UniformSmoothing(), SVLS(), GeoLS()))
    assert list(cells)[:4] == ["hard-none", "hard-ls", "hard-svls", "hard-geols"]
    assert list(factorial(Recipe(), smoothing=(GeoLS(alpha=0.1), GeoLS(alpha=0.3)))) == ["geols_alpha0.1", "geols_alpha0.3"]


@pytest.mark.parametrize(("kind", "fields"), [(UniformSmoothing, {"epsilon": 1.1}), (SVLS, {"sigma": 0}), (GeoLS, {"alpha": -0.1})])
def test_settings_that_leave_0_to_1_are_refused(kind: type[Smoothing], fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        kind(**fields)
