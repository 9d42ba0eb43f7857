"""Encrypted diagnosis between a hospital (rank 0) and a model owner (rank 1), with a dealer outside.

`inference.engine` chooses between two engines with one interface: `request_diagnoses` at the hospital, `answer_requests`
at the model owner, `deal_tuples` at the dealer. `fast` is for convolutional networks, its protocol is in
`fast.sessions`. `reference` is for all others:

Protocol, once:
  1. the hospital announces the batch sizes (public)
  2. both record by a dry run what correlated randomness a batch of each size takes, and declare it to the dealer, which
     begins with the first batch's while
  3. the model owner shares its weights
Per batch of images:
  4. the hospital announces this batch's size and the next one's, and shares the images
  5. both evaluate the network on shares (`inference`), with the dealer's corrections made ahead of need (`dealer`)
  6. the logits are opened to the hospital alone

Security. Shares of image and weights are masked by the pairwise seed of the two parties, every opened intermediate is
masked by a triple (Beaver 1991), the logits reach only the hospital, refreshed by a zero-share. The model owner learns
shapes, the number and sizes of batches and timing; the hospital learns its logits, architecture and shapes; the dealer
learns shapes and timing. Semi-honest, and the dealer colludes with neither.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from mpc_fl.config.config import DEALER, Config
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.errors import ConfigError, ProtocolError, SecrecyError
from mpc_fl.federation.feature_statistics import Normalisation
from mpc_fl.federation.hospital_round import Notify
from mpc_fl.files import finite, write_text, written_whole
from mpc_fl.inference.fast.network import Network
from mpc_fl.inference.fast.online.hospital_session import Hospital
from mpc_fl.inference.fast.online.owner_session import BatchGate, Owner
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool, OwnerPool
from mpc_fl.inference.fast.preprocessing.pool import Purpose
from mpc_fl.inference.fast.quantization.calibration import Calibration, calibrate
from mpc_fl.inference.fast.quantization.float_graph import prepare
from mpc_fl.inference.fast.quantization.lowering import IntegerWeights
from mpc_fl.inference.reference.cost import module_with
from mpc_fl.inference.reference.network import EncryptedGraph, OnLayer, build_graph, check_logits, run_layers
from mpc_fl.learning.data.loading import Dataset, load_images, normalised
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_normalisation
from mpc_fl.links.links import Links
from mpc_fl.sharing.correlated_randomness import Request
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime, crypten
from mpc_fl.sharing.dealer import Dealer
from mpc_fl.sharing.dealer_client import DealerClient
from mpc_fl.sharing.dry_run import record_requests, shape_share
from mpc_fl.sharing.opening import Record, SecretDomain, open_to

HOSPITAL, MODEL_OWNER = "hospital-0", "model-owner"
_MODEL_OWNER_RANK = 1
_ATTEMPTS = 2
_CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Diagnosis:
    """The hospital's result for one image, and the seconds its batch took per image.

    `logits`, float (classes,), is None where inference.reveal opens the label alone; `predicted` is the class's index.
    """

    logits: torch.Tensor | None
    seconds: float
    predicted: int

    @classmethod
    def of(cls, logits: torch.Tensor, seconds: float) -> Diagnosis:
        """From opened logits (classes,)."""
        return cls(logits, seconds, int(logits.argmax()))

    @property
    def probabilities(self) -> torch.Tensor | None:
        """Softmax of the logits, computed at the hospital; None without logits."""
        return None if self.logits is None else torch.softmax(self.logits.double(), dim=0)


# ---- either engine -------------------------------------------------------------------------------------------------


def require_supported(config: Config, model: nn.Module | None = None) -> None:
    """Raise when the engine cannot run the network; nothing is sent. The hospital, without `model`, checks shapes alone.

    `UnsupportedLayerError` names the layer; `ModelError` says what else is wrong with `model`; `ConfigError`: the label
    alone shall be opened by an engine that opens logits.
    """
    if model is None:
        model = build_model(config, config.data.input_shape, config.seed)
    if config.inference.engine == "fast":
        prepare(model)
        return
    if config.inference.reveal == "label":
        raise ConfigError("inference.reveal=label needs inference.engine=fast", "set the engine, or reveal logits")
    private_graph(config, model)


def request_diagnoses(config: Config, images: Dataset, links: Links, record: Record, notify: Notify) -> list[Diagnosis]:
    """The hospital's side of a session: one `Diagnosis` per record of `images`."""
    images = as_the_model_takes_them(config, images, links)
    if config.inference.engine == "fast":
        with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=False) as pool:
            return list(diagnose_batches(config, images, asking_session(config, links, record, pool), notify))
    graph = public_graph(config)
    with _runtime(config, links) as runtime:
        return ask(config, graph, images, SecretDomain(runtime, record), notify)


