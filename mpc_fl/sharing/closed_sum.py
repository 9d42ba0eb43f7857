"""Closed sums: masked summands whose sum stays closed until those who made them have seen who is in it.

Protocol. U hospitals, an opener that adds nothing, P(i) the `closing` hospitals after i in U, everything modulo 2^k:
  1. hospital i commits to all its keys of this sum (SHA-256 of each) and sends y_i = x_i + sum over j in U of z_ij + sum
     over j in P(i) of c_ij to the opener. The masks z_ij = -z_ji and c_ij are key streams that i and j both expand from a
     seed of this sum and of its transcript T, the digest of what each of them was told of it
  2. the opener fixes V, the hospitals whose summand has come in time (and passed the check of its norm), and tells all
  3. each i in V sees that V is large enough and that all of V confirmed it (`aggregation.quorum_sum`), records the opening,
     and sends keys: of z_ij for j in U but not in V, of c_ij for j in P(i), of c_ji for j in V with i in P(j). A seed gives
     its keys once, for one V (`keys_for`)
  4. the opener adds the y_i of V and takes away what the keys expand to (`unmask`). What is left is the sum over V

Who learns what. The opener learns the sum over V; the hospitals learn V. Nobody learns a summand, of V or left out.

Why two kinds of masks. The z_ij cancel in the sum over U, so whoever holds all y_i could open it without asking. A sum over
U and another over V would show what was left out. The c_ij do not cancel: no sum opens before step 3, and step 3 opens one.

Security. A summand of V stays masked by z_ij for every other j in V: the opener and |V| - 2 hospitals of V together learn
the sum of the other two and nothing else (Bonawitz et al., CCS 2017, section 4; Bell et al., CCS 2020). A summand that is
left out, also one that comes late, stays masked by the c_ij, whose keys nobody sends, against the opener and `closing` - 1
hospitals. With `closing` = 0 there are no c_ij, and V must be U: for a run that ends when anybody is lost. An opener that
tells two hospitals different things gives them different T: their masks are independent and do not cancel, so what it adds
up is uniform (against Pasquini et al., CCS 2022). Keys are 256 random bits, so their hashes show nothing of them; a key that
does not fit its commitment is known to be its sender's doing, two commitments to one key that differ are that of one of two.

What a lost party costs. Nothing before step 3: V just does not hold it. In step 3 the key of c_ij comes from j, or if j is
lost from i; only if both are lost the sum stays closed for ever (`ProtocolError`), and what was in it must be made anew.

One stream for all c_ij. Unless they are `apart`, because a check of norms folds the masks that two hospitals share, the c_ij of one
hospital are one key stream, whose key is a hash of all their keys: one honest one of P(i) is enough for it to be unknown.

Many hospitals. In a circle (`mask_circle`) z_ij and c_ij are shared by neighbours alone, and P(i) follows i in the circle. No V
is opened that leaves somebody in it with too few who follow.

Who shares what with whom, and which keys open what, is public: `sum_plan`.

Rounds and bytes. Two: y_i (k / 8 bytes per element) and at most 2 `closing` + n commitments, then V and as many keys, of 32
bytes each. The opener expands one key stream for each hospital, or `closing` where they are apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.errors import SAME_VERSION, ProtocolError, SecrecyError
from mpc_fl.sharing.mask_circle import joint_seed
from mpc_fl.sharing.sum_plan import Key, SumPlan, require_admissible

KEY_BYTES = 32


class SummandMasks:
    """A hospital's masks of one sum. `seed_with` gives the seeds that it shares with each other hospital for sums."""

    def __init__(self, plan: SumPlan, me: str, shape: Sequence[int], seed_with: Callable[[str], Seed]) -> None:
        self.plan, self.me, self.shape = plan, me, tuple(shape)
        self._seeds: dict[Key, Seed] = {}
        partners, closed_with = set(plan.partners(me)), set(plan.closed_with(me))
        for other in plan.neighbours(me):
            pair = seed_with(other).derive("closed sum", *plan.label, plan.transcript)
            self._seeds["zero", me, other] = pair.derive("zero")
            if other in partners:
                self._seeds["closing", me, other] = pair.derive("closing", me)
            if other in closed_with:
                self._seeds["closing", other, me] = pair.derive("closing", other)
        self._encoded: Private[torch.Tensor] | None = None
        self._given = False

    def commitments(self) -> list[str]:
        """Of every key of this hospital its SHA-256 as hex, in the order of `SumPlan.keys_known_to`."""
        return [_commitment(self._seeds[key].reveal_for_transport()) for key in self.plan.keys_known_to(self.me)]

    @property
    def encoded(self) -> Private[torch.Tensor]:
        """x_i, for a check that this hospital proves something about. Raises `SecrecyError` when it was masked in place."""
        if self._encoded is None:
            raise SecrecyError(f"the summand of '{self.plan.name}' was not kept without its masks")
        return self._encoded

    def masked(self, encoded: Private[torch.Tensor], in_place: bool = False) -> torch.Tensor:
        """Step 1, where an update is masked: y_i of the shape and dtype (int32 or int64) of x_i, uniform to everybody else.

        Once per sum. `in_place` masks x_i itself, to save its memory, unless it is a view that is not contiguous.
        """
        summand = encoded.inside_protocol()
        self._encoded = None if in_place else encoded
        summand = summand if in_place and summand.is_contiguous() else own_copy(summand)
        for other in self.plan.neighbours(self.me):
            stream = self._seeds["zero", self.me, other].stream("mask")
            _add_or_subtract(stream, summand, self.plan.adds(self.me, other))
        for stream in self.closing_masks():
            stream.add_to(summand)
        return summand

    def closing_masks(self) -> Iterator[Stream]:
        """The key streams of the c_ij of this hospital's own summand, expanded anew each time."""
        own = [self._seeds["closing", self.me, partner].again() for partner in self.plan.partners(self.me)]
        return _closing_streams(self.plan, own)

    def shared_masks(self, hospital: str) -> Iterator[tuple[Stream, bool]]:
        """The masks of another hospital's summand that this one knows, expanded again, and whether each was added.

        For this party's share of a linear function of that summand, in the check before step 2. Raises `SecrecyError` where closing
        masks are one key stream, of which nobody else knows the key.
        """
        self._require_apart()
        zero = self._seeds["zero", self.me, hospital]
        yield zero.again().stream("mask"), self.plan.adds(hospital, self.me)
        closing = self._seeds.get(("closing", hospital, self.me))
        if closing is not None:
            yield closing.again().stream("mask"), True

    def own_masks(self, partner: str) -> Iterator[tuple[Stream, bool]]:
        """As `shared_masks`: the masks of this hospital's own summand that `partner` knows too."""
        self._require_apart()
        yield self._seeds["zero", self.me, partner].again().stream("mask"), self.plan.adds(self.me, partner)
        closing = self._seeds.get(("closing", self.me, partner))
        if closing is not None:
            yield closing.again().stream("mask"), True

    def _require_apart(self) -> None:
        if self.plan.closing and not self.plan.apart:
            raise SecrecyError(f"nobody shares the closing masks of '{self.plan.name}' with only one other hospital")

    def own_keys(self, partner: str) -> list[bytes]:
        """The keys of the masks of this hospital's own summand that `partner` knows too, in the order of `SumPlan.keys_known_to`.

        To show all that `partner` answered falsely in a check. This hospital opens nothing of this sum any more.
        """
        self._given = True
        keys = [key for key in self.plan.keys_known_to(self.me) if key[1:] == (self.me, partner)]
        return [self._seeds[key].reveal_for_transport() for key in keys]

    def keys_for(self, admitted: Sequence[str], smallest: int) -> torch.Tensor:
        """Step 3: the keys for V, uint8 (count, 32), in the order of `SumPlan.keys_of`.

        Raises `ProtocolError` for a V that is too small, foreign to U or without this hospital, `SecrecyError` when keys
        were given before: the sum could be opened over two sets.
        """
        require_admissible(self.plan, admitted, smallest)
        if self.me not in admitted:
            raise ProtocolError(f"{self.me} is not in the sum that it should open", SAME_VERSION)
        if self._given:
            raise SecrecyError(f"the keys of the sum '{self.plan.name}' were asked for twice")
        self._given = True
        keys = [self._seeds[key].reveal_for_transport() for key in self.plan.keys_of(self.me, set(admitted))]
        return (
            torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES) if keys else _NO_KEYS
        )


