"""Records in memory, and some of them."""

from __future__ import annotations

import torch

from mpc_fl.learning.data.dataset import Dataset

RECORDS = Dataset(
    torch.arange(12.0).reshape(4, 3),
    torch.tensor([0, 1, 0, 1]),
    torch.tensor([0, 0, 1, 2]),
    ("a", "b", "c", "d"),
    groups={"sex": torch.tensor([0, 1, 1, 0])},
)


def test_some_records_keep_all_that_is_known_of_them() -> None:
    few = RECORDS.only(torch.tensor([3, 1]))
    assert few.inputs.tolist() == [[9.0, 10.0, 11.0], [3.0, 4.0, 5.0]]
    assert few.labels.tolist() == [1, 1] and few.patients.tolist() == [2, 0] and few.names == ("d", "b")
    assert few.groups["sex"].tolist() == [0, 1]


def test_of_none_nothing_is_left() -> None:
    none = RECORDS.only(torch.arange(0))
    assert len(none) == 0 and none.names == () and none.inputs.shape == (0, 3) and len(none.groups["sex"]) == 0
