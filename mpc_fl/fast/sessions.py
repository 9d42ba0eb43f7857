"""A diagnosis session of the engine `fast`: hospital C and model owner S, with a dealer D outside.

Protocol, once:
  1. S tells C and D the public network (architecture, shapes, scales, widths), and C the masked weights F = W - B
Per batch, offline, before the images are needed:
  2. C announces how many records come and what will be revealed, S repeats it to D
  3. D sends S its corrections; C draws its part and computes F * A (`correlations`)
Per group of prepared batches, online:
  4. C begins with its encoded images, both evaluate the network on shares (`engine`), all batches of the group at once
  5. the logits, or with reveal = "label" only the index of the largest, are opened to C alone (`opening.open_to`), in order

Security. Semi-honest parties, D colludes with neither. To S everything it receives is uniform: E, masked openings,
corrections. To C: F, masked openings, and the opened result. D receives the network and numbers of records. See the modules
named for the arguments; the number and sizes of messages depend on public values alone.

Steps 2 and 3 may have been done before: with a pool both parties take batches from their disks, see `party_pools`.

Batches of a group share nothing: masks, tags of messages and threads are each one's own. While one of them waits for its peer
or for the network, another computes or sends, so both parties are busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mpc_fl.errors import ModelError, MpcFlError, PoolError, ProtocolError, SecrecyError
from mpc_fl.fast.correlations import (
    ClientCorrelations,
    OwnerCorrelations,
    Product,
    Program,
    Reveal,
    client_correlations,
    label_bits,
    owner_correlations,
    program_of,
)
from mpc_fl.fast.dealing import BATCH, MASK_SEED, NETWORK, READY, SEED, STEP, batch_from, correction_tag
from mpc_fl.fast.emulation import encode
from mpc_fl.fast.engine import (
    ClientEvaluation,
    OnTruncation,
    aligned_elements,
    as_channels_last,
    client_evaluation,
    empty_share,
    owner_evaluation,
)
from mpc_fl.fast.linear import LinearMap, linear_maps, weight_masks
from mpc_fl.fast.lowering import IntegerWeights
from mpc_fl.fast.network import RING_BITS, Network
from mpc_fl.fast.network_messages import describe, network_from
from mpc_fl.fast.party_pools import FIRST_NUMBER, POOL, HospitalPool, OwnerPool, Place
from mpc_fl.opening import SecretDomain, open_to
from mpc_fl.ring import RingShare
from mpc_fl.secrecy import Shared
from mpc_fl.stream_cipher import Seed
from mpc_fl.transport import Links

_WEIGHTS = "masked weights"


@dataclass(frozen=True, repr=False)
class _ClientBatch:
    """A batch prepared at C: asked for `records` records, made for `size`."""

    number: int
    records: int
    size: int
    correlations: ClientCorrelations


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


class Hospital:
    """C's side of a session. `prepare` batches ahead, then `diagnose` them in the same order, then `finish`.

    With a pool that S holds the other half of, batches come from it while there are some; then from the dealer, if one
    takes part.
    """

    def __init__(
        self,
        domain: SecretDomain,
        owner: str,
        dealer: str,
        reveal: Reveal = "logits",
        pool: HospitalPool | None = None,
    ) -> None:
        self._domain, self._owner, self._dealer, self._reveal = domain, owner, dealer, reveal
        links = domain.runtime.links
        links.set_phase("model")
        description = links.receive_object(owner, NETWORK)
        self.network = network_from(description)
        self._pool = pool
        if pool is None and POOL in description:
            links.send_object(owner, POOL, {"id": "", "unused": True})
        self._masked_weights: dict[str, LinearMap] | None = None
        if pool is None or not pool.meet(links, self.network, description.get(POOL)):
            self._receive_masked_weights()
        self._root = links.pairwise_seed(dealer, SEED) if dealer in links.peers else None
        self._prepared: deque[_ClientBatch] = deque()
        self._announced = 0
        self.sequential_messages = 0
        self.on_truncation: OnTruncation | None = None

    def _receive_masked_weights(self) -> None:
        masked, links = {}, self._domain.runtime.links
        for layer in self.network.linear_layers:
            tag = f"{_WEIGHTS} {layer.output}"
            masked[layer.output] = links.receive_tensor(self._owner, tag, torch.int32, layer.weight_shape)
        self._masked_weights = linear_maps(self.network, masked)

    def _announce(self, step: str, records: int, place: Place | None = None) -> int:
        number, links = self._announced, self._domain.runtime.links
        batch = {"number": number, "records": records, "reveal": self._reveal}
        if self._dealer in links.peers:
            links.send_object(self._dealer, BATCH, batch)
        where = {} if place is None else place.message()
        links.send_object(self._owner, STEP, {"step": step, **batch, **where})
        self._announced += 1
        return number

    def prepare(self, records: int) -> None:
        """Offline work for one batch of `records` records; returns when S has its corrections, too.

        Raises `PoolError` when nothing is left in the pool and no dealer takes part.
        """
        links = self._domain.runtime.links
        links.set_phase("offline")
        pool = self._pool
        if pool is not None and pool.left and records <= pool.records:
            place, correlations = pool.take(self.network)
            number = FIRST_NUMBER + place.number
            links.send_object(self._owner, STEP, {"step": "take", **place.message()})
            self._prepared.append(_ClientBatch(number, records, pool.records, correlations))
            links.receive_object(self._owner, READY)
            return
        number, _, correlations = self._made_by_dealer("prepare", records)
        self._prepared.append(_ClientBatch(number, records, records, correlations))
        links.receive_object(self._owner, READY)

    def _made_by_dealer(
        self, step: str, records: int, place: Place | None = None
    ) -> tuple[int, Seed, ClientCorrelations]:
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
        program, seed = program_of(self.network, records, self._reveal), self._root.derive("batch", number)
        return number, seed, client_correlations(program, seed.again(), self._masked_weights)

    def fill(self, batches: int, records: int, stored: Callable[[int], None] = lambda done: None) -> None:
        """Store `batches` batches of `records` records in the pool instead of using them. Tells `stored` how many are."""
        links, pool = self._domain.runtime.links, self._pool
        assert pool is not None
        links.set_phase("offline")
        if not pool.agreed:
            assert self._masked_weights is not None
            masked = {name: linear.weights for name, linear in self._masked_weights.items()}
            pool.keep(links, self.network, masked)
        for done in range(batches):
            place = pool.new_place()
            _, seed, correlations = self._made_by_dealer("fill", records, place)
            links.receive_object(self._owner, READY)  # before it takes room here: S may refuse to keep more
            pool.put(place, self.network, seed, correlations)
            stored(done + 1)

    def diagnose(self, records: torch.Tensor) -> torch.Tensor:
        """The logits (N, K), float64, of float records (N, C, H, W); with reveal = "label" the classes (N,), int64.

        Raises `SecrecyError` when no batch of this size is prepared, `HeadroomError` for records that do not fit.
        """
        return self.diagnose_together([records])[0]

    def diagnose_together(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same for several batches, prepared in this order, that are evaluated at once."""
        links, prepared = self._domain.runtime.links, list(self._prepared)[: len(batches)]
        for place, records in enumerate(batches):
            if place >= len(prepared) or prepared[place].records != len(records):
                raise SecrecyError(f"no correlated randomness is prepared for a batch of {len(records)} records")
        shares = [self._share_of_input(records, batch.size) for records, batch in zip(batches, prepared, strict=True)]
        for _ in prepared:
            self._prepared.popleft()
        links.set_phase("online")
        links.send_object(self._owner, STEP, {"step": "evaluate", "numbers": [batch.number for batch in prepared]})

        def evaluation_of(batch: _ClientBatch, share: np.ndarray) -> Callable[[], np.ndarray]:
            evaluation = client_evaluation(self.network, links, self._owner, batch.number, batch.correlations)
            return lambda: self._evaluate(evaluation, share)

        works = [evaluation_of(batch, share) for batch, share in zip(prepared, shares, strict=True)]
        results = _at_once(works, links)
        opened = [self._open(result)[: batch.records] for batch, result in zip(prepared, results, strict=True)]
        links.set_phase("idle")
        return opened

    def _share_of_input(self, records: torch.Tensor, size: int) -> np.ndarray:
        if size > len(records):  # batches of a pool have one size
            records = torch.cat([records, records.new_zeros(size - len(records), *records.shape[1:])])
        return as_channels_last(encode(self.network, records).numpy().view(np.uint32))

    def _evaluate(self, evaluation: ClientEvaluation, share: np.ndarray) -> np.ndarray:
        """Step 4."""
        evaluation.on_truncation = self.on_truncation
        result = evaluation.evaluate(share)
        result = evaluation.label_share(result) if self._reveal == "label" else result
        self.sequential_messages = evaluation.chain.length + 1
        return result

    def _open(self, result: np.ndarray) -> torch.Tensor:
        """Step 5."""
        output, me = self.network.values[self.network.output], self._domain.runtime.links.name
        if self._reveal == "label":
            bits = label_bits(self.network)[1]
            label = _open(self._domain, result, bits, "label", me)
            assert label is not None
            return label.to(torch.int64) % (1 << bits)
        logits = _open(self._domain, result, output.bits, "logits", me)
        assert logits is not None
        return logits * output.scale

    def finish(self) -> None:
        """Tell the others that no batch follows. Batches prepared and not used are dropped."""
        self._announce("finish", 0)


