"""What hospital C and model owner S keep in their pools (`pool`), and how their halves meet.

Filling: a session in which C and S store what the dealer made instead of using it; D keeps nothing. Per model once:
  1. S draws the seed of B, gives it to D and keeps it; C receives F = W - B and keeps it
Per batch:
  2. C and D have a seed in common, S and D another, from X25519 keys of this session alone; D sends S its corrections
  3. C stores its seed and z_C = F * A + u_C, S its seed and its corrections, under one number and one random tag

Using, at the start of a session:
  1. each shows that it holds the pool's other half: a value of the key that both made when they filled the first batch, over
     the X25519 keys of this session. No certificate needs to be the one of then, so certificates may be renewed.
  2. each tells which numbers it has left and its `next`; both give up all below the larger one, to the disk
Per batch:
  3. C tells S the lowest number that both have, and its tag
  4. S takes it (`Pool.take`: used up before anything of it is read) and says so, then C does. S may refuse before: then neither
     has used it. Another tag means halves of different batches, and ends the session

Security. A batch from a pool is what the dealer would have sent in the session: the argument of `online.hospital_session` holds,
as B may serve any number of batches (`linear`). It needs that no batch is used twice and that B belongs to one W: two W under
one B would show C their difference. So S keeps a digest of W with the seed of B and refuses the pool for any other model. A
batch used twice would show S y - y' of two images; it takes both parties to use one, and each of them refuses (`pool`).
What S learns more: how many batches C has left. The last batch of a session is filled up with black images.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, PoolError, ProtocolError
from mpc_fl.inference.fast.messages import network_digest
from mpc_fl.inference.fast.network import IntegerWeights, Network, Reveal
from mpc_fl.inference.fast.preprocessing.batch_place import MOST_BATCHES, POOL, Place
from mpc_fl.inference.fast.preprocessing.correlations import (
    CorrelationPlan,
    HospitalCorrelations,
    LinearProduct,
    OwnerCorrelations,
    correlation_plan,
    hospital_correlations,
    owner_correlations,
    split_corrections,
)
from mpc_fl.inference.fast.preprocessing.pool import Pool, Purpose, Terms, create_pool, is_pool, open_pool
from mpc_fl.inference.fast.preprocessing.sealed_file import TAG_BYTES
from mpc_fl.links.links import Links

_HEAD = 64  # bytes before the words of a record: its seed, and zeros

P = TypeVar("P", bound="_PartyPool")
log = logging.getLogger(__name__)


class _PartyPool:
    """What both parties do alike. `records` and `reveal` are those of this session; close it in the end."""

    def __init__(
        self, directory: Path, party: str, counterpart: str, purpose: Purpose, records: int, reveal: Reveal
    ) -> None:
        self.directory = directory / party / counterpart
        self._party, self._counterpart, self._purpose = party, counterpart, purpose
        self._records, self._reveal = records, reveal
        self._pool = open_pool(self.directory, purpose) if is_pool(self.directory) else None
        self._common: deque[int] = deque()
        self._place = 0
        self.agreed = False

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process use the pool."""
        if self._pool is not None:
            self._pool.close()

    @property
    def filling(self) -> bool:
        """Whether this session fills the pool; another may use it meanwhile."""
        return self._purpose == "fill"

    @property
    def left(self) -> int:
        """Batches that both parties still have."""
        return len(self._common)

    @property
    def stored(self) -> int:
        """Batches on this party's disk."""
        return len(self._agreed_pool().numbers)

    @property
    def records(self) -> int:
        """Records per batch of this pool."""
        return self._agreed_pool().terms.records

    def _agreed_pool(self) -> Pool:
        if self._pool is None or not self.agreed:
            raise PoolError(
                f"the pool at {self.directory} takes no part in this session", "fill it: mpc-fl dealer fill"
            )
        return self._pool

    # ---- meeting ---------------------------------------------------------------------------------------------------

    def _require_fitting(self, network: Network) -> None:
        """The pool must be for this network, and for what is revealed."""
        if self._pool is None:
            return
        terms, fill = self._pool.terms, "fill another site.pool"
        if terms.network != network_digest(network):
            raise PoolError(f"the pool at {self.directory} is for another network", fill)
        if terms.reveal != self._reveal:
            raise PoolError(f"the pool at {self.directory} is for inference.reveal={terms.reveal}", fill)
        if terms.records > self._records or (terms.records < self._records and self._purpose == "fill"):
            raise PoolError(f"the pool at {self.directory} is for inference.batch_size={terms.records}", fill)

    def _word(self) -> dict[str, Any]:
        if self._pool is None:
            return {"id": "", "unused": True}
        return {"id": self._pool.terms.pool, "unused": self._pool.end == 0}

    def _counters(self, links: Links) -> dict[str, Any]:
        assert self._pool is not None
        counters = {"next": self._pool.next, "end": self._pool.end, "numbers": self._pool.numbers}
        return {**counters, "proof": self._proof(links, self._party, self._counterpart, counters)}

    def _proof(self, links: Links, sender: str, receiver: str, counters: dict[str, Any]) -> str:
        assert self._pool is not None
        fingerprints = links.key_fingerprint(sender), links.key_fingerprint(receiver)
        proof = self._pool.meeting_key.derive(sender, receiver, *fingerprints, json.dumps(counters))
        return proof.reveal_for_transport().hex()

    def _outcome(self, theirs: dict[str, Any]) -> Literal["same", "new", "none"]:
        """What becomes of both pools, alike at both parties. Raises `PoolError` for halves of different pools."""
        mine = self._word()
        if mine["id"] and mine["id"] == theirs.get("id"):
            return "same"
        if self._purpose == "fill" and mine["unused"] and theirs.get("unused") is True:
            return "new"
        if self._purpose == "use" and not (mine["id"] and theirs.get("id")):
            if mine["id"]:
                log.warning("%s has no pool that belongs to %s: the dealer is asked", self._counterpart, self.directory)
            return "none"
        raise PoolError(
            f"{self._counterpart} does not hold the other half of the pool at {self.directory}",
            "name the right site.pool at both parties, or fill a new one",
        )

    def _meet(self, links: Links, theirs: dict[str, Any]) -> None:
        """Steps 1 and 2 of using, or where to go on with filling."""
        assert self._pool is not None
        first, end, numbers = theirs.get("next"), theirs.get("end"), theirs.get("numbers")
        if (
            type(first) is not int
            or type(end) is not int
            or not isinstance(numbers, list)
            or any(type(number) is not int or not 0 <= number <= MOST_BATCHES for number in (first, end, *numbers))
        ):
            raise ProtocolError(f"{self._counterpart} does not say what its pool holds", SAME_VERSION)
        counters = {"next": first, "end": end, "numbers": numbers}
        proof = self._proof(links, self._counterpart, self._party, counters)
        if not hmac.compare_digest(proof, str(theirs.get("proof"))):
            raise ProtocolError(f"{self._counterpart} does not hold the other half of this pool", "fill a new one")
        self.agreed = True
        if self._purpose == "fill":
            self._place = max(self._pool.end, end)
            return
        common = set(self._pool.numbers) & set(numbers)
        self._pool.give_up_below(min(first, self._pool.end))
        self._common = deque(sorted(number for number in common if number >= self._pool.next))

    def _create(self, links: Links, network: Network, content: np.ndarray) -> None:
        """Step 1 of filling. The key of the pool is of this session's X25519 keys, so both make the same one."""
        self.close()
        key = links.pairwise_seed(self._counterpart, POOL)
        name = key.derive("name").reveal_for_transport().hex()[:32]
        terms = Terms(name, self._party, self._counterpart, network_digest(network), self._records, self._reveal)
        self._pool = create_pool(self.directory, terms, key.derive("meeting"), content)
        self.agreed = True

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _plan(self, network: Network) -> CorrelationPlan:
        terms = self._agreed_pool().terms
        return correlation_plan(network, terms.records, self._reveal)

    def _put(self, place: Place, seed: Seed, words: np.ndarray) -> None:
        content = np.zeros(_HEAD + len(words), dtype=np.uint8)
        key = seed.reveal_for_transport()
        content[: len(key)] = np.frombuffer(key, dtype=np.uint8)
        content[_HEAD:] = words
        self._agreed_pool().put(place.number, bytes.fromhex(place.tag), content)

    def _take(self, number: int, size: int) -> tuple[Place, Seed, np.ndarray]:
        tag, secret = self._agreed_pool().take(number)
        content = secret.inside_protocol()
        if len(content) != _HEAD + size:
            raise PoolError(f"record {number} of the pool at {self.directory} has another size", "fill a new pool")
        return Place(number, tag.hex()), Seed(content[:32].tobytes()), content[_HEAD:]


