"""A diagnosis session of the engine `fast`: hospital C and model owner S, with a dealer D outside. C's side is here.

Protocol, once:
  1. S tells C and D the public network (architecture, shapes, scales, widths), and C the masked weights F = W - B
Per batch, offline, before the images are needed:
  2. C announces how many records come and what will be revealed, S repeats it to D
  3. D sends S its corrections; C draws its part and computes F * A (`correlations`)
Per group of prepared batches, online:
  4. C begins with its encoded images, both evaluate the network on shares (`evaluation`), all batches of the group at once;
     of the images and of every value that linear layers read C sends E, its share less a fresh part of A
  5. the logits, or with reveal = "label" only the index of the largest, are opened to C alone (`opening.open_to`), in order

Security. D colludes with neither. To S everything it receives is uniform, whatever S itself sends: E is masked by A, C's part of
every opening by C's part of the gate's masks, each drawn by C for one use, and what D sends S is masked by other draws of C's.
C and D draw them from a seed that is bound to the network each was told (`messages.hospital_seed`). The number, order and
sizes of C's messages and how it ends depend on public values alone: C cuts off what does not fit, opens the result to itself,
and asks for nothing again. So an S that deviates can spoil results and learns nothing of an image (timing apart). A D that
deviates receives networks and numbers of records, no more. To a semi-honest C: F, masked openings, and the opened result are
uniform but for the result. See the modules named for the arguments.

Steps 2 and 3 may have been done before: with a pool both parties take batches from their disks, see `party_pools`.

Batches of a group share nothing: masks, tags of messages and threads are each one's own. While one of them waits for its peer
or for the network, another computes or sends, so both parties are busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import PoolError, SecrecyError
from mpc_fl.inference.fast.kernels.linear import LinearMap, linear_maps
from mpc_fl.inference.fast.messages import BATCH, NETWORK, READY, SEED, STEP, WEIGHTS, hospital_seed, network_from
from mpc_fl.inference.fast.network import Reveal, encode_silently, label_bits
from mpc_fl.inference.fast.online.evaluation import EvaluationLink, HospitalEvaluation, OnTruncation, as_channels_last
from mpc_fl.inference.fast.online.shared_steps import at_once, open_result
from mpc_fl.inference.fast.preprocessing.batch_place import FIRST_NUMBER, POOL, Place
from mpc_fl.inference.fast.preprocessing.correlations import (
    HospitalCorrelations,
    correlation_plan,
    hospital_correlations,
)
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool
from mpc_fl.roles import DEALER, MODEL_OWNER
from mpc_fl.sharing.opening import SecretDomain


@dataclass(frozen=True, repr=False)
class _HospitalBatch:
    """A batch prepared at C: asked for `records` records, made for `size`."""

    number: int
    records: int
    size: int
    correlations: HospitalCorrelations


class AskingGate(Protocol):
    """What C tells before it goes on with a session, the other side of `owner_session.BatchGate`; each may raise to end it."""

    def ready(self, images: int, dealt: bool) -> None:
        """S says that a batch is ready, made by the dealer or not; 0 images: it was stored. Nothing of an image was sent."""

    def finish(self) -> None:
        """S was told that no batch follows."""


class HospitalSession:
    """C's side of a session. `prepare` batches ahead, then `diagnose` them in the same order, then `finish`.

    With a pool that S holds the other half of, batches come from it while there are some; then from the dealer, if one
    takes part.
    """

    def __init__(
        self,
        domain: SecretDomain,
        reveal: Reveal = "logits",
        pool: HospitalPool | None = None,
        gate: AskingGate | None = None,
    ) -> None:
        self._domain, self._links, self._reveal, self._gate = domain, domain.links, reveal, gate
        links = domain.links
        links.set_phase("model")
        description = links.receive_object(MODEL_OWNER, NETWORK)
        self.network = network_from(description)
        self._pool = pool
        if pool is None and POOL in description:
            links.send_object(MODEL_OWNER, POOL, {"id": "", "unused": True})
        self._masked_weights: dict[str, LinearMap] | None = None
        if pool is None or not pool.meet(links, self.network, description.get(POOL)):
            self._receive_masked_weights()
        self._root: Seed | None = None
        if DEALER in links.peers:
            self._root = hospital_seed(links.pairwise_seed(DEALER, SEED), self.network)
        self._prepared: deque[_HospitalBatch] = deque()
        self._announced = 0
        self.sequential_messages = 0
        self.on_truncation: OnTruncation | None = None

    def _receive_masked_weights(self) -> None:
        masked = {}
        for layer in self.network.linear_layers:
            tag = f"{WEIGHTS} {layer.output}"
            masked[layer.output] = self._links.receive_tensor(MODEL_OWNER, tag, torch.int32, layer.weight_shape)
        self._masked_weights = linear_maps(self.network, masked)

    def _announce(self, step: str, records: int, place: Place | None = None) -> int:
        number, links = self._announced, self._links
        batch = {"number": number, "records": records, "reveal": self._reveal}
        if DEALER in links.peers:
            links.send_object(DEALER, BATCH, batch)
        where = {} if place is None else place.message()
        links.send_object(MODEL_OWNER, STEP, {"step": step, **batch, **where})
        self._announced += 1
        return number

    def prepare(self, records: int) -> None:
        """Offline work for one batch of `records` records; returns when S has its corrections, too.

        Raises `PoolError` when nothing is left in the pool and no dealer takes part.
        """
        links, pool = self._links, self._pool
        links.set_phase("offline")
        if pool is not None and pool.left and records <= pool.records:
            place = pool.propose()
            links.send_object(MODEL_OWNER, STEP, {"step": "take", **place.message()})
            links.receive_object(MODEL_OWNER, READY)  # before it is used up here: S may refuse
            self._ready(pool.records, dealt=False)
            correlations = pool.take(self.network, place)
            self._prepared.append(_HospitalBatch(FIRST_NUMBER + place.number, records, pool.records, correlations))
            return
        number, _, correlations = self._made_by_dealer("prepare", records)
        self._prepared.append(_HospitalBatch(number, records, records, correlations))
        links.receive_object(MODEL_OWNER, READY)
        self._ready(records, dealt=True)

    def _ready(self, images: int, dealt: bool) -> None:
        if self._gate is not None:
            self._gate.ready(images, dealt)

    def _made_by_dealer(
        self, step: str, records: int, place: Place | None = None
    ) -> tuple[int, Seed, HospitalCorrelations]:
        """Number, seed and C's part of a batch that is announced now."""
        if self._root is None:
            raise PoolError(
                "no batch is left in the pool and no dealer takes part",
                "fill the pool: mpc-fl dealer fill, or set inference.dealer=true",
            )
        number = self._announce(step, records, place)
        if self._masked_weights is None:
            assert self._pool is not None
            self._masked_weights = linear_maps(self.network, self._pool.masked_weights(self.network))
        plan, seed = correlation_plan(self.network, records, self._reveal), self._root.derive("batch", number)
        return number, seed, hospital_correlations(plan, seed.again(), self._masked_weights)

    def fill(self, batches: int, records: int, stored: Callable[[int], None] = lambda done: None) -> None:
        """Store `batches` batches of `records` records in the pool instead of using them. Tells `stored` how many are."""
        links, pool = self._links, self._pool
        assert pool is not None
        links.set_phase("offline")
        if not pool.agreed:
            assert self._masked_weights is not None
            masked = {name: linear.weights for name, linear in self._masked_weights.items()}
            pool.keep(links, self.network, masked)
        for done in range(batches):
            place = pool.new_place()
            _, seed, correlations = self._made_by_dealer("fill", records, place)
            links.receive_object(MODEL_OWNER, READY)  # before it takes room here: S may refuse to keep more
            self._ready(0, dealt=True)
            pool.put(place, self.network, seed, correlations)
            stored(done + 1)

    def diagnose(self, records: torch.Tensor) -> torch.Tensor:
        """The logits (N, K), float64, of float records (N, C, H, W); with reveal = "label" the classes (N,), int64.

        Raises `SecrecyError` when no batch of this size is prepared, `HeadroomError` for records of another shape. Values
        beyond the network's input are cut off without a word: what S sees must not depend on them.
        """
        return self.diagnose_together([records])[0]

    def diagnose_together(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same for several batches, prepared in this order, that are evaluated at once."""
        links, prepared = self._links, list(self._prepared)[: len(batches)]
        for place, records in enumerate(batches):
            if place >= len(prepared) or prepared[place].records != len(records):
                raise SecrecyError(f"no correlated randomness is prepared for a batch of {len(records)} records")
        shares = [self._share_of_input(records, batch.size) for records, batch in zip(batches, prepared, strict=True)]
        for _ in prepared:
            self._prepared.popleft()
        links.set_phase("online")
        links.send_object(MODEL_OWNER, STEP, {"step": "evaluate", "numbers": [batch.number for batch in prepared]})

        def evaluation_of(batch: _HospitalBatch, share: np.ndarray) -> Callable[[], np.ndarray]:
            link = EvaluationLink(links, MODEL_OWNER, batch.number)
            evaluation = HospitalEvaluation(self.network, link, batch.correlations)
            return lambda: self._evaluate(evaluation, share)

        works = [evaluation_of(batch, share) for batch, share in zip(prepared, shares, strict=True)]
        results = at_once(works, links)
        opened = [self._open(result)[: batch.records] for batch, result in zip(prepared, results, strict=True)]
        links.set_phase("idle")
        return opened

    def _share_of_input(self, records: torch.Tensor, size: int) -> np.ndarray:
        """C's share of the images is all of them, encoded; what it sends of it is masked first (`evaluation`)."""
        if size > len(records):  # batches of a pool have one size
            records = torch.cat([records, records.new_zeros(size - len(records), *records.shape[1:])])
        return as_channels_last(encode_silently(self.network, records).numpy().view(np.uint32))

    def _evaluate(self, evaluation: HospitalEvaluation, share: np.ndarray) -> np.ndarray:
        """Step 4."""
        evaluation.on_truncation = self.on_truncation
        result = evaluation.evaluate(share)
        result = evaluation.label_share(result) if self._reveal == "label" else result
        self.sequential_messages = evaluation.chain.length + 1
        return result

    def _open(self, result: np.ndarray) -> torch.Tensor:
        """Step 5."""
        opened = open_result(self._domain, self.network, self._reveal, result, self._links.name)
        assert opened is not None
        if self._reveal == "label":
            return opened.to(torch.int64) % (1 << label_bits(self.network)[1])
        return opened * self.network.values[self.network.output].scale

    def finish(self) -> None:
        """Tell the others that no batch follows. Batches prepared and not used are dropped."""
        self._announce("finish", 0)
        if self._gate is not None:
            self._gate.finish()
