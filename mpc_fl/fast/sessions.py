"""A diagnosis session of the engine `fast`: hospital C and model owner S, with a dealer D outside.

Protocol, once:
  1. S tells C and D the public network (architecture, shapes, scales, widths), and C the masked weights F = W - B
Per batch, offline, before the images are needed:
  2. C announces how many records come and what will be revealed, S repeats it to D
  3. D sends S its corrections; C draws its part and computes F * A (`correlations`)
Per batch, online:
  4. C begins with its encoded images, both evaluate the network on shares (`engine`)
  5. the logits, or with reveal = "label" only the index of the largest, are opened to C alone (`opening.open_to`)

Security. Semi-honest parties, D colludes with neither. To S everything it receives is uniform: E, masked openings,
corrections. To C: F, masked openings, and the opened result. D receives the network and numbers of records. See the modules
named for the arguments; the number and sizes of messages depend on public values alone.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from mpc_fl.errors import ModelError, ProtocolError, SecrecyError
from mpc_fl.fast.correlations import (
    ClientCorrelations,
    OwnerCorrelations,
    Product,
    Reveal,
    client_correlations,
    label_bits,
    owner_correlations,
    program_of,
)
from mpc_fl.fast.dealing import BATCH, NETWORK, READY, SEED, STEP, batch_from, correction_tag
from mpc_fl.fast.emulation import encode
from mpc_fl.fast.engine import (
    OnTruncation,
    aligned_elements,
    as_channels_last,
    client_evaluation,
    empty_share,
    owner_evaluation,
)
from mpc_fl.fast.linear import linear_maps, weight_masks
from mpc_fl.fast.lowering import IntegerWeights
from mpc_fl.fast.network import RING_BITS, Network
from mpc_fl.fast.network_messages import describe, network_from
from mpc_fl.opening import SecretDomain, open_to
from mpc_fl.ring import RingShare
from mpc_fl.secrecy import Shared

_WEIGHTS = "masked weights"


class Hospital:
    """C's side of a session. `prepare` batches ahead, then `diagnose` them in the same order, then `finish`."""

    def __init__(self, domain: SecretDomain, owner: str, dealer: str, reveal: Reveal = "logits") -> None:
        self._domain, self._owner, self._dealer, self._reveal = domain, owner, dealer, reveal
        links = domain.runtime.links
        links.set_phase("model")
        self.network = network_from(links.receive_object(owner, NETWORK))
        masked = {}
        for layer in self.network.linear_layers:
            tag = f"{_WEIGHTS} {layer.output}"
            masked[layer.output] = links.receive_tensor(owner, tag, torch.int32, layer.weight_shape)
        self._masked_weights = linear_maps(self.network, masked)
        self._root = links.pairwise_seed(dealer, SEED)
        self._prepared: deque[tuple[int, int, ClientCorrelations]] = deque()
        self._announced = 0
        self.sequential_messages = 0
        self.on_truncation: OnTruncation | None = None

    def _announce(self, records: int) -> int:
        number, links = self._announced, self._domain.runtime.links
        batch = {"number": number, "records": records, "reveal": self._reveal}
        links.send_object(self._dealer, BATCH, batch)
        links.send_object(self._owner, STEP, {"step": "prepare" if records else "finish", **batch})
        self._announced += 1
        return number

    def prepare(self, records: int) -> None:
        """Offline work for one batch of `records` records; returns when S has its corrections, too."""
        links = self._domain.runtime.links
        links.set_phase("offline")
        number = self._announce(records)
        program = program_of(self.network, records, self._reveal)
        seed = self._root.derive("batch", number)
        self._prepared.append((number, records, client_correlations(program, seed, self._masked_weights)))
        links.receive_object(self._owner, READY)

    def diagnose(self, records: torch.Tensor) -> torch.Tensor:
        """The logits (N, K), float64, of float records (N, C, H, W); with reveal = "label" the classes (N,), int64.

        Raises `SecrecyError` when no batch of this size is prepared, `HeadroomError` for records that do not fit.
        """
        if not self._prepared or self._prepared[0][1] != len(records):
            raise SecrecyError(f"no correlated randomness is prepared for a batch of {len(records)} records")
        share = as_channels_last(encode(self.network, records).numpy().view(np.uint32))
        number, _, correlations = self._prepared.popleft()
        links = self._domain.runtime.links
        links.set_phase("online")
        links.send_object(self._owner, STEP, {"step": "evaluate", "number": number})
        evaluation = client_evaluation(self.network, links, self._owner, number, correlations)
        evaluation.on_truncation = self.on_truncation
        result = evaluation.evaluate(share)
        if self._reveal == "label":
            opened = _open(
                self._domain, evaluation.label_share(result), label_bits(self.network)[1], "label", links.name
            )
        else:
            opened = _open(self._domain, result, self.network.values[self.network.output].bits, "logits", links.name)
        assert opened is not None
        self.sequential_messages = evaluation.chain.length + 1
        links.set_phase("idle")
        if self._reveal == "label":
            return opened.to(torch.int64) % (1 << label_bits(self.network)[1])
        return opened * self.network.values[self.network.output].scale

    def finish(self) -> None:
        """Tell the others that no batch follows. Batches prepared and not used are dropped."""
        self._announce(0)


