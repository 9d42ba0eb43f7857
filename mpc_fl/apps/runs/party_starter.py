"""The launcher's side of the fork server: start parties, signal them, hear of their ends.

Start it early, before anything secret is read: the server imports while the launcher reads its model and images.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mpc_fl.apps.runs.fork_server import END_GRACE, KEPT_FROM_THE_SERVER, READY
from mpc_fl.apps.runs.memory import use_large_pages
from mpc_fl.config.config import Config
from mpc_fl.errors import RunFailedError

_PROGRAM = "import sys; sys.path[:] = sys.argv[4:]; from mpc_fl.apps.runs.fork_server import main; main()"
# What most parties of a task import: an import that one party alone needs would delay all others.
_EVERY_ROLE = ("torch", "mpc_fl.links.party_links", "mpc_fl.learning.models.model_file", "mpc_fl.audit.opening_record")
_TRAINING = (
    "parties.hospital",
    "mpc_fl.federation.hospital_program",
    "torch._dynamo",  # the first step of an optimizer, or of vmap, imports torch's compiler, which takes a second
)
_LED = ("parties.aggregator", "mpc_fl.federation.aggregator_program")
_AMONG_PEERS = ("mpc_fl.federation.peer_program",)
_PRIVACY = ("opacus.grad_sample",)
_DIAGNOSIS = ("parties.hospital", "parties.model_owner", "parties.dealer", "mpc_fl.inference.hospital_program")
_SERVICE = ("parties.model_owner", "parties.dealer", "mpc_fl.inference.serving.server")
_FAST = ("mpc_fl.inference.fast.diagnosis", "mpc_fl.inference.fast.preprocessing.dealer")
# A dry run on shapes (`sharing.dry_run`) has torch import its compiler, which takes a second.
_REFERENCE = ("mpc_fl.inference.reference.diagnosis", "mpc_fl.sharing.dealer", "torch._dynamo")


def modules_to_share(config: Config) -> tuple[str, ...]:
    """What all or most parties of this task and engine import, and nothing more.

    Nothing on systems other than Linux, where libraries of the system itself do not survive a fork: there each party imports
    for itself.
    """
    if sys.platform != "linux":
        return ()
    if config.task == "train":
        others = _AMONG_PEERS if config.among_peers else _LED
        return (*_EVERY_ROLE, *_TRAINING, *others, *(() if config.privacy.mechanism == "none" else _PRIVACY))
    programs = _SERVICE if config.task == "serve" else _DIAGNOSIS
    return (*_EVERY_ROLE, *programs, *(_FAST if config.inference.engine == "fast" else _REFERENCE))


class StartedParty:
    """A party's process. `pid` is known once it was forked, `exitcode` once it has ended (-N: killed by signal N).

    `lost` says that the fork server has died: nobody tells of this party's end any more, and `exitcode` is `UNKNOWN`.
    """

    UNKNOWN = 255

    def __init__(self, name: str, pipe: Connection, events: Connection) -> None:
        """`pipe` leads to the party, `events` tell of its start and its end."""
        self.name, self.pipe, self.sentinel = name, pipe, events
        self.lost = False
        self._pid: int | None = None
        self._exitcode: int | None = None

    @property
    def pid(self) -> int | None:
        """Number of the process, None while it is still to start."""
        self._hear()
        return self._pid

    @property
    def exitcode(self) -> int | None:
        """Exit status, None while the process runs or is still to start."""
        self._hear()
        return self._exitcode

    def _hear(self) -> None:
        try:
            while self._exitcode is None and self.sentinel.poll():
                event = json.loads(self.sentinel.recv_bytes())
                self._pid = event.get("started", self._pid)
                self._exitcode = event.get("ended")
        except (EOFError, OSError):
            self.lost, self._exitcode = True, self.UNKNOWN

    def signal(self, number: int) -> None:
        """Send a signal if the process runs."""
        if self.exitcode is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def end_if_lost(self) -> None:
        """End a party that outlived the fork server. It holds the other end of the pipe exactly as long as it runs."""
        if not self.lost or self._pid is None:
            return
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                self.pipe.recv_bytes()
            os.kill(self._pid, signal.SIGKILL)
            while self.pipe.poll(END_GRACE):
                self.pipe.recv_bytes()

    def join(self, seconds: float) -> None:
        """Wait for the end, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while self.exitcode is None and time.monotonic() < deadline:
            wait([self.sentinel], max(0.0, deadline - time.monotonic()))