class Owner:
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
                links.send_tensor(hospital, f"{_WEIGHTS} {layer.output}", masked)
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
                    raise ProtocolError("the hospital asked for what was not agreed", "run the same version everywhere")

    def _begin(self, records: Any) -> None:
        """A batch that will be evaluated: within what was agreed, and the gate lets it pass."""
        if type(records) is not int or not 1 <= records <= self._largest_batch or len(self._prepared) >= self._at_once:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed, or for too many at once",
                "check inference.batch_size and inference.at_once",
            )
        if self._gate is not None:
            self._gate.begin(records)

    def _prepare(self, message: dict[str, Any]) -> None:
        """Steps 2 and 3."""
        self._begin(message.get("records"))
        number, records, program, seed, corrections = self._made_by_dealer(message)
        self._keep_ready(number, records, program, owner_correlations(program, seed, corrections))

    def _take(self, pool: OwnerPool, place: Place) -> None:
        """The same from the pool."""
        self._begin(pool.records)
        self._domain.runtime.links.set_phase("offline")
        correlations = pool.take(self.network, place)
        program = program_of(self.network, pool.records, self._reveal)
        self._keep_ready(FIRST_NUMBER + place.number, pool.records, program, correlations)

    def _fill(self, pool: OwnerPool, message: dict[str, Any]) -> None:
        """Store a batch in the pool."""
        if self._gate is not None:
            self._gate.store(pool.stored)
        number, records, _, seed, corrections = self._made_by_dealer(message)
        if records != pool.records:
            raise ProtocolError("the hospital fills batches of another size", "give both one configuration")
        pool.put(Place.from_message(message), self.network, seed, corrections)
        if self._gate is not None:
            self._gate.end()
        self._domain.runtime.links.send_object(self._hospital, READY, {"number": number})

    def _made_by_dealer(self, message: dict[str, Any]) -> tuple[int, int, Program, Seed, dict[str, np.ndarray]]:
        """Number, size, pieces, own seed and corrections of a batch that the hospital announced."""
        links = self._domain.runtime.links
        links.set_phase("offline")
        number = self._announced
        records, reveal = batch_from(message, number)
        if reveal != self._reveal or not 1 <= records <= self._largest_batch:
            raise ProtocolError(
                "the hospital asked for a batch or result not agreed", "check inference.reveal and inference.batch_size"
            )
        if self._root is None:
            raise ProtocolError("the hospital asked for a batch of a dealer that takes no part", "fill the pool")
        links.send_object(self._dealer, BATCH, message)
        self._announced += 1
        program = program_of(self.network, records, reveal)
        corrections = {
            name: links.receive_tensor(
                self._dealer, correction_tag(number), torch.uint8, (piece.correction_bytes,)
            ).numpy()
            for name, piece in program.pieces.items()
        }
        return number, records, program, self._root.derive("batch", number), corrections

    def _keep_ready(self, number: int, records: int, program: Program, correlations: OwnerCorrelations) -> None:
        """For the hospital to evaluate."""
        self._prepared.append(_OwnerBatch(number, records, correlations))
        if records not in self._warm:  # the fastest way of each convolution is measured now, not while an image waits
            self._warm.add(records)
            for name, piece in program.pieces.items():
                if isinstance(piece, Product):
                    self._weights[name](torch.zeros(program.masks[piece.value], dtype=torch.int32))
        self._domain.runtime.links.send_object(self._hospital, READY, {"number": number})

    def _evaluate(self, numbers: Any) -> int:
        """Steps 4 and 5 for the prepared batches of these numbers; returns how many."""
        batches = list(self._prepared)[: len(numbers) if isinstance(numbers, list) else 0]
        if not batches or [batch.number for batch in batches] != numbers:
            raise ProtocolError("the hospital asked for a batch not prepared", "run the same version everywhere")
        for _ in batches:
            self._prepared.popleft()
        links = self._domain.runtime.links
        links.set_phase("online")
        output = self.network.values[self.network.output]

        def evaluation_of(batch: _OwnerBatch) -> Callable[[], np.ndarray]:
            evaluation = owner_evaluation(
                self.network, links, self._hospital, batch.number, batch.correlations, self._weights, self._biases
            )
            evaluation.on_truncation = self.on_truncation
            share = empty_share(self.network, batch.records)
            if self._reveal == "label":
                return lambda: evaluation.label_share(evaluation.evaluate(share))
            return lambda: evaluation.evaluate(share)

        for result in _at_once([evaluation_of(batch) for batch in batches], links):
            if self._reveal == "label":
                _open(self._domain, result, label_bits(self.network)[1], "label", self._hospital)
            else:
                _open(self._domain, result, output.bits, "logits", self._hospital)
        if self._gate is not None and not self._prepared:
            self._gate.end()
        links.set_phase("idle")
        return len(batches)


def _at_once(works: Sequence[Callable[[], np.ndarray]], links: Links) -> list[np.ndarray]:
    """The results of all, each on a thread of its own; the first failure ends the waits of the others and is raised."""
    if len(works) == 1:
        return [works[0]()]

    def run(work: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return work()
        except MpcFlError as error:
            links.interrupt(error)
            raise
        except Exception as error:
            links.interrupt(MpcFlError(f"an evaluation failed with {type(error).__name__}"))
            raise

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(run, works))


def _open(domain: SecretDomain, share: np.ndarray, bits: int, what: str, hospital: str) -> torch.Tensor | None:
    """Open a value of `bits` bits to the hospital alone, as signed integers in float64 there."""
    elements = RingShare(aligned_elements(share, bits), RING_BITS - bits)
    return open_to(domain, Shared(what, elements), [hospital], "diagnosis for the hospital that asked")
