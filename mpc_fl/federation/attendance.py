"""Who takes part in a round: decided by the aggregator before it begins, told to all, and never changed within it.

Before round k, at the aggregator:
  1. hospitals of the round before stay, unless they were lost or have started again
  2. those that have announced themselves since (`announce`) join, if they and all others hold keys of each other
  3. fewer than the quorum end the run; else the word "plan" names the hospitals and, by the fingerprints of their keys,
     which start of each is meant; newcomers get the global model and the blocks of the reveal ledger they lack
A hospital that is lost or late once there is a plan is left out of a sum, or has the round planned anew without it; it stays out
until it announces itself again.
After the last round the word "complete" ends the run: nothing counts as a success before it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpc_fl.aggregation.rules import Rules, require_hospitals, require_quorum
from mpc_fl.aggregation.words import broadcast, names_in, say
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR

log = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.jsonl"  # among peers: what was opened of each round, alike at all hospitals that were in it
COMMON = "common"  # below a hospital's directory among peers: checkpoints of what all have in common
_PRESENT = "present"
_LOOK = 0.2


@dataclass(frozen=True)
class RoundPlan:
    """Round `number`, attempt `attempt`: its hospitals, the fingerprints of their keys, and which of them are new.

    `weight_total` is the public power of two that weights are divided by, 1 before it is known; `resumed` says that the
    reveal ledger goes on, `normalised` that the common normalisation of inputs is known and comes with the model.
    """

    number: int
    attempt: int
    hospitals: tuple[str, ...]
    starts: Mapping[str, str]
    newcomers: tuple[str, ...]
    weight_total: int
    resumed: bool
    normalised: bool = False

    @property
    def round_of(self) -> tuple[int, int]:
        """What labels everything of this attempt at this round."""
        return self.number, self.attempt

    def beginning(self, links: Links) -> Links:
        """Links for what comes before its sums: what was said of an attempt that was given up is not taken for this one's."""
        return links.scoped(f"beginning {self.number} {self.attempt}")

    @classmethod
    def from_word(cls, word: Mapping[str, Any]) -> RoundPlan:
        """From the aggregator's word. Raises `ProtocolError` for one that is no plan."""
        hospitals, newcomers, starts = names_in(word, "hospitals"), names_in(word, "newcomers"), word.get("starts")
        numbers = [word.get(key) for key in ("number", "attempt", "weight_total")]
        if not isinstance(starts, dict) or set(starts) != set(hospitals) or any(type(n) is not int for n in numbers):
            raise ProtocolError("the aggregator sent no plan of a round", SAME_VERSION)
        if not all(isinstance(start, str) and len(start) == 64 for start in starts.values()):
            raise ProtocolError("the aggregator sent no plan of a round", SAME_VERSION)
        flags = [word.get(key) is True for key in ("resumed", "normalised")]
        return cls(numbers[0], numbers[1], hospitals, starts, newcomers, numbers[2], *flags)  # type: ignore[arg-type]


@dataclass
class PlansFollowed:
    """A hospital's view of the plans it was sent: none comes twice, and none is taken up that the rules do not allow.

    `round_of` is the last one that this start of the hospital took up; `kept` the last round of which it has a checkpoint.
    `behind` says that it has missed the model of the round before, so that it must be given the model again.
    """

    rules: Rules
    rounds: int
    largest_total: int
    kept: int = -1
    round_of: tuple[int, int] = (-1, 0)
    behind: bool = True

    def follow(self, plan: RoundPlan, me: str) -> None:
        """Take up a plan, or raise `ProtocolError` before anything follows from it.

        The hospitals are enough and of this run (`require_hospitals`). Rounds and attempts go up: a repeated plan would have
        its sums made again. An attempt is lost only with a hospital, so there are no more of them than hospitals. The total
        of weights is a power of two, no larger than numbers of patients allow: a larger one would silence all.
        """
        require_hospitals(self.rules, plan.hospitals, me)
        opener, total = self.rules.opener, plan.weight_total
        first = max(self.kept, 0) if self.round_of[0] < 0 else self.round_of[0]
        if not (first <= plan.number <= self.rounds + 1 and plan.round_of > self.round_of):
            what = (
                f"planned round {plan.number} (attempt {plan.attempt}) after round {max(self.kept, self.round_of[0])}"
            )
        elif not 0 <= plan.attempt < len(self.rules.hospitals):
            what = f"began round {plan.number} anew too often"
        elif not set(plan.newcomers) <= set(plan.hospitals):
            what = "named newcomers that take no part"
        elif self.behind and me not in plan.newcomers:
            what = f"did not give {me} the model of the round before"
        elif total < 1 or total & (total - 1) or total > self.largest_total:
            what = "sent a total of weights that cannot be"
        else:
            self.round_of, self.behind = plan.round_of, False
            return
        raise ProtocolError(f"{opener} {what}", f"{opener} does not follow the protocol; nothing was sent to it")


def announce(links: Links, aggregator: str, hospitals: tuple[str, ...]) -> None:
    """At a hospital: say that it is there and would join, and whose keys it holds."""
    held = {name: links.key_fingerprint(name) for name in hospitals if name == links.name or links.alive(name)}
    links.send_object(aggregator, _PRESENT, {"held": held})


