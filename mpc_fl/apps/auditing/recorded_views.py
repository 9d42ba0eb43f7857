"""What each party of a run received, from the records that they kept: a table of it all, and the tests of what is masked.

Every message is in the table, whatever it is; what no rule here knows is called so. Tested are masked words, of one message at a
time (`uniformity.p_values_of_one`), and of two that must not depend on each other: those that one party sent another one after
the other, round after round, and those that several sent to one for the same sum. Of two hospitals' summands of one sum without
closing masks each follows from the other and from the sum, so that two alone are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpc_fl.apps.views_summary import Judged, Received
from mpc_fl.errors import DataError
from mpc_fl.evidence.uniformity import FEWEST_WORDS, p_values_of_one, p_values_of_two, rejected, words_of
from mpc_fl.links.message_record import RecordedMessage, is_recorded, recorded_messages
from mpc_fl.roles import is_hospital

MASKED, FIELD = "masked", "masked, in the field of proofs"
_OPEN, _SHARES, _PUBLIC = "opened", "masked, not tested", "open to all parties"
# By the first word of a tag: what it is, and in which form it leaves.
_KINDS: Mapping[str, tuple[str, str]] = {
    "summand": ("summand of a sum", MASKED),
    "slice": ("slice of a summand", MASKED),
    "copy": ("copy of a slice", MASKED),
    "keys": ("keys that open a sum", "keys, given once"),
    "opening": ("share of an opening", MASKED),
    "proof": ("proof of a norm", FIELD),
    "answers": ("answers to a proof", _SHARES),
    "accused": ("what shows who deviates", _OPEN),
    "total": ("total of masked slices", _SHARES),
    "shown": ("combination of masked words", _SHARES),
    "kept": ("copy of a slice, shown", _SHARES),
    "global": ("global model", _PUBLIC),
    "parameters": ("first model", _PUBLIC),
    "statistics": ("statistics of layers", _PUBLIC),
    "normalisation": ("normalisation of inputs", _PUBLIC),
    "calibration": ("calibration", _PUBLIC),
    "state": ("model for a newcomer", _PUBLIC),
    "masked": ("masked value", MASKED),
    "E": ("masked input of a layer", MASKED),
    "correction": ("correction by the dealer", _SHARES),
    "mask": ("seed for the dealer", "secret, for the dealer"),
    "crypten": ("share or masked value of CrypTen", _SHARES),
}
_CONTROL, _UNKNOWN = ("control message", "in the open"), ("other tensor", "not known here")
_MOST_WORDS = 1 << 18  # of one message that are tested
_MOST_MESSAGES = 64  # tested of what one party sent another of one kind
_FIELD_BYTES = 16  # of an element of the field of proofs, whose highest byte is not uniform


@dataclass(frozen=True)
class Words:
    """Masked words of one message, and what to call it."""

    name: str
    tag: str
    sender: str
    values: np.ndarray


class PValues:
    """p-values by name, in groups; judged together at the end."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}

    def add(self, of: str, name: str, p_values: Mapping[str, float]) -> None:
        """The p-values by test of one message or pair of messages, in the group `of`."""
        self._found.setdefault(of, {}).update({f"{name}: {test}": value for test, value in p_values.items()})

    @property
    def count(self) -> int:
        """Tests in all groups."""
        return sum(map(len, self._found.values()))

    def judged(self, level: float) -> list[Judged]:
        """All groups, with the tests that are rejected; with probability 1 - `level` none is that should hold."""
        names = [(of, name) for of, tests in self._found.items() for name in tests]
        values = [self._found[of][name] for of, name in names]
        bad = {key for key, is_bad in zip(names, rejected(values, level), strict=True) if is_bad}
        return [
            Judged(of, len(tests), min(tests.values()), [f"{of}, {name}" for name in tests if (of, name) in bad])
            for of, tests in self._found.items()
            if tests
        ]


def require_record(run: Path) -> list[Path]:
    """The directories of a run's parties that kept a record. Raises `DataError` where there are none."""
    parties = sorted(path for path in (run / "parties").glob("*") if is_recorded(path))
    if not parties:
        raise DataError(
            f"{run} holds no record of what its parties received",
            "make the run with --set runtime.record_messages=true, on phantoms",
        )
    return parties


def kind_of(message: RecordedMessage) -> tuple[str, str]:
    """What a message is, and its form."""
    if message.dtype is None:
        return _CONTROL
    return _KINDS.get(message.tag.rsplit("/", 1)[-1].split(" ", 1)[0], _UNKNOWN)


def received_by(parties: Iterable[Path]) -> tuple[list[Received], int]:
    """Who received what of whom, and how many contents were not kept. Raises `DataError` for a damaged record."""
    found, left_out = dict[tuple[str, str, str, str], tuple[int, int]](), 0
    for party in parties:
        for message in recorded_messages(party):
            key = (party.name, message.sender, *kind_of(message))
            count, size = found.get(key, (0, 0))
            found[key] = (count + 1, size + message.size)
            left_out += message.dtype is not None and message.file is None
    return [Received(*key, *counts) for key, counts in sorted(found.items())], left_out


def add_tests_of_records(parties: Sequence[Path], tests: PValues) -> None:
    """Add the tests of all masked words in these records. Raises `DataError` for a damaged one."""
    for party in parties:
        last, latest = dict[tuple[str, str], Words](), dict[str, Words]()
        counts = dict[tuple[str, str], int]()
        for what, words in _masked_words(party):
            key = (what, words.sender)
            counts[key] = counts.get(key, 0) + 1
            if counts[key] > _MOST_MESSAGES:
                continue
            tests.add(what, words.name, p_values_of_one(words.values))
            before, beside = last.get(key), latest.get(what)
            if before is not None and _alike(before, words):
                tests.add(f"{what}, with the one before", words.name, p_values_of_two(words.values, before.values))
            if beside is not None and _of_one_sum(beside, words) and _several(parties):
                tests.add(f"{what}, with another's", words.name, p_values_of_two(words.values, beside.values))
            last[key], latest[what] = words, words


def _of_one_sum(one: Words, other: Words) -> bool:
    return one.tag == other.tag and one.sender != other.sender and _alike(one, other)


def _several(parties: Sequence[Path]) -> bool:
    return sum(is_hospital(party.name) for party in parties) > 2


def _alike(one: Words, other: Words) -> bool:
    return one.values.shape == other.values.shape and one.values.dtype == other.values.dtype


def _masked_words(party: Path) -> Iterator[tuple[str, Words]]:
    """What is masked and long enough to tell something, with what it is."""
    for number, message in enumerate(recorded_messages(party)):
        what, form = kind_of(message)
        if form not in (MASKED, FIELD) or message.file is None or message.size < FEWEST_WORDS:
            continue
        values = words_of(message.tensor())[:_MOST_WORDS]
        if form == FIELD:
            elements = values.view(np.uint8).reshape(-1, _FIELD_BYTES)
            values = np.ascontiguousarray(elements[:, :-1]).reshape(-1)
        if values.nbytes >= FEWEST_WORDS:
            yield (
                what,
                Words(f"message {number} at {party.name} from {message.sender}", message.tag, message.sender, values),
            )
