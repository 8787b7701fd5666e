"""A batch that stays cut on its way through a network: its portions fit into a processor's cache, and nobody joins them.

To whoever computes with it a `CutBatch` is a tensor as any other, with one shape and with gradients. What treats items apart is
computed portion by portion; anything else sees the whole batch, and gives what it always gives.

Legend: b items, C channels, *S space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: of all memory that torch allocates on a CPU
APART = re.compile(
    "detach|alias|_to_copy|copy_|zero_|fill_|masked_fill_|(empty|zeros|ones|full)_like|(leaky_relu|elu|hardtanh|softplus)_backward|"
    "(_prelu_kernel|(max_pool[23]d_with_indices|(_adaptive_)?avg_pool[23]d|(reflection|replication)_pad[23]d))(_backward)?|"
    "_?upsample_(nearest|nearest_exact|bilinear|trilinear|bicubic)[23]d|pixel_(un)?shuffle"
)
"""Functions that treat items apart whatever their arguments are, beside those that torch calls pointwise."""
UNLESS = re.compile(
    "cat|constant_pad_nd|slice(_backward)?|sum|mean|amax|amin|view|_unsafe_view|split(_with_sizes)?|_(log_)?softmax(_backward_data)?|"
    "_?upsample_(nearest|nearest_exact|bilinear|trilinear|bicubic)[23]d_backward"
)
"""Functions that do so unless an axis that they are given is that of the items, or a shape does not begin with their number."""
SHAPES = "size", "input_size", "input_sizes"


class Waiting(Sequence[Tensor]):
    """Portions each of which is made when it is first asked for, while what it is made of is still in the cache.

    Until then nobody changes what they are made of.
    """

    def __init__(self, make: Callable[[int], Tensor], count: int) -> None:
        self._make: Callable[[int], Tensor] | None = make
        self._made: list[Tensor | None] = [None] * count
        self._missing = count

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self._made)))

    def __getitem__(self, at: int) -> Tensor:  # type: ignore[override]
        made = self._made[at]
        if made is None:
            assert self._make is not None
            made = self._made[at] = self._make(at)
            self._missing -= 1
            if not self._missing:
                self._make = None  # and what it holds
        return made

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change every portion in place, those that are still to be made when they are."""
        for made in self._made:
            if made is not None:
                function(made)
        if (make := self._make) is not None:
            self._make = lambda at: function(make(at))


class CutBatch(Tensor):
    """A batch [b ...] that consists of `portions` [b_1 ...], [b_2 ...], ... of its items; there is at least one."""

    portions: Sequence[Tensor]
    lengths: list[int]  # of the portions; `len` of a tensor takes torch longer than a small addition

    # Functions are dispatched below autograd, for which a batch is one tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, portions: Sequence[Tensor], lengths: list[int] | None = None) -> CutBatch:
        """A batch of portions that are no part of any graph."""
        first = portions[0]
        lengths = lengths or [portion.shape[0] for portion in portions]
        batch: CutBatch = Tensor._make_wrapper_subclass(
            cls, (sum(lengths), *first.shape[1:]), strides=first.stride(), dtype=first.dtype, device=first.device
        )
        batch.portions, batch.lengths = portions, lengths
        return batch

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the one that is switched off
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, rule = kwargs or {}, _rule(func)
        columns = _columns(rule, args) if rule.apart and not _batches(named.values()) else None
        if columns is None:
            whole = [_whole(arg, shared=rule.shared) for arg in args]
            result = func(*whole, **{name: _whole(arg, shared=rule.shared) for name, arg in named.items()})
            return args[0] if rule.in_place else result
        first = _batches(args)[0]
        if rule.alias:
            return CutBatch(first.portions, first.lengths)
        if rule.in_place and isinstance(first.portions, Waiting) and not any(isinstance(a, Tensor) for a in args[1:]):
            first.portions.change(lambda portion: func(portion, *args[1:]))
            return first

        def of_portion(at: int) -> Any:
            return func(*[column[at] for column in columns], **named)

        if rule.waits:
            return CutBatch(Waiting(of_portion, len(first.lengths)), first.lengths)
        results = [of_portion(at) for at in range(len(first.lengths))]
        if rule.in_place:
            return args[0]
        if isinstance(results[0], Tensor):
            return CutBatch(results, first.lengths)
        return type(results[0])(CutBatch(of_one) for of_one in zip(*results, strict=True))

    def whole(self) -> Tensor:
        """All items in one tensor, which is no part of any graph."""
        return self.portions[0] if len(self.portions) == 1 else torch.cat(tuple(self.portions))


def cut(batch: Tensor, size: int) -> CutBatch:
    """A batch [b ...] in portions of `size` items, the last of which may be smaller; as it is if it is cut already."""
    return batch if isinstance(batch, CutBatch) else _Cut.apply(batch, size)


def apart(batch: CutBatch) -> tuple[Tensor, ...]:
    """The portions of a batch, as tensors of the graph that it is in."""
    return _Apart.apply(batch)


def together(portions: Sequence[Tensor]) -> CutBatch:
    """The batch of these portions; the inverse of `apart`."""
    return _Together.apply(*portions)


