"""Peer sums: the aggregator's sum bit for bit, recorded by all, with losses in every phase, at the stated bytes."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation.mask_graph import mask_circle
from mpc_fl.aggregation.peer_sum import peer_sum
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import ProtocolError, QuorumError, SecrecyError, SumLostError
from mpc_fl.links.frames import Frame
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan
from tests.support.harness import run_parties, run_parties_in_memory
from tests.support.peer_sums import WHY, PeerSums, expected, hospitals_of, planned, rules_of, summand
from tests.support.signatories import signatories, signatory_in

AGGREGATOR = "aggregator"
ABOUT = Description("sum of updates", WHY)


def _with_an_aggregator(links: Any, directory: str, signatory: dict[str, Signatory], size: int, dtype: Any) -> Any:
    hospitals = tuple(name for name in [links.name, *links.peers] if name != AGGREGATOR)
    hospitals = tuple(sorted(hospitals))
    record = OpeningRecord(Path(directory) / f"{links.name}-with.jsonl", links.name)
    domain = SecretDomain(links, [*hospitals, AGGREGATOR], record, signatory=signatory[links.name])
    rules, agreed = Rules(AGGREGATOR, hospitals, 2, 2, 60.0), AgreedSum(hospitals, ("update", 1), ABOUT)
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in hospitals}
        return collect(domain, rules, agreed, starts, dtype, (size,))[1]
    return contribute(domain, rules, agreed, Private("update", summand(links.name, size, dtype)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("count", "elements"), [(3, 1000), (3, 2), (5, 1001)])
def test_the_sum_is_that_of_an_aggregator_bit_for_bit_and_recorded_by_all(
    count: int, elements: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospitals = hospitals_of(count)
    world = [*hospitals, AGGREGATOR]
    signatory = signatories(world, tmp_path / "with an aggregator")
    aggregated = run_parties_in_memory(_with_an_aggregator, world, str(tmp_path), signatory, elements, dtype)
    sums = PeerSums(tmp_path, monkeypatch, count, elements)
    sums.dtype = dtype
    outcome = sums.run()
    assert not outcome.errors and sorted(outcome.released) == list(hospitals)
    assert outcome.admitted == dict.fromkeys(hospitals, hospitals)
    for name in hospitals:
        total = outcome.totals[name]
        assert total is not None and total.dtype == dtype
        assert torch.equal(total, aggregated[AGGREGATOR]) and torch.equal(total, expected(hospitals, elements, dtype))
        (line,) = sums.openings(name)
        stated = ["sum of updates", WHY, [elements], list(hospitals), list(hospitals)]
        assert [line[key] for key in ("what", "why", "shape", "to", "among")] == stated and len(
            line["transcript"]
        ) == 64


def test_the_bytes_are_those_stated_and_no_key_leaves_before_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = 300_000
    sums = PeerSums(tmp_path, monkeypatch, 3, elements)
    outcome = sums.run()
    assert not outcome.errors
    for name in sums.hospitals:
        sent = sum(size for sender, _, tag, size in outcome.frames if sender == name and tag)
        assert 0 <= sent - 8 * elements * 2 / 3 < 20_000
    tags = [tag for _, _, tag, _ in outcome.frames]
    first_key = next(at for at, tag in enumerate(tags) if tag.startswith("keys"))
    # The words of the check: coin, combinations and repeated, three hospitals to two others each.
    words = [at for at, tag in enumerate(tags) if tag.endswith("/word")]
    assert (
        len(words) == 40 and sum(at < first_key for at in words) >= 38
    )  # of the last two words one may still be on its way


def test_two_sums_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = PeerSums(tmp_path, monkeypatch)
    sums.numbers = (1, 2)
    outcome = sums.run()
    assert not outcome.errors
    for total in outcome.totals.values():
        assert total is not None and torch.equal(total, expected(sums.hospitals, sums.elements, number=2))


# ---- losses ------------------------------------------------------------------------------------------------------------


def _word_of(frame: Frame) -> str:
    """Which message of the protocol a frame is: the word, or the tag without its number."""
    if isinstance(frame.payload, dict) and "word" in frame.payload:
        return str(frame.payload["word"])
    return frame.tag.split("/")[-1].split(" ")[0]


def _loses(sums: PeerSums, victim: str, message: str) -> Any:
    """Drop a hospital where it sends its first message of a kind."""

    def watch(sender: str, _receiver: str, frame: Frame) -> None:
        if sender == victim and _word_of(frame) == message:
            sums.network.drop(victim)

    return sums.run(watch)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("message", ["slices", "slice", "arrived"])
def test_a_loss_before_the_set_is_fixed_leaves_the_hospital_out(
    message: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = PeerSums(tmp_path, monkeypatch, count)
    victim = sums.hospitals[1]
    outcome = _loses(sums, victim, message)
    rest = tuple(name for name in sums.hospitals if name != victim)
    assert not outcome.errors and outcome.admitted == dict.fromkeys(rest, rest)
    for name in rest:
        total = outcome.totals[name]
        assert total is not None and torch.equal(total, expected(rest, sums.elements))
        assert sums.openings(name)[0]["among"] == list(rest)


@pytest.mark.parametrize("message", ["confirm", "total", "coin", "combinations", "repeated"])
def test_a_loss_before_the_check_has_passed_makes_the_sum_void(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = PeerSums(tmp_path, monkeypatch, 5)
    outcome = _loses(sums, "hospital-3", message)
    rest = [name for name in sums.hospitals if name != "hospital-3"]
    assert sorted(outcome.errors) == rest and not outcome.totals
    for name in rest:
        error = outcome.errors[name]
        assert isinstance(error, SumLostError) and error.lost == "hospital-3", error
        assert not sums.openings(name)


@pytest.mark.parametrize("message", ["slices", "fixed"])
def test_a_loss_of_the_proposer_makes_the_sum_void(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = _loses(PeerSums(tmp_path, monkeypatch), "hospital-0", message)
    assert {name: getattr(error, "lost", "") for name, error in outcome.errors.items()} == {
        "hospital-1": "hospital-0",
        "hospital-2": "hospital-0",
    }


@pytest.mark.parametrize("count", [3, 5])
def test_a_loss_after_the_check_costs_nothing(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys are with others, and its slice was told before."""
    sums = PeerSums(tmp_path, monkeypatch, count)
    outcome = _loses(sums, "hospital-1", "keys")
    assert sorted(outcome.totals) == [name for name in sums.hospitals if name != "hospital-1"]
    for total in outcome.totals.values():
        assert total is not None and torch.equal(total, expected(sums.hospitals, sums.elements))