def answer_requests(config: Config, model: nn.Module, links: Links, record: Record) -> int:
    """The model owner's side of a session; returns the number of batches.

    What inputs are normalised with is no secret of the model: it is told to the hospital, which normalises.
    """
    normalisation = None
    if config.data.normalise == "secure":
        if config.site.model is None:
            raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
        normalisation = load_normalisation(config.site.model, config)
    if normalisation is not None:
        links.send_tensor(HOSPITAL, "normalisation", normalisation.tensor())
    if config.inference.engine == "fast":
        calibration = calibrated(config, model, normalisation)
        filling = config.inference.fill > 0
        with pool_of(config, OwnerPool, MODEL_OWNER, HOSPITAL, filling) as pool:
            return answering_session(config, calibration, links, HOSPITAL, record, pool).serve()
    graph = private_graph(config, model)
    with _runtime(config, links) as runtime:
        return answer(config, graph, SecretDomain(runtime, record))


def deal_tuples(config: Config, links: Links) -> None:
    """The dealer's side of a session."""
    if config.inference.engine == "fast":
        deal(links, HOSPITAL, MODEL_OWNER)
    else:
        Dealer(links, [HOSPITAL, MODEL_OWNER], config.runtime.dealer_ahead_bytes).serve()


class IntegerModel(Protocol):
    """What a session needs of a model: a `Calibration`, or what a model owner that stays up keeps of one."""

    @property
    def network(self) -> Network:
        """The public network."""

    @property
    def weights(self) -> Private[IntegerWeights]:
        """The owner's."""


def as_the_model_takes_them(config: Config, images: Dataset, links: Links) -> Dataset:
    """The hospital's images, normalised with the constants that the model owner tells where inputs are normalised."""
    if config.data.normalise == "none":
        return images
    shape = (2, config.data.input_shape[0])
    constants = links.receive_tensor(MODEL_OWNER, "normalisation", torch.float64, shape)
    return normalised(images, Normalisation.of_tensor(constants))


def calibrated(config: Config, model: nn.Module, normalisation: Normalisation | None) -> Calibration:
    """The model as integers, with ranges found on `calibration_images`. Raises `HeadroomError`, `DataError`."""
    images = calibration_images(config)
    return calibrate(model, images if normalisation is None else normalisation.apply(images))


def _runtime(config: Config, links: Links) -> CrypTenRuntime:
    bits, ahead = config.inference.fraction_bits, config.runtime.dealer_ahead_bytes
    return CrypTenRuntime(links, [HOSPITAL, MODEL_OWNER], DEALER, bits, ahead)


# ---- engine fast ---------------------------------------------------------------------------------------------------


def calibration_images(config: Config) -> torch.Tensor:
    """What the model owner finds ranges with: its own records (site.images) if it names some, else public phantoms.

    Ranges hold four times the largest value seen, but phantoms are no patients: a model owner should name records like
    those it will be asked about. Raises `DataError` when there are none.
    """
    if config.site.images is not None or config.data.is_table:
        return load_images(config.site.images, config, _CALIBRATION_IMAGES).inputs
    return public_phantoms(_CALIBRATION_IMAGES, config)


def _domain_without_crypten(links: Links, hospital: str, record: Record) -> SecretDomain:
    """`open_to` needs the zero-shares of a runtime; CrypTen itself stays as it is."""
    return SecretDomain(CrypTenRuntime(links, [hospital, MODEL_OWNER], None, 0), record)


P = TypeVar("P", HospitalPool, OwnerPool)


def pool_of(
    config: Config, kind: type[P], party: str, counterpart: str, filling: bool
) -> AbstractContextManager[P | None]:
    """This party's half of its pool with the other in `site.pool`, to fill or to use; None to use when it keeps none."""
    inference, directory = config.inference, config.site.pool
    if directory is None:
        if filling:
            raise ConfigError(f"{party} has no place for a pool", "set site.pool to a directory")
        return nullcontext()
    purpose: Purpose = "fill" if filling else "use"
    return kind(directory, party, counterpart, purpose, inference.batch_size, inference.reveal)


def asking_session(config: Config, links: Links, record: Record, pool: HospitalPool | None) -> Hospital:
    """The session of the hospital whose links these are; the model owner's part is `answering_session`."""
    domain = _domain_without_crypten(links, links.name, record)
    return Hospital(domain, MODEL_OWNER, DEALER, config.inference.reveal, pool)


def answering_session(
    config: Config,
    model: IntegerModel,
    links: Links,
    hospital: str,
    record: Record,
    pool: OwnerPool | None,
    gate: BatchGate | None = None,
) -> Owner:
    """The model owner's part of a session with `hospital`, as the configuration agrees to."""
    domain, inference = _domain_without_crypten(links, hospital, record), config.inference
    agreed = inference.reveal, inference.batch_size
    network, weights = model.network, model.weights.inside_protocol()
    return Owner(domain, hospital, DEALER, network, weights, *agreed, pool, inference.at_once, gate)


