"""Where a record stands in a batch under distributed noise: a place of its own content, whoever else is there.

The kernels of matrix products and convolutions round differently by number of rows and place in the batch, so batches have one
size, and a record has one place (`per_sample_gradients.rounded_sum`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# With more places fewer batches are needed, and more places stay empty.
_FEWEST_PLACES, _MOST_PLACES = 16, 256
_GRADIENT_ELEMENTS = 1 << 18  # of a batch with more than the fewest places
_WORDS = 1 << 20  # of records whose places are found at once
_ODD = 0x5851F42D4C957F2D  # multiplier of a linear congruential generator (Knuth, TAOCP 2, section 3.3.4)


def places_of(parameters: int) -> int:
    """How many places a batch has for a network of this size: public, and the same in every step."""
    return max(_FEWEST_PLACES, min(_MOST_PLACES, _GRADIENT_ELEMENTS // parameters))


def record_batches(records: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of at most `size` records that have different places: the places, and which records, int64 (N,) each.

    A record's place is a digest of its content, so it is the same in every batch and for every other data set.
    """
    waiting: list[list[int]] = [[] for _ in range(size)]
    for number, place in enumerate(_digests(records).remainder(size).tolist()):
        waiting[place].append(number)
    while any(waiting):
        taken = [(place, queue.pop()) for place, queue in enumerate(waiting) if queue]
        places, numbers = torch.tensor(taken, dtype=torch.int64).unbind(1)
        yield places, numbers


def _digests(records: torch.Tensor) -> torch.Tensor:
    """A number of each record float32 (N, ...), int64 (N,), from its bits alone: whole numbers add up the same in any order.

    It spreads records and hides nothing; a place that many share costs time.
    """
    rows = records.flatten(1) if len(records) else records.new_zeros(0, 1)
    factors = (torch.arange(rows.shape[1], dtype=torch.int64) * 2 + 1) * _ODD
    pieces = rows.split(max(1, _WORDS // max(1, rows.shape[1])))
    sums = torch.cat([(piece.contiguous().view(torch.int32).long() * factors).sum(dim=1) for piece in pieces])
    return ((sums ^ (sums >> 32)) * _ODD) >> 32
