"""Real party processes for tests: spawn, link over mutual TLS, run a function, collect its result."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpc_fl.identity import load_identity, make_local_identities
from mpc_fl.transport import Agreement, Links

SPAWN = multiprocessing.get_context("spawn")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def local_links(name: str, names: list[str], ports: dict[str, int], directory: Path, **options: Any) -> Links:
    peers = {peer: f"127.0.0.1:{ports[peer]}" for peer in names if peer != name}
    settings: dict[str, Any] = {
        "agreement": Agreement("test", "digest", "train"),
        "connect_timeout": 60.0,
        "receive_timeout": 60.0,
    }
    settings.update(options)
    return Links(load_identity(directory / name, name), f"127.0.0.1:{ports[name]}", peers, **settings)


def _party(
    function: Callable[..., Any],
    name: str,
    names: list[str],
    ports: dict[str, int],
    directory: Path,
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        with local_links(name, names, ports, directory) as links:
            results.put((name, "result", function(links, *arguments)))
    except Exception as error:
        results.put((name, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        raise SystemExit(1) from None


def run_parties(
    function: Callable[..., Any], names: list[str], directory: Path, *arguments: Any, timeout: float = 120.0
) -> dict[str, Any]:
    """Run `function(links, *arguments)` in one process per name; return the results, or fail with the first error."""
    make_local_identities(names, {name: directory / name for name in names})
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    results = SPAWN.Queue()
    processes = [
        SPAWN.Process(target=_party, args=(function, name, names, ports, directory, arguments, results), name=name)
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
