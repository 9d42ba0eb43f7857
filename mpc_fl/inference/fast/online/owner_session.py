"""The model owner's side (S) of a session of the engine `fast`; protocol and security are in `hospital_session`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError, RefusedError
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
from mpc_fl.inference.fast.network import IntegerModel, IntegerWeights, Reveal
from mpc_fl.inference.fast.online.evaluation import EvaluationLink, OnTruncation, OwnerEvaluation, empty_share
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
from mpc_fl.roles import DEALER
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

    def ready(self, images: int, dealt: bool) -> None:
        """A batch is ready, and the hospital is told so next: made by the dealer or not; 0 images: it was stored."""

    def answer(self) -> None:
        """Before batches that are ready are evaluated."""

    def end(self) -> None:
        """All batches begun have been answered."""

    def store(self, stored: int) -> None:
        """Before one more batch is put into a pool that holds `stored`; `end` follows."""

    def finish(self) -> None:
        """The hospital asks for nothing more."""


@dataclass(frozen=True)
class SessionTerms:
    """What a model owner agrees to: what is revealed, records of a batch, batches prepared at the same time; at most so many.

    `records` in the whole session; None where something else bounds them, or nothing does.
    """

    reveal: Reveal = "logits"
    largest_batch: int = 64
    at_once: int = 1
    records: int | None = None


class OwnerSession:
    """S's side of a session with `hospital`: the weights stay here. `gate` is asked before each batch.

    Making one tells the others the network, and the hospital the masked weights unless both have them in a pool. Raises
    `ModelError`, `PoolError`, `PeerLostError`.
    """

    def __init__(
        self,
        domain: SecretDomain,
        hospital: str,
        model: IntegerModel,
        terms: SessionTerms | None = None,
        pool: OwnerPool | None = None,
        gate: BatchGate | None = None,
    ) -> None:
        self._domain, self._links, self._hospital = domain, domain.links, hospital
        self._terms, self._pool, self._gate = terms or SessionTerms(), pool, gate
        self.network, integers = model.network, model.weights.inside_protocol()
        self.on_truncation: OnTruncation | None = None
        self._root = self._share_model(integers)
        self._weights, self._integers = linear_maps(self.network, integers.weights), integers
        self._prepared: deque[_OwnerBatch] = deque()
        self._announced = self._records = 0
        self._warm: set[int] = set()

    def _share_model(self, integers: IntegerWeights) -> Seed | None:
        """Step 1; the seed in common with the dealer, if one takes part."""
        network, pool, links = self.network, self._pool, self._links
        integers.require_fitting(network)
        links.set_phase("model")
        offered = {} if pool is None else pool.offer(network, integers)
        links.send_object(self._hospital, NETWORK, {**describe(network), **offered})
        kept = pool is not None and pool.meet(links)
        # B outlives this session if it is a pool's: then the dealer is told its seed each time.
        own_seed = None if pool is None else pool.mask_seed() if kept else Seed.from_system() if pool.filling else None
        root = self._tell_dealer(own_seed) if DEALER in links.peers else None
        if not kept:
            mask_seed = own_seed or (Seed.from_system() if root is None else root.derive("model"))
            self._send_masked_weights(integers, mask_seed.again())
            if pool is not None and pool.filling:
                pool.keep(links, network, integers, mask_seed)
        return root

    def _send_masked_weights(self, integers: IntegerWeights, mask_seed: Seed) -> None:
        """F = W - B."""
        masks = weight_masks(self.network, mask_seed)
        for layer in self.network.linear_layers:
            masked = integers.weights[layer.output] - masks.pop(layer.output)
            self._links.send_tensor(self._hospital, f"{WEIGHTS} {layer.output}", masked)

    def _tell_dealer(self, mask_seed: Seed | None) -> Seed:
        """Give it the network, and B's seed unless B is this session's; the seed in common."""
        links = self._links
        given = {} if mask_seed is None else {MASK_SEED: True}
        links.send_object(DEALER, NETWORK, {**describe(self.network), **given})
        if mask_seed is not None:
            words = np.frombuffer(mask_seed.reveal_for_transport(), dtype=np.uint8).copy()
            links.send_tensor(DEALER, MASK_SEED, torch.from_numpy(words))
        return links.pairwise_seed(DEALER, SEED)

    def serve(self) -> int:
        """Prepare and evaluate batches as the hospital asks, until it is done; returns how many were evaluated.

        Raises `ProtocolError` when the hospital asks for what cannot be.
        """
        links = self._links
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
                    if DEALER in links.peers:
                        links.send_object(DEALER, BATCH, message)
                    if self._gate is not None:
                        self._gate.finish()
                    return evaluated
                case _:
                    raise ProtocolError("the hospital asked for what was not agreed", SAME_VERSION)

    def _agreed_size(self, message: dict[str, Any]) -> int:
        """Records of the batch that the hospital announces next."""
        records, reveal = batch_from(message, self._announced)
        if reveal != self._terms.reveal and self._gate is not None:
            raise RefusedError(
                f"this model owner reveals {self._terms.reveal}, and the hospital asked for {reveal}",
                f"set inference.reveal={self._terms.reveal}",
            )
        if reveal != self._terms.reveal or not 1 <= records <= self._terms.largest_batch:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed", "check inference.reveal and inference.batch_size"
            )
        return records

    def _begin(self, records: int) -> None:
        """A batch that will be evaluated: there is room for it, and the gate lets it pass."""
        if len(self._prepared) >= self._terms.at_once:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed: for too many at once", "check inference.at_once"
            )
        self._records += records
        if self._terms.records is not None and self._records > self._terms.records:
            raise ProtocolError(
                f"the hospital asked about more than {self._terms.records} images", "raise inference.limit at both"
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
        self._links.set_phase("offline")
        correlations = pool.take(self.network, place)
        plan = correlation_plan(self.network, pool.records, self._terms.reveal)
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
            self._gate.ready(0, dealt=True)
        self._links.send_object(self._hospital, READY, {"number": number})

    def _made_by_dealer(
        self, message: dict[str, Any], records: int
    ) -> tuple[int, CorrelationPlan, Seed, dict[str, np.ndarray]]:
        """Number, pieces, own seed and corrections of a batch of `records` that the hospital announced."""
        links = self._links
        links.set_phase("offline")
        number = self._announced
        if self._root is None:
            raise ProtocolError("the hospital asked for a batch of a dealer that takes no part", "fill the pool")
        links.send_object(DEALER, BATCH, message)
        self._announced += 1
        plan = correlation_plan(self.network, records, self._terms.reveal)
        corrections = {
            name: links.receive_tensor(DEALER, correction_tag(number), torch.uint8, (piece.correction_bytes,)).numpy()
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
        if self._gate is not None:
            self._gate.ready(records, dealt=number < FIRST_NUMBER)
        self._links.send_object(self._hospital, READY, {"number": number})

    def _evaluate(self, numbers: Any) -> int:
        """Steps 4 and 5 for the prepared batches of these numbers; returns how many."""
        batches = list(self._prepared)[: len(numbers) if isinstance(numbers, list) else 0]
        if not batches or [batch.number for batch in batches] != numbers:
            raise ProtocolError("the hospital asked for a batch not prepared", SAME_VERSION)
        if self._gate is not None:
            self._gate.answer()
        for _ in batches:
            self._prepared.popleft()
        links = self._links
        links.set_phase("online")

        def evaluation_of(batch: _OwnerBatch) -> Callable[[], np.ndarray]:
            link = EvaluationLink(links, self._hospital, batch.number)
            evaluation = OwnerEvaluation(self.network, link, batch.correlations, self._weights, self._integers)
            evaluation.on_truncation = self.on_truncation
            share = empty_share(self.network, batch.records)
            if self._terms.reveal == "label":
                return lambda: evaluation.label_share(evaluation.evaluate(share))
            return lambda: evaluation.evaluate(share)

        for result in at_once([evaluation_of(batch) for batch in batches], links):
            open_result(self._domain, self.network, self._terms.reveal, result, self._hospital)
        if self._gate is not None and not self._prepared:
            self._gate.end()
        links.set_phase("idle")
        return len(batches)
