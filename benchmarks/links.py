"""What a link costs: the messages of one encrypted diagnosis (ResNet18, 224), and one large stream, between two processes.

    python benchmarks/links.py [--repeats 12] [--megabytes 256] [--json]

Both parties run on this machine, each a process of its own, with mutual TLS as in a run. `exchange`: 19 messages from one side,
then 63 that both send at the same time: 19 MB from the one and 11 MB from the other. `stream`: `--megabytes` one way,
in messages of 8 MB. Seconds are medians; `processor` is what a whole process used, its threads together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts

NAMES = ["model-owner", "hospital-0"]
_GATES = [401408, 401408, 200704, 200704] + [200704] * 5 + [100352] * 4 + [50176] * 4 + [25088] * 4
OPENINGS = [size for gates in _GATES for size in (5 * gates // 2, 9 * gates // 8, gates // 8)]  # bytes, both ways
INPUTS = [602112] + [802816] * 5 + [401408] * 5 + [200704] * 5 + [100352] * 3  # bytes, from the hospital
_MESSAGE = 8 << 20

Seconds = tuple[float, float]  # by the clock, of the processor


def _exchange(links: NetworkLinks, peer: str, sends_inputs: bool) -> None:
    messages = {size: torch.zeros(size, dtype=torch.uint8) for size in {*INPUTS, *OPENINGS}}
    for size in INPUTS:
        if sends_inputs:
            links.send_tensor(peer, "input", messages[size])
        else:
            links.receive_tensor(peer, "input", torch.uint8, (size,))
    for size in OPENINGS:
        links.send_tensor(peer, "opening", messages[size])
        links.receive_tensor(peer, "opening", torch.uint8, (size,))


def _stream(links: NetworkLinks, peer: str, sends: bool, megabytes: int) -> None:
    message = torch.zeros(_MESSAGE, dtype=torch.uint8)
    for _ in range((megabytes << 20) // _MESSAGE):
        if sends:
            links.send_tensor(peer, "stream", message)
        else:
            links.receive_tensor(peer, "stream", torch.uint8, (_MESSAGE,))
    if sends:
        links.receive_object(peer, "all there")
    else:
        links.send_object(peer, "all there", {})


def _party(name: str, ports: list[int], directory: str, repeats: int, megabytes: int, results: Connection) -> None:
    torch.set_num_threads(1)
    peer = NAMES[1 - NAMES.index(name)]
    addresses = {party: f"127.0.0.1:{port}" for party, port in zip(NAMES, ports, strict=True)}
    identity = load_identity(Path(directory) / name, name)
    agreement, reach = Agreement("links", "digest", "bench"), Reach.of(name, NAMES, addresses)
    found: dict[str, list[Seconds]] = {"exchange": [], "stream": []}
    with NetworkLinks(identity, agreement, reach, Timeouts(60.0, 60.0)) as links:
        for repeat in range(repeats + 1):
            for kind, seconds in found.items():
                wall, processor = time.perf_counter(), time.process_time()
                if kind == "exchange":
                    _exchange(links, peer, name == NAMES[1])
                elif repeat % 4 == 0:
                    _stream(links, peer, name == NAMES[1], megabytes)
                else:
                    continue
                if repeat:  # the first warms up
                    seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    results.send(found)


def measure(repeats: int, megabytes: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds (of the stream also MB/s) by kind of exchange and party."""
    import socket

    listening = [socket.create_server(("127.0.0.1", 0)) for _ in NAMES]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        make_local_identities(NAMES, {name: Path(directory) / name for name in NAMES})
        pipes = {name: spawn.Pipe(duplex=False) for name in NAMES}
        processes = [
            spawn.Process(target=_party, args=(name, ports, directory, repeats, megabytes, pipes[name][1]))
            for name in NAMES
        ]
        for process in processes:
            process.start()
        found: dict[str, dict[str, list[Seconds]]] = {name: pipes[name][0].recv() for name in NAMES}
        for process in processes:
            process.join()
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("exchange", "stream"):
        for name in NAMES:
            wall, processor = (statistics.median(column) for column in zip(*found[name][kind], strict=True))
            row = {"seconds_ms": round(1e3 * wall, 1), "processor_ms": round(1e3 * processor, 1)}
            if kind == "stream":
                row["megabytes_per_second"] = round(megabytes / wall)
            summary.setdefault(kind, {})[name] = row
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    summary = measure(max(arguments.repeats, 4), arguments.megabytes)
    if arguments.json:
        print(json.dumps(summary))
        return
    for kind, parties in summary.items():
        for name, row in parties.items():
            print(f"{kind:10} {name:12}", "  ".join(f"{what} {value:g}" for what, value in row.items()))


if __name__ == "__main__":
    main()
