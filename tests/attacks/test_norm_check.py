"""A hospital, or the aggregator, that deviates in a norm check, against others that run the program unchanged.

Hospital 2 sends an update ten times as long as allowed and changes whatever it sends, or adds offsets to all shares
that it holds. (Before, every hospital held a share of what was computed of itself: an offset to it let any update pass.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation import norm_check, proof_steps
from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import Transcript, whole_numbers
from mpc_fl.aggregation.prime_field import PRIME, Vector
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import MpcFlError, ProtocolError
from mpc_fl.links.frames import Frame
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from tests.support.checked_sums import (
    AGGREGATOR,
    BOUND,
    BUCKETS,
    PARAMETERS,
    Said,
    checked_sum,
    domain_of,
    hospitals_of,
    update,
)
from tests.support.harness import run_parties, run_parties_in_memory
from tests.support.signatories import signatories

WORLD = [*hospitals_of(3), AGGREGATOR]
DEVIATING = "hospital-2"
OFFSETS = [1, 2**32, 2**63, 2**64, PRIME // 2, PRIME - 1]


def _say_that_it_is_within() -> None:
    proof_steps.square_sum = lambda sketch: 0


def _add_to_what(name: str) -> Callable[[int], None]:
    """Let a function of `proof_steps` that makes a vector add an offset to every element of it."""

    def deviate(offset: int) -> None:
        original = getattr(proof_steps, name)

        def changed(*arguments: Any, **named: Any) -> Any:
            return (original(*arguments, **named) + offset) % PRIME

        setattr(proof_steps, name, changed)

    return deviate


def _add_to_sketch(offset: int) -> None:
    original = proof_steps.centred_sketch

    def changed(test: NormTest, shares: Any) -> tuple[Vector, Vector]:
        sketch, carries = original(test, shares)
        return sketch + offset, carries

    proof_steps.centred_sketch = changed


def _add_to_carries(offset: int) -> None:
    original = proof_steps.centred_sketch

    def changed(test: NormTest, shares: Any) -> tuple[Vector, Vector]:
        sketch, carries = original(test, shares)
        return sketch - (offset << test.ring_bits), carries + offset

    proof_steps.centred_sketch = changed


def _claim_another_sketch(offset: int) -> None:
    """All it proves is true of a sketch that is as short as its own divided by `offset`."""
    original = proof_steps.centred_sketch

    def changed(test: NormTest, shares: Any) -> tuple[Vector, Vector]:
        sketch, carries = original(test, shares)
        return sketch // (offset + 10), carries

    proof_steps.centred_sketch = changed


DEVIATIONS: dict[str, Callable[[int], None]] = {
    "its proof": lambda offset: None,
    "its sketch": _add_to_sketch,
    "another sketch": _claim_another_sketch,
    "its carries": _add_to_carries,
    "its bits": _add_to_what("bits_of"),
    "its products": _add_to_what("products_of"),
}
EVERYWHERE = ("its sketch", "its bits", "its products")


def deviate(links: Any, directory: str) -> Any:
    """One sum for every way and offset; who passed, at the aggregator."""
    domain, test, passed = domain_of(links, directory, 3), NormTest(BOUND, 32, BUCKETS), dict[str, Any]()
    kept = dict(vars(proof_steps))
    ways = [(name, [deviation]) for name, deviation in DEVIATIONS.items()]
    for way, deviations in [*ways, ("everywhere", [DEVIATIONS[name] for name in EVERYWHERE])]:
        for offset in OFFSETS:
            if links.name == DEVIATING:
                _say_that_it_is_within()
                for deviation in deviations:
                    deviation(offset)
            x = None if links.name == AGGREGATOR else update("long" if links.name == DEVIATING else "honest", BOUND, 7)
            passed[f"{way} + {offset}"] = checked_sum(domain, f"{way} {offset}", test, x)
            vars(proof_steps).update(kept)
    return passed


@pytest.mark.processes
def test_no_offset_lets_a_large_update_pass(tmp_path: Path) -> None:
    """42 attempts, each with a chance below 2^-38; the others pass in all of them."""
    results = run_parties(deviate, WORLD, tmp_path, str(tmp_path), timeout=300)
    assert len(results[AGGREGATOR]) == len(OFFSETS) * (len(DEVIATIONS) + 1)
    assert {tuple(passed) for passed in results[AGGREGATOR].values()} == {("hospital-0", "hospital-1")}


def shift_answers(links: Any, directory: str, offset: int) -> Any:
    """Hospital 2 adds an offset to its answers, which are all about others, and sends a large update itself."""
    domain, test, said = domain_of(links, directory, 3), NormTest(BOUND, 32, BUCKETS), Said()
    if links.name == DEVIATING:
        _say_that_it_is_within()
        _add_to_what("answers_of")(offset)
    x = None if links.name == AGGREGATOR else update("long" if links.name == DEVIATING else "honest", BOUND, 7)
    return checked_sum(domain, "a", test, x), said.lines


@pytest.mark.processes
@pytest.mark.parametrize("offset", [1, PRIME // 2])
def test_whoever_answers_falsely_about_others_is_named_and_does_not_pass(offset: int, tmp_path: Path) -> None:
    results = run_parties(shift_answers, WORLD, tmp_path, str(tmp_path), offset)
    passed, said = results[AGGREGATOR]
    assert passed == []  # what remains: others can be refused. They, and the aggregator, learn by whom
    for name in ("hospital-0", "hospital-1"):
        assert (
            f"the proof of {name} that its update is within its norm bound was not accepted: it says that {DEVIATING} "
            + ("answered falsely; it or they deviate")
            in said
        )
        assert any(f"false answers of {DEVIATING}" in line for line in results[name][1]), results[name]
    # Its own proof: it can accuse others too. Nobody else knows whether that is true, so the line names both.
    assert any(line.startswith(f"the proof of {DEVIATING}") for line in said)


# -- the aggregator


class TwoTruths(NormCheck):
    """An aggregator that tells hospital 1 another seed in one of its words (0: of the sketch, 1 to 3 as they come)."""

    which = 0
    answers: list[Any] = []

    def at_opener(self, domain: Any, closed: Any, say_check: Any) -> list[str]:
        links, told = domain.links, [0]

        def say(**word: Any) -> None:
            for name in WORLD[:-1]:
                other = {**word, "sketch": "77" * 32} if self.which == 0 and name == "hospital-1" else word
                links.send_object(name, "word", other)

        def tell(opener: Any, **word: Any) -> None:
            told[0] += 1
            for name in WORLD[:-1]:
                lie = told[0] == self.which and name == "hospital-1"
                opener.links.send_object(name, "told", {**word, "seed": "77" * 32} if lie else word)

        take = norm_check.accepted

        def accepted(size: Any, weights: Vector, answers: Any) -> bool:
            TwoTruths.answers.append(sum(answers[1:], answers[0]) % PRIME)
            return take(size, weights, answers)

        norm_check._Opener._tell, norm_check.accepted = tell, accepted
        return super().at_opener(domain, closed, say)


def told_two_truths(links: Any, directory: str, which: int) -> Any:
    domain, test = domain_of(links, directory, 3), NormTest(BOUND, 32, BUCKETS)
    TwoTruths.which, TwoTruths.answers = which, []
    x = None if links.name == AGGREGATOR else update("honest", BOUND, 7)
    passed = checked_sum(domain, "a", test, x, TwoTruths)
    return passed, TwoTruths.answers


@pytest.mark.processes
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_an_aggregator_that_tells_two_truths_gets_noise(which: int, tmp_path: Path) -> None:
    """Hospital 1 was told something else, so its shares and answers fit to nothing: all that is opened of a row is uniform.

    Its own row has no answer of it: where the point alone differs, the others' answers are those of an honest check.
    """
    results = run_parties(told_two_truths, WORLD, tmp_path, str(tmp_path), which)
    passed, answers = results[AGGREGATOR]
    assert passed == (["hospital-1"] if which == 3 else [])
    assert len(answers) == 3
    for total in (answers[0], answers[2], *(answers[1:2] if which < 3 else [])):
        values = total.tolist()
        assert len(set(values)) == len(values) and 0 not in values
        halves = sum(value > PRIME // 2 for value in values) / len(values)
        assert abs(halves - 0.5) < 6 / (4 * len(values)) ** 0.5


def asked_twice(links: Any, directory: str) -> Any:
    """An aggregator that begins the check of one sum again, to have a second answer about the same proofs."""
    from mpc_fl.sharing.sum_plan import SumPlan

    domain, test = domain_of(links, directory, 3), NormTest(BOUND, 32, BUCKETS)
    if links.name == AGGREGATOR:
        passed = checked_sum(domain, "a", test, None)
        for name in WORLD[:-1]:
            links.send_object(name, "word", {"hospitals": WORLD[:-1], "sketch": "11" * 32})
        return passed
    plan = SumPlan(tuple(WORLD[:-1]), AGGREGATOR, ("sum", "a"), 1, "seen alike", apart=True)
    masks = SummandMasks(plan, links.name, (PARAMETERS,), domain.sum_seed)
    links.send_tensor(AGGREGATOR, "summand", masks.masked(Private("update", update("honest", BOUND, 3).int())))
    check = NormCheck(test, PARAMETERS)
    check.at_hospital(domain, masks, links.receive_object(AGGREGATOR, "word"))
    try:
        check.at_hospital(domain, masks, links.receive_object(AGGREGATOR, "word"))
    except MpcFlError as error:
        return type(error).__name__
    return "answered twice"


def test_the_proofs_of_one_sum_are_answered_for_once(tmp_path: Path) -> None:
    results = run_parties_in_memory(asked_twice, WORLD, str(tmp_path))
    assert {results[name] for name in WORLD[:-1]} == {"SecrecyError"}


def test_shares_are_bound_to_all_that_was_told() -> None:
    first, second = Transcript(["a", "b"]), Transcript(["a", "b"])
    assert first.add(bytes(32)) == second.add(bytes(32))
    assert first.add(bytes(32), ["a"]) != second.add(bytes(32), ["a", "b"])
    assert first.add(bytes(32)) != second.add(bytes(32))


# -- whole sums: two hospitals together, a false commitment


def one_checked_sum(links: Any, directory: str, signatory: dict[str, Signatory], long: tuple[str, ...] = ()) -> Any:
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    domain = SecretDomain(links, WORLD, record, signatory=signatory[links.name])
    hospitals, test = tuple(WORLD[:-1]), NormTest(BOUND, 32, BUCKETS)
    rules = Rules(AGGREGATOR, hospitals, 2, 1, 60.0, NormCheck(test, PARAMETERS))
    agreed = AgreedSum(hospitals, ("update", 1), Description("mean update", "round 1"))
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in hospitals}
        return collect(domain, rules, agreed, starts, torch.int32, (PARAMETERS,))
    summand = update("long" if links.name in long else "honest", BOUND, 3).int()
    return contribute(domain, rules, agreed, Private("update", summand))


def test_a_false_commitment_with_a_hospital_that_never_came_ruins_no_checked_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check needs all of U, so the sum begins again without the one that is lost, and no key shared with it is in it.

    Without a check such a commitment gives a hospital nothing: it may send any summand.
    """
    commitments = SummandMasks.commitments

    def false(masks: SummandMasks) -> list[str]:
        keys = zip(masks.plan.keys_known_to(masks.me), commitments(masks), strict=True)
        lies = masks.me == "hospital-1"
        return ["0" * 64 if lies and DEVIATING in key[1:] else committed for key, committed in keys]

    monkeypatch.setattr(SummandMasks, "commitments", false)

    def lose(network: InMemoryNetwork) -> None:
        others, ready = threading.Event(), set[str]()

        def watch(sender: str, _receiver: str, frame: Frame) -> None:
            if not frame.tag.startswith("ready "):
                return
            if sender == DEVIATING:
                assert others.wait(60)  # else the others might not have been connected with all yet
                network.drop(DEVIATING)
            else:
                ready.add(sender)
                if len(ready) == len(WORLD) - 2:
                    others.set()

        network.watch(watch)

    signatory = signatories(WORLD, tmp_path / "identities")
    results = run_parties_in_memory(
        one_checked_sum, WORLD, str(tmp_path), signatory, prepare=lose, tolerated=WORLD[:-1]
    )
    admitted, total = results[AGGREGATOR]
    assert admitted == ("hospital-0", "hospital-1") == results["hospital-0"] == results["hospital-1"]
    assert torch.equal(total, 2 * update("honest", BOUND, 3).int())


