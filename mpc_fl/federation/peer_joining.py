"""Joining a run among peers that goes on: a hospital is given the blocks and the state that it lacks, and believes neither.

A hospital that comes later, comes back, or was left out (`Joining.catch_up`):
  1. says to all that it would take part ("asks"), and hears where they are, each signed (`peer_attendance`)
  2. where a quorum is before the same round, with the same block and state, it waits for the votes that it needs
     (`peer_admission`), shows them to one of those, and asks it for what it lacks: nobody gives the model to who is not admitted
  3. checks what it is given: each block by the signatures of all its parties, from the first on; the parameters of the model by the
     last signed block; all that a state has by the digest that the quorum said
  4. writes that down, and says that it is there like all others
Whoever gives something else is named in its log, and another one is asked.

Bytes. From one hospital, once: the ledger, and 4 bytes for each parameter of the network, as much again for each moment of the
optimizer and for an average.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block, to_json
from mpc_fl.config.deadlines import PeerDeadlines
from mpc_fl.errors import SAME_VERSION, LeftOutError, MpcFlError, PeerLostError, ProtocolError, printable
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.peer_attendance import Further, PeerAttendance
from mpc_fl.federation.peer_blocks import GivenBlocks, block_in
from mpc_fl.federation.peer_proposal import require_of_this_run
from mpc_fl.federation.peer_state import Peer, given_form, largest_given, take_given
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

_MOST_BLOCKS = 100_000
_LONGEST = 300  # letters of a reason
_MOST_IN_VAIN = 3  # times that one hospital is given what it does not take
_MOST_RETURNS = 8  # one after the other, of one that was in a plan and has kept no block of it


@dataclass
class Giving:
    """At a member: what it gives to those that ask: blocks of `ledger`, and the `state` after the last `number`ed round.

    It spends so many `seconds` with that before each round, for others wait for its words, whoever takes what is given slowly.
    """

    links: Links
    ledger: RevealLedger
    seconds: float
    number: int = -1
    state: Aggregator | None = None
    _given: set[tuple[str, str, int]] = field(default_factory=set)
    _in_vain: Counter[str] = field(default_factory=Counter)
    _spent: float = 0.0

    def before(self, number: int, state: Aggregator) -> None:
        """The next round is `number`, and `state` what all have in common before it."""
        self.number, self.state, self._spent = number - 1, state, 0.0

    def give(self, name: str, asked: Mapping[str, Any], lacking: str) -> None:
        """Answer one that asks, once for each of its starts and rounds. Who takes nothing is given nothing, nor who is not admitted
        yet, which would have `lacking`; either is said."""
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
        why = f"that would have {lacking}" if lacking else ""
        if self._in_vain[name] >= _MOST_IN_VAIN or self._spent >= self.seconds:
            why = (
                why
                or f"it, or another one, has taken {self.seconds:g} s before this round, or did not take what it was given"
            )
        if why:
            log.warning("%s asks for the state of the run and is given nothing: %s", name, why)
            broadcast([name], lambda to: _of_request(self.links, request).send_object(to, "lacks", {"declined": why}))
            return
        self._given.add(key)
        began = time.monotonic()
        try:
            self._send(name, request, self.ledger.blocks[blocks:], began + self.seconds - self._spent)
            self._in_vain.pop(name, None)
        except PeerLostError as error:
            log.warning("%s", error)
            self._in_vain[name] += 1
        self._spent += time.monotonic() - began

    def _send(self, name: str, request: int, blocks: Sequence[Block], until: float) -> None:
        """Raises `PeerLostError` where that is not taken `until` then (of `time.monotonic`)."""
        assert self.state is not None
        links, state = _of_request(self.links, request), given_form(self.state, self.number)

        def timed() -> Links:
            return links.within(max(0.0, until - time.monotonic()))

        timed().send_object(name, "lacks", {"round": self.number, "blocks": len(blocks), "bytes": len(state)})
        for block in blocks:
            timed().send_object(name, "block", {"block": to_json(block)})
        if len(state):
            timed().send_tensor(name, "state", state)
        log.info("gave %s %d blocks and the state after round %d", name, len(blocks), self.number)


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
        self.returns = (
            0 if attendance.recalls else self.returns
        )  # it has kept one since: whoever proposes may leave it out again
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
            self._await_votes([name for name, _ in givers])
            try:
                number = self._take_from(giver)
            except PeerLostError as error:
                log.warning("%s; another hospital is asked", error)
            except MpcFlError as error:
                log.warning("%s gave what cannot be: %s", giver, error)
                self._false.add(giver)
            else:
                if number is not None:
                    waited_for = {*attendance.members}
                    if ledger.blocks:
                        attendance.members = ledger.blocks[-1].parties
                    if not waited_for.issuperset(attendance.members):  # it needs their votes, too
                        self._await_votes([name for name, _ in givers])
                    return number
        raise left_out

    def _take_from(self, giver: str) -> int | None:
        """Steps 2 and 3; the number of the round that the others are before, `None` where they have gone on meanwhile, or ended.

        Raises `MpcFlError` for what is not what it should be.
        """
        attendance, deadline = self.attendance, time.monotonic() + self.deadlines.presence
        self.requests += 1
        links, given = _of_request(attendance.domain.links, self.requests), GivenBlocks(attendance.ledger, giver)
        attendance.ask(giver, self.requests)
        try:
            lacks = links.receive_object(giver, "lacks", deadline)
            if "declined" in lacks:
                log.warning("%s gives nothing yet: %s", giver, printable(str(lacks["declined"]), _LONGEST))
                return None
            number, blocks, size = _announced(giver, lacks, largest_given(self.peer.common))
            for _ in range(blocks):
                block = block_in(giver, links.receive_object(giver, "block", deadline))
                require_of_this_run(block, giver, attendance.admission.about_run, attendance.rules.smallest)
                given.take(block)
            state = torch.zeros(0, dtype=torch.uint8)
            if size:
                state = links.receive_tensor(giver, "state", torch.uint8, (size,), deadline)
        finally:
            links.end_scope()
        further = self._where_others_are(number + 1)
        if further is None or (further.number != number + 1 and not given.end_with(further.seal)):
            return None
        given.keep(further.seal)
        if attendance.ledger.chain.ended:
            return None
        take_given(self.peer, state, attendance.ledger, number, further.state)
        log.info("took the state after round %d from %s, as a quorum has it", number, giver)
        return further.number

    def _where_others_are(self, number: int) -> Further | None:
        """Where a quorum of them is, before this round, in which the giver is already, or further; `None` where none says so."""
        until = time.monotonic() + self.deadlines.answer
        while True:
            further = self.attendance.further()
            if further is not None and further.number >= number:
                return further
            if time.monotonic() >= until or not self.attendance.look(until):
                return None

    def _await_votes(self, givers: Sequence[str]) -> None:
        until = time.monotonic() + self.deadlines.answer / 2  # who proposes waits for a whole one
        while not self.attendance.answered(givers) and time.monotonic() < until and self.attendance.look(until):
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