def test_a_hospital_whose_slices_do_not_come_in_time_is_left_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sums = PeerSums(tmp_path, monkeypatch)

    def watch(sender: str, _receiver: str, frame: Frame) -> None:
        if sender == "hospital-2" and _word_of(frame) == "slices":
            sums.clock.wait(threading.Event(), 100.0)  # the deadline is 60 s

    outcome = sums.run(watch)
    rest = ("hospital-0", "hospital-1")
    assert {name: outcome.admitted[name] for name in rest} == dict.fromkeys(rest, rest)
    for name in rest:
        total = outcome.totals[name]
        assert total is not None and torch.equal(total, expected(rest, sums.elements))
    assert outcome.totals.get("hospital-2") is None


def test_fewer_than_the_quorum_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = PeerSums(tmp_path, monkeypatch)
    sums.smallest = 3
    outcome = _loses(sums, "hospital-1", "slices")
    assert sorted(outcome.errors) == ["hospital-0", "hospital-2"]
    for name, error in outcome.errors.items():
        assert isinstance(error, QuorumError) and "the quorum is 3" in str(error) and not sums.openings(name)


# ---- what is refused before anything is sent ---------------------------------------------------------------------------


def _refused(links: Any, directory: str, signatory: dict[str, Signatory]) -> list[str]:
    """What a hospital says to sums that it may not take part in."""
    hospitals, said = hospitals_of(3), list[str]()
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    domain = SecretDomain(links, hospitals, record, signatory=signatory[links.name])
    agreed = AgreedSum(hospitals, ("update", 1), ABOUT)
    good = planned(links, rules_of("hospital-0", hospitals), agreed)
    plans = {
        "one closing mask": SumPlan(hospitals, "hospital-0", good.label, 1, good.transcript),
        "a stranger proposes": SumPlan(hospitals, "aggregator", good.label, 2, good.transcript),
        "two hospitals": SumPlan(hospitals[:2], "hospital-0", good.label, 1, good.transcript),
        "without this one": SumPlan(
            hospitals[1:] if links.name == "hospital-0" else hospitals[:1], "x", ("a",), 0, "b"
        ),
    }
    many = hospitals_of(18)
    in_a_circle = replace(rules_of("hospital-0", many, 17), colluders=3)
    bounds = in_a_circle.bounds(18)
    assert bounds is not None
    circle = mask_circle(many, good.transcript, bounds)
    tried = [(rules_of("hospital-0", hospitals, 3), plan) for plan in plans.values()]
    tried.append((in_a_circle, SumPlan(many, "hospital-0", good.label, 2, good.transcript)))
    tried.append((replace(in_a_circle, colluders=None), SumPlan(many, "hospital-0", good.label, 2, "c", circle)))
    for rules, plan in tried:
        try:
            peer_sum(domain, rules, agreed, plan, Private("update", summand(links.name, 10)))
        except ProtocolError as error:
            said.append(str(error))
    domain.take_up(good.transcript)
    try:
        peer_sum(domain, tried[0][0], agreed, good, Private("update", summand(links.name, 10)))
    except SecrecyError as error:
        said.append(str(error))
    return said


def test_what_may_not_be_summed_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    tags: list[str] = []
    signatory = signatories(list(hospitals_of(3)), tmp_path / "identities")

    def prepare(network: Any) -> None:
        network.watch(lambda _sender, _receiver, frame: tags.append(frame.tag))

    results = run_parties_in_memory(_refused, list(hospitals_of(3)), str(tmp_path), signatory, prepare=prepare)
    for said in results.values():
        assert len(said) == 7
        assert "cannot be summed among peers" in said[0] and "cannot be summed among peers" in said[1]
        assert "hospital-0 asked" in said[2] and "hospital-0 asked" in said[3] and "asked for twice" in said[6]
        assert all("among 18 peers with masks in a circle" in each for each in said[4:6])
    assert not any(tags)


# ---- between processes -------------------------------------------------------------------------------------------------


def _between_processes(links: Any, directory: str) -> list[int]:
    hospitals = hospitals_of(3)
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    signatory = signatory_in(Path(directory), links.name, list(hospitals))
    domain = SecretDomain(links, hospitals, record, signatory=signatory)
    rules, agreed = rules_of("hospital-2", hospitals), AgreedSum(hospitals, ("update", 1), ABOUT)
    plan = planned(links, rules, agreed)
    _, total = peer_sum(domain, rules, agreed, plan, Private("update", summand(links.name, 50_000)))
    assert total is not None
    return [int(word) for word in total]


@pytest.mark.processes
def test_three_processes_over_mutual_tls(tmp_path: Path) -> None:
    hospitals = hospitals_of(3)
    results = run_parties(_between_processes, list(hospitals), tmp_path, str(tmp_path), tolerated=hospitals)
    assert set(results) == set(hospitals)
    for total in results.values():
        assert total == expected(hospitals, 50_000).tolist()