def test_two_hospitals_that_pass_together_gain_what_the_bounds_of_all_allow_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hospital 1 answers for hospital 2 with another share of its sketch than its masks have, so that all is true of none."""
    begin = norm_check._Hospital.__init__

    def pool(self: Any, check: NormCheck, domain: Any, masks: SummandMasks, seed: bytes) -> None:
        begin(self, check, domain, masks, seed)
        lie = SignHash(seed, PARAMETERS, BUCKETS).fold(update("long", BOUND, 3).int())
        if self.me == "hospital-1":
            self.steps.shares[DEVIATING] = self.steps.shares[DEVIATING] - lie
        elif self.me == DEVIATING:
            share = self.steps.shares_of_mine["hospital-1"]
            self.steps.shares_of_mine["hospital-1"] = (share - whole_numbers(lie)) % (1 << check.test.ring_bits)

    monkeypatch.setattr(norm_check._Hospital, "__init__", pool)
    signatory, said = signatories(WORLD, tmp_path / "identities"), Said()

    def party(links: Any) -> Any:
        try:
            return one_checked_sum(links, str(tmp_path), signatory, (DEVIATING,))
        except MpcFlError as error:
            return str(error)

    results = run_parties_in_memory(party, WORLD)
    assert not said.lines  # the check itself names nobody
    assert (
        "'round 1': the sum of 3 updates within their norm bound is" in results[AGGREGATOR]
        and "two or more of hospital-0, hospital-1, hospital-2 deviate together; nothing was made"
        in results[AGGREGATOR]
    ), results


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_how_long_a_sum_may_be(dtype: torch.dtype) -> None:
    test = NormTest(BOUND, 32 if dtype == torch.int32 else 64, BUCKETS)
    check, longest = NormCheck(test, PARAMETERS), test.largest_square_sum**0.5
    total = torch.zeros(PARAMETERS, dtype=dtype)
    total[7] = -int(3 * longest)
    check.require_total(total, WORLD[:3], "round 1")
    total[8] = int(longest)
    with pytest.raises(ProtocolError, match=r"the sum of 3 updates .* is 3.16 times as long as one may be"):
        check.require_total(total, WORLD[:3], "round 1")
