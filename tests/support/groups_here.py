"""Groups of simulated hospitals in this process, one after the other: what Ray does, without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.config.config import Config, parse_config


class GroupsHere:
    """`Workers` that keep everything that they were asked in `asked`, by the name of the method."""

    def __init__(self, groups: list[HospitalGroup]) -> None:
        self.groups, self.asked = groups, list[str]()

    def all(self, method: Callable[..., Any], *given: Any) -> list[Any]:
        self.asked.append(method.__name__)
        return [method(group, *given) for group in self.groups]

    def each(self, method: Callable[..., None], done: Callable[[int, int], None], *given: Any) -> None:
        self.asked.append(method.__name__)
        ranks = [(group, rank) for group in self.groups for rank in group.ranks]
        for count, (group, rank) in enumerate(ranks, 1):
            method(group, rank, *given)
            done(count, len(ranks))


def placed_here(directory: Path, groups: int = 2) -> Callable[[Config, dict[str, Any]], Any]:
    """What `simulate` takes: hospitals in so many groups, whose privacy ledgers lie in `directory`."""

    @contextlib.contextmanager
    def place(config: Config, values: dict[str, Any]) -> Iterator[GroupsHere]:
        values["site"]["out"] = str(directory)
        own, hospitals = parse_config(values, "test"), config.federation.hospitals
        yield GroupsHere([HospitalGroup(own, range(first, hospitals, groups)) for first in range(groups)])

    return place