class PartyStarter:
    """A running fork server. Use it in a `with`, which ends it with every party that is left."""

    def __init__(self, modules: Sequence[str], program: str = "mpc_fl.apps.runs.party_process") -> None:
        """Start the server, which goes on to import `modules`; this does not wait for it.

        `program` is the module whose `party_process` each party runs.
        """
        use_large_pages()  # glibc reads that when a process starts
        ours, theirs = socket.socketpair()
        self._socket, self._said, self._ended = ours, b"", False
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), program, ",".join(modules), *sys.path]
        self._server: subprocess.Popen[bytes] | None = None
        self._refusal = ""
        try:
            with theirs, _signals_held_back():
                self._server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                )
        except OSError as error:  # told when a party shall start: what else is wrong with the task comes first
            self._refusal = f"{sys.executable}: {error.strerror}"

    def __enter__(self) -> PartyStarter:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server. Raises `RunFailedError` when it could not be started."""
        if self._server is None:
            raise self.failure()
        return self._server.pid

    def start(self, name: str, values: dict[str, Any]) -> StartedParty:
        """Have a party forked, as soon as the server has imported everything; `values` is the party's configuration.

        Raises `RunFailedError` when the server is gone.
        """
        here, there = multiprocessing.Pipe()
        try:
            events, ends = multiprocessing.Pipe(duplex=False)
        except OSError:  # of files that this process may open: those at hand serve the cleaning up
            here.close()
            there.close()
            raise
        try:
            with there, ends:
                socket.send_fds(self._socket, [b"."], [there.fileno(), ends.fileno()])
            here.send_bytes(json.dumps({"name": name, "values": values}).encode())
        except OSError:
            raise self.failure() from None
        return StartedParty(name, here, events)

    def failure(self) -> RunFailedError:
        """Why the server has ended, which it never does by itself before `close`. Waits until it has."""
        code, what = self._wait(END_GRACE), "the process that parties are forked from"
        if code is None:
            return RunFailedError(f"{what} cannot be started: {self._refusal}")
        self._listen()
        if self._said not in (b"", READY):
            return RunFailedError(f"{what} failed: {self._said.removeprefix(READY).decode('utf-8', 'replace')}")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return RunFailedError(f"{what} {how}", "all parties were stopped")

    def close(self) -> None:
        """End the server and all parties that are left, within `END_GRACE` seconds or by force."""
        if self._ended:
            return
        self._listen()
        self._socket.close()
        if not self._said and self._server is not None:
            self._server.kill()  # it still imports: no party was forked
        self._wait(2 * END_GRACE)
        self._ended = True

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while more := self._socket.recv(4096, socket.MSG_DONTWAIT):
                self._said += more

    def _wait(self, seconds: float) -> int | None:
        """The server's exit status, by force after so many seconds; None if it was never started."""
        if self._server is None:
            return None
        try:
            return self._server.wait(seconds)
        except subprocess.TimeoutExpired:
            self._server.kill()
            return self._server.wait()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started within begins with SIGINT, SIGTERM and SIGHUP blocked, before its first instruction.

    One that arrives here meanwhile is delivered at the end, even if another thread gets it: an exception half-way would
    leave a process behind that nobody knows.
    """
    late: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # nobody else can be interrupted
        handlers = {number: signal.getsignal(number) for number in KEPT_FROM_THE_SERVER}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda arrived, _frame: late.append(arrived))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_THE_SERVER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived in late:
            signal.raise_signal(arrived)
