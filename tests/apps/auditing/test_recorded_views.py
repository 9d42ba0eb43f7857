"""Records of messages: who received what, and masked words that are none are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpc_fl.aggregation.prime_field import to_words, uniform
from mpc_fl.apps.auditing.recorded_views import PValues, add_tests_of_records, received_by, require_record
from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.errors import DataError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.roles import AGGREGATOR, hospital_names
from tests.support.viewed import record_at, tensor_frame

WORDS, ROUNDS = 2000, 3


def stream(*label: int) -> Stream:
    return Stream(bytes([*label, *b"w" * (32 - len(label))]))


def update(*label: int) -> torch.Tensor:
    """An encoded update, int32 (2000,)."""
    numbers = np.random.Generator(np.random.Philox([*label, 7])).normal(0, 0.01, WORDS)
    return torch.from_numpy(np.round(numbers * 2**24).astype(np.int32))


def masked(*label: int, mask: tuple[int, ...] | None = None) -> torch.Tensor:
    """An update under a mask of its own, or that of another label."""
    words = update(*label)
    stream(*(label if mask is None else mask)).add_to(words)
    return words


def found_in(run: Path) -> tuple[int, list[str]]:
    """How many tests were made of a run's records, and the groups in which one is rejected."""
    tests = PValues()
    add_tests_of_records(require_record(run), tests)
    return tests.count, [made.of for made in tests.judged(0.05) if made.rejected]


def recorded_sums(run: Path, hospitals: int = 3) -> None:
    """What hospitals send to the aggregator in three rounds; each hospital has a record of its own."""
    record = record_at(run)
    for number in range(ROUNDS):
        for rank, name in enumerate(hospital_names(hospitals)):
            record(name, tensor_frame(f"summand update {number} 0 0", masked(number, rank)))
    for name in hospital_names(hospitals):
        record_at(run, name)(AGGREGATOR, tensor_frame("global model", torch.zeros(WORDS)))


def test_masked_words_of_a_run_pass_and_are_told_apart_from_what_is_open(tmp_path: Path) -> None:
    recorded_sums(tmp_path)
    record_at(tmp_path)("hospital-0", Frame(Kind.OBJECT, "ready update", 9, {"keys": []}, 12))
    record_at(tmp_path)("hospital-0", tensor_frame("strange", torch.zeros(3)))
    record_at(tmp_path)("hospital-0", tensor_frame("peers update 1/slice", masked(9, 9)))
    count, rejected = found_in(tmp_path)
    assert rejected == [] and count == 10 * 4 + 6 * 5 + 6 * 5
    received, not_kept = received_by(require_record(tmp_path))
    told = {(of.receiver, of.sender, of.what): (of.form, of.messages, of.bytes) for of in received}
    assert told[AGGREGATOR, "hospital-1", "summand of a sum"] == ("masked", 3, 3 * 4 * WORDS)
    assert told[AGGREGATOR, "hospital-0", "slice of a summand"] == ("masked", 1, 4 * WORDS)
    assert told[AGGREGATOR, "hospital-0", "control message"] == ("in the open", 1, 12)
    assert told[AGGREGATOR, "hospital-0", "other tensor"] == ("not known here", 1, 12)
    assert told["hospital-2", AGGREGATOR, "global model"] == ("open to all parties", 1, 4 * WORDS)
    assert not_kept == 0


def test_a_mask_that_was_left_out_is_found(tmp_path: Path) -> None:
    recorded_sums(tmp_path)
    record_at(tmp_path)("hospital-1", tensor_frame("summand update 3 0 0", update(3, 1)))
    assert "summand of a sum" in found_in(tmp_path)[1]


def test_a_mask_that_comes_again_in_the_next_round_is_found_though_its_words_look_uniform(tmp_path: Path) -> None:
    recorded_sums(tmp_path)
    record_at(tmp_path)("hospital-1", tensor_frame("summand update 3 0 0", masked(3, 1, mask=(2, 1))))
    assert found_in(tmp_path)[1] == ["summand of a sum, with the one before"]


def test_a_mask_that_two_hospitals_have_in_one_sum_is_found(tmp_path: Path) -> None:
    recorded_sums(tmp_path)
    record = record_at(tmp_path)
    for rank, name in enumerate(hospital_names(2)):
        record(name, tensor_frame("summand update 3 0 0", masked(3, rank, mask=(3, 3))))
    assert found_in(tmp_path)[1] == ["summand of a sum, with another's"]


def test_two_hospitals_alone_are_not_compared_within_a_sum(tmp_path: Path) -> None:
    """Their words add up to the sum that is opened."""
    record = record_at(tmp_path)
    mask = masked(5, 5)
    record("hospital-0", tensor_frame("summand update 1 0 0", mask))
    record("hospital-1", tensor_frame("summand update 1 0 0", update(1, 0) - mask))
    for name in hospital_names(2):
        record_at(tmp_path, name)
    assert found_in(tmp_path) == (8, [])


def test_elements_of_the_field_of_proofs_are_tested_without_their_highest_byte(tmp_path: Path) -> None:
    record_at(tmp_path)("hospital-0", tensor_frame("check update 1/proof", to_words(uniform(stream(1), 500))))
    assert found_in(tmp_path) == (4, [])
    small = to_words(np.array(list(range(500)), dtype=object))
    record_at(tmp_path)("hospital-0", tensor_frame("check update 2/proof", small))
    assert "proof of a norm" in found_in(tmp_path)[1]


def test_a_run_without_a_record_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "parties" / AGGREGATOR).mkdir(parents=True)
    with pytest.raises(DataError, match="record_messages=true"):
        require_record(tmp_path)
