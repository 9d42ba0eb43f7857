"""Parties for tests: run a function at each, over its links, and collect the results.

`run_parties` gives every party a process of its own and links over mutual TLS; `run_parties_in_memory` a thread and links
in memory, which is enough for most protocols (not within CrypTen: its runtime replaces globals of CrypTen's modules).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc_fl.chosen_names import NO_NAMES, ChosenNames
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import PeerLostError
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import DroppedError, InMemoryNetwork
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts, Tolerance, Unread

# Every party is a process of its own, forked from a server that has imported the libraries and done nothing else (torch
# survives a fork only before it starts threads). The launcher and the command line are tested with spawn.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.support.harness_imports"])
# The fork server finds modules only through the environment.
_ROOT = str(Path(__file__).resolve().parents[2])
# Without an empty part, which would stand for whatever directory a process is in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@dataclass(frozen=True)
class Options:
    """What a test may say about its parties' links; the same for links over the network and in memory."""

    agreement: Agreement = Agreement("test", "digest", "train")
    connect_timeout: float = 60.0
    receive_timeout: float = 60.0
    linger_after_error: float = 2.0
    another_relay: float = 10.0
    observer: Observer | None = None
    relay: str | Sequence[str] = ()
    tolerated: Sequence[str] = ()
    goes_on_without: bool = False
    unread: Unread = Unread()
    chosen: ChosenNames = NO_NAMES

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(
            self.connect_timeout,
            self.receive_timeout,
            linger_after_error=self.linger_after_error,
            another_relay=self.another_relay,
        )

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(frozenset(self.tolerated), self.goes_on_without, self.unread)


def local_links(name: str, names: list[str], ports: dict[str, int], directory: Path, **options: Any) -> NetworkLinks:
    """Links of one party on this machine, over the network; `options` are fields of `Options`."""
    said = Options(**options)
    addresses = {party: f"127.0.0.1:{port}" for party, port in ports.items()}
    reach = Reach.of(name, names, addresses, [said.relay] if isinstance(said.relay, str) else said.relay)
    identity = load_identity(directory / name, name, said.chosen)
    return NetworkLinks(identity, said.agreement, reach, said.timeouts, said.tolerance, said.observer)


def _party(
    function: Callable[..., Any],
    name: str,
    names: list[str],
    ports: dict[str, int],
    directory: Path,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    results: Any,
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        with local_links(name, names, ports, directory, **options) as links:
            results.put((name, "result", function(links, *arguments)))
    except Exception as error:
        results.put((name, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        raise SystemExit(1) from None


def run_parties(
    function: Callable[..., Any],
    names: list[str],
    directory: Path,
    *arguments: Any,
    timeout: float = 120.0,
    dial_out_only: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run `function(links, *arguments)` in one process per name; return the results, or fail with the first error."""
    make_local_identities(names, {name: directory / name for name in names})
    reachable = [name for name in names if name not in dial_out_only]
    ports = dict(zip(reachable, free_ports(len(reachable)), strict=True))
    results = SPAWN.Queue()
    processes = [
        SPAWN.Process(
            target=_party, args=(function, name, names, ports, directory, arguments, options, results), name=name
        )
        for name in names
    ]
    for process in processes:
        process.start()
    collected: dict[str, Any] = {}
    errors: list[str] = []
    try:
        for _ in names:
            try:
                name, kind, value = results.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"no result within {timeout} s, got {sorted(collected)}") from None
            if kind == "error":
                errors.append(f"{name} failed: {value}")
            collected[name] = value
        errors.sort(key=lambda text: "PeerLostError" in text)  # the cause before its consequences
        assert not errors, errors[0]
        for process in processes:
            process.join(timeout=30)
            assert process.exitcode == 0, f"{process.name} exited with {process.exitcode}"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return collected


def run_parties_in_memory(
    function: Callable[..., Any],
    names: list[str],
    *arguments: Any,
    timeout: float = 120.0,
    prepare: Callable[[InMemoryNetwork], None] = lambda network: None,
    **options: Any,
) -> dict[str, Any]:
    """Run `function(links, *arguments)` in one thread per name; return the results, or fail with the first error.

    `options` are fields of `Options`. `prepare(network)` comes before the parties: there a test watches frames, and keeps
    the network to drop parties, which then have no result. Arguments are the same objects at all parties.
    What traces networks cannot run so: torch.fx replaces `nn.Module.__call__` for all threads while it traces.
    """
    said = Options(**options)
    assert not said.relay, "there is no relay in memory"
    network = InMemoryNetwork(names, said.agreement, said.timeouts)
    prepare(network)
    collected: dict[str, Any] = {}
    errors: list[tuple[str, BaseException]] = []

    def party(name: str) -> None:
        try:
            with network.links(name, said.tolerance, said.observer) as links:
                result = function(links, *arguments)
            collected[name] = result
        except DroppedError:
            pass
        except BaseException as error:
            errors.append((name, error))

    threads = [threading.Thread(target=party, args=(name,), name=name, daemon=True) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [thread for thread in threads if thread.is_alive()]
    failed = sorted(errors, key=lambda item: isinstance(item[1], PeerLostError))  # the cause before its consequences
    for thread in late:
        network.drop(thread.name)
    for thread in late:
        thread.join(timeout=30)
    for name, error in failed:
        raise AssertionError(f"{name} failed: {type(error).__name__}: {error}") from error
    assert not late, f"no result within {timeout} s, got {sorted(collected)}"
    return collected


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A test run started in the background ignores SIGINT, and what it starts would inherit that."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
