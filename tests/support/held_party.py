"""`mpc-fl` in a process of its own, in which a hospital among peers does not train a round before somebody else is there.

`python -m tests.support.held_party 2:hospital-3:asks,4:hospital-4:links ARGUMENTS`: round 2 when hospital-3 has asked to take part,
round 4 when hospital-4 is linked. So what a test is about happens in the round that it means, however slow the machine is.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from mpc_fl.apps.cli.main import main
from mpc_fl.federation.peer_round import PeerRound

PATIENCE = 300.0


def hold(rounds: dict[int, tuple[str, str]]) -> None:
    """Let training wait, in these rounds, for these hospitals."""
    train = PeerRound.train

    def held(self: PeerRound) -> Any:
        links = self.domain.links
        name, what = rounds.get(self.plan.number, (links.name, ""))
        until = time.monotonic() + PATIENCE
        while name != links.name and not is_there(links, name, what) and time.monotonic() < until:
            links.await_change(0.2)
        return train(self)

    PeerRound.train = held  # type: ignore[method-assign]


def is_there(links: Any, name: str, what: str) -> bool:
    alive: bool = links.alive(name)
    return alive and (what == "links" or links.scoped("attendance").waiting(name, "word"))


if __name__ == "__main__":
    said = [each.split(":") for each in sys.argv[1].split(",") if each]
    hold({int(number): (name, what) for number, name, what in said})
    sys.argv[1:2] = []
    sys.argv[0] = "mpc-fl"
    main()
