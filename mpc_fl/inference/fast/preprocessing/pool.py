"""Correlations made ahead, on one party's disk: encrypted, each used once, also across crashes.

A pool belongs to two parties, hospital C and model owner S, and one model; each keeps its own half in a directory of its own
(mode 0700):

  keys              mode 0600: what the pool is for, how many records were used, the keys that are still needed
  model             sealed: at C the masked weights F = W - B; at S the seed of B and the digest of W
  <number>.record   sealed: one batch. At C its seed and its shares z_C = F * A + u_C, at S its seed and corrections
  use.lock          held by the one process that uses the pool; another may fill it meanwhile (fill.lock)

The dealer keeps nothing. What lies in which record and how the parties agree on one is in `party_pools`; this module only stores.

Used once. Records are used in ascending order, so one number, `next`, says which are used up: all below it. `take(k)` writes
next = k + 1 to the disk (fsync of the file, of the directory) before it reads what is secret of record k. A crash before that has
used nothing, a crash after it wastes record k. Keys are a chain: that of record k follows from chain value k, and value
k + 1 from value k by HMAC-SHA256, but not back; `keys` holds value `next` only. So a used record cannot be decrypted any
more, even if its file is put back, copied, or read from blocks that the disk still has (Bellare and Yee, CT-RSA 2003).
Not detectable by one party alone: that somebody puts back an old `keys` together with old records (a backup, a snapshot of
a machine). Then the other party's `next` is larger, which `party_pools` takes over, so nothing is used twice unless both
parties are put back. Never restore a pool from a backup: fill a new one.

Sealed (`sealed_file`) with a key of its own for each file. Associated data: parties, pool, network, batch size, what is revealed,
number and tag of the record: a record of another pool, another number or another party does not open.

The keys file is as secret as the party's identity key beside it (same mode, same disk, not encrypted): who can read either can
act as this party. A stolen disk without its keys file shows sizes and numbers of records, and for whom they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import PoolError, SecrecyError
from mpc_fl.files import written_whole
from mpc_fl.inference.fast.preprocessing.sealed_file import MAGIC, SALT_BYTES, TAG_BYTES, readable, seal, unseal
from mpc_fl.parsing import parse_json

Purpose = Literal["use", "fill"]
KEYS, MODEL, RECORD = "keys", "model", ".record"


@dataclass(frozen=True)
class Terms:
    """What every record of a pool is for; public. `pool` names it, `network` is the digest of the public network."""

    pool: str
    party: str
    counterpart: str
    network: str
    records: int
    reveal: str


class Pool:
    """One party's half of a pool. Made by `create_pool` or `open_pool`; close it, or use it in a `with` block.

    Every method but those that look raises `PoolError` for files that cannot be read or written.
    """

    def __init__(self, directory: Path, terms: Terms, keys: _Keys) -> None:
        self.directory, self.terms = directory, terms
        self._keys = keys
        self._locks, self._purpose = contextlib.ExitStack(), ""

    def __repr__(self) -> str:
        return f"Pool({self.directory}, {len(self.numbers)} records)"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process use the pool."""
        self._locks.close()
        self._purpose = ""

    # ---- looking ---------------------------------------------------------------------------------------------------

    @property
    def next(self) -> int:
        """Every record below this number is used up or given up."""
        return self._keys.next

    @property
    def numbers(self) -> list[int]:
        """The numbers of the records that are left, ascending."""
        return [number for number in _numbers(self.directory) if number >= self.next]

    @property
    def end(self) -> int:
        """Above the number of every record that this pool holds or used."""
        return max([self.next, *(number + 1 for number in self.numbers)])

    def tag(self, number: int) -> bytes:
        """The tag of a record, public; `take` finds out whether it is genuine. Raises `PoolError` for no such record."""
        path = self._path(number)
        with readable(path), path.open("rb") as file:
            header = file.read(len(MAGIC) + SALT_BYTES + TAG_BYTES)
        return header[len(MAGIC) + SALT_BYTES :]

    @property
    def meeting_key(self) -> Seed:
        """What the two halves know each other by: the same at both parties, known to nobody else."""
        return self._keys.meeting.again()

    def model(self) -> Private[np.ndarray]:
        """What `create_pool` was given, uint8."""
        key = self._keys.model.again()
        return Private("the model's part of a pool", unseal(self.directory / MODEL, key, self._context("model"))[1])

    # ---- filling ---------------------------------------------------------------------------------------------------

    def put(self, number: int, tag: bytes, content: np.ndarray) -> None:
        """Store a batch, uint8 of any size. `tag` (16 public bytes) is the same at both parties.

        Raises `SecrecyError` for a number that is used up or taken.
        """
        self._require("fill")
        if number < self.next or number in self.numbers:
            raise SecrecyError(f"record {number} of the pool at {self.directory} exists or was used already")
        seal(self._path(number), self._keys.of_record(number), self._context(number), tag, content)

    # ---- using -----------------------------------------------------------------------------------------------------

    def take(self, number: int) -> tuple[bytes, Private[np.ndarray]]:
        """The tag and content of a record; it, and all before it, are used up from then on, whatever happens.

        Raises `SecrecyError` for a record that was used before or given up, `PoolError` for one that does not exist (then
        nothing is used up) or is damaged (then it is).
        """
        path = self._path(number)
        if number < self.next:
            raise SecrecyError(f"record {number} of the pool at {self.directory} was used already")
        if not path.is_file():
            raise PoolError(f"the pool at {self.directory} has no record {number}", "fill it: mpc-fl dealer fill")
        key = self._keys.of_record(number)
        self.give_up_below(number + 1)  # on the disk now; not before this line may anything of the record be used
        try:
            tag, content = unseal(path, key, self._context(number))
        finally:
            path.unlink(missing_ok=True)
        return tag, Private("a batch of correlations", content)

    def give_up_below(self, number: int) -> None:
        """Durably use up every record below `number`."""
        self._require("use")
        if number <= self.next:
            return
        self._keys = self._keys.forward(number)
        self._keys.write(self.directory, self.terms)
        for old in _numbers(self.directory):
            if old < number - 1:  # the last one may be about to be read
                self._path(old).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:08d}{RECORD}"

    def _context(self, what: int | str) -> bytes:
        return json.dumps({**asdict(self.terms), "what": what}, sort_keys=True).encode()

    def _require(self, purpose: Purpose) -> None:
        if self._purpose != purpose:
            raise SecrecyError(f"the pool at {self.directory} was not opened to {purpose} it")

    def _lock(self, purpose: Purpose) -> None:
        path = self.directory / f"{purpose}.lock"
        with readable(path):
            file = self._locks.enter_context(path.open("ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except OSError:
            self.close()
            doing = "using" if purpose == "use" else "filling"
            raise PoolError(
                f"another process is {doing} the pool at {self.directory}", "wait until it has ended"
            ) from None
        self._purpose = purpose


def create_pool(directory: Path, terms: Terms, meeting: Seed, model: np.ndarray) -> Pool:
    """A new pool without records, open for filling. `model` (uint8) is sealed with it.

    Raises `PoolError` when the directory holds a pool with records: nothing is ever overwritten.
    """
    if _numbers(directory) or (is_pool(directory) and _read_keys(directory)[1].next > 0):
        raise PoolError(f"{directory} holds another pool", "choose another site.pool, or remove it")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PoolError(f"cannot create {directory}: {error.strerror}", "choose another site.pool") from None
    pool = Pool(directory, terms, _Keys(0, Seed.from_system(), Seed.from_system(), meeting))
    pool._lock("fill")
    seal(directory / MODEL, pool._keys.model.again(), pool._context("model"), bytes(TAG_BYTES), model)
    pool._keys.write(directory, terms)  # last: a pool exists if this file does
    return pool


def is_pool(directory: Path) -> bool:
    """Whether there is a pool, with or without records."""
    return (directory / KEYS).is_file()


def open_pool(directory: Path, purpose: Purpose | None) -> Pool:
    """The pool in a directory, for one process at a time to use or to fill; with `None` to look only.

    Raises `PoolError` when there is none, it is damaged, its keys can be read by others, or another process has it.
    """
    pool = Pool(directory, *_read_keys(directory))
    if purpose is not None:
        pool._lock(purpose)
        pool.terms, pool._keys = _read_keys(directory)  # as the last process left them
        for left_over in directory.glob(f".{KEYS}.*" if purpose == "use" else f".*{RECORD}.*"):
            left_over.unlink(missing_ok=True)  # of a crash; old keys must not stay
    return pool


# ---- keys --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _Keys:
    """`chain` is value `next` of the chain of record keys; `model` seals the model's part."""

    next: int
    chain: Seed
    model: Seed
    meeting: Seed

    def forward(self, number: int) -> _Keys:
        """The keys when every record below `number` is used up."""
        chain = self.chain
        for _ in range(number - self.next):
            chain = chain.again().derive("next")
        return _Keys(number, chain, self.model, self.meeting)

    def of_record(self, number: int) -> Seed:
        """The key of a record not yet used."""
        return self.forward(number).chain.again().derive("record")

    def write(self, directory: Path, terms: Terms) -> None:
        """To the disk, before this returns."""
        keys = {name: getattr(self, name).reveal_for_transport().hex() for name in ("chain", "model", "meeting")}
        text = json.dumps({"terms": asdict(terms), "next": self.next, **keys}) + "\n"
        with written_whole(directory / KEYS, durable=True) as temporary:
            temporary.write_text(text, encoding="ascii")


def _read_keys(directory: Path) -> tuple[Terms, _Keys]:
    path = directory / KEYS
    if not is_pool(directory):
        raise PoolError(f"there is no pool at {directory}", "make one: mpc-fl dealer fill")
    with readable(path):
        if path.stat().st_mode & 0o077:
            raise PoolError(f"the file {path} can be read by other users", f"run: chmod 600 {path}")
        text = path.read_text(encoding="ascii", errors="replace")
    try:
        values: dict[str, Any] = parse_json(text)
        chain, model, meeting = (Seed(bytes.fromhex(values[name])) for name in ("chain", "model", "meeting"))
        if type(values["next"]) is not int or values["next"] < 0:
            raise ValueError
        return Terms(**values["terms"]), _Keys(values["next"], chain, model, meeting)
    except (ValueError, KeyError, TypeError):
        raise PoolError(f"{path} is damaged", "remove this pool at both parties and fill a new one") from None


def _numbers(directory: Path) -> list[int]:
    names = [path.name.removesuffix(RECORD) for path in directory.glob(f"*{RECORD}")]
    return sorted(int(name) for name in names if name.isdecimal())
