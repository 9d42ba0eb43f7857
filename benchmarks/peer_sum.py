"""What a sum among peers costs: bytes, seconds, and the share of the linear check in them.

    python benchmarks/peer_sum.py [--parameters 11178051] [--hospitals 3] [--rounds 5] [--in-process] [--json]

All hospitals run on this machine, each a process of one thread, over mutual TLS, with the update in memory. A round goes from
a common start until all hospitals have the mean: encode, mask, send slices, confirm, totals, check, keys, unmask, decode.
`seconds` is the median over rounds of the slowest hospital; the first round, which makes the seeds, is left out. `check` is
what the linear check takes of it at the same hospital, from the coin to the verdict, waiting for others included. Seconds
of the processor, of the same hospital, do not depend on what else the machine does: `processor seconds` is all that its
process takes for a round, `processor share of the check` what of that the check takes. With `--in-process` hospitals are threads
with links in memory: no TLS, and seconds of the processor are those of the hospital's thread.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import hospital_names
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

_WAIT = 300.0
_ABOUT = Description("sum of updates", "benchmark")


class _Timed(threading.local):
    """Seconds, and seconds of the processor, that this thread spent in some functions since the last `taken`."""

    seconds = processor = 0.0

    def time(self, where: Any, name: str) -> None:
        """Let a function of a module be timed, which calls none of the others."""
        original = getattr(where, name)

        def timed(*arguments: Any) -> Any:
            began, used = time.perf_counter(), time.thread_time()
            try:
                return original(*arguments)
            finally:
                self.seconds += time.perf_counter() - began
                self.processor += time.thread_time() - used

        setattr(where, name, timed)

    def taken(self) -> tuple[float, float]:
        """Both, which begin at zero again."""
        taken = self.seconds, self.processor
        self.seconds = self.processor = 0.0
        return taken


_CHECKING = _Timed()


def _time_the_check() -> None:
    for name in ("_coin", "_combinations", "fits"):
        _CHECKING.time(slice_totals, name)


def _update(rank: int, parameters: int) -> torch.Tensor:
    """A public stand-in for an update, float32 (P,)."""
    return torch.sin(torch.arange(parameters, dtype=torch.float32) * (0.001 * (rank + 1))) * 0.1


def _rounds(
    links: Links, signatory: Signatory, options: Any, used_so_far: Callable[[], float]
) -> list[dict[str, float]]:
    """At one hospital: the figures of each round but the first."""
    names = hospital_names(options.hospitals)
    hospitals, headroom = tuple(names), MeanHeadroom(FixedPoint(24, 64.0), len(names))
    update = _update(names.index(links.name), options.parameters)
    rounds, mean = list[dict[str, float]](), update
    record = OpeningRecord(options.folder / f"{links.name}.jsonl", links.name)
    domain, rules = SecretDomain(links, names, record, signatory=signatory), Rules(names[0], hospitals, 2, 2, _WAIT)
    for number in range(options.rounds + 1):
        links.set_phase("start")
        for peer in links.peers:
            links.send_object(peer, "go", {})
        for peer in links.peers:
            links.receive_object(peer, "go")
        links.set_phase(f"round {number}")
        began, used = time.perf_counter(), used_so_far()
        agreed = AgreedSum(hospitals, ("round", number), _ABOUT)
        plan = SumPlan(hospitals, names[0], ("round", number, 0), 2, transcript_of(links, rules, agreed, hospitals, 0))
        encoded = Private("update", headroom.encode(update, 1 / len(names), "update"))
        _, total = peer_sum(domain, rules, agreed, plan, encoded)
        assert total is not None
        mean = headroom.decode(total, 1.0, torch.float32)
        seconds, processor = time.perf_counter() - began, used_so_far() - used
        sent = sum(peer.bytes_sent for peer in links.traffic[f"round {number}"].values())
        check, of_check = _CHECKING.taken()
        each = {"seconds": seconds, "check": check, "processor": processor, "of check": of_check, "bytes": sent}
        rounds.append(each)
    right = torch.stack([_update(rank, 1000) for rank in range(len(names))]).double().mean(0)
    assert float((mean[:1000].double() - right).abs().max()) < 1e-6
    return rounds[1:]


def _signatory(folder: Path, name: str, names: list[str]) -> Signatory:
    identities = {each: load_identity(folder / each, each) for each in names}
    certificates = {each: x509.load_pem_x509_certificate(identities[each].certificate) for each in names}
    return Signatory(identities[name], certificates.get)


def _process(name: str, addresses: dict[str, str], options: Any, out: Connection) -> None:
    torch.set_num_threads(1)
    _time_the_check()
    names = hospital_names(options.hospitals)
    reach, agreement = Reach.of(name, names, addresses), Agreement(options.session, "bench", "bench")
    with NetworkLinks(load_identity(options.folder / name, name), agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
        out.send(_rounds(links, _signatory(options.folder, name, names), options, time.process_time))


def _in_processes(names: list[str], options: Any) -> dict[str, list[dict[str, float]]]:
    use_large_pages()
    addresses = local_addresses(names, None)
    arguments = {name: (name, addresses, options) for name in names}
    return run_processes(_process, arguments, _WAIT, "the benchmark of the sum among peers")


def _in_threads(names: list[str], options: Any) -> dict[str, list[dict[str, float]]]:
    torch.set_num_threads(1)
    _time_the_check()
    network = InMemoryNetwork(names, Agreement(options.session, "bench", "bench"), Timeouts(_WAIT, _WAIT))

    def hospital(name: str) -> list[dict[str, float]]:
        with network.links(name) as links:
            return _rounds(links, _signatory(options.folder, name, names), options, time.thread_time)

    with ThreadPoolExecutor(len(names)) as threads:
        return dict(zip(names, threads.map(hospital, names), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=11_178_051)
    parser.add_argument("--hospitals", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.session = secrets.token_hex(8)
    names = hospital_names(options.hospitals)
    with tempfile.TemporaryDirectory() as made:
        options.folder = Path(made)
        make_local_identities(names, {name: options.folder / name for name in names})
        results = (_in_threads if options.in_process else _in_processes)(names, options)
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