def fill_pool(config: Config, links: Links, record: Record, notify: Notify) -> None:
    """The hospital's side of a session that stores `inference.fill` batches for later sessions; no image is needed.

    Raises `PoolError` when the model owner does not hold the other half of this pool.
    """
    with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=True) as pool:
        fill_with(config, asking_session(config, links, record, pool), notify)


def fill_with(config: Config, hospital: Hospital, notify: Notify) -> None:
    """Store `inference.fill` batches in the pool of a hospital whose session has begun; the session ends with the last."""
    inference = config.inference
    _require_agreed(config, hospital.network)
    hospital.fill(inference.fill, inference.batch_size, lambda done: notify("fill pool", done, inference.fill))
    hospital.finish()


def diagnose_batches(config: Config, images: Dataset, hospital: Hospital, notify: Notify) -> Iterator[Diagnosis]:
    """One `Diagnosis` per record of `images`, batch by batch; the session ends with the last. Raises `ProtocolError`."""
    _require_agreed(config, hospital.network)
    count = len(images.inputs)
    batches = images.inputs.split(config.inference.batch_size) if count else ()  # torch splits nothing into one part
    for start in range(0, len(batches), config.inference.at_once):
        group = batches[start : start + config.inference.at_once]
        notify("encrypted inference", start * config.inference.batch_size, count)
        for batch in group:
            hospital.prepare(len(batch))
        began = time.monotonic()
        opened = torch.cat(hospital.diagnose_together(group))
        seconds = (time.monotonic() - began) / len(opened)
        for row in opened:
            if config.inference.reveal == "label":
                yield Diagnosis(None, seconds, int(row))
            else:
                yield Diagnosis.of(row.float(), seconds)
    notify("encrypted inference", count, count)
    hospital.finish()


def _require_agreed(config: Config, network: Network) -> None:
    """The model owner's network must take these records and tell these classes apart."""
    shapes = network.values[network.input].shape, network.values[network.output].shape
    if shapes != (tuple(config.data.input_shape), (len(config.data.classes),)):
        raise ProtocolError(
            "the model owner's network has other inputs or classes", "give both parties one configuration"
        )


# ---- engine reference ----------------------------------------------------------------------------------------------


def public_graph(config: Config) -> EncryptedGraph:
    """The network as the hospital knows it: architecture and shapes; its weights are placeholders.

    Raises `UnsupportedLayerError` for a layer without encrypted counterpart, before any data moves.
    """
    return build_graph(build_model(config, config.data.input_shape, config.seed), config.data.input_shape)


def private_graph(config: Config, model: nn.Module) -> EncryptedGraph:
    """The same network with the model owner's weights."""
    return build_graph(model, config.data.input_shape)


def requests_of(graph: EncryptedGraph, input_shape: Sequence[int], parties: int, fraction_bits: int) -> list[Request]:
    """The correlated randomness of one forward pass on `input_shape` (N, C, H, W), in order, from shapes alone.

    The weights may be encrypted or not; only their shapes count.
    """

    def weights_without_elements(module: Any) -> Any:
        shapes = {name: tuple(parameter.size()) for name, parameter in module.named_parameters()}
        twin = module_with(module, {name: shape_share(shape, fraction_bits) for name, shape in shapes.items()})
        twin.encrypted = True
        return twin

    def forward() -> None:
        layers = [dataclasses.replace(layer, module=weights_without_elements(layer.module)) for layer in graph.layers]
        run_layers(layers, graph.input, graph.output, shape_share(input_shape, fraction_bits))

    with crypten.no_grad():
        return record_requests(forward, parties, fraction_bits)


def ask(
    config: Config, graph: EncryptedGraph, images: Dataset, domain: SecretDomain, notify: Notify
) -> list[Diagnosis]:
    """The hospital's side: one `Diagnosis` per record of `images`.

    A batch whose logits show a failed truncation is repeated once with fresh randomness; to the model owner it looks
    like any other batch. Raises `ProtocolError` if the repetition fails too, `PeerLostError` for a lost party.
    """
    links = domain.runtime.links
    count, size = len(images.inputs), config.inference.batch_size
    batches = [images.inputs[start : start + size] for start in range(0, count, size)]
    sizes = [len(batch) for batch in batches]
    links.set_phase("sharing weights")
    distinct = list(dict.fromkeys(sizes))
    links.send_object(MODEL_OWNER, "batch sizes", {"sizes": distinct})
    _declare_batches(config, graph, distinct, domain)
    encrypted = graph.encrypt(src=_MODEL_OWNER_RANK)
    results: list[Diagnosis] = []
    for batch, following in zip(batches, [*sizes[1:], 0], strict=True):
        start = len(results)
        links.set_phase(f"images {start + 1} to {start + len(batch)}" if size > 1 else f"image {start + 1}")
        began = time.monotonic()

        def layer_done(index: int, total: int, _name: str, done: int = start, width: int = len(batch)) -> None:
            notify("encrypted inference", done * total + index * width, count * total)

        logits = _ask_batch(config, encrypted, batch, following, domain, layer_done)
        seconds = (time.monotonic() - began) / len(batch)
        results += [Diagnosis.of(row.float(), seconds) for row in logits]
    links.send_object(MODEL_OWNER, "batch", {"size": 0, "next": 0})
    return results