def portions_of(values: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    """Values [b ...], such as a gradient, in portions of these lengths; inside autograd functions."""
    if isinstance(values, CutBatch):
        return values.portions
    return tuple(_aligned(portion) for portion in values.split(lengths))


def _aligned(portion: Tensor) -> Tensor:
    """The portion as it would lie in memory of its own: matrix products depend on that too."""
    return portion if portion.data_ptr() % ALIGNMENT == 0 else portion.clone()


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: Tensor, size: int) -> CutBatch:
        return CutBatch([_aligned(portion) for portion in batch.split(size)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad.whole() if isinstance(grad, CutBatch) else grad, None


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: CutBatch) -> tuple[Tensor, ...]:
        return tuple(portion.detach() for portion in batch.portions)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> CutBatch:
        return CutBatch(grad_outputs)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *portions: Tensor) -> CutBatch:
        ctx.lengths = [portion.shape[0] for portion in portions]
        return CutBatch([portion.detach() for portion in portions])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(portions_of(grad_outputs[0], ctx.lengths))


class _Rule(NamedTuple):
    """How a function treats items: `apart`, unless its arguments at the positions `axes`, `shape` and `pads` say otherwise.

    `alias`: it gives what it is given. `waits`: it is called where nothing changes its arguments any more, in backward passes.
    `shared`: it changes an argument, or gives a view of it.
    """

    apart: bool
    axes: tuple[int, ...]
    shape: int | None
    pads: int | None
    in_place: bool
    alias: bool
    waits: bool
    shared: bool


@cache
def _rule(func: Any) -> _Rule:
    name, arguments = func.overloadpacket.__name__, [argument.name for argument in func._schema.arguments]
    in_place, random = (tag in func.tags for tag in (torch.Tag.inplace, torch.Tag.nondeterministic_seeded))
    alias, waits = name in ("alias", "detach"), name.endswith("_backward") and len(func._schema.returns) == 1
    others = in_place, alias, waits, in_place or func.is_view
    if not UNLESS.fullmatch(name):
        apart = APART.fullmatch(name) is not None or torch.Tag.pointwise in func.tags
        return _Rule(apart and not random, (), None, None, *others)
    axes = tuple(at for at, argument in enumerate(arguments) if argument == "dim")
    shape = next((at for at, argument in enumerate(arguments) if argument in SHAPES), None)
    pads = arguments.index("pad") if "pad" in arguments else None
    return _Rule(bool(axes) or (shape, pads) != (None, None), axes, shape, pads, *others)


def _columns(rule: _Rule, args: Sequence[Any]) -> list[Sequence[Any]] | None:
    """Of every argument what each portion gets of it; None if portions cannot be treated apart."""
    batches = _batches(args)
    lengths, ndim = batches[0].lengths, batches[0].ndim
    if any(other.ndim != ndim or other.lengths != lengths for other in batches[1:]):
        return None
    if not all(at < len(args) and _spares_items(args[at], ndim) for at in rule.axes):
        return None
    if rule.pads is not None and len(args[rule.pads]) >= 2 * ndim:
        return None
    columns = []
    for at, arg in enumerate(args):
        column = _shapes(arg, lengths) if at == rule.shape else _column(arg, lengths, ndim)
        if column is None:
            return None
        columns.append(column)
    return columns


def _batches(args: Iterable[Any]) -> list[CutBatch]:
    """All batches among arguments, or in a list among them."""
    flat = chain.from_iterable(arg if isinstance(arg, list | tuple) else (arg,) for arg in args)
    return [arg for arg in flat if type(arg) is CutBatch]


def _spares_items(axes: int | Sequence[int] | None, ndim: int) -> bool:
    """Whether none of these axes is the first of `ndim`; none at all stands for all of them."""
    several = [axes] if isinstance(axes, int) else list(axes or [0])
    return all(axis % ndim for axis in several)


def _shapes(shape: Sequence[int], lengths: list[int]) -> list[list[int]] | None:
    """`shape` for every portion if it begins with the number of all items."""
    return [[length, *shape[1:]] for length in lengths] if shape[0] == sum(lengths) else None


def _column(arg: Any, lengths: list[int], ndim: int) -> Sequence[Any] | None:
    """What every portion gets of an argument: its own items, or the same as all others; None if that cannot be known."""
    if type(arg) is CutBatch:
        return arg.portions
    if isinstance(arg, list | tuple) and any(isinstance(value, Tensor) for value in arg):
        columns = [_column(value, lengths, ndim) for value in arg]
        return None if None in columns else list(zip(*columns, strict=True))
    if not isinstance(arg, Tensor) or arg.ndim < ndim or (arg.ndim == ndim and arg.shape[0] == 1):
        return [arg] * len(lengths)
    return arg.split(lengths) if arg.ndim == ndim and arg.shape[0] == sum(lengths) else None


def _whole(arg: Any, *, shared: bool) -> Any:
    """`arg` with whole batches for those that are cut; if it is `shared`, their portions become views of it."""
    if isinstance(arg, list | tuple):
        return [_whole(value, shared=shared) for value in arg]
    if type(arg) is not CutBatch:
        return arg
    whole = arg.whole()
    if shared:
        arg.portions = whole.split(arg.lengths)
    return whole
