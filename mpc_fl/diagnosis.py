"""Encrypted diagnosis between a hospital (rank 0) and a model owner (rank 1), with a dealer outside.

Protocol, per batch of images:
  1. the hospital announces the batch size (public), shares the images; the model owner shared its weights at the start
  2. both evaluate the network on shares, with triples of the dealer (`inference`)
  3. the logits are opened to the hospital alone

Security. Shares of image and weights are masked by the pairwise seed of the two parties, every opened intermediate is
masked by a triple (Beaver 1991), the logits reach only the hospital, refreshed by a zero-share. The model owner learns
shapes, the number of batches and timing; the hospital learns its logits, architecture and shapes. Semi-honest.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mpc_fl.config import Config
from mpc_fl.crypten_runtime import crypten
from mpc_fl.data import Dataset
from mpc_fl.errors import ProtocolError
from mpc_fl.federation import Notify
from mpc_fl.files import finite, write_text, written_whole
from mpc_fl.inference import EncryptedGraph, OnLayer, build_graph, check_logits
from mpc_fl.models import build_model
from mpc_fl.opening import SecretDomain, open_to
from mpc_fl.secrecy import Shared

HOSPITAL, MODEL_OWNER = "hospital-0", "model-owner"
_MODEL_OWNER_RANK = 1
_ATTEMPTS = 2


@dataclass(frozen=True)
class Diagnosis:
    """The hospital's result for one image: float logits (classes,), and the seconds its batch took per image."""

    logits: torch.Tensor
    seconds: float

    @property
    def probabilities(self) -> torch.Tensor:
        """Softmax of the logits, computed at the hospital."""
        return torch.softmax(self.logits.double(), dim=0)

    @property
    def predicted(self) -> int:
        """Index of the most probable class."""
        return int(self.logits.argmax())


def public_graph(config: Config) -> EncryptedGraph:
    """The network as the hospital knows it: architecture and shapes; its weights are placeholders.

    Raises `UnsupportedLayerError` for a layer without encrypted counterpart, before any data moves.
    """
    return build_graph(build_model(config, config.data.input_shape, config.seed), config.data.input_shape)


def private_graph(config: Config, model: nn.Module) -> EncryptedGraph:
    """The same network with the model owner's weights."""
    return build_graph(model, config.data.input_shape)


def ask(
    config: Config, graph: EncryptedGraph, images: Dataset, domain: SecretDomain, notify: Notify
) -> list[Diagnosis]:
    """The hospital's side: one `Diagnosis` per record of `images`.

    A batch whose logits show a failed truncation is repeated once with fresh randomness; to the model owner it looks
    like any other batch. Raises `ProtocolError` if the repetition fails too, `PeerLostError` for a lost party.
    """
    links = domain.runtime.links
    links.set_phase("sharing weights")
    encrypted = graph.encrypt(src=_MODEL_OWNER_RANK)
    results: list[Diagnosis] = []
    count, size = len(images.inputs), config.inference.batch_size
    for start in range(0, count, size):
        batch = images.inputs[start : start + size]
        links.set_phase(f"images {start + 1} to {start + len(batch)}" if size > 1 else f"image {start + 1}")
        began = time.monotonic()

        def layer_done(index: int, total: int, _name: str, done: int = start, width: int = len(batch)) -> None:
            notify("encrypted inference", done * total + index * width, count * total)

        logits = _ask_batch(config, encrypted, batch, domain, layer_done)
        seconds = (time.monotonic() - began) / len(batch)
        results += [Diagnosis(row.float(), seconds) for row in logits]
    links.send_object(MODEL_OWNER, "batch", {"size": 0})
    return results


def _ask_batch(
    config: Config, graph: EncryptedGraph, batch: torch.Tensor, domain: SecretDomain, on_layer: OnLayer
) -> torch.Tensor:
    for attempt in range(_ATTEMPTS):
        domain.runtime.links.send_object(MODEL_OWNER, "batch", {"size": len(batch)})
        logits = _evaluate(graph, batch, domain, on_layer)
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
    encrypted = graph.encrypt(src=_MODEL_OWNER_RANK)
    batches = 0
    while True:
        size = links.receive_object(HOSPITAL, "batch").get("size")
        if not isinstance(size, int) or not 0 <= size <= config.inference.batch_size:
            raise ProtocolError("the hospital announced a batch of a size not agreed", "check inference.batch_size")
        if size == 0:
            return batches
        batches += 1
        links.set_phase(f"batch {batches}")
        _evaluate(encrypted, torch.zeros(size, *config.data.input_shape), domain, None)


def _evaluate(
    graph: EncryptedGraph, batch: torch.Tensor, domain: SecretDomain, on_layer: OnLayer | None
) -> torch.Tensor | None:
    """Steps 1 to 3. At the model owner `batch` only gives the shape."""
    shared = crypten.cryptensor(batch, src=0)
    logits = graph.forward(shared, on_layer)
    return open_to(domain, Shared("logits", logits), [HOSPITAL], "diagnosis for the hospital that asked")


def write_results(config: Config, images: Dataset, results: list[Diagnosis], out: Path) -> None:
    """Write the hospital's results and, for its own report, its images (both readable by this user only)."""
    lines = []
    for index, result in enumerate(results):
        line = {
            "index": index,
            "name": images.names[index],
            "label": int(images.labels[index]),
            "predicted": result.predicted,
            "probabilities": [round(value, 6) for value in result.probabilities.tolist()],
            "logits": [round(value, 6) for value in result.logits.tolist()],
            "seconds": round(result.seconds, 4),
        }
        lines.append(json.dumps(finite(line)))
    if not config.data.is_table:
        pixels = (images.inputs * 255).round().clamp(0, 255).to(torch.uint8)
        with written_whole(out / "images.safetensors", 0o600) as temporary:
            save_file({"images": pixels.contiguous()}, temporary)
    write_text(out / "results.jsonl", "\n".join(lines) + "\n", 0o600)
