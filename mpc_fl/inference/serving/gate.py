"""The gate of one session: before each batch the model owner waits for its hospital's turn and charges its quota.

`SessionGate` joins what `turns` decides (whose batch is next) with what `quota` decides (how many images a hospital may ask
about), and keeps a session to its purpose: one that diagnoses fills no pool, and the other way round. `SignedGate` adds that
nothing goes on without the receipt of what was before (`receipt_exchange`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from mpc_fl.errors import ProtocolError, RefusedError
from mpc_fl.inference.serving.quota import UsageLedger
from mpc_fl.inference.serving.receipt_exchange import OwnerReceipts
from mpc_fl.inference.serving.turns import Turns
from mpc_fl.inference.serving.visits import Visit


class SessionGate:
    """Turns and limits of one session's batches.

    `check` raises when there is nobody to wait for any more; the model owner keeps `pool_batches` for each hospital.
    """

    def __init__(
        self, visit: Visit, turns: Turns, usage: UsageLedger, pool_batches: int, check: Callable[[], None]
    ) -> None:
        self._visit, self._turns, self._usage, self._check = visit, turns, usage, check
        self._pool_batches, self._has_turn = pool_batches, False

    @contextlib.contextmanager
    def session(self) -> Iterator[SessionGate]:
        """However the session ends, its turn ends with it."""
        try:
            yield self
        finally:
            self.end()

    def _take_turn(self) -> None:
        if not self._has_turn:
            self._turns.begin(self._visit, self._check)
            self._has_turn = True

    def begin(self, records: int) -> None:
        """Wait for the turn unless it has begun, and charge. Raises `RefusedError`, `ProtocolError`, what `check` raises."""
        if self._visit.purpose != "diagnose":
            raise ProtocolError(
                "the hospital asked for a diagnosis in a session that fills its pool", "begin another session"
            )
        self._usage.require(self._visit.hospital, records)
        self._take_turn()
        self._usage.charge(self._visit.hospital, records)

    def store(self, stored: int) -> None:
        """Wait for the turn before a batch is stored. Raises `RefusedError` when `stored` are enough, and as `begin`."""
        if self._visit.purpose != "fill":
            raise ProtocolError("the hospital filled its pool in a session that diagnoses", "begin another session")
        if stored >= self._pool_batches:
            raise RefusedError(
                f"the model owner keeps {stored} batches for {self._visit.hospital}, no more than {self._pool_batches}",
                "come back when some are used",
            )
        self._take_turn()

    def end(self) -> None:
        """What was begun has been answered, or stored."""
        self._turns.end(self._visit)
        self._has_turn = False


class SignedGate:
    """What `OwnerSession` asks at each batch of one session (`BatchGate`): receipts first, then turns and limits."""

    def __init__(self, gate: SessionGate, receipts: OwnerReceipts) -> None:
        self._gate, self._receipts = gate, receipts

    def begin(self, records: int) -> None:
        """Raises `RefusedError` for a receipt that was not signed, and as `SessionGate.begin`."""
        self._receipts.require_signed()
        self._gate.begin(records)

    def ready(self, images: int, dealt: bool) -> None:
        """The receipt of this batch is proposed. Raises `ProtocolError` when the dealer did not sign."""
        self._receipts.ready(images, dealt)

    def answer(self) -> None:
        """Raises `RefusedError` for a receipt that was not signed."""
        self._receipts.require_signed()

    def end(self) -> None:
        """As `SessionGate.end`."""
        self._gate.end()

    def store(self, stored: int) -> None:
        """Raises `RefusedError` for a receipt that was not signed, and as `SessionGate.store`."""
        self._receipts.require_signed()
        self._gate.store(stored)

    def finish(self) -> None:
        """The closing receipt."""
        self._receipts.close()
