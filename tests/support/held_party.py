"""`mpc-fl` in a process of its own, in which a hospital among peers does not train a round before somebody else is there.

`python -m tests.support.held_party 2:hospital-3:asks,4:hospital-4:links ARGUMENTS`: round 2 when hospital-3 has asked to take part,
round 4 when hospital-4 is linked; of `5` alone it says when it is in it. Whoever is in the plan of that round already is there. So
what a test is about happens in the round that it means, however slow or fast the machine is; `reached` is what such a hospital
prints when it is in that round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from mpc_fl.apps.cli.main import main
from mpc_fl.federation.peer_round import PeerRound

PATIENCE = 900.0
Awaited = Sequence[tuple[str, str]]  # names, and whether each "asks" or "links"


def reached(number: int) -> str:
    """What a hospital prints that is in a round in which it waits."""
    return f"held in round {number}"


def hold(rounds: dict[int, Awaited]) -> None:
    """Let training wait, in these rounds, for these hospitals; `TimeoutError` names who does not come."""
    train = PeerRound.train

    def held(self: PeerRound) -> Any:
        number = self.plan.number
        if number in rounds:
            print(reached(number), flush=True)
        for name, what in rounds.get(number, ()):
            await_hospital(self, name, what)
        return train(self)

    PeerRound.train = held  # type: ignore[method-assign]


def await_hospital(made: PeerRound, name: str, what: str) -> None:
    """Return when that hospital is there, or is the one that waits."""
    links, until = made.domain.links, time.monotonic() + PATIENCE
    while name not in made.plan.hospitals and not is_there(links, name, what):
        if time.monotonic() > until:
            raise TimeoutError(f"{name} is not there in round {made.plan.number}: '{what}' has not come")
        links.await_change(0.2)


def is_there(links: Any, name: str, what: str) -> bool:
    alive: bool = links.alive(name)
    return alive and (what == "links" or links.scoped("attendance").waiting(name, "word"))


def parsed(text: str) -> dict[int, Awaited]:
    """The first argument of this program."""
    rounds = dict[int, list[tuple[str, str]]]()
    for each in filter(None, text.split(",")):
        number, *awaited = each.split(":")
        for name, what in zip(awaited[::2], awaited[1::2], strict=True):
            rounds.setdefault(int(number), []).append((name, what))
        rounds.setdefault(int(number), [])
    return dict(rounds)


if __name__ == "__main__":
    hold(parsed(sys.argv[1]))
    sys.argv[1:2] = []
    sys.argv[0] = "mpc-fl"
    main()
