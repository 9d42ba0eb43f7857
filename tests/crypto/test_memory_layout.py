"""Copies, bytes and overlaps of tensors of any layout, against the elements taken one by one."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from mpc_fl.crypto.memory_layout import bytes_of, elements_overlap, own_copy
from tests.support.views import in_row_order, views

ALL = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64)


@settings(max_examples=300, deadline=None)
@given(views(ALL, overlapping=True))
def test_a_copy_has_the_elements_in_row_order_in_memory_of_its_own(view: torch.Tensor) -> None:
    copy = own_copy(view)
    assert copy.is_contiguous() and copy.dtype == view.dtype and torch.equal(copy, in_row_order(view))
    before = in_row_order(view)
    copy.fill_(77)
    assert torch.equal(view, before)


@settings(max_examples=300, deadline=None)
@given(views(ALL, overlapping=True))
def test_bytes_are_those_of_the_elements_in_row_order(view: torch.Tensor) -> None:
    found = bytes_of(view)
    assert found.dtype == torch.uint8 and found.shape == (view.numel() * view.element_size(),)
    assert found.numpy().tobytes() == in_row_order(view).numpy().tobytes()


def test_a_parameter_and_a_view_of_negated_elements_have_bytes_too() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert bytes_of(parameter).numpy().tobytes() == parameter.detach().numpy().tobytes()
    assert not own_copy(parameter).requires_grad
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert negated.is_neg() and bytes_of(negated).numpy().tobytes() == torch.tensor([-2.0, 4.0]).numpy().tobytes()


def _overlaps(view: torch.Tensor) -> bool:
    places = torch.zeros(view.shape, dtype=torch.int64)
    for dimension, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        places += (torch.arange(size) * stride).reshape([-1 if d == dimension else 1 for d in range(view.dim())])
    return len(places.unique()) < view.numel()


@settings(max_examples=300, deadline=None)
@given(views(overlapping=True))
def test_no_overlap_is_missed(view: torch.Tensor) -> None:
    assert elements_overlap(view) or not _overlaps(view)


@settings(max_examples=300, deadline=None)
@given(views())
def test_cutting_stepping_and_transposing_overlap_nowhere(view: torch.Tensor) -> None:
    assert not elements_overlap(view) and not _overlaps(view)
