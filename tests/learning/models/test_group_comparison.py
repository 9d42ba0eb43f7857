"""What is said of groups: worst, best, gaps, and how many of them are called more than chance where there is none."""

from __future__ import annotations

import pytest
import torch

from mpc_fl.learning.models.group_comparison import (
    GroupCounts,
    figures_compared,
    gaps_between,
    share_of,
)
from mpc_fl.learning.models.shares import wilson_interval


def counts(attribute: str, group: str, rows: list[list[float]], noise: float | None = None) -> GroupCounts:
    kind = torch.int64 if noise is None else torch.float64
    return GroupCounts(attribute, group, torch.tensor(rows, dtype=kind), noise)


def test_figures_of_a_class_are_those_of_one_against_the_rest() -> None:
    of = counts("sex", "f", [[8, 1, 1], [2, 16, 2], [0, 0, 30]])
    found, named_rightly = share_of(of, 0, "sensitivity"), share_of(of, 0, "specificity")
    assert (found.hits, found.of, found.value) == (8, 10, 0.8)
    assert (named_rightly.hits, named_rightly.of) == (48, 50)
    assert (found.low, found.high) == wilson_interval(0.8, 10)
    nobody = share_of(counts("sex", "f", [[0, 0], [1, 9]]), 0, "sensitivity")
    assert nobody.value is None and nobody.to_json() == {"share": None, "low": None, "high": None, "of": 0}


def test_of_two_classes_nothing_is_compared_twice() -> None:
    assert figures_compared(2) == [(0, "sensitivity"), (1, "sensitivity")]
    assert len(figures_compared(3)) == 6


def test_a_group_that_fares_worse_is_named_with_its_gap_and_chance() -> None:
    groups = [
        counts("scanner", "A", [[90, 10], [10, 90]]),
        counts("scanner", "B", [[50, 50], [10, 90]]),
        counts("scanner", "C", [[88, 12], [11, 89]]),
        counts("sex", "f", [[70, 30], [10, 90]]),
        counts("sex", "m", [[72, 28], [10, 90]]),
    ]
    gaps = {(gap.attribute, gap.class_number): gap for gap in gaps_between(groups)}
    worst = gaps["scanner", 0]
    assert (worst.worst, worst.best, worst.differs) == ("B", "A", "B")
    assert worst.gap == pytest.approx(0.4) and 0.25 < worst.low < 0.4 < worst.high
    assert worst.chance is not None and worst.chance < 1e-6
    for key in (("scanner", 1), ("sex", 0), ("sex", 1)):
        chance = gaps[key].chance
        assert chance is not None and chance > 0.5
    assert worst.to_json()["gap"] == 0.4


def test_one_group_alone_has_no_gap_and_noise_hides_one() -> None:
    assert gaps_between([counts("sex", "f", [[9, 1], [1, 9]])]) == []
    lost = [counts("sex", name, [[40.0, 10.0], [5.0, 45.0]], noise=20.0) for name in ("f", "m")]
    assert share_of(lost[0], 0, "sensitivity").value is None and gaps_between(lost) == []
    large = [
        counts("sex", "f", [[700.0, 300.0], [50.0, 950.0]], 10.0),
        counts("sex", "m", [[950.0, 50.0], [50.0, 950.0]], 10.0),
    ]
    (first, second) = gaps_between(large)
    assert first.chance is not None and first.chance < 1e-6 and first.low > 0.15
    assert second.chance == 1.0


def test_equal_groups_are_rarely_called_different() -> None:
    """Of 60 runs with two attributes, six groups and three classes, 5 % at most have a gap that is more than chance by the
    correction; Fisher's test is careful. More than 9 would have a chance below 1e-3."""
    draw, found = torch.Generator().manual_seed(7), 0
    chances = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    for _ in range(60):
        groups = []
        for attribute, sizes in (("sex", (60, 80)), ("age", (30, 50, 40, 20))):
            for group, of in enumerate(sizes):
                drawn = [
                    torch.multinomial(row, of, replacement=True, generator=draw).bincount(minlength=3)
                    for row in chances
                ]
                groups.append(GroupCounts(attribute, str(group), torch.stack(drawn)))
        found += any(gap.chance is not None and gap.chance < 0.05 for gap in gaps_between(groups))
    assert found <= 9
