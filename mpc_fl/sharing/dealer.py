"""The dealer: correlated randomness for parties that compute on shares, from outside of them.

Protocol, for tuple number k of instance c (a tuple asked for alone, or a run of a program):
  1. every computing party p expands its shares of the drawn parts from seed_p / c under label k (`correlated_randomness`)
  2. all but the last party expand their share of the corrected part likewise
  3. the dealer, who has all seeds, computes the corrected part and sends the last party what is missing of it

A program is a sequence that every party declared alike, from shapes alone, before it runs. Then step 3 needs no request:
the dealer makes corrections in order, in blocks, while it waits; also for a run that has only been prepared. What it has
sent and the last party has not reported as consumed stays within `ahead_bytes` (or is a single block), which bounds the
memory of the last party. Between two messages of the parties it does one block at a time.

Security. The dealer is semi-honest and colludes with no computing party. It sees operations and shapes, and no message of
a party depends on a secret. Drawn parts are key streams of seeds that only one party and the dealer know. The correction is
c - (shares of the others); n-1 parties lack one seed, so a and b are uniform to them, and so is their share of c: if the last
party is among them, the missing share of c masks it, else they hold key streams alone (Beaver, CRYPTO 1991; CrypTen's
trusted third party, Knott et al., NeurIPS 2021, section 4). Labels are used once: instances are counted and never come back,
and seeds are made anew with the links of every start. A party's messages are taken as hostile: unknown, oversized, or
different from what the other parties say, they end the run.

Bytes. 8 per element of a corrected part, to the last party. Alone: one message of each party and one correction per tuple.
As a program: one message of each party per run, one block per MiB of corrections, reports in coarse steps. No rounds between
computing parties; the last party waits for the dealer only where corrections are slower than its computation.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.correlated_randomness import MAX_REQUESTS, CorrectionBlock, Request, TupleProgram, block_tag
from mpc_fl.sharing.dealer_client import AHEAD_BYTES, CONSUMED, CONTROL, DROPPED, SEED_PURPOSE

log = logging.getLogger(__name__)

_LONGEST_NAME = 100
_MOST_PROGRAMS = 256


@dataclass
class _Instance:
    """A run of a program: how many of its blocks were sent, and how many of those the last party has consumed."""

    number: int
    program: TupleProgram
    seeds: list[Seed]
    sent: int = 0
    consumed: int = 0

    def next_block(self) -> CorrectionBlock | None:
        blocks = self.program.blocks
        return blocks[self.sent] if self.sent < len(blocks) else None

    def outstanding(self) -> int:
        """Bytes of corrections that lie at the last party or on the way to it."""
        return sum(block.size for block in self.program.blocks[self.consumed : self.sent])


class Dealer:
    """Serves tuples to the computing parties `world` (in rank order) until all of them say that they are finished.

    A thread listens to the parties; computing and sending happen in the caller's. `served` counts corrected tuples,
    `elements` their elements, `ahead` those tuples among them whose run had not begun.
    """

    def __init__(self, links: Links, world: list[str], ahead_bytes: int = AHEAD_BYTES) -> None:
        self._links, self._world, self._ahead_bytes = links, world, ahead_bytes
        self._seeds = [links.pairwise_seed(name, SEED_PURPOSE) for name in world]
        self._programs: dict[str, TupleProgram] = {}
        self._declaring: dict[str, list[Request]] = {}
        self._instances = 0
        self._running: _Instance | None = None
        self._prepared: _Instance | None = None
        self._heard: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="dealer listener", daemon=True)
        self.served = self.elements = self.ahead = 0

    def serve(self) -> None:
        """Serve until the parties are finished. Raises like `serve_one`."""
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        """Do the next thing: take up one message of the parties, or else send one block; False when they are finished.

        Raises `ProtocolError` when the parties ask for different tuples or for something not allowed, `PeerLostError`
        when one is gone or late.
        """
        if self._listener.ident is None:
            self._listener.start()
        instance = self._sendable()
        try:
            heard = self._heard.get(block=instance is None)  # the listener's receives have deadlines
        except queue.Empty:
            assert instance is not None
            self._send_block(instance)
            return True
        if isinstance(heard, Exception):
            raise heard
        return self._take_up(heard)

    @property
    def outstanding(self) -> int:
        """Bytes of corrections sent for programs that the last party has not reported as consumed."""
        return sum(instance.outstanding() for instance in (self._running, self._prepared) if instance is not None)

    # -- listening, in a thread of its own
    def _listen(self) -> None:
        """Queue what the parties say in common and, while a program runs, what the last party has consumed."""
        try:
            message: dict[str, Any] = {}
            while message.get("kind") != "finish":
                messages = [self._links.receive_object(name, CONTROL) for name in self._world]
                message = messages[0]
                if any(other != message for other in messages[1:]):
                    raise ProtocolError(
                        "the computing parties asked the dealer for different tuples", "use one configuration"
                    )
                self._heard.put(message)
                complete = message.get("kind") != "run"
                while not complete:
                    report = self._links.receive_object(self._world[-1], CONSUMED)
                    self._heard.put({**report, "kind": CONSUMED})
                    complete = report.get("complete") is not False
        except Exception as error:  # noqa: BLE001 - raised again by serve_one, in the thread that has to end
            self._heard.put(error)

    # -- messages
    def _take_up(self, message: dict[str, Any]) -> bool:
        kind = message.get("kind")
        if kind == CONSUMED:
            self._take_report(message)
        elif self._running is not None:
            raise ProtocolError("a computing party left a program before its end", SAME_VERSION_AND_CONFIGURATION)
        elif kind == "request":
            request = Request.from_message(message.get("request"))
            self._send_block(self._new_instance(TupleProgram.of("", [request]), message))
        elif kind == "declare":
            self._declare(message)
        elif kind == "prepare":
            self._drop_prepared()
            self._prepared = self._new_instance(self._declared(message.get("program")), message)
        elif kind == "run":
            self._start(message)
        elif kind == "finish":
            log.info("served %d tuples, %d of them ahead, %d elements", self.served, self.ahead, self.elements)
            return False
        else:
            raise ProtocolError("an unknown message reached the dealer", SAME_VERSION_AND_CONFIGURATION)
        return True

    def _declare(self, message: dict[str, Any]) -> None:
        name, requests = message.get("program"), message.get("requests")
        if message.get("ahead_bytes") != self._ahead_bytes:
            raise ProtocolError("dealer and parties differ in runtime.dealer_ahead_bytes", "use one configuration")
        if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not isinstance(requests, list):
            raise ProtocolError("a program was declared without name or requests", SAME_VERSION_AND_CONFIGURATION)
        if name in self._programs or len(self._programs) + len(self._declaring) > _MOST_PROGRAMS:
            raise ProtocolError(
                "a program was declared twice, or too many were declared", SAME_VERSION_AND_CONFIGURATION
            )
        known = self._declaring.setdefault(name, [])
        if len(known) + len(requests) > MAX_REQUESTS:
            raise ProtocolError(f"a program has more than {MAX_REQUESTS} requests", "use a smaller network")
        known += [Request.from_message(request) for request in requests]
        if message.get("more") is False:
            self._programs[name] = TupleProgram.of(name, self._declaring.pop(name))

    def _declared(self, name: Any) -> TupleProgram:
        if not isinstance(name, str) or name not in self._programs:
            raise ProtocolError("a program was started that was not declared", SAME_VERSION_AND_CONFIGURATION)
        return self._programs[name]

    def _start(self, message: dict[str, Any]) -> None:
        program, following = self._declared(message.get("program")), message.get("following")
        if self._prepared is not None and self._prepared.program is program:
            if message.get("instance") != self._prepared.number:
                raise ProtocolError(
                    "the computing parties and the dealer count instances differently", SAME_VERSION_AND_CONFIGURATION
                )
            self._running, self._prepared = self._prepared, None
        else:
            self._drop_prepared()
            self._running = self._new_instance(program, message)
        if following != "":
            self._prepared = self._new_instance(self._declared(following))

    def _new_instance(self, program: TupleProgram, message: dict[str, Any] | None = None) -> _Instance:
        """The next instance, with seeds of its own. The parties' message names its number, so that a slip is found."""
        self._instances += 1
        if message is not None and message.get("instance") != self._instances:
            raise ProtocolError(
                "the computing parties and the dealer count instances differently", SAME_VERSION_AND_CONFIGURATION
            )
        return _Instance(self._instances, program, [seed.derive(self._instances) for seed in self._seeds])

    def _drop_prepared(self) -> None:
        """Forget a prepared instance; the last party has to know how many of its blocks to take off the link."""
        if self._prepared is not None:
            message = {"instance": self._prepared.number, "blocks": self._prepared.sent}
            self._links.send_object(self._world[-1], DROPPED, message)
            self._prepared = None

    def _take_report(self, report: dict[str, Any]) -> None:
        instance, blocks = self._running, report.get("blocks")
        if instance is None or report.get("instance") != instance.number:
            raise ProtocolError(
                "a computing party consumed corrections of no running program", SAME_VERSION_AND_CONFIGURATION
            )
        if type(blocks) is not int or not instance.consumed <= blocks <= instance.sent:
            raise ProtocolError(
                "a computing party consumed corrections that were not sent", SAME_VERSION_AND_CONFIGURATION
            )
        instance.consumed = blocks
        if report.get("complete") is not False:
            if blocks != len(instance.program.blocks):
                raise ProtocolError("a computing party left a program before its end", SAME_VERSION_AND_CONFIGURATION)
            self._running = None

    # -- corrections
    def _sendable(self) -> _Instance | None:
        """The instance whose next block may be made now: the running one first, then the prepared one."""
        for instance in (self._running, self._prepared):
            block = None if instance is None else instance.next_block()
            if block is not None:
                outstanding = self.outstanding
                return instance if outstanding == 0 or outstanding + block.size <= self._ahead_bytes else None
        return None

    def _send_block(self, instance: _Instance) -> None:
        block = instance.program.blocks[instance.sent]
        corrections = [
            instance.program.requests[position].correction(instance.seeds, position).reshape(-1)
            for position in range(block.start, block.stop)
        ]
        flat = corrections[0] if len(corrections) == 1 else torch.cat(corrections)
        self._links.send_tensor(self._world[-1], block_tag(instance.number, instance.sent), flat)
        instance.sent += 1
        self.served += block.stop - block.start
        self.ahead += block.stop - block.start if instance is self._prepared else 0
        self.elements += block.elements
