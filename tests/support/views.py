"""Tensors of every layout that a protocol may be given: views, odd strides, no elements, no dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st

# From a contiguous tensor of shape (4, 6) to a view of it.
WRITABLE_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.t(),
    "permuted": lambda base: base.view(2, 2, 6).permute(2, 0, 1),
    "every second column": lambda base: base[:, ::2],
    "part of the columns, transposed": lambda base: base[1:, 2:5].t(),
    "diagonal": lambda base: base.diagonal(),
    "one element of an odd stride": lambda base: base[2:3, 1],
    "one element of odd strides in two dimensions": lambda base: base.t()[1:2, ::3][:, 1:],
    "no dimensions": lambda base: base[2, 3],
    "no elements": lambda base: base[:, 3:3],
    "no elements, transposed": lambda base: base[4:, ::2].t(),
}
LAYOUTS = WRITABLE_LAYOUTS | {
    "expanded": lambda base: base[1].expand(3, 6),
    "one element, expanded": lambda base: base[1, 1].expand(2, 3),
    "overlapping windows": lambda base: base[2].unfold(0, 3, 1),
}


def _transposed(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    return view.transpose(first % view.dim(), second % view.dim()) if view.dim() else view


def _cut(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    if not view.dim():
        return view
    dimension = first % view.dim()
    size = view.shape[dimension]
    places = torch.arange(size)[second % (size + 1) :: step]
    start = int(places[0]) if len(places) else size
    return view[(slice(None),) * dimension + (slice(start, None, step),)]


def _selected(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    if not view.dim() or not view.shape[first % view.dim()]:
        return view
    return view.select(first % view.dim(), second % view.shape[first % view.dim()])


def _with_a_size_of_one(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    return view.unsqueeze(first % (view.dim() + 1)) if view.dim() < 6 else view


def _expanded(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    return view.expand(1 + step, *view.shape) if view.dim() < 6 and view.numel() < 500 else view


def _windows(view: torch.Tensor, first: int, second: int, step: int) -> torch.Tensor:
    if not 1 <= view.dim() < 6 or not view.shape[first % view.dim()] or view.numel() > 500:
        return view
    dimension = first % view.dim()
    return view.unfold(dimension, 1 + second % view.shape[dimension], step)


_STEPS = [_transposed, _cut, _selected, _with_a_size_of_one]
_OVERLAPPING_STEPS = [_expanded, _windows]


@st.composite
def views(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.int64, torch.int32), overlapping: bool = False
) -> torch.Tensor:
    """A view of a tensor that holds 0, 1, 2, ...; with `overlapping` perhaps one whose elements lie in one place."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    view = torch.arange(int(torch.tensor(shape).prod())).reshape(shape).to(draw(st.sampled_from(dtypes)))
    steps = _STEPS + (_OVERLAPPING_STEPS if overlapping else [])
    for step in draw(st.lists(st.sampled_from(steps), max_size=6)):
        view = step(view, *(draw(st.integers(0, 5)) for _ in range(2)), draw(st.integers(1, 3)))
    return view


def in_row_order(view: torch.Tensor) -> torch.Tensor:
    """The same elements, put together one by one: what a protocol must take the view for."""
    return torch.tensor([view[place].item() for place in _places(view.shape)], dtype=view.dtype).reshape(view.shape)


def _places(shape: torch.Size) -> list[tuple[int, ...]]:
    return [()] if not shape else [(i, *rest) for i in range(shape[0]) for rest in _places(shape[1:])]
