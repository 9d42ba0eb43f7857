"""The model owner's side (S) of a session of the engine `fast`; the protocol, its steps and its security are in `sessions`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ModelError, ProtocolError
from mpc_fl.inference.fast.kernels.linear import linear_maps, weight_masks
from mpc_fl.inference.fast.messages import (
    BATCH,
    MASK_SEED,
    NETWORK,
    READY,
    SEED,
    STEP,
    WEIGHTS,
    batch_from,
    correction_tag,
    describe,
)
from mpc_fl.inference.fast.network import IntegerWeights, Network, Reveal
from mpc_fl.inference.fast.online.evaluation import (
    OnTruncation,
    empty_share,
    owner_evaluation,
)
from mpc_fl.inference.fast.online.shared_steps import at_once, open_result
from mpc_fl.inference.fast.preprocessing.batch_place import FIRST_NUMBER, Place
from mpc_fl.inference.fast.preprocessing.correlations import (
    CorrelationPlan,
    LinearProduct,
    OwnerCorrelations,
    correlation_plan,
    owner_correlations,
)
from mpc_fl.inference.fast.preprocessing.party_pools import OwnerPool
from mpc_fl.sharing.opening import SecretDomain


@dataclass(frozen=True, repr=False)
class _OwnerBatch:
    """A batch prepared at S."""

    number: int
    records: int
    correlations: OwnerCorrelations


class BatchGate(Protocol):
    """What S asks before it does work for its hospital; each may wait, or raise `RefusedError` to end the session."""

    def begin(self, records: int) -> None:
        """Before the offline work of a batch that will be evaluated, made by the dealer or from a pool."""

    def end(self) -> None:
        """All batches begun have been answered."""

    def store(self, stored: int) -> None:
        """Before one more batch is put into a pool that holds `stored`; `end` follows."""


class OwnerSession:
    """S's side of a session: the weights stay here.

    It agrees to nothing but `reveal`, batches of `largest_batch`, and `at_once` prepared ones; `gate` is asked before each.
    """

    def __init__(
        self,
        domain: SecretDomain,
        hospital: str,
        dealer: str,
        network: Network,
        integers: IntegerWeights,
        reveal: Reveal = "logits",
        largest_batch: int = 64,
        pool: OwnerPool | None = None,
        at_once: int = 1,
        gate: BatchGate | None = None,
    ) -> None:
        self._reveal, self._largest_batch, self._at_once, self._gate = reveal, largest_batch, at_once, gate
        self._domain, self._hospital, self._dealer, self.network = domain, hospital, dealer, network
        self.on_truncation: OnTruncation | None = None
        for layer in network.linear_layers:
            if tuple(integers.biases[layer.output].shape) != (layer.weight_shape[0],):
                raise ModelError(f"layer '{layer.path}' has no bias of its size", "this is a defect of calibration")
        links = domain.runtime.links
        links.set_phase("model")
        self._pool = pool
        offered = {} if pool is None else pool.offer(network, integers)
        links.send_object(hospital, NETWORK, {**describe(network), **offered})
        kept = pool is not None and pool.meet(links)
        # B outlives this session if it is a pool's: then the dealer is told its seed each time.
        own_seed = None if pool is None else pool.mask_seed() if kept else Seed.from_system() if pool.filling else None
        self._root = self._tell_dealer(own_seed) if dealer in links.peers else None
        if not kept:
            mask_seed = own_seed or (Seed.from_system() if self._root is None else self._root.derive("model"))
            masks = weight_masks(network, mask_seed.again())
            for layer in network.linear_layers:
                masked = integers.weights[layer.output] - masks.pop(layer.output)
                links.send_tensor(hospital, f"{WEIGHTS} {layer.output}", masked)
            if pool is not None and pool.filling:
                pool.keep(links, network, integers, mask_seed)
        self._weights, self._biases = linear_maps(network, integers.weights), integers.biases
        self._prepared: deque[_OwnerBatch] = deque()
        self._announced = 0
        self._warm: set[int] = set()

    def _tell_dealer(self, mask_seed: Seed | None) -> Seed:
        """Give it the network, and B's seed unless B is this session's; the seed in common."""
        links = self._domain.runtime.links
        given = {} if mask_seed is None else {MASK_SEED: True}
        links.send_object(self._dealer, NETWORK, {**describe(self.network), **given})
        if mask_seed is not None:
            words = np.frombuffer(mask_seed.reveal_for_transport(), dtype=np.uint8).copy()
            links.send_tensor(self._dealer, MASK_SEED, torch.from_numpy(words))
        return links.pairwise_seed(self._dealer, SEED)

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
                case "take" if self._pool is not None and self._pool.agreed:
                    self._take(self._pool, Place.from_message(message))
                case "fill" if self._pool is not None and self._pool.filling:
                    self._fill(self._pool, message)
                case "evaluate":
                    evaluated += self._evaluate(message.get("numbers"))
                case "finish":
                    batch_from(message, self._announced)
                    if self._dealer in links.peers:
                        links.send_object(self._dealer, BATCH, message)
                    return evaluated
                case _:
                    raise ProtocolError("the hospital asked for what was not agreed", SAME_VERSION)

    def _agreed_size(self, message: dict[str, Any]) -> int:
        """Records of the batch that the hospital announces next."""
        records, reveal = batch_from(message, self._announced)
        if reveal != self._reveal or not 1 <= records <= self._largest_batch:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed", "check inference.reveal and inference.batch_size"
            )
        return records

    def _begin(self, records: int) -> None:
        """A batch that will be evaluated: there is room for it, and the gate lets it pass."""
        if len(self._prepared) >= self._at_once:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed: for too many at once", "check inference.at_once"
            )
        if self._gate is not None:
            self._gate.begin(records)

    def _prepare(self, message: dict[str, Any]) -> None:
        """Steps 2 and 3."""
        records = self._agreed_size(message)
        self._begin(records)
        number, plan, seed, corrections = self._made_by_dealer(message, records)
        self._keep_ready(number, records, plan, owner_correlations(plan, seed, corrections))

    def _take(self, pool: OwnerPool, place: Place) -> None:
        """The same from the pool."""
        self._begin(pool.records)
        self._domain.runtime.links.set_phase("offline")
        correlations = pool.take(self.network, place)
        plan = correlation_plan(self.network, pool.records, self._reveal)
        self._keep_ready(FIRST_NUMBER + place.number, pool.records, plan, correlations)

    def _fill(self, pool: OwnerPool, message: dict[str, Any]) -> None:
        """Store a batch in the pool."""
        records = self._agreed_size(message)
        if records != pool.records:
            raise ProtocolError("the hospital fills batches of another size", "give both one configuration")
        if self._gate is not None:
            self._gate.store(pool.stored)
        number, _, seed, corrections = self._made_by_dealer(message, records)
        pool.put(Place.from_message(message), self.network, seed, corrections)
        if self._gate is not None:
            self._gate.end()
        self._domain.runtime.links.send_object(self._hospital, READY, {"number": number})

    def _made_by_dealer(
        self, message: dict[str, Any], records: int
    ) -> tuple[int, CorrelationPlan, Seed, dict[str, np.ndarray]]:
        """Number, pieces, own seed and corrections of a batch of `records` that the hospital announced."""
        links = self._domain.runtime.links
        links.set_phase("offline")
        number = self._announced
        if self._root is None:
            raise ProtocolError("the hospital asked for a batch of a dealer that takes no part", "fill the pool")
        links.send_object(self._dealer, BATCH, message)
        self._announced += 1
        plan = correlation_plan(self.network, records, self._reveal)
        corrections = {
            name: links.receive_tensor(
                self._dealer, correction_tag(number), torch.uint8, (piece.correction_bytes,)
            ).numpy()
            for name, piece in plan.pieces.items()
        }
        return number, plan, self._root.derive("batch", number), corrections

    def _keep_ready(self, number: int, records: int, plan: CorrelationPlan, correlations: OwnerCorrelations) -> None:
        """For the hospital to evaluate."""
        self._prepared.append(_OwnerBatch(number, records, correlations))
        if records not in self._warm:  # the fastest way of each convolution is measured now, not while an image waits
            self._warm.add(records)
            for name, piece in plan.pieces.items():
                if isinstance(piece, LinearProduct):
                    self._weights[name](torch.zeros(plan.masks[piece.value], dtype=torch.int32))
        self._domain.runtime.links.send_object(self._hospital, READY, {"number": number})

    def _evaluate(self, numbers: Any) -> int:
        """Steps 4 and 5 for the prepared batches of these numbers; returns how many."""
        batches = list(self._prepared)[: len(numbers) if isinstance(numbers, list) else 0]
        if not batches or [batch.number for batch in batches] != numbers:
            raise ProtocolError("the hospital asked for a batch not prepared", SAME_VERSION)
        for _ in batches:
            self._prepared.popleft()
        links = self._domain.runtime.links
        links.set_phase("online")

        def evaluation_of(batch: _OwnerBatch) -> Callable[[], np.ndarray]:
            evaluation = owner_evaluation(
                self.network, links, self._hospital, batch.number, batch.correlations, self._weights, self._biases
            )
            evaluation.on_truncation = self.on_truncation
            share = empty_share(self.network, batch.records)
            if self._reveal == "label":
                return lambda: evaluation.label_share(evaluation.evaluate(share))
            return lambda: evaluation.evaluate(share)

        for result in at_once([evaluation_of(batch) for batch in batches], links):
            open_result(self._domain, self.network, self._reveal, result, self._hospital)
        if self._gate is not None and not self._prepared:
            self._gate.end()
        links.set_phase("idle")
        return len(batches)