class HospitalPool(_PartyPool):
    """C's half."""

    def meet(self, links: Links, network: Network, offered: object) -> bool:
        """Find out whether this session uses the pool; `offered` is what S said with its network. Raises `PoolError`.

        True: F is in the pool. False: S sends F; when filling, `keep` it then.
        """
        self._require_fitting(network)
        theirs = offered if isinstance(offered, dict) else {"id": "", "unused": self._purpose == "use"}
        outcome = self._outcome(theirs)
        if isinstance(offered, dict):
            own = self._counters(links) if self._pool is not None else {}
            links.send_object(self._counterpart, POOL, {**self._word(), **own})
        if outcome == "same":
            self._meet(links, links.receive_object(self._counterpart, POOL))
        return outcome == "same"

    def keep(self, links: Links, network: Network, masked: Mapping[str, torch.Tensor]) -> None:
        """Begin a pool with F, int32, by layer."""
        words = [masked[layer.output].reshape(-1) for layer in network.linear_layers]
        self._create(links, network, torch.cat(words).numpy().view(np.uint8))

    def masked_weights(self, network: Network) -> dict[str, torch.Tensor]:
        """F, int32, by layer."""
        words = torch.from_numpy(self._agreed_pool().model().inside_protocol().view(np.int32))
        shapes = {layer.output: layer.weight_shape for layer in network.linear_layers}
        return _split(words, shapes)

    def new_place(self) -> Place:
        """Where the next batch goes."""
        self._place += 1
        return Place(self._place - 1, secrets.token_hex(TAG_BYTES))

    def put(self, place: Place, network: Network, seed: Seed, correlations: HospitalCorrelations) -> None:
        """Store a batch: its seed, and the products that were computed from it."""
        words = [correlations.products.take(name).reshape(-1) for name in _product_shapes(self._plan(network))]
        self._put(place, seed, torch.cat(words).numpy().view(np.uint8))

    def propose(self) -> Place:
        """The next batch."""
        return Place(self._common[0], self._agreed_pool().tag(self._common[0]).hex())

    def take(self, network: Network, place: Place) -> HospitalCorrelations:
        """The batch that was proposed, used up from now on."""
        plan = self._plan(network)
        shapes = _product_shapes(plan)
        size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
        found, seed, words = self._take(self._common.popleft(), size)
        if found != place:
            raise ProtocolError("the next batch of the pool is not the one that was proposed", "restart the session")
        products = _split(torch.from_numpy(words.view(np.int32)), shapes)
        return hospital_correlations(plan, seed, {}, products)