def _ask_batch(
    config: Config,
    graph: EncryptedGraph,
    batch: torch.Tensor,
    following: int,
    domain: SecretDomain,
    on_layer: OnLayer,
) -> torch.Tensor:
    for attempt in range(_ATTEMPTS):
        domain.runtime.links.send_object(MODEL_OWNER, "batch", {"size": len(batch), "next": following})
        logits = _evaluate(graph, batch, following, domain, on_layer)
        assert logits is not None
        try:
            check_logits(logits, config.inference.logit_bound)
            return logits
        except ProtocolError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def answer(config: Config, graph: EncryptedGraph, domain: SecretDomain) -> int:
    """The model owner's side: share the weights, serve batches until the hospital is done; returns their number."""
    links = domain.runtime.links
    links.set_phase("sharing weights")
    sizes = links.receive_object(HOSPITAL, "batch sizes").get("sizes")
    allowed = range(1, config.inference.batch_size + 1)
    # All batches are full but the last.
    if not isinstance(sizes, list) or len(sizes) > 2 or any(type(n) is not int or n not in allowed for n in sizes):
        raise ProtocolError("the hospital announced batches of a size not agreed", "check inference.batch_size")
    _declare_batches(config, graph, sizes, domain)
    encrypted = graph.encrypt(src=_MODEL_OWNER_RANK)
    batches = 0
    while True:
        message = links.receive_object(HOSPITAL, "batch")
        size, following = message.get("size"), message.get("next")
        if type(size) is not int or type(following) is not int or not {size, following} <= {0, *sizes}:
            raise ProtocolError("the hospital announced a batch of a size not agreed", "check inference.batch_size")
        if size == 0:
            return batches
        batches += 1
        links.set_phase(f"batch {batches}")
        _evaluate(encrypted, torch.zeros(size, *config.data.input_shape), following, domain, None)


def _dealer(domain: SecretDomain) -> DealerClient:
    if domain.runtime.dealer_client is None:
        raise SecrecyError("an encrypted inference has no dealer")
    return domain.runtime.dealer_client


def _program(size: int) -> str:
    return f"batch of {size}"


def _declare_batches(config: Config, graph: EncryptedGraph, sizes: Sequence[int], domain: SecretDomain) -> None:
    """Step 2, at both parties alike."""
    dealer, world = _dealer(domain), domain.runtime.world
    for size in sizes:
        shape = (size, *config.data.input_shape)
        dealer.declare(_program(size), requests_of(graph, shape, len(world), config.inference.fraction_bits))
        if size == sizes[0]:
            dealer.prepare(_program(size))


def _evaluate(
    graph: EncryptedGraph, batch: torch.Tensor, following: int, domain: SecretDomain, on_layer: OnLayer | None
) -> torch.Tensor | None:
    """Steps 4 to 6. At the model owner `batch` only gives the shape."""
    with _dealer(domain).program(_program(len(batch)), _program(following) if following else None):
        shared = crypten.cryptensor(batch, src=0)
        logits = graph.forward(shared, on_layer)
    return open_to(domain, Shared("logits", logits), [HOSPITAL], "diagnosis for the hospital that asked")


def _rounded(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else [round(value, 6) for value in values.tolist()]


def write_results(config: Config, images: Dataset, results: list[Diagnosis], out: Path) -> None:
    """Write the hospital's results and, for its own report, its images (both readable by this user only)."""
    lines = []
    for index, result in enumerate(results):
        line = {
            "index": index,
            "name": images.names[index],
            "label": int(images.labels[index]),
            "predicted": result.predicted,
            "probabilities": _rounded(result.probabilities),
            "logits": _rounded(result.logits),
            "seconds": round(result.seconds, 4),
        }
        lines.append(json.dumps(finite(line)))
    if not config.data.is_table:
        pixels = (images.inputs * 255).round().clamp(0, 255).to(torch.uint8)
        with written_whole(out / "images.safetensors", 0o600) as temporary:
            save_file({"images": pixels.contiguous()}, temporary)
    write_text(out / "results.jsonl", "\n".join(lines) + "\n", 0o600)
