"""Joining a run among peers that goes on: a hospital is given the blocks and the state that it lacks, and believes neither.

A hospital that comes later, comes back, or was left out (`Joining.catch_up`):
  1. says to all that it would take part ("asks"), and hears where they are, each signed (`peer_attendance`)
  2. where a quorum is before the same round, with the same block and state, it asks one of those for what it lacks
  3. checks what it is given: each block by the signatures of all its parties, from the first on; the parameters of the model by the
     last signed block; all that a state has by the digest that the quorum said
  4. writes that down, waits for the votes that it needs (`peer_admission`), and says that it is there like all others
Whoever gives something else is named in its log, and another one is asked.

Bytes. From one hospital, once: the ledger, and 4 bytes for each parameter of the network, as much again for each moment of the
optimizer and for an average.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import to_json
from mpc_fl.config.deadlines import PeerDeadlines
from mpc_fl.errors import SAME_VERSION, LeftOutError, MpcFlError, PeerLostError, ProtocolError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.peer_attendance import Further, PeerAttendance
from mpc_fl.federation.peer_blocks import add_given, block_in
from mpc_fl.federation.peer_state import Peer, given_form, largest_given, take_given
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_MOST_BLOCKS = 100_000
_MOST_RETURNS = 8  # of one start that was in a plan


@dataclass
class Giving:
    """At a member: what it gives to those that ask: blocks of `ledger`, and the `state` after the last `number`ed round."""

    links: Links
    ledger: RevealLedger
    number: int = -1
    state: Aggregator | None = None
    _given: set[tuple[str, str, int]] = field(default_factory=set)

    def before(self, number: int, state: Aggregator) -> None:
        """The next round is `number`, and `state` what all have in common before it."""
        self.number, self.state = number - 1, state

    def give(self, name: str, asked: Mapping[str, Any]) -> None:
        """Answer one that asks, once for each of its starts and rounds. Who takes nothing is given nothing."""
        blocks, request = asked.get("blocks"), asked.get("request")
        key = name, self.links.key_fingerprint(name), self.ledger.chain.blocks
        if (
            self.state is None
            or type(blocks) is not int
            or type(request) is not int
            or blocks < 0
            or key in self._given
        ):
            return
        self._given.add(key)
        links, lacking = _of_request(self.links, request), self.ledger.blocks[blocks:]
        state = given_form(self.state, self.number)
        try:
            links.send_object(name, "lacks", {"round": self.number, "blocks": len(lacking), "bytes": len(state)})
            for block in lacking:
                links.send_object(name, "block", {"block": to_json(block)})
            if len(state):
                links.send_tensor(name, "state", state)
            log.info("gave %s %d blocks and the state after round %d", name, len(lacking), self.number)
        except PeerLostError as error:
            log.warning("%s", error)


def _of_request(links: Links, request: int) -> Links:
    return links.scoped(f"joining {request}")


@dataclass
class Joining:
    """At a hospital that catches up. `requests` counts what it asked for, `returns` how often it was left out and came back."""

    peer: Peer
    attendance: PeerAttendance
    deadlines: PeerDeadlines
    requests: int = 0
    returns: int = 0
    _false: set[str] = field(default_factory=set)

    def catch_up(self, left_out: LeftOutError) -> int:
        """Take the state that a quorum of others has; the number of the round before which they are.

        Raises `left_out` where no quorum of them is there, or says alike where it is, before a deadline; or the run has ended.
        """
        attendance, ledger = self.attendance, self.attendance.ledger
        self.returns += attendance.begins_anew()
        if self.returns > _MOST_RETURNS:
            raise left_out
        attendance.ask()
        asked = set[tuple[str, int]]()
        until = time.monotonic() + self.deadlines.presence + self.deadlines.beyond
        while time.monotonic() < until and not ledger.chain.ended:
            further = attendance.further()
            givers = [] if further is None else [(name, further.number) for name in further.givers]
            now = next((each for each in givers if each not in asked and each[0] not in self._false), None)
            if now is None:
                if not attendance.look(until):
                    break
                continue
            asked.add(now)
            giver = now[0]
            try:
                number = self._take_from(giver)
            except PeerLostError as error:
                log.warning("%s; another hospital is asked", error)
            except MpcFlError as error:
                log.warning("%s gave what cannot be: %s", giver, error)
                self._false.add(giver)
            else:
                if number is not None:
                    if ledger.blocks:
                        attendance.members = ledger.blocks[-1].parties  # it needs their votes
                    self._await_votes()
                    return number
        raise left_out

    def _take_from(self, giver: str) -> int | None:
        """Steps 2 and 3; the number of the round that the others are before, `None` where they have gone on meanwhile, or ended.

        Raises `MpcFlError` for what is not what it should be.
        """
        attendance, deadline = self.attendance, time.monotonic() + self.deadlines.presence
        self.requests += 1
        links = _of_request(attendance.domain.links, self.requests)
        attendance.ask(giver, self.requests)
        try:
            lacks = links.receive_object(giver, "lacks", deadline)
            number, blocks, size = _announced(giver, lacks, largest_given(self.peer.common))
            for _ in range(blocks):
                block = block_in(giver, links.receive_object(giver, "block", deadline))
                about_run, quorum = attendance.admission.about_run, attendance.rules.smallest
                add_given(attendance.ledger, block, giver, about_run, quorum)
            state = torch.zeros(0, dtype=torch.uint8)
            if size:
                state = links.receive_tensor(giver, "state", torch.uint8, (size,), deadline)
        finally:
            links.end_scope()
        if attendance.ledger.chain.ended or (further := self._where_others_are(number + 1)) is None:
            return None
        if attendance.ledger.chain.seal != further.seal:
            raise ProtocolError(f"{giver} gave another ledger than a quorum has", SAME_VERSION)
        take_given(self.peer, state, attendance.ledger, number, further.state)
        log.info("took the state after round %d from %s, as a quorum has it", number, giver)
        return further.number

    def _where_others_are(self, number: int) -> Further | None:
        """Where a quorum of them is, before this round, in which the giver is already; `None` where they are further."""
        until = time.monotonic() + self.deadlines.answer
        while True:
            further = self.attendance.further()
            if further is not None and further.number >= number:
                return further if further.number == number else None
            if time.monotonic() >= until or not self.attendance.look(until):
                return None

    def _await_votes(self) -> None:
        until = time.monotonic() + self.deadlines.answer / 2  # who proposes waits for a whole one
        while not self.attendance.answered() and time.monotonic() < until and self.attendance.look(until):
            pass


def _announced(giver: str, word: Mapping[str, Any], most: int) -> tuple[int, int, int]:
    """After which round a state is that follows, of so many bytes, and before it so many blocks. Raises `ProtocolError`."""
    number, blocks, size = (word.get(key) for key in ("round", "blocks", "bytes"))
    if type(number) is not int or type(blocks) is not int or type(size) is not int or number < -1:
        raise ProtocolError(f"{giver} did not say what it gives", SAME_VERSION)
    if not 0 <= blocks <= _MOST_BLOCKS or not 0 <= size <= most:
        raise ProtocolError(
            f"{giver} would give {blocks} blocks and {size} bytes, more than there can be", SAME_VERSION
        )
    return number, blocks, size