_NO_KEYS = torch.zeros(0, KEY_BYTES, dtype=torch.uint8)


def _commitment(key: bytes) -> str:
    return hashlib.sha256(b"mpc-fl key of a sum" + key).hexdigest()


class KeyCommitments:
    """What the hospitals of one sum committed to, at the opener: one hash for each key, from both of its holders."""

    def __init__(self, plan: SumPlan) -> None:
        self._plan = plan
        self._known: dict[str, dict[Key, str]] = {}

    def take(self, hospital: str, hashes: object) -> None:
        """Keep a hospital's commitments, as they came.

        Raises `ProtocolError` when they are none, or differ from those of another holder of one of these keys.
        """
        keys = self._plan.keys_known_to(hospital)
        if not isinstance(hashes, list) or len(hashes) != len(keys):
            raise ProtocolError(f"{hospital} did not commit to its keys", SAME_VERSION, hospital)
        for key, committed in zip(keys, hashes, strict=True):
            if not isinstance(committed, str) or len(committed) != 2 * KEY_BYTES:
                raise ProtocolError(f"{hospital} did not commit to its keys", SAME_VERSION, hospital)
            kind, owner, partner = key
            other = partner if owner == hospital else owner
            twin = (kind, other, hospital) if kind == "zero" else key
            if self._known.get(other, {}).get(twin, committed) != committed:
                raise ProtocolError(
                    f"{hospital} and {other} committed to different keys of '{self._plan.name}'",
                    "one of these two does not follow the protocol; nothing was opened",
                )
        self._known[hospital] = dict(zip(keys, hashes, strict=True))

    def require(self, hospital: str, key: Key, row: bytes) -> None:
        """Raise `ProtocolError` unless this is the key that the hospital committed to."""
        if self._known.get(hospital, {}).get(key) != _commitment(row):
            raise ProtocolError(
                f"{hospital} sent another key of '{self._plan.name}' than it committed to",
                f"{hospital} does not follow the protocol; the sum stays closed",
                hospital,
            )

    def checked(self, admitted: Sequence[str], keys: Mapping[str, torch.Tensor]) -> dict[Key, bytes]:
        """The keys for V in the answers of step 3 by hospital.

        Raises `ProtocolError` naming a hospital whose answer is malformed, or not what it committed to.
        """
        known, inside = dict[Key, bytes](), set(admitted)
        for name, answer in keys.items():
            names = self._plan.keys_of(name, inside)
            if answer.shape != (len(names), KEY_BYTES) or answer.dtype != torch.uint8:
                raise ProtocolError(f"{name} sent something else than its keys", SAME_VERSION, name)
            for key, row in zip(names, answer, strict=True):
                known[key] = row.numpy().tobytes()
                self.require(name, key, known[key])
        return known


