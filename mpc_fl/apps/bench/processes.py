"""Processes of a benchmark: one for each party, one result from each."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from mpc_fl.errors import RunFailedError


def run_processes(
    party: Callable[..., None], arguments: Mapping[str, tuple[Any, ...]], seconds: float, what: str
) -> dict[str, Any]:
    """Run `party(*arguments[name], results)` in a process per name; each sends one result through the connection `results`.

    Raises `RunFailedError` when one of them fails, or all take longer than `seconds` together; `what` begins its message.
    """
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe(duplex=False) for name in arguments}
    processes = [
        context.Process(target=party, args=(*values, pipes[name][1]), name=name) for name, values in arguments.items()
    ]
    results: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
            pipes[process.name][1].close()
        while len(results) < len(arguments):
            waiting = {pipes[name][0]: name for name in arguments if name not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RunFailedError(f"{what} took longer than {seconds:g} s", "use less data")
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    results[waiting[connection]] = connection.recv()
                except EOFError:
                    raise RunFailedError(f"{what} failed at {waiting[connection]}", "see the output above") from None
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return results
