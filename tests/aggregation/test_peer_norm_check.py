"""The norm check among peers: the hospitals of too long updates are left out, by all alike; nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import ProofSize
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import QuorumError, SumLostError
from mpc_fl.links.frames import Frame
from mpc_fl.sharing.opening import SecretDomain
from tests.support.checked_peer_sums import BOUND, BUCKETS, ELEMENTS, checked_sums, expected_of, updates
from tests.support.harness import run_parties_in_memory
from tests.support.peer_sums import WHY, hospitals_of
from tests.support.signatories import signatories

AGGREGATOR = "aggregator"


def _with_an_aggregator(
    links: Any, directory: str, signatory: dict[str, Signatory], summands: dict[str, torch.Tensor], dtype: Any
) -> Any:
    hospitals = tuple(summands)
    record = OpeningRecord(Path(directory) / f"{links.name}-with.jsonl", links.name)
    domain = SecretDomain(links, [*hospitals, AGGREGATOR], record, signatory=signatory[links.name])
    check = NormCheck(NormTest(BOUND, 32 if dtype == torch.int32 else 64, BUCKETS), ELEMENTS)
    rules = Rules(AGGREGATOR, hospitals, 2, 2, 60.0, check)
    agreed = AgreedSum(hospitals, ("update", 1), Description("sum of updates", WHY))
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in hospitals}
        return collect(domain, rules, agreed, starts, dtype, (ELEMENTS,))
    return contribute(domain, rules, agreed, Private("update", summands[links.name].to(dtype, copy=True)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("count", "long"), [(3, ()), (3, ("hospital-1",)), (5, ("hospital-0", "hospital-3"))])
def test_who_passes_and_the_sum_are_those_of_an_aggregator_bit_for_bit(
    count: int, long: Sequence[str], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = [*hospitals_of(count), AGGREGATOR]
    signatory = signatories(world, tmp_path / "with an aggregator")
    led = run_parties_in_memory(_with_an_aggregator, world, str(tmp_path), signatory, updates(count, long), dtype)
    sums = checked_sums(tmp_path, monkeypatch, count, long)
    sums.dtype = dtype
    sums.check = NormCheck(NormTest(BOUND, 32 if dtype == torch.int32 else 64, BUCKETS), ELEMENTS)
    outcome = sums.run()
    rest = tuple(name for name in sums.hospitals if name not in long)
    assert not outcome.errors and outcome.admitted == dict.fromkeys(sums.hospitals, rest)
    admitted, total = led[AGGREGATOR]
    assert admitted == rest
    for name in sums.hospitals:
        opened = outcome.totals[name]
        if name in long:
            assert opened is None
        else:
            assert opened is not None and torch.equal(opened, total) and torch.equal(opened, expected_of(sums, rest))
    for name in sums.hospitals:
        first, *others = sums.openings(name)
        what = ["whether each update is within its norm bound", "norm check of 'update 1 0'", [count]]
        assert [first[key] for key in ("what", "why", "shape")] == what
        assert first["to"] == first["among"] == list(sums.hospitals) and len(first["transcript"]) == 64
        assert [line["among"] for line in others] == ([] if name in long else [list(rest)])
        assert all(line["transcript"] != first["transcript"] for line in others)


def test_who_is_left_out_is_named_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sums = checked_sums(tmp_path, monkeypatch, 3, ("hospital-2",))
    with caplog.at_level(logging.WARNING):
        sums.run()
    said = [record.getMessage() for record in caplog.records]
    assert said.count("hospital-2 says that its update is beyond its norm bound") == 2
    assert said.count("the update of this hospital is beyond its norm bound") == 1
    assert said.count("'round 1' goes on without hospital-2: not shown to be within the norm bound") == 3


def test_fewer_than_the_quorum_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = checked_sums(tmp_path, monkeypatch, 3, ("hospital-2",))
    sums.smallest = 3
    outcome = sums.run()
    assert not outcome.totals
    for name, error in outcome.errors.items():
        assert isinstance(error, QuorumError) and "the quorum is 3; hospital-2 missing" in str(error)
        assert len(sums.openings(name)) == 1


def test_the_bytes_are_those_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = checked_sums(tmp_path, monkeypatch, 4)
    outcome = sums.run()
    assert not outcome.errors
    size = ProofSize(NormTest(BOUND, 32, BUCKETS), 3)
    for name in sums.hospitals:
        tensors = {"proof": 0, "answers": 0, "copy": 0, "words": 0}
        for sender, _, tag, length in outcome.frames:
            kind = tag.split("/")[-1].split(" ")[0]
            if sender == name and kind in tensors:
                tensors[kind] += length
            elif sender == name and kind == "word":
                tensors["words"] += length
        assert 0 <= tensors["proof"] - 16 * (BUCKETS + size.bits + 66) < 3 * 300
        assert 0 <= tensors["answers"] - 3 * 16 * 3 * size.answers < 3 * 300
        assert 0 <= tensors["copy"] - 4 * ELEMENTS // 4 < 300
        assert tensors["words"] < 60_000


# ---- losses ------------------------------------------------------------------------------------------------------------


def _word_of(frame: Frame) -> str:
    if isinstance(frame.payload, dict) and "word" in frame.payload:
        return str(frame.payload["word"])
    return frame.tag.split("/")[-1]


@pytest.mark.parametrize(
    "message", ["copy hospital-2", "heard", "sketch", "proof carries", "bits", "proof products", "answers", "judged"]
)
def test_a_loss_before_the_check_has_passed_makes_the_sum_void(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one before the set is fixed: its masks are in the other summands."""
    sums = checked_sums(tmp_path, monkeypatch, 4)

    def watch(sender: str, _receiver: str, frame: Frame) -> None:
        if sender == "hospital-2" and _word_of(frame) == message:
            sums.network.drop("hospital-2")

    outcome = sums.run(watch)
    rest = [name for name in sums.hospitals if name != "hospital-2"]
    assert sorted(outcome.errors) == rest and not outcome.totals
    for name in rest:
        error = outcome.errors[name]
        assert isinstance(error, SumLostError) and error.lost == "hospital-2", error
        assert len(sums.openings(name)) <= 1