class Owner:
    """S's side of a session: the weights stay here. It agrees to nothing but `reveal` and batches of `largest_batch`."""

    def __init__(
        self,
        domain: SecretDomain,
        hospital: str,
        dealer: str,
        network: Network,
        integers: IntegerWeights,
        reveal: Reveal = "logits",
        largest_batch: int = 64,
    ) -> None:
        self._reveal, self._largest_batch = reveal, largest_batch
        self._domain, self._hospital, self._dealer, self.network = domain, hospital, dealer, network
        self.on_truncation: OnTruncation | None = None
        for layer in network.linear_layers:
            if tuple(integers.biases[layer.output].shape) != (layer.weight_shape[0],):
                raise ModelError(f"layer '{layer.path}' has no bias of its size", "this is a defect of calibration")
        links = domain.runtime.links
        links.set_phase("model")
        for name in (hospital, dealer):
            links.send_object(name, NETWORK, describe(network))
        self._root = links.pairwise_seed(dealer, SEED)
        masks = weight_masks(network, self._root.derive("model"))
        for layer in network.linear_layers:
            masked = integers.weights[layer.output] - masks.pop(layer.output)
            links.send_tensor(hospital, f"{_WEIGHTS} {layer.output}", masked)
        self._weights, self._biases = linear_maps(network, integers.weights), integers.biases
        self._prepared: deque[tuple[int, int, Reveal, OwnerCorrelations]] = deque()
        self._announced = 0
        self._warm: set[int] = set()

    def serve(self) -> int:
        """Prepare and evaluate batches as the hospital asks, until it is done; returns how many were evaluated.

        Raises `ProtocolError` when the hospital asks for what cannot be.
        """
        links = self._domain.runtime.links
        evaluated = 0
        while True:
            message = links.receive_object(self._hospital, STEP)
            match message.pop("step", None):
                case "prepare":
                    self._prepare(message)
                case "evaluate" if self._prepared and message.get("number") == self._prepared[0][0]:
                    self._evaluate(*self._prepared.popleft())
                    evaluated += 1
                case "finish":
                    batch_from(message, self._announced)
                    links.send_object(self._dealer, BATCH, message)
                    return evaluated
                case _:
                    raise ProtocolError(
                        "the hospital asked for a batch not prepared", "run the same version everywhere"
                    )

    def _prepare(self, message: dict[str, Any]) -> None:
        """Steps 2 and 3."""
        links = self._domain.runtime.links
        links.set_phase("offline")
        number = self._announced
        records, reveal = batch_from(message, number)
        if reveal != self._reveal or not 1 <= records <= self._largest_batch:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed", "check inference.reveal and inference.batch_size"
            )
        links.send_object(self._dealer, BATCH, message)
        self._announced += 1
        program = program_of(self.network, records, reveal)
        corrections = {
            name: links.receive_tensor(
                self._dealer, correction_tag(number), torch.uint8, (piece.correction_bytes,)
            ).numpy()
            for name, piece in program.pieces.items()
        }
        correlations = owner_correlations(program, self._root.derive("batch", number), corrections)
        self._prepared.append((number, records, reveal, correlations))
        if records not in self._warm:  # the fastest way of each convolution is measured now, not while an image waits
            self._warm.add(records)
            for name, piece in program.pieces.items():
                if isinstance(piece, Product):
                    self._weights[name](torch.zeros(program.masks[piece.value], dtype=torch.int32))
        links.send_object(self._hospital, READY, {"number": number})

    def _evaluate(self, number: int, records: int, reveal: Reveal, correlations: OwnerCorrelations) -> None:
        """Steps 4 and 5."""
        links = self._domain.runtime.links
        links.set_phase("online")
        evaluation = owner_evaluation(
            self.network, links, self._hospital, number, correlations, self._weights, self._biases
        )
        evaluation.on_truncation = self.on_truncation
        result = evaluation.evaluate(empty_share(self.network, records))
        if reveal == "label":
            _open(self._domain, evaluation.label_share(result), label_bits(self.network)[1], "label", self._hospital)
        else:
            _open(self._domain, result, self.network.values[self.network.output].bits, "logits", self._hospital)
        links.set_phase("idle")


def _open(domain: SecretDomain, share: np.ndarray, bits: int, what: str, hospital: str) -> torch.Tensor | None:
    """Open a value of `bits` bits to the hospital alone, as signed integers in float64 there."""
    elements = RingShare(aligned_elements(share, bits), RING_BITS - bits)
    return open_to(domain, Shared(what, elements), [hospital], "diagnosis for the hospital that asked")