@dataclass(repr=False)
class ClosedSum:
    """The opener's side: the summands that have come, added up at once, or each kept when a check may leave some out."""

    plan: SumPlan
    dtype: torch.dtype
    shape: tuple[int, ...]
    keep: bool = False
    summands: dict[str, torch.Tensor] = field(default_factory=dict)
    _came: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commitments = KeyCommitments(self.plan)

    @property
    def present(self) -> tuple[str, ...]:
        """The hospitals whose summands have come, in the order of U."""
        return tuple(name for name in self.plan.hospitals if name in self._came)

    def take(self, hospital: str, summand: torch.Tensor) -> None:
        """Keep y_i, which must have the dtype and shape of the sum and is changed."""
        if not self.keep:
            self.take_added([hospital], summand)
            return
        self._came.append(hospital)
        self.summands[hospital] = summand

    def take_added(self, hospitals: Sequence[str], total: torch.Tensor) -> None:
        """Keep the y_i of several hospitals that were added up already. Raises `ProtocolError` where each is kept by itself."""
        if self.keep:
            raise ProtocolError("summands that are checked one by one cannot come added up", "send each by itself")
        self._came.extend(hospitals)
        if self.summands:
            next(iter(self.summands.values())).add_(total)
        else:
            self.summands[hospitals[0]] = total

    def _total(self, admitted: Sequence[str]) -> torch.Tensor:
        """The y_i of V, added up; used up by it. Without `keep` V must be all who came."""
        if not self.keep:
            if tuple(admitted) != self.present:
                raise ProtocolError("a sum that was added up already cannot leave anybody out", "keep its summands")
            return self.summands.popitem()[1]
        total = self.summands.pop(admitted[0])
        for name in admitted[1:]:
            total += self.summands.pop(name)
        return total

    def keys_missing(self, admitted: Sequence[str], answered: Sequence[str]) -> bool:
        """Whether the sum over V cannot be opened with the keys of those who answered."""
        return self.plan.keys_missing(admitted, answered)

    def unmask(self, admitted: Sequence[str], keys: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Step 4: the sum over V, of dtype and shape of a summand. `keys` are the answers of step 3 by hospital.

        The summands are used up. Raises `ProtocolError` when keys are missing, malformed, or not those committed to.
        """
        known = self.commitments.checked(admitted, keys)
        return _without_masks(self.plan, self._total(admitted), admitted, known)


@dataclass(repr=False)
class MaskedTotal:
    """What a hospital of V holds of a sum that each of V opens to itself (`aggregation.peer_sum`), of the summands' shape:
    its masks, what V committed to, and the y_i of V added up, which is used up when it is opened.
    """

    masks: SummandMasks
    commitments: KeyCommitments
    total: torch.Tensor

    @property
    def plan(self) -> SumPlan:
        """What is public of the sum."""
        return self.masks.plan

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a summand."""
        return self.masks.shape

    def unmask(self, admitted: Sequence[str], keys: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Step 4 at a hospital of V: as `ClosedSum.unmask`."""
        return _without_masks(self.plan, self.total, admitted, self.commitments.checked(admitted, keys))


def _closing_streams(plan: SumPlan, own: Sequence[Seed]) -> Iterator[Stream]:
    """Of the c_ij of one hospital, from the seeds that it shares with its partners, in their order."""
    if own and not plan.apart:
        own = [joint_seed([seed.reveal_for_transport() for seed in own])]
    return (seed.stream("mask") for seed in own)


def _without_masks(
    plan: SumPlan, total: torch.Tensor, admitted: Sequence[str], known: Mapping[Key, bytes]
) -> torch.Tensor:
    for key in plan.keys_needed(admitted):
        if key not in known:
            raise ProtocolError("the keys of a sum were lost with the parties that held them", "make its summands anew")
        kind, owner, partner = key
        if kind == "zero":
            _add_or_subtract(Seed(known[key]).stream("mask"), total, not plan.adds(owner, partner))
    for name in admitted:
        for stream in _closing_streams(
            plan, [Seed(known["closing", name, partner]) for partner in plan.partners(name)]
        ):
            stream.subtract_from(total)
    return total


def _add_or_subtract(stream: Stream, total: torch.Tensor, add: bool) -> None:
    (stream.add_to if add else stream.subtract_from)(total)
