"""Run all parties of a task as separate processes of this machine, watch them, end all of them when one fails.

The launcher spawns exactly the programs that `mpc-fl party` runs at a site. It talks to them through one pipe each,
in JSON: progress and the final word. It reads none of their data. A party whose pipe to the launcher breaks ends
itself, so that no orphan outlives a killed launcher.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from mpc_fl.config import Config, parse_config, party_names
from mpc_fl.errors import ConfigError, LinkError, MpcFlError, PeerLostError, RunFailedError
from mpc_fl.identity import make_local_identities

ROLES = {"hospital": "parties.hospital", "aggregator": "parties.aggregator", "dealer": "parties.dealer",
         "model-owner": "parties.model_owner"}  # fmt: skip
CAUSE_GRACE = 2.0
TERMINATE_GRACE = 3.0

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


def place_parties(config: Config, run_dir: Path) -> dict[str, Config]:
    """One configuration per party of a local run: fresh session, addresses, identities, a directory of its own."""
    names = party_names(config)
    federation = {
        "session": secrets.token_hex(16),
        "addresses": config.federation.addresses or local_addresses(names, config.runtime.first_port),
    }
    missing = set(names) - set(federation["addresses"])
    if missing:
        raise ConfigError(f"federation.addresses lacks {sorted(missing)[0]}", "name all parties or none")
    directories = {name: run_dir / "parties" / name for name in names}
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


def _end_with_launcher(pipe: Connection, lock: threading.Lock) -> None:
    """The launcher never writes: the pipe becomes readable only when it is gone."""
    while not pipe.poll(None):
        pass
    os._exit(3)


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
    import torch

    torch.set_num_threads(config.runtime.threads)
    role, rank = split_name(name)
    if role not in ROLES:
        raise ConfigError(f"there is no role '{role}'", f"the roles are {', '.join(ROLES)}")
    log = logging.getLogger("mpc_fl")
    log.info("%s starts (%s), process %d", name, config.task, os.getpid())
    importlib.import_module(ROLES[role]).run(config, rank, notify, observer)
    log.info("%s has finished", name)


def _party_process(name: str, values: dict[str, Any], pipe: Connection) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C for all
    lock = threading.Lock()
    threading.Thread(target=_end_with_launcher, args=(pipe, lock), daemon=True).start()

    def tell(**event: Any) -> None:
        with lock:
            pipe.send_bytes(json.dumps(event).encode())

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
        # The message of an unforeseen error could quote data, so only its type and place are told and logged.
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
        for frame in frames:
            log.error("at %s:%s in %s", frame.filename, frame.lineno, frame.name)
        log.error("unexpected %s", type(error).__name__)
        tell(error=f"unexpected {type(error).__name__} at {place} (a defect; see the log)", peer=None, time=time.time())
        code = 1
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


@dataclass
class _Watch:
    parties: list[_Party] = field(default_factory=list)
    failed_at: float | None = None

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
        return [party for party in self.parties if party.error is not None or self._died(party)]

    @staticmethod
    def _died(party: _Party) -> bool:
        return party.process.exitcode is not None and not party.open and not party.finished


def launch(config: Config, run_dir: Path, progress: Progress) -> None:
    """Run every party of the task to its end.

    Raises `RunFailedError` naming the party that failed and why, after all processes have ended (within
    `CAUSE_GRACE` + `TERMINATE_GRACE` seconds, then by force). `KeyboardInterrupt` ends them too and is raised again.
    """
    placed = place_parties(config, run_dir)
    context = multiprocessing.get_context("spawn")
    watch = _Watch()
    try:
        for name, party_config in placed.items():
            here, there = context.Pipe()
            values = party_config.model_dump(mode="json")
            process = context.Process(target=_party_process, args=(name, values, there), name=name)
            process.start()
            there.close()
            watch.parties.append(_Party(name, process, here))
        _watch(watch, progress)
    finally:
        _end_all(watch.parties)
    failures = watch.failures()
    if failures:
        raise _explain(failures)


def _watch(watch: _Watch, progress: Progress) -> None:
    while True:
        waiting: list[Any] = [party.pipe for party in watch.parties if party.open]
        waiting += [party.process.sentinel for party in watch.parties if party.process.exitcode is None]
        if not waiting:
            return
        multiprocessing.connection.wait(waiting, timeout=0.5)
        for party in watch.parties:
            watch.read(party, progress)
        if watch.failures():
            watch.failed_at = watch.failed_at or time.monotonic()
            causes = [party for party in watch.failures() if party.blames is None]
            # A loss that one party reports usually has its cause at another: give that one time to say it.
            if causes or time.monotonic() - watch.failed_at > CAUSE_GRACE:
                return


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
    """The cause: a party's own error, or its death by a signal, before losses that others report; then the earliest."""
    own = [party for party in failures if party.blames is None and party.error is not None]
    dead = [party for party in failures if party.error is None and party.process.exitcode not in (0, -signal.SIGTERM)]
    first = min(own or dead or failures, key=lambda party: party.failed_at)
    if first.error is not None:
        return RunFailedError(f"{first.name} failed: {first.error}")
    code = first.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit status {code}"
    return RunFailedError(f"{first.name} {how}", "all other parties were stopped")
