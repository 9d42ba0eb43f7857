"""What a sum among peers costs: bytes, seconds, and the share of the linear check in them.

    python benchmarks/peer_sum.py [--parameters 11178051] [--hospitals 3] [--rounds 5] [--json]

All hospitals run on this machine, each a process of one thread, over mutual TLS, with the update in memory. A round goes from
a common start until all hospitals have the mean: encode, mask, send slices, confirm, totals, check, keys, unmask, decode.
`seconds` is the median over rounds of the slowest hospital; the first round, which makes the seeds, is left out. `check` is
what the linear check takes of it at the same hospital, from the coin to the verdict, waiting for others included. Seconds
of the processor, of the same hospital, do not depend on what else the machine does: `processor seconds` is all that its
process takes for a round, `processor share of the check` what of that the check takes.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cryptography import x509

from mpc_fl.aggregation import slice_totals
from mpc_fl.aggregation.peer_sum import peer_sum
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.memory import use_large_pages
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import hospital_names
from mpc_fl.sharing.closed_sum import SumPlan
from mpc_fl.sharing.opening import SecretDomain

_WAIT = 300.0
_ABOUT = Description("sum of updates", "benchmark")


class _Timed:
    """Seconds, and seconds of the processor, spent in functions of a module since the last `taken`. No function calls another."""

    def __init__(self, where: Any, names: Sequence[str]) -> None:
        self._seconds = self._processor = 0.0
        for name in names:
            setattr(where, name, self._timed(getattr(where, name)))

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began, used = time.perf_counter(), time.thread_time()
            try:
                return original(*arguments)
            finally:
                self._seconds += time.perf_counter() - began
                self._processor += time.thread_time() - used

        return timed

    def taken(self) -> tuple[float, float]:
        taken = self._seconds, self._processor
        self._seconds = self._processor = 0.0
        return taken


def _hospital(
    name: str, folder: Path, names: list[str], addresses: dict[str, str], options: Any, out: Connection
) -> None:
    torch.set_num_threads(1)
    hospitals, rank = tuple(names), names.index(name)
    certificates = {
        each: x509.load_pem_x509_certificate(load_identity(folder / each, each).certificate) for each in names
    }
    identity = load_identity(folder / name, name)
    update = torch.sin(torch.arange(options.parameters, dtype=torch.float32) * (0.001 * (rank + 1))) * 0.1
    headroom = MeanHeadroom(FixedPoint(24, 64.0), len(names))
    checking = _Timed(slice_totals, ("_coin", "_combinations", "fits"))
    agreement, reach = Agreement(options.session, "bench", "bench"), Reach.of(name, names, addresses)
    rounds, mean = list[dict[str, float]](), update
    with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
        record = OpeningRecord(folder / f"{name}.jsonl", name)
        domain = SecretDomain(links, names, record, signatory=Signatory(identity, certificates.get))
        rules = Rules(names[0], hospitals, 2, 2, _WAIT)
        for number in range(options.rounds + 1):
            for peer in links.peers:
                links.send_object(peer, "go", {})
            for peer in links.peers:
                links.receive_object(peer, "go")
            links.set_phase(f"round {number}")
            began, used = time.perf_counter(), time.process_time()
            agreed = AgreedSum(hospitals, ("round", number), _ABOUT)
            plan = SumPlan(
                hospitals, names[0], ("round", number, 0), 2, transcript_of(links, rules, agreed, hospitals, 0)
            )
            encoded = Private("update", headroom.encode(update, 1 / len(names), "update"))
            _, total = peer_sum(domain, rules, agreed, plan, encoded)
            assert total is not None
            mean = headroom.decode(total, 1.0, torch.float32)
            seconds, processor = time.perf_counter() - began, time.process_time() - used
            sent = sum(peer.bytes_sent for peer in links.traffic[f"round {number}"].values())
            check, of_check = checking.taken()
            each = {"seconds": seconds, "check": check, "processor": processor, "of check": of_check, "bytes": sent}
            rounds.append(each)
        links.set_phase("closed")
    updates = [
        torch.sin(torch.arange(1000, dtype=torch.float32) * (0.001 * (at + 1))) * 0.1 for at in range(len(names))
    ]
    right = torch.stack(updates).double().mean(0)
    assert float((mean[:1000].double() - right).abs().max()) < 1e-6
    out.send(rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=11_178_051)
    parser.add_argument("--hospitals", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.session = secrets.token_hex(8)
    use_large_pages()
    names = hospital_names(options.hospitals)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_local_identities(names, {name: folder / name for name in names})
        addresses = local_addresses(names, None)
        arguments = {name: (name, folder, names, addresses, options) for name in names}
        results = run_processes(_hospital, arguments, _WAIT, "the benchmark of the sum among peers")
    slowest = [max(each, key=lambda one: one["seconds"]) for each in zip(*results.values(), strict=True)]
    middle: Callable[[str], float] = lambda what: statistics.median(one[what] for one in slowest)  # noqa: E731
    figures = {
        "hospitals": options.hospitals,
        "parameters": options.parameters,
        "seconds": middle("seconds"),
        "share of the check": statistics.median(one["check"] / one["seconds"] for one in slowest),
        "processor seconds": middle("processor"),
        "processor share of the check": statistics.median(one["of check"] / one["processor"] for one in slowest),
        "bytes per parameter": max(one["bytes"] for each in results.values() for one in each) / options.parameters,
    }
    print(json.dumps(figures) if options.json else "\n".join(f"{name}: {value:.5g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
