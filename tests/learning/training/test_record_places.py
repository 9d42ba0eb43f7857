"""Places of records: of their own content alone, and spread well."""

from __future__ import annotations

import torch

from mpc_fl.learning.training.record_places import record_batches


def placed(records: torch.Tensor, size: int) -> dict[int, int]:
    """The place of each record by its number."""
    found: dict[int, int] = {}
    for places, numbers in record_batches(records, size):
        assert len(places.unique()) == len(places)
        found.update(zip(numbers.tolist(), places.tolist(), strict=True))
    return found


def test_a_record_has_its_place_whoever_else_is_there_and_wherever_it_lies() -> None:
    records = torch.randn(300, 3, 5, generator=torch.Generator().manual_seed(0))
    places = placed(records, 64)
    assert sorted(places) == list(range(300)) and set(places.values()) <= set(range(64))
    backwards, spread = placed(records.flip(0), 64), records.new_zeros(300, 3, 10)[..., ::2].copy_(records)
    assert places == {299 - number: place for number, place in backwards.items()} == placed(spread, 64)
    assert all(placed(records[number : number + 1], 64)[0] == places[number] for number in range(300))
    assert placed(records[:0], 64) == {}


def test_records_are_spread_also_where_they_differ_in_little() -> None:
    """Rows of a table that differ in one column, and records of which most numbers are zero."""
    tables = torch.zeros(512, 6)
    tables[:, 2] = torch.arange(512) / 8
    sparse = torch.zeros(512, 700)
    sparse[range(512), range(512)] = 1.0
    for records in (tables, sparse):
        counts = torch.tensor(list(placed(records, 256).values())).bincount(minlength=256)
        assert counts.max() <= 10