class OwnerPool(_PartyPool):
    """S's half."""

    def offer(self, network: Network, integers: IntegerWeights) -> dict[str, Any]:
        """What S says with its network. Raises `PoolError` when the pool is for another network or other weights."""
        self._require_fitting(network)
        if self._pool is not None:
            kept = self._pool.model().inside_protocol()
            if len(kept) != 64 or not hmac.compare_digest(kept[32:].tobytes(), weights_digest(integers)):
                # Under the same B, the difference of two models would show.
                raise PoolError(f"the pool at {self.directory} is for another model", "fill another site.pool")
        return {POOL: self._word()}

    def meet(self, links: Links) -> bool:
        """As for the hospital."""
        theirs = links.receive_object(self._counterpart, POOL)
        outcome = self._outcome(theirs)
        if outcome == "same":
            links.send_object(self._counterpart, POOL, self._counters(links))
            self._meet(links, theirs)
        return outcome == "same"

    def keep(self, links: Links, network: Network, integers: IntegerWeights, mask_seed: Seed) -> None:
        """Begin a pool with the seed of B, which masks these weights and no others."""
        content = mask_seed.reveal_for_transport() + weights_digest(integers)
        self._create(links, network, np.frombuffer(content, dtype=np.uint8))

    def mask_seed(self) -> Seed:
        """The seed of B."""
        return Seed(self._agreed_pool().model().inside_protocol()[:32].tobytes())

    def put(self, place: Place, network: Network, seed: Seed, corrections: Mapping[str, np.ndarray]) -> None:
        """Store a batch: its seed and the dealer's corrections, uint8, by piece."""
        if place.number != self._place:
            raise ProtocolError("the hospital named a place in the pool that is not next", SAME_VERSION)
        self._place += 1
        plan = self._plan(network)
        words = np.zeros(plan.stored_bytes, dtype=np.uint8)
        for name, view in split_corrections(plan, words).items():
            view[:] = corrections[name]
        self._put(place, seed, words)

    def take(self, network: Network, place: Place) -> OwnerCorrelations:
        """The batch that the hospital took. Raises `ProtocolError` for one that not both have left, or of another tag."""
        if not self._common or place.number != self._common[0]:
            raise ProtocolError("the hospital asked for a batch that is not next in the pool", "restart the session")
        plan = self._plan(network)
        found, seed, words = self._take(self._common.popleft(), plan.stored_bytes)
        if found != place:
            raise ProtocolError("the two parties hold halves of different batches", "fill a new pool at both")
        return owner_correlations(plan, seed, split_corrections(plan, words))


def _product_shapes(plan: CorrelationPlan) -> dict[str, tuple[int, ...]]:
    return {name: piece.shape for name, piece in plan.pieces.items() if isinstance(piece, LinearProduct)}


def _split(words: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if sum(sizes) != len(words):
        raise PoolError("a file of a pool has another size than its network needs", "fill a new pool")
    pieces = zip(shapes.items(), words.split(sizes), strict=True)
    return {name: piece.reshape(shape) for (name, shape), piece in pieces}


def weights_digest(integers: IntegerWeights) -> bytes:
    """SHA-256 of integer weights and biases. A secret of the model owner's: who guesses a model could compare."""
    digest = hashlib.sha256()
    for tensors in (integers.weights, integers.biases):
        for name in sorted(tensors):
            digest.update(name.encode() + str(tuple(tensors[name].shape)).encode())
            digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.digest()
