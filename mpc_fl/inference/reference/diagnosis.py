"""A diagnosis with the engine `reference`: hospital (rank 0) and model owner (rank 1) compute on shares, a dealer helps.

Protocol, once:
  1. the hospital announces the batch sizes (public)
  2. both record by a dry run what correlated randomness a batch of each size takes, and declare it to the dealer, which
     begins with the first batch's while
  3. the model owner shares its weights
Per batch of images:
  4. the hospital announces this batch's size and the next one's, and shares the images
  5. both evaluate the network on shares (`network`), with the dealer's corrections made ahead of need (`sharing.dealer`)
  6. the logits are opened to the hospital alone

Who learns what. The hospital learns its logits, architecture and shapes; the model owner shapes, the number and sizes of
batches and timing; the dealer shapes and timing.

Security. Shares of image and weights are masked by the pairwise seed of the two parties, every opened intermediate is
masked by a triple (Beaver, CRYPTO 1991), the logits reach only the hospital, refreshed by a zero-share. The dealer colludes
with neither. What the hospital sends is masked by draws that it has in common with the dealer alone, each used once, so it is
uniform to the model owner whatever that one sends; and number, order and ending of messages follow from sizes alone. So there
is no step after the logits: a batch in which a truncation failed is not repeated, since a model can be made so that its
logits exceed the bound when something is true of the image. The hospital says so to its own user, when all is over.

Rounds and bytes. Those of the layers, which `network.cost` counts from shapes before a run; sharing weights and images sends
nothing, the logits are 8 bytes each and one round. The dealer's bytes are stated in `sharing.dealer`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.errors import ProtocolError, SecrecyError
from mpc_fl.inference.reference.cost import module_with
from mpc_fl.inference.reference.network import EncryptedGraph, OnLayer, build_graph, run_layers, within_bound
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.class_offsets import with_offsets
from mpc_fl.links.links import Links
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER, HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.correlated_randomness import Request
from mpc_fl.sharing.crypten_parts import crypten, ring_share_of
from mpc_fl.sharing.crypten_runtime import CrypTenDomain, CrypTenRuntime
from mpc_fl.sharing.dealer_client import DealerClient
from mpc_fl.sharing.dry_run import record_requests, shape_share
from mpc_fl.sharing.opening import open_to

_MODEL_OWNER_RANK = 1


def runtime_of(config: Config, links: Links) -> CrypTenRuntime:
    """CrypTen for one session, at either party, to be entered by `with`; its `domain` goes to `ask` or `answer`."""
    bits, ahead = config.inference.fraction_bits, config.runtime.dealer_ahead_bytes
    return CrypTenRuntime(links, [HOSPITAL, MODEL_OWNER], DEALER, bits, ahead)


def public_graph(config: Config) -> EncryptedGraph:
    """The network as the hospital knows it: architecture and shapes; its weights are placeholders.

    Raises `UnsupportedLayerError` for a layer without encrypted counterpart, before any data moves.
    """
    model = build_model(config)
    # Offsets are the model owner's, but that the last layer has a bias then is public.
    model = with_offsets(model, config, Calibration.none(len(config.data.classes)))
    return build_graph(model, config.data.input_shape)


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
    config: Config, graph: EncryptedGraph, images: Dataset, domain: CrypTenDomain, notify: Notify
) -> list[Diagnosis]:
    """The hospital's side: one `Diagnosis` per record of `images`.

    An image whose logits show a failed truncation has a `doubt`; to the model owner it looks like any other. Raises
    `PeerLostError` for a lost party.
    """
    links = domain.links
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

        links.send_object(MODEL_OWNER, "batch", {"size": len(batch), "next": following})
        logits = _evaluate(encrypted, batch, following, domain, layer_done)
        assert logits is not None
        seconds = (time.monotonic() - began) / len(batch)
        certain = within_bound(logits, config.inference.logit_bound).tolist()
        results += [
            Diagnosis.of(row.float(), seconds, None if held else _beyond(config))
            for row, held in zip(logits, certain, strict=True)
        ]
    links.send_object(MODEL_OWNER, "batch", {"size": 0, "next": 0})
    return results


def _beyond(config: Config) -> str:
    bound = config.inference.logit_bound
    return f"a logit lies beyond inference.logit_bound={bound:g}, as when a fixed-point truncation failed"


def answer(config: Config, graph: EncryptedGraph, domain: CrypTenDomain) -> int:
    """The model owner's side: share the weights, serve batches until the hospital is done; returns their number."""
    links = domain.links
    links.set_phase("sharing weights")
    sizes = links.receive_object(HOSPITAL, "batch sizes").get("sizes")
    allowed = range(1, config.inference.batch_size + 1)
    # All batches are full but the last.
    if not isinstance(sizes, list) or len(sizes) > 2 or any(type(n) is not int or n not in allowed for n in sizes):
        raise ProtocolError("the hospital announced batches of a size not agreed", "check inference.batch_size")
    _declare_batches(config, graph, sizes, domain)
    encrypted = graph.encrypt(src=_MODEL_OWNER_RANK)
    batches = records = 0
    while True:
        message = links.receive_object(HOSPITAL, "batch")
        size, following = message.get("size"), message.get("next")
        if type(size) is not int or type(following) is not int or not {size, following} <= {0, *sizes}:
            raise ProtocolError("the hospital announced a batch of a size not agreed", "check inference.batch_size")
        if size == 0:
            return batches
        batches, records = batches + 1, records + size
        if config.inference.limit is not None and records > config.inference.limit:
            raise ProtocolError(
                f"the hospital asked about more than {config.inference.limit} images", "raise inference.limit at both"
            )
        links.set_phase(f"batch {batches}")
        _evaluate(encrypted, torch.zeros(size, *config.data.input_shape), following, domain, None)


def _dealer(domain: CrypTenDomain) -> DealerClient:
    if domain.runtime.dealer_client is None:
        raise SecrecyError("an encrypted inference has no dealer")
    return domain.runtime.dealer_client


def _program(size: int) -> str:
    return f"batch of {size}"


def _declare_batches(config: Config, graph: EncryptedGraph, sizes: Sequence[int], domain: CrypTenDomain) -> None:
    """Step 2, at both parties alike."""
    dealer, world = _dealer(domain), domain.world
    for size in sizes:
        shape = (size, *config.data.input_shape)
        dealer.declare(_program(size), requests_of(graph, shape, len(world), config.inference.fraction_bits))
        if size == sizes[0]:
            dealer.prepare(_program(size))


def _evaluate(
    graph: EncryptedGraph, batch: torch.Tensor, following: int, domain: CrypTenDomain, on_layer: OnLayer | None
) -> torch.Tensor | None:
    """Steps 4 to 6. At the model owner `batch` only gives the shape."""
    with _dealer(domain).program(_program(len(batch)), _program(following) if following else None):
        shared = crypten.cryptensor(batch, src=0)
        logits = graph.forward(shared, on_layer)
    return open_to(domain, Shared("logits", ring_share_of(logits)), [HOSPITAL], "diagnosis for the hospital that asked")
