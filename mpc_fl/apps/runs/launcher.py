"""Run all parties of a task as separate processes of this machine, watch them, end all of them when one fails.

The launcher spawns exactly the programs that `mpc-fl party` runs at a site. It talks to them through one pipe each,
in JSON: progress and the final word. It reads none of their data. A party whose pipe to the launcher breaks ends
itself, so that no orphan outlives a killed launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.config.config import Config, may_lose_hospitals, parse_config, party_names
from mpc_fl.errors import ConfigError, LinkError, MpcFlError, PeerLostError, RunFailedError
from mpc_fl.files import write_text
from mpc_fl.apps.runs.memory import peak_memory, use_large_pages
from mpc_fl.links.tls_log import log_refused_handshakes

ROLES = {"hospital": "parties.hospital", "aggregator": "parties.aggregator", "dealer": "parties.dealer",
         "model-owner": "parties.model_owner"}  # fmt: skip
# All processes have ended within 10 s of a failure: a party takes leave of its peers first (`transport`), and tells then.
CAUSE_GRACE = 3.0
TERMINATE_GRACE = 3.0
LATECOMER_GRACE = 10.0
ORPHANED = 3  # exit status of a party whose launcher is gone

Progress = Callable[[str, str, int, int], None]


def split_name(name: str) -> tuple[str, int]:
    """('hospital-2') -> ('hospital', 2); other roles have rank 0."""
    if name.startswith("hospital-"):
        return "hospital", int(name.rsplit("-", 1)[1])
    return name, 0


def local_addresses(names: list[str], first_port: int | None) -> dict[str, str]:
    """Loopback addresses: consecutive ports from `first_port`, or ports the system has free.

    Raises `LinkError` naming the port when a configured one is in use.
    """
    addresses: dict[str, str] = {}
    held: list[socket.socket] = []
    try:
        for index, name in enumerate(names):
            port = 0 if first_port is None else first_port + index
            listener = socket.socket()
            held.append(listener)
            if first_port is not None:  # connections of the run before, closed but remembered, are no obstacle
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                raise LinkError(
                    f"port {port} for {name} is in use", "set runtime.first_port to another number, or to null"
                ) from None
            addresses[name] = f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for listener in held:
            listener.close()
    return addresses


def _session(run_dir: Path) -> str:
    """A fresh name for a run, or the one that it has when it goes on."""
    path = run_dir / "session"
    if not path.exists():
        write_text(path, secrets.token_hex(16))
    return path.read_text(encoding="ascii")


def place_parties(config: Config, run_dir: Path) -> dict[str, Config]:
    """One configuration per party of a local run: fresh session, addresses, identities, a directory of its own."""
    names = party_names(config)
    reachable = [name for name in names if name not in config.federation.dial_out_only]
    federation = {
        "session": _session(run_dir),
        "addresses": config.federation.addresses or local_addresses(reachable, config.runtime.first_port),
    }
    missing = set(reachable) - set(federation["addresses"])
    if missing:
        raise ConfigError(f"federation.addresses lacks {sorted(missing)[0]}", "name all parties or none")
    directories = {name: run_dir / "parties" / name for name in names}
    if not all((directories[name] / "identity").is_dir() for name in names):
        make_local_identities(names, {name: directories[name] / "identity" for name in names})
    placed = {}
    for name in names:
        site: dict[str, Any] = {
            "out": str(directories[name]),
            "identity": str(directories[name] / "identity"),
            "log": str(run_dir / "logs" / f"{name}.log"),
        }
        role, _ = split_name(name)
        # A party is told only of the files of its own role.
        for key, owner in (("data", "hospital"), ("images", "hospital"), ("model", "model-owner"),
                           ("privacy_ledger", "hospital")):  # fmt: skip
            if role != owner:
                site[key] = None
        placed[name] = config.with_values(federation=federation, site=site)
        directories[name].mkdir(parents=True, exist_ok=True)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return placed


# ---- in the party's process --------------------------------------------------------------------------------------------


def _end_with_launcher(pipe: Connection) -> None:
    """The launcher never writes: the pipe becomes readable only when it is gone."""
    while not pipe.poll(None):
        pass
    os._exit(ORPHANED)


def set_up_log(path: Path | None) -> None:
    """Send this process's log to a file, or to standard error."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def run_party(name: str, config: Config, notify: Callable[[str, int, int], None], observer: Any = None) -> None:
    """Run one party's program in this process until it ends. Raises what the program raises."""
    log_refused_handshakes()
    import torch

    torch.set_num_threads(config.runtime.threads)
    role, rank = split_name(name)
    if role not in ROLES:
        raise ConfigError(f"there is no role '{role}'", f"the roles are {', '.join(ROLES)}")
    log = logging.getLogger("mpc_fl")
    log.info("%s starts (%s), process %d", name, config.task, os.getpid())
    importlib.import_module(ROLES[role]).run(config, rank, notify, observer)
    log.info("%s has finished, its peak memory was %d MB", name, peak_memory() // 10**6)


def unforeseen(error: BaseException) -> MpcFlError:
    """Log and name an error that no code foresaw by its type and place: its message could quote data, so it is lost."""
    log = logging.getLogger("mpc_fl")
    frames = traceback.extract_tb(error.__traceback__)
    for frame in frames:
        log.error("at %s:%s in %s", frame.filename, frame.lineno, frame.name)
    log.error("unexpected %s", type(error).__name__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
    return MpcFlError(f"unexpected {type(error).__name__} at {place} (a defect; see the log)")


def run_alone(name: str, config: Config, notify: Callable[[str, int, int], None]) -> None:
    """`run_party` where no launcher watches. Raises `MpcFlError` alone: a traceback could quote data or a model."""
    try:
        run_party(name, config, notify)
    except MpcFlError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is
        raise unforeseen(error) from None


def _party_process(name: str, values: dict[str, Any], pipe: Connection) -> NoReturn:
    lock = threading.Lock()
    threading.Thread(target=_end_with_launcher, args=(pipe,), daemon=True).start()

    def tell(**event: Any) -> None:
        try:
            with lock:
                pipe.send_bytes(json.dumps(event).encode())
        except OSError:
            os._exit(ORPHANED)

    log = logging.getLogger("mpc_fl")
    code = 0
    try:
        config = parse_config(values, f"configuration of {name}")
        set_up_log(config.site.log)
        run_party(name, config, lambda phase, done, total: tell(phase=phase, done=done, total=total))
        tell(finished=True)
    except MpcFlError as error:
        log.error("%s", error)
        tell(error=str(error), peer=error.peer if isinstance(error, PeerLostError) else None, time=time.time())
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - the last frame of the process: report, then end with a code
        tell(error=str(unforeseen(error)), peer=None, time=time.time())
        code = MpcFlError.exit_code
    logging.shutdown()
    os._exit(code)  # threads of a lost link must not keep the process


# ---- in the launcher ---------------------------------------------------------------------------------------------------


@dataclass
class _Party:
    name: str
    process: Any
    pipe: Connection
    finished: bool = False
    error: str | None = None
    blames: str | None = None
    failed_at: float = float("inf")
    open: bool = True
    starts: int = 1


@dataclass
class _Watch:
    """All parties; `start` starts one, `spare` is how many hospitals the run can do without, `restarts` how often each of
    them is started again. `lost` are those that were lost, in order, as often as they were."""

    start: Callable[[str, bool], _Party]
    spare: int = 0
    restarts: int = 0
    parties: list[_Party] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _given_up: set[str] = field(default_factory=set)
    _finished_at: float | None = None

    def read(self, party: _Party, progress: Progress) -> None:
        try:
            while party.open and party.pipe.poll():
                event = json.loads(party.pipe.recv_bytes())
                if "phase" in event:
                    progress(party.name, event["phase"], event["done"], event["total"])
                elif "error" in event:
                    party.error, party.blames = event["error"], event.get("peer")
                    party.failed_at = event["time"]
                else:
                    party.finished = True
        except (EOFError, OSError):
            party.open = False

    def failures(self) -> list[_Party]:
        """Parties that failed, without hospitals that the run can do without."""
        failed = [party for party in self.parties if party.error is not None or self._died(party)]
        return [party for party in failed if not (party.name.startswith("hospital-") and self.spare > 0)]

    def do_without(self, progress: Progress) -> None:
        """Start lost hospitals again, or go on without them as far as the quorum allows."""
        for index, party in enumerate(self.parties):
            failed = party.error is not None or self._died(party)
            if not failed or not party.name.startswith("hospital-") or self.spare <= 0 or party.name in self._given_up:
                continue
            if party.process.exitcode is None:
                continue  # it is still taking leave
            self.lost.append(party.name)
            party.pipe.close()
            if party.starts <= self.restarts:
                self.parties[index] = self.start(party.name, True)
                self.parties[index].starts = party.starts + 1
                progress(party.name, "started again", party.starts, self.restarts)
            else:
                self.spare -= 1
                party.finished, party.error, party.open = True, None, False
                self._given_up.add(party.name)
                progress(party.name, "lost", 1, 1)

    def give_up_latecomers(self) -> None:
        """Hospitals that were started again and came too late: all others have finished, nobody answers them any more."""
        late = [party for party in self.parties if not party.finished]
        if not late or any(party.starts == 1 for party in late):
            self._finished_at = None
            return
        self._finished_at = self._finished_at or time.monotonic()
        if time.monotonic() - self._finished_at > LATECOMER_GRACE:
            for party in late:
                party.process.kill()
                party.finished, party.error, party.open = True, None, False

    @staticmethod
    def _died(party: _Party) -> bool:
        return party.process.exitcode is not None and not party.open and not party.finished


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started within never see SIGINT: Ctrl-C reaches them too, but the launcher handles it for all.

    One that arrives meanwhile is delivered to the launcher at the end. (Python's own handler would only be replaced
    after the imports of a party, and print a traceback until then.) So are SIGTERM and SIGHUP, which the processes themselves
    keep: a party that exists and was not yet told what to do would print a traceback, too.
    """
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock the signal
    late: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # nobody else can be interrupted
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda arrived, _frame: late.append(arrived))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for arrived in late:
            signal.raise_signal(arrived)


def launch(config: Config, run_dir: Path, progress: Progress) -> list[str]:
    """Run every party of the task to its end.

    Hospitals that are lost are started again `runtime.restarts` times each; then the run goes on without them as long as
    the quorum holds. Returns the names of lost hospitals, as often as they were lost.

    Raises `RunFailedError` naming the party that failed and why, after all processes have ended (within
    `CAUSE_GRACE` + `TERMINATE_GRACE` seconds, then by force). `KeyboardInterrupt` ends them too and is raised again.
    """
    placed = place_parties(config, run_dir)
    use_large_pages()
    context = multiprocessing.get_context("spawn")

    def start(name: str, again: bool) -> _Party:
        here, there = context.Pipe()
        values = placed[name].model_dump(mode="json")
        values["site"]["resume"] = values["site"]["resume"] or again
        # A daemon ends with this process even if an interrupt comes before it is on the list.
        process = context.Process(target=_party_process, args=(name, values, there), name=name, daemon=True)
        with _without_interrupts():
            process.start()
        there.close()
        return _Party(name, process, here)

    watch = _Watch(start)
    if may_lose_hospitals(config):
        watch.spare = config.federation.hospitals - config.federation.quorum_size
        watch.restarts = config.runtime.restarts
    try:
        for name in placed:
            watch.parties.append(start(name, False))
        failures = _watch(watch, progress)
    finally:
        _end_all(watch.parties)
    if failures:
        raise _explain(failures)
    return watch.lost


def _watch(watch: _Watch, progress: Progress) -> list[_Party]:
    """Wait until all parties have finished or one has failed; the failed ones, with the cause among them if it shows."""
    failed_at: float | None = None
    while True:
        waiting: list[Any] = [party.pipe for party in watch.parties if party.open]
        waiting += [party.process.sentinel for party in watch.parties if party.process.exitcode is None]
        if waiting:
            multiprocessing.connection.wait(waiting, timeout=0.5)
        for party in watch.parties:
            watch.read(party, progress)
        watch.do_without(progress)
        watch.give_up_latecomers()
        failures = watch.failures()
        if failures:
            failed_at = failed_at or time.monotonic()
            causes = [party for party in failures if party.blames is None]
            # A loss that one party reports usually has its cause at another: give that one time to say it.
            if causes or not waiting or time.monotonic() - failed_at > CAUSE_GRACE:
                return failures
        elif not waiting:
            return []


def _end_all(parties: list[_Party]) -> None:
    deadline = time.monotonic() + TERMINATE_GRACE
    for party in parties:
        if party.process.exitcode is None and not party.finished:
            party.process.terminate()
    for party in parties:
        party.process.join(max(0.1, deadline - time.monotonic()))
        if party.process.exitcode is None:
            party.process.kill()
            party.process.join()
        party.pipe.close()


def _explain(failures: list[_Party]) -> RunFailedError:
    """The cause: a party's own error, or else its death, before losses that others report; then the earliest."""
    own = [party for party in failures if party.blames is None and party.error is not None]
    dead = [party for party in failures if party.error is None]
    first = min(own or dead or failures, key=lambda party: party.failed_at)
    if first.error is not None:
        return RunFailedError(f"{first.name} failed: {first.error}")
    code, stopped = first.process.exitcode, "all other parties were stopped"
    if code == -signal.SIGKILL:
        return RunFailedError(
            f"{first.name} was killed by signal 9", f"{stopped}; the system does that too when memory runs out"
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
    return RunFailedError(f"{first.name} {how}", stopped)
