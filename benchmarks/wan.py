"""An encrypted diagnosis over an emulated WAN beside loopback, in one run: the engine `fast` as `mpc-fl bench inference` runs it.

    python benchmarks/wan.py [--model resnet18] [--size 224] [--batches 1 8] [--at-once 1 2] [--round-trip-ms 40] [--megabits 100]

Between any two parties lies a relay, a process of its own that passes TCP bytes on: each direction of each connection delays
by half the round trip and lets `megabits` through a second; what does not fit waits in a buffer of 4 MB, then the sender
waits. TLS runs through it unchanged. Loss of packets and TCP's slow start are not emulated.
Times in seconds per batch: `online` from the images to the opened logits, `offline` the dealer's corrections ahead of it.
With `--at-once 2` the images go in two smaller batches that are evaluated at the same time: one sends while the other computes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from mpc_fl.apps.bench.inference import PARTIES, Job, fast_party, run_parties
from mpc_fl.inference.fast.quantization.calibration import calibrate
from mpc_fl.roles import HOSPITAL

_PIECE = 16 << 10  # bytes that leave together
_BUFFER = 4 << 20  # bytes that one direction holds back


async def _one_direction(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, rate: float) -> None:
    """Pass bytes on, each when `rate` bytes a second let it through, and `delay` seconds later."""
    loop = asyncio.get_running_loop()
    waiting: deque[tuple[float, bytes]] = deque()
    changed, room = asyncio.Event(), asyncio.Event()
    room.set()
    held, ended, free = 0, False, 0.0

    async def leave() -> None:
        nonlocal held
        while waiting or not ended:
            if not waiting:
                changed.clear()
                await changed.wait()
                continue
            when, piece = waiting[0]
            if when > loop.time():
                await asyncio.sleep(when - loop.time())
            waiting.popleft()
            held -= len(piece)
            room.set()
            writer.write(piece)
            await writer.drain()

    leaving = asyncio.create_task(leave())
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            free = max(loop.time(), free) + len(piece) / rate
            waiting.append((free + delay, piece))
            held += len(piece)
            changed.set()
            while held > _BUFFER:
                room.clear()
                await room.wait()
    ended = True
    changed.set()
    with contextlib.suppress(OSError):
        await leaving
        writer.write_eof()


async def _relay(targets: dict[str, str], delay: float, rate: float, told: Connection) -> None:
    """Listen once per target; tell the addresses; pass on until this process is ended."""

    async def pass_on(target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = target.rpartition(":")
        try:
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
        except OSError:  # it does not listen yet; whoever dialled tries again
            writer.close()
            return
        await asyncio.gather(
            _one_direction(reader, there_writer, delay, rate), _one_direction(there_reader, writer, delay, rate)
        )
        writer.close()
        there_writer.close()

    servers, addresses = [], {}
    for name, target in targets.items():
        server = await asyncio.start_server(lambda r, w, t=target: pass_on(t, r, w), "127.0.0.1", 0)
        servers.append(server)
        addresses[name] = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    told.send(addresses)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def relay_process(targets: dict[str, str], delay: float, rate: float, told: Connection) -> None:
    """The relay's process."""
    asyncio.run(_relay(targets, delay, rate, told))


@contextlib.contextmanager
def wide_area(addresses: dict[str, str], round_trip: float, rate: float) -> Iterator[dict[str, str]]:
    """Addresses of a relay before `addresses`: `round_trip` in seconds, `rate` in bytes a second and direction."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=relay_process, args=(addresses, round_trip / 2, rate, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(60):
            raise TimeoutError("the relay did not start within 60 s")
        yield here.recv()
    finally:
        process.terminate()
        process.join()
        here.close()


def measure(job: Job, round_trip: float | None, rate: float) -> dict[str, Any]:
    """Figures of one job over the emulated WAN, or over loopback when `round_trip` is None; medians, seconds per batch."""
    if round_trip is None:
        found = run_parties(fast_party, PARTIES, job)
    else:
        found = run_parties(fast_party, PARTIES, job, lambda addresses: wide_area(addresses, round_trip, rate))
    hospital = found[HOSPITAL]
    online, offline = (statistics.median(hospital[phase][1:]) for phase in ("online", "offline"))
    return {
        "online_seconds": online,
        "online_seconds_per_image": online / job.batch,
        "offline_seconds": offline,
        "online_seconds_of_each": hospital["online"],
        "sequential_messages": hospital["sequential_messages"],
        "peak_memory_bytes": {name: result["peak_memory_bytes"] for name, result in found.items()},
        "logits": hospital["logits"],
    }


def main() -> None:
    """Measure and print JSON; exit status 1 when logits differ from the plaintext network's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1])
    parser.add_argument("--places", nargs="+", choices=["loopback", "wan"], default=["loopback", "wan"])
    parser.add_argument("--repeats", type=int, default=1, help="batches measured, after one that is left out")
    parser.add_argument("--round-trip-ms", type=float, default=40.0)
    parser.add_argument("--megabits", type=float, default=100.0, help="a second, each direction")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("model", "size", "round_trip_ms", "megabits")}
    largest_error = 0.0
    for batch in options.batches:
        job = Job(options.model, options.size, batch, options.repeats)
        network, images = job.network(), job.images()
        calibrate(network, images)  # whatever is wrong with the network is said before processes start
        with torch.no_grad():
            expected = network(images).double()
        del network
        for at_once, place in itertools.product(options.at_once, options.places):
            if at_once > batch:
                continue
            round_trip = None if place == "loopback" else options.round_trip_ms / 1000
            found = measure(dataclasses.replace(job, at_once=at_once), round_trip, options.megabits * 1e6 / 8)
            logits = torch.tensor(found.pop("logits"), dtype=torch.float64)
            largest_error = max(largest_error, float((logits - expected).abs().max()))
            name = f"{batch} images" if at_once == 1 else f"{batch} images, {at_once} batches at once"
            figures.setdefault(name, {})[place] = found
    figures["max_logit_error"] = largest_error
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if largest_error > 0.05:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
