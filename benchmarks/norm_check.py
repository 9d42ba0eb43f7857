"""What the norm check of hidden updates costs beside the aggregation round it guards, and how often it errs.

    python benchmarks/norm_check.py [--parameters 11178051] [--hospitals 3] [--rounds 7] [--seeds 2000] [--json]

All parties run on this machine with one thread each: hospitals and aggregator, over mutual TLS. A round is: hospitals encode
their update (noise off), mask and send it; the aggregator takes all, gets the keys, opens and decodes the sum. In the
same rounds, between sending and opening, every update is checked: fold, prove, verify, open one bit each. `round`
and `check` are the aggregator's seconds (median over the rounds, one more warms up), `ratio` is the median of their ratios
within each round. In every other round one hospital boosts its update ten times.

Rates are of the sketch in plaintext over many public seeds, for vectors at the bound and ten times longer: normal ones, equal
ones, and the worst for a sketch (two coordinates).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mpc_fl.aggregation.norm_bound import in_grid_units
from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import FixedSum, SecretDomain, open_to
from mpc_fl.sharing.sum_plan import SumPlan

AGGREGATOR = "aggregator"
DEVIATION = 0.01  # of the updates' coordinates: noise of a usual run
HEADROOM = MeanHeadroom(FixedPoint(24, 64.0), 3)


def party(name: str, names: list[str], addresses: dict[str, str], folder: str, options: Any, results: Any) -> None:
    """One process: a hospital or the aggregator."""
    torch.set_num_threads(1)
    hospitals = tuple(names[:-1])
    agreement = Agreement("norm check", "benchmark", "train")
    identity = load_identity(Path(folder) / name, name)
    with NetworkLinks(identity, agreement, Reach.of(name, names, addresses), Timeouts(60.0, 120.0)) as links:
        domain = SecretDomain(links, names, OpeningRecord(Path(folder) / f"{name}.jsonl", name))
        bound = in_grid_units(1.01 * DEVIATION * options.parameters**0.5, 24, options.parameters)
        check = NormCheck(NormTest(bound, 32), options.parameters)
        measured = []
        for number in range(options.rounds + 1):
            plan = SumPlan(hospitals, AGGREGATOR, ("round", number), options.closing, "seen alike", apart=True)
            if name == AGGREGATOR:
                measured.append(aggregate(domain, check, plan, number))
            else:
                contribute(domain, check, plan, number)
        if name == AGGREGATOR:
            results.put(measured[1:])


def contribute(domain: SecretDomain, check: NormCheck, plan: SumPlan, number: int) -> None:
    """One round at a hospital. In odd rounds the second one boosts its update."""
    links = domain.links
    update = DEVIATION * torch.randn(check.parameters)
    if number % 2 and links.name == plan.hospitals[1]:
        update *= 10
    masks = SummandMasks(plan, links.name, (check.parameters,), domain.sum_seed)
    links.send_object(AGGREGATOR, "ready", {"keys": masks.commitments()})
    links.receive_object(AGGREGATOR, "begin")
    encoded = Private("update", HEADROOM.encode(update, 1.0, "update"))
    links.send_tensor(AGGREGATOR, "summand", masks.masked(encoded))
    check.at_hospital(domain, masks, links.receive_object(AGGREGATOR, "word"))
    admitted = tuple(links.receive_object(AGGREGATOR, "fixed")["hospitals"])
    if links.name in admitted:
        open_to(domain, Shared("sum", FixedSum(masks, admitted, 2, 24)), [AGGREGATOR], "benchmark")


def aggregate(domain: SecretDomain, check: NormCheck, plan: SumPlan, number: int) -> dict[str, Any]:
    """One round at the aggregator: seconds of the round without the check and of the check, bytes and who passed."""
    links = domain.links

    def say(tag: str, **values: Any) -> None:
        for name in plan.hospitals:
            links.send_object(name, tag, values)

    closed = ClosedSum(plan, torch.int32, (check.parameters,), keep=True)
    for name in plan.hospitals:
        closed.commitments.take(name, links.receive_object(name, "ready").get("keys"))
    began = time.perf_counter()
    say("begin")
    for name in plan.hospitals:
        closed.take(name, links.receive_tensor(name, "summand", torch.int32, (check.parameters,)))
    links.set_phase(f"check {number}")
    start = time.perf_counter()
    passed = tuple(check.at_opener(domain, closed, lambda **values: say("word", **values)))
    stop = time.perf_counter()
    links.set_phase(f"opening {number}")
    say("fixed", hospitals=list(passed))
    opened = open_to(domain, Shared("sum", FixedSum(closed, passed, 2, 24)), [AGGREGATOR], "benchmark")
    ended = time.perf_counter()
    assert opened is not None
    traffic = links.traffic[f"check {number}"].values()
    return {
        "round": ended - stop + start - began,
        "check": stop - start,
        "right": passed == tuple(name for name in plan.hospitals if not (number % 2 and name == plan.hospitals[1])),
        "bytes_received": sum(one.bytes_received for one in traffic),
        "bytes_sent": sum(one.bytes_sent for one in traffic),
        "waits": sum(one.waits for one in traffic),
    }


def rates(seeds: int) -> list[dict[str, Any]]:
    """How often vectors at the bound are refused and ten times longer ones pass, over public seeds."""
    count = 10 * 4096
    test = NormTest(2.0**24, 32)
    two = torch.zeros(count, dtype=torch.float64)
    two[[3, 4099]] = 1.0
    shapes = {
        "normal": torch.randn(count, dtype=torch.float64),
        "equal": torch.ones(count, dtype=torch.float64),
        "two": two,
    }
    found = []
    for name, shape in shapes.items():
        unit = shape / shape.norm() * 0.999999 * test.bound
        at_bound, longer = unit.round().to(torch.int32), (10 * unit).round().to(torch.int32)
        refused = passed = 0
        for number in range(seeds):
            sign_hash = SignHash(number.to_bytes(32, "little"), count)
            refused += not test.passes(sign_hash.fold(at_bound))
            passed += test.passes(sign_hash.fold(longer))
        found.append({"vector": name, "false_alarms": refused / seeds, "detected": 1 - passed / seeds})
    return found


def fold_milliseconds(parameters: int) -> float:
    """Best of nine folds of an int32 vector on one core."""
    vector = torch.randint(-(2**31), 2**31, (parameters,), dtype=torch.int64).to(torch.int32)
    sign_hash, best = SignHash(bytes(32), parameters), float("inf")
    for _ in range(9):
        began = time.perf_counter()
        sign_hash.fold(vector)
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def measure(options: Any) -> list[dict[str, Any]]:
    """All rounds of one session."""
    names = [f"hospital-{rank}" for rank in range(options.hospitals)] + [AGGREGATOR]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        make_local_identities(names, {name: Path(folder) / name for name in names})
        addresses = local_addresses(names, None)
        processes = [
            context.Process(target=party, args=(name, names, addresses, folder, options, results)) for name in names
        ]
        for process in processes:
            process.daemon = True
            process.start()
        measured: list[dict[str, Any]] | None = None
        while measured is None:
            if any(process.exitcode for process in processes):
                raise SystemExit("a party failed, see above")
            with suppress(queue.Empty):
                measured = results.get(timeout=1.0)
        for process in processes:
            process.join()
    return measured


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=int, default=11_178_051)
    parser.add_argument("--hospitals", type=int, default=3)
    parser.add_argument("--closing", type=int, default=1, help="closing masks per summand")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fold = fold_milliseconds(options.parameters)
    measured = measure(options)
    summary = {
        "round_seconds": statistics.median(one["round"] for one in measured),
        "check_seconds": statistics.median(one["check"] for one in measured),
        "ratio": statistics.median(one["check"] / one["round"] for one in measured),
        "all_decided_rightly": all(one["right"] for one in measured),
        "bytes_to_aggregator_in_check": measured[-1]["bytes_received"],
        "bytes_from_aggregator_in_check": measured[-1]["bytes_sent"],
        "waits_of_aggregator_in_check": measured[-1]["waits"],
        "fold_milliseconds": fold,
        "rates": rates(options.seeds),
    }
    if options.json:
        print(json.dumps({"torch": torch.__version__, **vars(options), **summary}, indent=2))
        return
    print(f"{options.hospitals} hospitals, {options.parameters:,} parameters, {options.rounds} rounds")
    print(f"round without check {summary['round_seconds']:.3f} s   check {summary['check_seconds']:.3f} s   ", end="")
    print(f"ratio {summary['ratio']:.2f}   fold {fold:.1f} ms   ", end="")
    print("all decided rightly" if summary["all_decided_rightly"] else "WRONG DECISIONS")
    print(
        f"check: {summary['bytes_to_aggregator_in_check']:,} bytes and {summary['waits_of_aggregator_in_check']} waits"
    )
    for one in summary["rates"]:
        print(
            f"{one['vector']:7} false alarms {one['false_alarms']:.5f}   ten times longer detected {one['detected']:.5f}"
        )


if __name__ == "__main__":
    main()
