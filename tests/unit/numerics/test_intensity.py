"""Each intensity transform does to the image what its name says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from augmentation_samples import SPACES, augment, every_space, frame_of, uniform
from scipy.ndimage import gaussian_filter
from torch.nn.functional import avg_pool2d, interpolate

from softseg_dist import BiasField, Blur, Contrast, Gamma, LowResolution, Noise

# ---------------------------------------------------------------- Noise, Gamma, Contrast


def test_noise_has_at_most_its_std() -> None:
    image = torch.zeros(200, 2, 16, 16)
    noise, _ = augment(image, image, (Noise(std=0.3),), range(200), "soft", (1, 1))
    stds = noise.flatten(1).std(dim=1)
    assert stds.max() < 0.3 * 1.1
    assert stds.mean().item() == pytest.approx(0.15, rel=0.15)


def test_gamma_keeps_extremes_and_order_per_channel() -> None:
    image = uniform(8, 2, 6, 6) * 5 - 2
    out, _ = augment(image, image, (Gamma(range=(0.5, 2)),), range(8), "soft", (1, 1))
    for reduce in (torch.amin, torch.amax):
        torch.testing.assert_close(reduce(out, (2, 3)), reduce(image, (2, 3)))
    assert torch.equal(out.flatten(2).argsort(dim=2), image.flatten(2).argsort(dim=2))


def test_gamma_leaves_a_constant_image_alone() -> None:
    image = torch.full((1, 1, 4, 4), -3.0)
    out, _ = augment(image, image, (Gamma(),), [0], "soft", (1, 1))
    assert torch.equal(out, image)


@every_space
def test_contrast_changes_the_spread_by_its_factor_and_keeps_the_mean(size: tuple[int, ...]) -> None:
    image = uniform(3, 2, *size) * 5 - 2
    out = Contrast().change(image, torch.tensor([0.5, 1.0, 2.0]), frame_of(size, SPACES[size], channels=2))
    torch.testing.assert_close(out.flatten(2).mean(2), image.flatten(2).mean(2))
    spread = torch.tensor([0.5, 1.0, 2.0])[:, None] * image.flatten(2).std(2)
    torch.testing.assert_close(out.flatten(2).std(2), spread)


# ---------------------------------------------------------------- BiasField


@every_space
@pytest.mark.parametrize("order", [1, 3, 5])
def test_bias_field_lies_within_its_strength_and_comes_near_it(size: tuple[int, ...], order: int) -> None:
    bias, frame = BiasField(order=order, strength=1.5), frame_of(size, SPACES[size])
    draws = torch.stack([bias.draw(torch.Generator().manual_seed(seed), frame) for seed in range(60)])
    logs = bias.field(draws, frame).log().flatten(1)
    assert logs.abs().max() <= math.log(1.5) + 1e-6
    torch.testing.assert_close(logs.abs().amax(1), draws[:, 0], rtol=1e-4, atol=1e-6)
    assert draws[:, 0].max() > 0.9 * math.log(1.5)
    assert 0.3 < (logs.sum(1) > 0).float().mean() < 0.7  # brighter as often as darker


def test_bias_field_of_order_1_has_a_logarithm_that_is_a_plane() -> None:
    bias, frame = BiasField(order=1), frame_of((17, 24), (0.5, 0.7))
    log = bias.field(torch.tensor([[0.4, 1.0, -2.0]]), frame).log()[0, 0]
    x, y = (frame.positions[0] / torch.tensor([17 * 0.5 / 2, 24 * 0.7 / 2])).unbind(-1)  # from -1 to 1
    plane = 1.0 * y - 2.0 * x
    torch.testing.assert_close(log, 0.4 * plane / plane.abs().max())


def test_bias_field_multiplies_the_signal_above_the_darkest_voxel_in_all_channels_alike() -> None:
    bias, frame, image = BiasField(), frame_of((17, 24), (0.5, 0.7), channels=2), uniform(4, 2, 17, 24) - 2
    draws = torch.stack([bias.draw(torch.Generator().manual_seed(seed), frame) for seed in range(4)])
    out, low = bias.change(image, draws, frame), image.amin((2, 3), keepdim=True)
    torch.testing.assert_close((out - low) / bias.field(draws, frame), image - low)
    torch.testing.assert_close(out.amin((2, 3), keepdim=True), low)


# ---------------------------------------------------------------- Blur


@every_space
def test_blur_is_the_gaussian_filter_of_scipy(size: tuple[int, ...]) -> None:
    image, sigma_mm = uniform(2, 1, *size), 1.4
    out = Blur(sigma_mm=sigma_mm).change(image, torch.full((2,), sigma_mm), frame_of(size, SPACES[size]))
    sigmas = [sigma_mm / step_mm for step_mm in SPACES[size]]
    for blurred, sample in zip(out, image, strict=True):
        expected = gaussian_filter(sample[0].double().numpy(), sigmas, mode="nearest", truncate=5)
        np.testing.assert_allclose(blurred[0].numpy(), expected, atol=2e-4)


def test_blur_is_as_wide_in_mm_along_every_axis() -> None:
    frame, image = frame_of((41, 61), (1.0, 0.5)), torch.zeros(1, 1, 41, 61)
    image[..., 20, 30] = 1
    spot = Blur(sigma_mm=2.5).change(image, torch.tensor([2.0]), frame)[0, 0]
    assert spot.sum().item() == pytest.approx(1, abs=1e-5)
    variances = (spot[..., None] * frame.positions[0] ** 2).sum((0, 1))
    assert variances.tolist() == pytest.approx([4, 4], rel=1e-3)


def test_blur_by_nothing_is_bit_exact_beside_a_sample_that_is_blurred() -> None:
    image = uniform(2, 1, 17, 24)
    out = Blur().change(image, torch.tensor([0.0, 1.0]), frame_of((17, 24), (0.5, 0.7)))
    assert torch.equal(out[0], image[0])
    assert out[1].std() < image[1].std() / 2


# ---------------------------------------------------------------- LowResolution


def test_low_resolution_by_2_is_the_mean_of_2_and_linear_between() -> None:
    image = uniform(2, 3, 16, 24)
    out = LowResolution(range=(1, 4)).change(image, torch.tensor([2.0, 4.0]), frame_of((16, 24), (1, 1)))
    for low, sample, factor in zip(out, image, (2, 4), strict=True):
        expected = interpolate(avg_pool2d(sample[None], factor), size=(16, 24), mode="bilinear", align_corners=False)
        torch.testing.assert_close(low, expected[0], rtol=0, atol=1e-6)


@every_space
def test_low_resolution_by_1_is_bit_exact(size: tuple[int, ...]) -> None:
    image = uniform(2, 1, *size)
    out = LowResolution().change(image, torch.tensor([1.0, 2.0]), frame_of(size, SPACES[size]))
    assert torch.equal(out[0], image[0])
    assert not torch.equal(out[1], image[1])


@every_space
@pytest.mark.parametrize("factor", [1.01, 1.3, 2.7, 5.0, 100.0])
def test_low_resolution_stays_between_the_extremes_and_knows_no_direction(size: tuple[int, ...], factor: float) -> None:
    image, coarse, frame = uniform(1, 1, *size), LowResolution(range=(1, 100)), frame_of(size, SPACES[size])
    out = coarse.change(image, torch.tensor([factor]), frame)
    assert image.min() - 1e-6 <= out.min()
    assert out.max() <= image.max() + 1e-6
    mirrored = coarse.change(image.flip(2, 3), torch.tensor([factor]), frame)
    torch.testing.assert_close(mirrored, out.flip(2, 3), rtol=0, atol=1e-6)
    if factor == 100:
        torch.testing.assert_close(out, image.mean().expand_as(out))


def test_low_resolution_does_not_depend_on_the_reach_of_its_range() -> None:
    image, frame, factor = uniform(1, 1, 17, 24), frame_of((17, 24), (1, 1)), torch.tensor([2.3])
    narrow, wide = (LowResolution(range=(1, largest)).change(image, factor, frame) for largest in (2.3, 20))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-6)


def test_low_resolution_through_the_plane_leaves_the_plane_alone() -> None:
    frame, coarse = frame_of((9, 12, 7), (0.5, 0.5, 3)), LowResolution(range=(2, 2), axes=(2,))
    image = uniform(1, 1, 9, 12, 1).expand(1, 1, 9, 12, 7)
    torch.testing.assert_close(coarse.change(image, torch.tensor([2.0]), frame), image)
    varied = uniform(1, 1, 9, 12, 7)
    assert coarse.change(varied, torch.tensor([2.0]), frame).std() < 0.9 * varied.std()
