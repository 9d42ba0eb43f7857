"""The engine `fast` beside stock CrypTen and the plaintext network, in one run: what an encrypted diagnosis costs.

Every party is a process of its own with one thread; the parties of `fast` talk over mutual TLS as in a real run. The network
has its first random weights and BatchNorm calibrated on SYNTHETIC phantoms; phantoms are diagnosed, too. Speed depends on
shapes alone. `Job` can be given another network and other images: benchmarks/fast_accuracy.py diagnoses X-rays.

  fast       hospital, model owner, dealer. Per batch: `offline` (dealer's corrections, client's part), then `online`, from the
             image to the opened logits. Medians; the first batch, in which each convolution is measured once, is left out
  crypten    stock CrypTen on gloo: its trusted first party, its own max-pool, masked weights sent with every image
  plaintext  the float network on one thread, in this process, before the others start
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.bench.stock_inference import stock_crypten_logits
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.memory import peak_memory
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.inference.fast.diagnosis import integers_of
from mpc_fl.inference.fast.kernels.compiled import kernels
from mpc_fl.inference.fast.online.hospital_session import HospitalSession
from mpc_fl.inference.fast.online.owner_session import OwnerSession, SessionTerms
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.quantization.calibration import calibrate
from mpc_fl.learning.data.phantoms import make_phantoms, public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import DEALER, HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.opening import SecretDomain

PARTIES = (HOSPITAL, MODEL_OWNER, DEALER)
Against = Literal["crypten", "none"]
# From the addresses of all parties to those at which others reach them, while the parties run.
Detour = Callable[[dict[str, str]], AbstractContextManager[dict[str, str]]]
_WAIT = 600.0
_CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Job:
    """What is measured: `repeats` times `batch` images of `size` x `size` through torchvision's `model`.

    They are evaluated in `at_once` batches at the same time.
    """

    model: str
    size: int
    batch: int
    repeats: int
    at_once: int = 1

    @property
    def config(self) -> Config:
        """The configuration of the network."""
        data = {"image_size": self.size, "channels": 3}
        return Config().with_values(data=data, model={"architecture": self.model, "normalisation": "frozen"})

    def network(self) -> nn.Module:
        """The float network, alike in every process that asks."""
        model = build_model(self.config, seed=0)
        calibrate_batchnorm(model, public_phantoms(_CALIBRATION_IMAGES, self.config))
        return model.eval()

    def calibration_images(self) -> torch.Tensor:
        """The images that ranges are found on, float32 (N, 3, size, size)."""
        return public_phantoms(_CALIBRATION_IMAGES, self.config)

    def images(self) -> torch.Tensor:
        """The images that are diagnosed, float32 (batch, 3, size, size); a multiple of `batch` of them."""
        found = make_phantoms(self.batch, 3, self.size, 1, "test").images[: self.batch]
        return torch.from_numpy(found)[:, None].expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class InferenceFigures:
    """Figures of one run; times are medians in seconds per batch, bytes are those of an image, memory is a peak.

    `kernels` says by what convolutions modulo 2^32 may be computed here.

    What stock CrypTen takes is None where it was not measured.
    """

    model: str
    size: int
    batch: int
    repeats: int
    kernels: str
    plaintext_seconds: float
    online_seconds: float
    offline_seconds: float
    online_seconds_of_each: list[float]
    offline_seconds_of_each: list[float]
    ratio_vs_plaintext: float
    ratio_offline_to_online: float
    bytes_sent_per_party: int
    bytes_sent: dict[str, int]
    sequential_messages: int
    max_logit_error: float
    same_class: bool
    peak_memory_bytes: int
    peak_memory_bytes_of_each: dict[str, int]
    crypten_seconds: float | None = None
    crypten_max_logit_error: float | None = None
    crypten_peak_memory_bytes: int | None = None
    speedup_vs_crypten: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_inference(model: str, size: int, batch: int, repeats: int, against: Against) -> InferenceFigures:
    """Measure the plaintext network, the engine `fast`, and stock CrypTen where `against` says so.

    Raises `RunFailedError` when a process fails, `UnsupportedLayerError` or `HeadroomError` for a network that does not fit.
    """
    torch.set_num_threads(1)
    job = Job(model, size, batch, repeats)
    network, images = job.network(), job.images()
    calibrate(network, images)  # whatever is wrong with the network is said before processes start
    plaintext, expected = _plaintext(network, images, repeats)
    fast = run_parties(fast_party, PARTIES, job)
    hospital = fast[HOSPITAL]
    sent = {name: result["bytes_sent"] // (batch * (repeats + 1)) for name, result in fast.items() if name != DEALER}
    logits = torch.tensor(hospital["logits"], dtype=torch.float64)
    online, offline = (statistics.median(hospital[phase][1:]) for phase in ("online", "offline"))
    figures = InferenceFigures(
        model=model,
        size=size,
        batch=batch,
        repeats=repeats,
        kernels=str(kernels()),
        plaintext_seconds=plaintext,
        online_seconds=online,
        offline_seconds=offline,
        online_seconds_of_each=hospital["online"],
        offline_seconds_of_each=hospital["offline"],
        ratio_vs_plaintext=online / plaintext,
        ratio_offline_to_online=offline / online,
        bytes_sent_per_party=max(sent.values()),
        bytes_sent=sent,
        sequential_messages=hospital["sequential_messages"],
        max_logit_error=_largest_error(logits, expected),
        same_class=bool((logits.argmax(1) == expected.argmax(1)).all()),
        peak_memory_bytes=max(result["peak_memory_bytes"] for result in fast.values()),
        peak_memory_bytes_of_each={name: result["peak_memory_bytes"] for name, result in fast.items()},
    )
    return _beside_crypten(figures, job, expected) if against == "crypten" else figures


def _beside_crypten(figures: InferenceFigures, job: Job, expected: torch.Tensor) -> InferenceFigures:
    """The same figures with those of stock CrypTen; `expected` are the logits (N, K) of the plaintext network."""
    stock = run_parties(_stock_party, PARTIES[:2], job)
    seconds = stock[HOSPITAL]["seconds"]
    return replace(
        figures,
        crypten_seconds=seconds,
        crypten_max_logit_error=_largest_error(torch.tensor(stock[HOSPITAL]["logits"], dtype=torch.float64), expected),
        crypten_peak_memory_bytes=max(stock[name]["peak_memory_bytes"] for name in PARTIES[:2]),
        speedup_vs_crypten=seconds / figures.online_seconds,
    )


def _largest_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected.double()).abs().max())


def _plaintext(network: nn.Module, images: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Median seconds of the float network, and its logits."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            logits = network(images)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]), logits


def run_parties(
    party: Callable[..., None], names: tuple[str, ...], job: Job, detour: Detour = nullcontext
) -> dict[str, dict[str, Any]]:
    """Run `party(name, job, ...)` in one process per name; their results. Others are reached through `detour`."""
    addresses, session = local_addresses(list(names), None), secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder, detour(addresses) as reached:
        make_local_identities(list(names), {name: Path(folder) / name for name in names})
        task = {name: (name, job, {**reached, name: addresses[name]}, folder, session) for name in names}
        return run_processes(party, task, _WAIT, "the benchmark")


def fast_party(name: str, job: Job, addresses: dict[str, str], folder: str, session: str, results: Connection) -> None:
    """A party of `fast` in a process of its own."""
    torch.set_num_threads(1)
    reach = Reach.of(name, list(PARTIES), addresses)
    identity = load_identity(Path(folder) / name, name)
    agreement = Agreement(session, "bench inference", "bench")
    figures: dict[str, Any] = {}
    with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
        if name == DEALER:
            deal(links, HOSPITAL, MODEL_OWNER)
        else:
            record = OpeningRecord(Path(folder) / name / "openings.jsonl", name)
            domain = SecretDomain(links, [HOSPITAL, MODEL_OWNER], record)
            figures = _diagnoses(domain, job) if name == HOSPITAL else _answers(domain, job)
            figures["bytes_sent"] = sum(peer.bytes_sent for peer in links.traffic["online"].values())
    figures["peak_memory_bytes"] = peak_memory()
    results.send(figures)


def _diagnoses(domain: SecretDomain, job: Job) -> dict[str, Any]:
    hospital = HospitalSession(domain)
    rounds = job.images().split(job.batch)
    logits: list[list[float]] = []
    seconds: dict[str, list[float]] = {"offline": [], "online": []}
    for number in range(max(job.repeats + 1, len(rounds))):
        batches = rounds[number % len(rounds)].chunk(job.at_once)
        began = time.perf_counter()
        for images in batches:
            hospital.prepare(len(images))
        prepared = time.perf_counter()
        found = torch.cat(hospital.diagnose_together(batches))
        if number < len(rounds):
            logits += found.tolist()
        seconds["offline"].append(prepared - began)
        seconds["online"].append(time.perf_counter() - prepared)
    hospital.finish()
    return {**seconds, "logits": logits, "sequential_messages": hospital.sequential_messages}


def _answers(domain: SecretDomain, job: Job) -> dict[str, Any]:
    integers = integers_of(job.network(), job.calibration_images())
    OwnerSession(domain, HOSPITAL, integers, SessionTerms(at_once=job.at_once)).serve()
    return {}


def _stock_party(
    name: str, job: Job, addresses: dict[str, str], folder: str, session: str, results: Connection
) -> None:
    torch.set_num_threads(1)
    rank = PARTIES.index(name)
    seconds, logits = stock_crypten_logits(rank, Path(folder) / "store", job.network(), job.images())
    opened = None if logits is None else logits.tolist()
    results.send({"seconds": seconds, "logits": opened, "peak_memory_bytes": peak_memory()})
