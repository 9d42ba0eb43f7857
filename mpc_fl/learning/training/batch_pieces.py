"""Batches in pieces: however many patients a step draws, only so many records go through the network at once.

What a network keeps of a record for its backward pass is many times the record itself, for those built in 40 to 100 times. So
records are counted by their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from mpc_fl.learning.training.augmentation import Inputs, copies_of, copies_per_record, records_of

_RECORD_BYTES = 8 << 20  # of records or copies that are in the network at once


def copies_at_once(shape: Sequence[int]) -> int:
    """How many records of this shape, or copies of them, may be in a network at once; at least one."""
    return max(1, _RECORD_BYTES // (4 * max(1, math.prod(shape))))


def pieces_of(inputs: Inputs, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All copies of all records, float32 (M, ...), and their labels int64 (M,), in pieces of at most `copies_at_once`."""
    most, copies = copies_at_once(records_of(inputs).shape[1:]), copies_per_record(inputs)
    records = max(1, most // copies)
    for start in range(0, len(inputs), records):
        rows = slice(start, start + records)
        of_rows = copies_of(inputs[rows]).flatten(0, 1), labels[rows].repeat_interleave(copies)
        # Not channels last, which is a third faster: torch 2.13 then crashes in GroupNorm behind layers that are not trained.
        yield from zip(*(tensor.split(most) for tensor in of_rows), strict=True)