def await_keys(links: Links, plan: RoundPlan, seconds: float) -> None:
    """At a hospital: wait until it holds the keys of the plan's starts of all others. Raises `PeerLostError`."""
    deadline = time.monotonic() + seconds
    if plan.starts[links.name] != links.key_fingerprint(links.name):
        raise ProtocolError(f"the aggregator planned with another start of {links.name} than this one", SAME_VERSION)
    for name in plan.hospitals:
        while links.key_fingerprint(name) != plan.starts[name]:
            if time.monotonic() > deadline:
                raise PeerLostError(name, f"the link with {name} was not made again within {seconds:g} s")
            links.await_change(_LOOK)


class Attendance:
    """The aggregator's list: `members` are the hospitals of the sums last opened, by the starts in `starts`."""

    def __init__(self, links: Links, rules: Rules, hospitals: tuple[str, ...]) -> None:
        self._links, self._rules, self._hospitals = links, rules, hospitals
        self.members: tuple[str, ...] = ()
        self.starts: dict[str, str] = {}
        self._void = False
        self._number = 0
        self._costs: Counter[str] = Counter()  # sums that were lost with each hospital
        self._sits_out_until: dict[str, int] = {}  # and the round from which it may be in one again

    def await_announced(self, seconds: float) -> None:
        """Before the first plan: wait for the announcements of all hospitals that are connected.

        Raises `PeerLostError` where nobody may be missing and somebody is lost or late.
        """
        links, deadline = self._links, time.monotonic() + seconds
        while True:
            links.require_all()
            late = [name for name in self._hospitals if links.alive(name) and not links.waiting(name, _PRESENT)]
            if not late:
                return
            if time.monotonic() > deadline:
                break
            links.await_change(_LOOK)
        for name in late:
            error = PeerLostError(
                name, f"{name} is late: not ready to begin within {seconds:g} s", f"see the log of {name}"
            )
            if self._rules.smallest == len(self._hospitals):
                raise error
            log.warning("%s; the others begin without it", error)

    def plan(
        self, number: int, attempt: int, weight_total: int, resumed: bool = False, normalised: bool = False
    ) -> RoundPlan:
        """Steps 1 to 3. Raises `QuorumError` when too few hospitals are there."""
        links, hold, self._number = self._links, self._links.key_fingerprint, number
        chosen = [name for name in self.members if links.alive(name) and hold(name) == self.starts[name]]
        newcomers, self._void = list(chosen) if self._void else [], False
        for name in self._hospitals:
            if name in chosen or not links.alive(name) or not links.waiting(name, _PRESENT):
                continue
            held = links.receive_object(name, _PRESENT).get("held")
            if number < self._sits_out_until.get(name, 0):
                log.warning("%s has cost sums and sits out round %d", name, number)
                say(links, [name], "wait")
            elif isinstance(held, dict) and all(held.get(other) == hold(other) for other in [*chosen, name]):
                chosen.append(name)
                newcomers.append(name)
            else:
                log.info("%s is not connected with all others yet", name)
                say(links, [name], "wait")
        present = tuple(name for name in self._hospitals if name in chosen)
        require_quorum(self._rules, present, self._hospitals, f"round {number}")
        self.members, self.starts = present, {name: hold(name) for name in present}
        if newcomers and number > 1:
            log.info("round %d: %s joins", number, ", ".join(newcomers))
        starts = dict(self.starts)
        plan = RoundPlan(number, attempt, present, starts, tuple(newcomers), weight_total, resumed, normalised)
        say(
            links,
            present,
            "plan",
            number=number,
            attempt=attempt,
            hospitals=list(present),
            starts=starts,
            newcomers=newcomers,
            weight_total=weight_total,
            resumed=resumed,
            normalised=normalised,
        )
        return plan

    def void(self, lost: str = "") -> None:
        """After a round without result, because of somebody: all others stay, and are told everything again."""
        self._void = True
        if lost:
            # Until the next round, and each time for twice as many: whoever has every sum it is in made anew must not drain the
            # others' budgets.
            self._sits_out_until[lost] = self._number + 2 ** self._costs[lost]
            self._costs[lost] += 1
        self.members = tuple(name for name in self.members if name != lost)

    def keep(self, hospitals: tuple[str, ...]) -> None:
        """After a sum: only those in it stay."""
        self.members = hospitals


def announce_end(links: Links, hospitals: tuple[str, ...], rounds: int) -> None:
    """At the aggregator, when its results are written: tell all hospitals that the run is complete. Who is gone knows less."""
    links.set_phase("conclusion")
    links.stay_for(hospitals)
    broadcast(hospitals, lambda name: links.send_object(name, "complete", {"rounds": rounds}))


def await_end(links: Links, rounds: int) -> None:
    """At a hospital: nothing counts as a success before the aggregator says so. Raises `PeerLostError` otherwise."""
    links.set_phase("conclusion")
    if links.receive_object(AGGREGATOR, "complete").get("rounds") != rounds:
        raise ProtocolError("the aggregator ended after another number of rounds", SAME_VERSION)
