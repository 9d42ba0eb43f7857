"""Encrypted images with corrections asked for one by one, and with corrections made ahead of need, in one session.

    python benchmarks/dealer_ahead.py [--architecture resnet18] [--size 64] [--images 2] [--repeats 3] [--json]

Three processes on this machine: hospital, model owner, dealer, each with one thread. In every repeat the same images are
evaluated in both ways, in turn. `seconds` is the hospital's time per image, `waited` the part of it in which the last
party waited for the dealer, `messages` what all parties sent to and took from the dealer for one image. The dry run that
declares the program is timed apart; in a diagnosis it happens once per batch size, before the weights are shared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.runs.local_parties import place_parties
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.inference.reference.diagnosis import public_graph, requests_of
from mpc_fl.links.party_links import connect
from mpc_fl.roles import HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.crypten_parts import crypten
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
from mpc_fl.sharing.dealer import Dealer
from mpc_fl.sharing.opening import open_to

WAYS = ("on demand", "ahead")
PROGRAM = "image"


def party(name: str, values: dict[str, Any], images: int, repeats: int, results: Any) -> None:
    """One process: the dealer, or a computing party that evaluates all images in both ways."""
    config = parse_config(values, name)
    torch.set_num_threads(config.runtime.threads)
    with connect(config, name) as links:
        if name == "dealer":
            Dealer(links, [HOSPITAL, MODEL_OWNER]).serve()
            return
        with CrypTenRuntime(links, [HOSPITAL, MODEL_OWNER], "dealer", config.inference.fraction_bits) as runtime:
            assert config.site.out is not None and runtime.dealer_client is not None
            domain = runtime.domain(OpeningRecord(config.site.out / "openings.jsonl", name))
            graph, shape = public_graph(config), (1, *config.data.input_shape)
            began = time.perf_counter()
            requests = requests_of(graph, shape, 2, config.inference.fraction_bits)
            dry_run = time.perf_counter() - began
            runtime.dealer_client.declare(PROGRAM, requests)
            encrypted = graph.encrypt(src=1)

            def evaluate(phase: str, program: Any) -> dict[str, float]:
                links.set_phase(phase)
                start = time.perf_counter()
                with program:
                    logits = encrypted.forward(crypten.cryptensor(torch.rand(shape), src=0))
                open_to(domain, Shared("logits", logits), [HOSPITAL], "benchmark")
                traffic = links.traffic[phase]["dealer"]
                messages = traffic.messages_sent + traffic.messages_received
                seconds = time.perf_counter() - start
                return {"seconds": seconds, "waited": traffic.seconds_waited, "messages": messages}

            measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for repeat in range(repeats + 1):  # the first warms up
                for image in range(images):
                    one = evaluate(f"on demand {repeat} {image}", nullcontext())
                    measured["on demand"] += [one] if repeat else []
                runtime.dealer_client.prepare(PROGRAM)
                for image in range(images):
                    following = PROGRAM if image + 1 < images else None
                    one = evaluate(f"ahead {repeat} {image}", runtime.dealer_client.program(PROGRAM, following))
                    measured["ahead"] += [one] if repeat else []
        results.put((name, {"dry_run": dry_run, "tuples": len(requests), "ways": measured}))


def measure(config: Config, images: int, repeats: int) -> dict[str, Any]:
    """Medians over all images of all repeats, for each way, and their ratio."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=party, args=(name, placed.model_dump(mode="json"), images, repeats, results))
            for name, placed in place_parties(config, Path(directory)).items()
        ]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=1800) for _ in range(len(party_names(config)) - 1))
        for process in processes:
            process.join()
    summary: dict[str, Any] = {"tuples": found[HOSPITAL]["tuples"], "dry_run_seconds": found[HOSPITAL]["dry_run"]}
    for way in WAYS:
        hospital, owner = found[HOSPITAL]["ways"][way], found[MODEL_OWNER]["ways"][way]
        summary[way] = {
            "seconds": statistics.median(one["seconds"] for one in hospital),
            "waited": statistics.median(one["waited"] for one in owner),
            "messages": statistics.median(a["messages"] + b["messages"] for a, b in zip(hospital, owner, strict=True)),
        }
    summary["seconds_ratio"] = summary["ahead"]["seconds"] / summary["on demand"]["seconds"]
    return summary


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    channels = 3 if options.architecture == "resnet18" else 1
    values = {
        "task": "infer",
        "data": {"source": "images", "image_size": options.size, "channels": channels},
        "model": {"architecture": options.architecture},
    }
    summary = measure(parse_config(values, "benchmark"), options.images, options.repeats)
    if options.json:
        print(json.dumps({"torch": torch.__version__, **vars(options), **summary}, indent=2))
        return
    print(f"{options.architecture} {options.size}x{options.size}: {summary['tuples']} tuples per image, ", end="")
    print(f"dry run {summary['dry_run_seconds']:.2f} s")
    for way in WAYS:
        one = summary[way]
        print(
            f"{way:10} {one['seconds']:7.3f} s/image   {one['waited']:7.3f} s waited   {one['messages']:5.0f} messages"
        )
    print(f"ratio {summary['seconds_ratio']:.2f}")


if __name__ == "__main__":
    main()
