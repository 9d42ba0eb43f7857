"""A computing party's side of the dealer: draws its shares, announces what it needs, takes corrections.

Single tuples are announced one by one; the last party waits for each correction. A program is declared once, from a dry
run (`dry_run`) or by being followed the first time; from then on one message starts it and corrections come in blocks,
ahead of need. `dealer` holds the protocol and its security argument.

Labels. Each tuple asked for alone and each run of a program is one *instance*. Parties and dealer count instances alike,
derive one child seed for each and never come back to a number: what was prepared and not used is dropped with its seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.correlated_randomness import CorrectionBlock, Request, TupleProgram, block_tag

AHEAD_BYTES = 256 << 20
SEED_PURPOSE = "correlated randomness"
CONTROL, CONSUMED, DROPPED = "dealer control", "dealer consumed", "dealer dropped"  # tags of messages
_REQUESTS_PER_MESSAGE = 1000
_LONGEST_UNREPORTED = 32 << 20  # bytes; the dealer takes a party for late that reports nothing for long


class _Run:
    """One instance of a program at one party: hands out its tuples in order."""

    def __init__(self, client: DealerClient, program: TupleProgram, instance: int, seed: Seed) -> None:
        self.program, self.instance = program, instance
        self._client, self._seed = client, seed
        self._position = 0
        self._corrections = torch.empty(0, dtype=torch.int64)
        self._received = self._reported = 0  # blocks

    def shares(self, request: Request) -> list[torch.Tensor]:
        """This party's shares of the next tuple. Raises `ProtocolError` unless the program names `request` next."""
        requests, position = self.program.requests, self._position
        if position >= len(requests) or requests[position] != request:
            named = str(requests[position]) if position < len(requests) else "nothing more"
            raise ProtocolError(
                f"the computation asks for {request} where program '{self.program.name}' names {named}",
                SAME_VERSION_AND_CONFIGURATION,
            )
        shares = [request.drawn_share(part, self._seed, position) for part in range(len(request.shapes))]
        if self._client.takes_corrections:
            shares.append(self._correction(request))
        else:
            shares.append(request.corrected_share(self._seed, position))
        self._position += 1
        return shares

    def _correction(self, request: Request) -> torch.Tensor:
        blocks = self.program.blocks
        if self._received == 0 or self._position == blocks[self._received - 1].stop:
            self._report_before(blocks[self._received])
            self._corrections = self._client.receive_block(self.instance, self._received, blocks[self._received])
            self._received += 1
        correction = self._corrections[: request.elements]
        self._corrections = self._corrections[request.elements :]
        return correction.reshape(request.corrected_shape)

    def _report_before(self, block: CorrectionBlock) -> None:
        """Report in coarse steps, and whenever the dealer could not send `block` before it hears what was consumed."""
        unreported = sum(known.size for known in self.program.blocks[self._reported : self._received])
        limit = self._client.ahead_bytes
        if unreported and (unreported >= min(limit // 8, _LONGEST_UNREPORTED) or unreported + block.size > limit):
            self._report(False)

    def _report(self, complete: bool) -> None:
        self._reported = self._received
        if self._client.takes_corrections:
            self._client.send(CONSUMED, instance=self.instance, blocks=self._received, complete=complete)

    def finish(self) -> None:
        """Tell the dealer that everything was consumed. Raises `ProtocolError` when the computation ended early."""
        missing = len(self.program.requests) - self._position
        if missing:
            raise ProtocolError(
                f"the computation ended {missing} tuples before program '{self.program.name}'",
                SAME_VERSION_AND_CONFIGURATION,
            )
        self._report(True)


class DealerClient:
    """Correlated randomness for one computing party, from the dealer named `dealer`.

    `world` lists the computing parties in rank order; all of them must call the same methods in the same order.
    `ahead_bytes` bounds the corrections that the dealer sends ahead of need; it must be equal everywhere.
    """

    def __init__(self, links: Links, world: Sequence[str], dealer: str, ahead_bytes: int = AHEAD_BYTES) -> None:
        self.ahead_bytes = ahead_bytes
        self.takes_corrections = links.name == world[-1]
        self._links, self._dealer = links, dealer
        self._seed = links.pairwise_seed(dealer, SEED_PURPOSE)
        self._instances = 0
        self._programs: dict[str, TupleProgram] = {}
        self._prepared: tuple[TupleProgram, int] | None = None
        self._run: _Run | None = None
        self._followed: list[Request] | None = None

    # -- for computations
    def shares(self, request: Request) -> list[torch.Tensor]:
        """This party's shares of the parts of one tuple, int64, in the order of `correlated_randomness`.

        Inside `program` nothing is sent. Raises `ProtocolError` when the program does not name `request` next,
        `PeerLostError` when the dealer is gone or late.
        """
        if self._run is not None:
            return self._run.shares(request)
        if self._followed is not None:
            self._followed.append(request)
        instance = self._new_instance()
        self.send(CONTROL, kind="request", instance=instance, request=request.to_message())
        return _Run(self, TupleProgram.of("", [request]), instance, self._seed.derive(instance)).shares(request)

    def declares(self, name: str) -> bool:
        """Whether program `name` was declared."""
        return name in self._programs

    def declare(self, name: str, requests: Sequence[Request]) -> None:
        """Tell the dealer the requests of program `name`. Raises `ProtocolError` for none, too many or a known name."""
        if name in self._programs:
            raise ProtocolError(f"program '{name}' is declared already", "declare it once")
        self._programs[name] = TupleProgram.of(name, requests)
        for start in range(0, len(requests), _REQUESTS_PER_MESSAGE):
            stop = min(start + _REQUESTS_PER_MESSAGE, len(requests))
            part = [request.to_message() for request in requests[start:stop]]
            more, limit = stop < len(requests), self.ahead_bytes
            self.send(CONTROL, kind="declare", program=name, requests=part, more=more, ahead_bytes=limit)

    def prepare(self, name: str) -> None:
        """Let the dealer begin with a run of the declared program `name`, ahead of need."""
        dropped, self._prepared = self._prepared, (self._declared(name), self._new_instance())
        self.send(CONTROL, kind="prepare", program=name, instance=self._prepared[1])
        self._drop(dropped)

    @contextmanager
    def program(self, name: str, following: str | None = None) -> Iterator[None]:
        """Run program `name`: inside, every tuple must be the one it names next, and all must be used.

        `following` names the declared program that will run next, which the dealer prepares as soon as this one's
        corrections are out. A program that was not declared is followed tuple by tuple, and declared at the end.
        Raises `ProtocolError` for a deviation, before a wrong tuple is used.
        """
        if self._run is not None or self._followed is not None:
            raise ProtocolError(f"program '{name}' was started inside another", "end that one first")
        try:
            if name in self._programs:
                self._run = self._start(self._programs[name], following)
                yield
                self._run.finish()
            else:
                self._followed = []
                yield
                self.declare(name, self._followed)
        finally:
            self._run = self._followed = None

    def _start(self, program: TupleProgram, following: str | None) -> _Run:
        prepared, dropped = self._prepared, None
        if prepared is None or prepared[0] is not program:
            prepared, dropped = (program, self._new_instance()), prepared
        self._prepared = None if following is None else (self._declared(following), self._new_instance())
        instance = prepared[1]
        self.send(CONTROL, kind="run", program=program.name, instance=instance, following=following or "")
        self._drop(dropped)
        return _Run(self, program, instance, self._seed.derive(instance))

    def finish(self) -> None:
        """Tell the dealer that nothing follows."""
        self.send(CONTROL, kind="finish")

    def _declared(self, name: str) -> TupleProgram:
        if name not in self._programs:
            raise ProtocolError(f"program '{name}' was not declared", "declare it before it is prepared")
        return self._programs[name]

    # -- messages
    def _new_instance(self) -> int:
        self._instances += 1
        return self._instances

    def send(self, tag: str, **message: Any) -> None:
        """Send a control message to the dealer: names, shapes and counts."""
        self._links.send_object(self._dealer, tag, message)

    def receive_block(self, instance: int, number: int, block: CorrectionBlock) -> torch.Tensor:
        """Corrections of one block, flat int64. Raises `PeerLostError` when the dealer is gone or late."""
        return self._links.receive_tensor(self._dealer, block_tag(instance, number), torch.int64, (block.elements,))

    def _drop(self, prepared: tuple[TupleProgram, int] | None) -> None:
        """Take the blocks of an instance that will not run, as many as the dealer had sent, and forget them."""
        if prepared is None or not self.takes_corrections:
            return
        program, instance = prepared
        message = self._links.receive_object(self._dealer, DROPPED)
        sent = message.get("blocks")
        if message.get("instance") != instance or type(sent) is not int or not 0 <= sent <= len(program.blocks):
            raise ProtocolError("the dealer dropped corrections that were not prepared", SAME_VERSION_AND_CONFIGURATION)
        for number in range(sent):
            self.receive_block(instance, number, program.blocks[number])
