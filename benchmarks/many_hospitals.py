"""How a closed sum grows with hospitals: masks, keys, bytes and time, in one process, and a thousand hospitals simulated.

    python benchmarks/many_hospitals.py [--hospitals 3 8 16 32] [--parameters 100000] [--simulated 1000] [--json]

In process: hospitals and aggregator are threads with links in memory, whose messages are encoded and counted in the same
frames as on the network; up to a tenth of the hospitals may be left out (closing masks, quorum nine tenths). Bytes are those that a
hospital sends and receives beyond its summand, by the links' own counters.

Simulated: every hospital's masks, commitments and keys are made and every sum is opened and compared, as many sums as
`--sums`, of 64 elements, of which a random tenth of the hospitals is lost; there are no links, so bytes are of the messages as the
frames would hold them. Whether losses ever leave somebody too few neighbours is tried on `--circles` more graphs.

Up to 16 hospitals the graph is complete. `against` says how many may pool with the aggregator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography import x509

from mpc_fl.aggregation.mask_costs import MaskCosts, mask_costs
from mpc_fl.aggregation.mask_graph import mask_circle, most_colluding
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.settings import NOBODY_LOST, Timeouts
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

_WAIT = 300.0
_ELEMENT = 4
_SIGNATURE = "0" * 144  # hex of a P-256 signature in DER, at most
_ABOUT = Description("sum of updates", "benchmark")


@dataclass(frozen=True)
class Figures:
    """Of one sum; bytes and keys are the largest of any hospital, beyond its summand, seconds the median over sums."""

    hospitals: int
    lost: int
    neighbours: int
    keys: int
    against: int
    sent: int
    received: int
    received_without_names: int
    seconds: float
    exact: bool


def rules_of(count: int) -> Rules:
    """Of a federation whose quorum is nine tenths, with masks as a run has them by default."""
    names, quorum = tuple(hospital_names(count)), max(2, math.ceil(0.9 * count))
    quorum = min(quorum, count - 1) if count > 2 else count
    return Rules(AGGREGATOR, names, quorum, 2, _WAIT, colluders=most_colluding(count, 1))


def value_of(rank: int, parameters: int) -> torch.Tensor:
    """A public stand-in for an encoded update, int32 (P,)."""
    return torch.arange(parameters, dtype=torch.int32) * (rank + 1)


# ---- in process --------------------------------------------------------------------------------------------------------


def in_process(count: int, parameters: int, sums: int) -> Figures:
    """Hospitals and aggregator as threads of this process."""
    rules = rules_of(count)
    world = [*rules.hospitals, AGGREGATOR]
    network = InMemoryNetwork(world, Agreement("many hospitals", "benchmark", "train"), Timeouts(_WAIT, _WAIT))
    seconds, traffic, opened = list[float](), dict[str, tuple[int, int]](), list[bool]()
    expected = torch.stack([value_of(rank, parameters) for rank in range(count)]).sum(0, dtype=torch.int32)

    def party(name: str, folder: Path, signatory: Signatory) -> None:
        with network.links(name, NOBODY_LOST, None) as links:
            record = OpeningRecord(folder / f"{name}.jsonl", name)
            domain = SecretDomain(links, world, record, signatory=signatory)
            for number in range(sums):
                links.set_phase(f"sum {number}")
                agreed = AgreedSum(rules.hospitals, ("update", number), _ABOUT)
                if name == AGGREGATOR:
                    seconds.append(lead(domain, rules, agreed, expected, opened))
                    continue
                links.receive_object(AGGREGATOR, "go")
                contribute(domain, rules, agreed, Private("update", value_of(world.index(name), parameters)))
            if name != AGGREGATOR:
                told = links.traffic[f"sum {sums - 1}"][AGGREGATOR]
                traffic[name] = told.bytes_sent - _ELEMENT * parameters, told.bytes_received

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_local_identities(world, {name: directory / name for name in world})
        identities = {name: load_identity(directory / name, name) for name in world}
        certificates = {name: x509.load_pem_x509_certificate(each.certificate) for name, each in identities.items()}
        threads = [
            threading.Thread(target=party, args=(name, directory, Signatory(identities[name], certificates.get)))
            for name in world
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    costs = mask_costs(rules, count)
    return Figures(
        hospitals=count,
        lost=0,
        neighbours=costs.neighbours,
        keys=costs.keys,
        against=costs.against,
        sent=max(sent for sent, _ in traffic.values()),
        received=max(received for _, received in traffic.values()),
        received_without_names=max(received for _, received in traffic.values()) - costs.bytes_of_names,
        seconds=statistics.median(seconds),
        exact=len(opened) == sums and all(opened),
    )


def lead(domain: SecretDomain, rules: Rules, agreed: AgreedSum, expected: torch.Tensor, opened: list[bool]) -> float:
    """A sum at the aggregator: seconds from its word to all until the sum is opened."""
    links: Links = domain.links
    starts = {name: links.key_fingerprint(name) for name in rules.hospitals}
    began = time.perf_counter()
    for name in rules.hospitals:
        links.send_object(name, "go", {})
    _, total = collect(domain, rules, agreed, starts, torch.int32, tuple(expected.shape))
    took = time.perf_counter() - began
    opened.append(torch.equal(total, expected))
    return took


# ---- simulated ---------------------------------------------------------------------------------------------------------


def simulated(count: int, sums: int, elements: int = 64) -> Figures:
    """All masks, commitments and keys of every hospital; a random tenth is lost before it sends."""
    rules = rules_of(count)
    bounds = rules.bounds(count)
    seconds, sent, received, exact, lost = list[float](), 0, 0, True, count - rules.smallest
    for number in range(sums):
        began = time.perf_counter()
        transcript = hashlib.sha256(f"many hospitals {number}".encode()).hexdigest()
        circle = None if bounds is None else mask_circle(rules.hospitals, transcript, bounds)
        closing = rules.closing if bounds is None else bounds.closing
        plan = SumPlan(rules.hospitals, AGGREGATOR, ("update", number), closing, transcript, circle)
        away = set(random.Random(number).sample(rules.hospitals, lost))
        admitted = tuple(name for name in rules.hospitals if name not in away)
        closed, answers = ClosedSum(plan, torch.int32, (elements,)), dict[str, torch.Tensor]()
        for rank, name in enumerate(rules.hospitals):
            if name in away:
                continue
            masks = SummandMasks(plan, name, (elements,), _pairwise(name))
            commitments = masks.commitments()
            closed.commitments.take(name, commitments)
            closed.take(name, masks.masked(Private("update", value_of(rank, elements)), in_place=True))
            answers[name] = masks.keys_for(admitted, rules.smallest)
            messages = [{"keys": commitments}, {"confirmation": _SIGNATURE}]
            sent = max(sent, answers[name].numel() + sum(len(json.dumps(message)) for message in messages))
            signatures = dict.fromkeys(plan.confirmed_by(name, admitted), _SIGNATURE)
            received = max(received, len(json.dumps({"word": "confirmed", "signatures": signatures})))
        total = closed.unmask(admitted, answers)
        ranks = [rank for rank, name in enumerate(rules.hospitals) if name not in away]
        expected = torch.stack([value_of(rank, elements) for rank in ranks]).sum(0, dtype=torch.int32)
        exact = exact and torch.equal(total, expected)
        seconds.append(time.perf_counter() - began)
    costs: MaskCosts = mask_costs(rules, count)
    return Figures(
        hospitals=count,
        lost=lost,
        neighbours=costs.neighbours,
        keys=costs.keys,
        against=costs.against,
        sent=sent,
        received=received + len(json.dumps({"word": "fixed", "hospitals": admitted, "late": sorted(away)})),
        received_without_names=received,
        seconds=statistics.median(seconds),
        exact=exact,
    )


def _pairwise(me: str) -> Any:
    """Seeds that two hospitals of a simulation have in common; public, so only a simulation may have them."""
    return lambda other: Seed(hashlib.sha256(" ".join(sorted((me, other))).encode()).digest())


def stopped(count: int, circles: int) -> int:
    """How many of so many sums would stop, because a random tenth that is lost leaves somebody too few neighbours."""
    rules = rules_of(count)
    bounds, found = rules.bounds(count), 0
    for number in range(circles if bounds is not None else 0):
        assert bounds is not None
        circle = mask_circle(rules.hospitals, hashlib.sha256(f"circle {number}".encode()).hexdigest(), bounds)
        found += bool(circle.followed_by_too_few(set(random.Random(number).sample(rules.hospitals, rules.smallest))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hospitals", type=int, nargs="*", default=[3, 8, 16, 32])
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--simulated", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--sums", type=int, default=3)
    parser.add_argument("--circles", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "in process": [in_process(count, arguments.parameters, arguments.sums) for count in arguments.hospitals],
        "simulated": [simulated(count, arguments.sums) for count in arguments.simulated],
    }
    stops = {count: stopped(count, arguments.circles) for count in arguments.simulated}
    if arguments.json:
        print(json.dumps({**{how: [asdict(each) for each in lines] for how, lines in found.items()}, "stopped": stops}))
        return
    print("            hospitals  lost  neighbours  keys  against   sent  received  without names  seconds  exact")
    for how, lines in found.items():
        for each in lines:
            print(
                f"{how:10s}  {each.hospitals:9d}  {each.lost:4d}  {each.neighbours:10d}  {each.keys:4d}  {each.against:7d}  "
                f"{each.sent:5d}  {each.received:8d}  {each.received_without_names:13d}  {each.seconds:7.3f}  {each.exact}"
            )
    for count, times in stops.items():
        print(f"{count} hospitals: {times} of {arguments.circles} sums would stop when a random tenth is lost")


if __name__ == "__main__":
    main()
