"""Hospitals that deviate in a norm check among peers, against others that run the program unchanged.

`hospital-1` deviates unless a test says otherwise; `hospital-0` proposes. It is the first verifier of hospital-0, and verifies the
rest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation import peer_norm_check, peer_sum, proof_steps, shown_answers, slice_totals
from mpc_fl.aggregation.peer_norm_check import PeerNormCheck
from mpc_fl.aggregation.prime_field import PRIME
from mpc_fl.aggregation.shown_answers import ShownAnswers
from mpc_fl.aggregation.signed_words import Subject
from mpc_fl.errors import ProtocolError, SumLostError
from mpc_fl.links.links import Links
from tests.support.checked_peer_sums import checked_sums, expected_of, update
from tests.support.peer_sums import Outcome, PeerSums, only_at

DEVIATES = "hospital-1"


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerSums:
    return checked_sums(tmp_path, monkeypatch, 4)


def _honest(sums: PeerSums, *but: str) -> list[str]:
    return [name for name in sums.hospitals if name not in (but or (DEVIATES,))]


def _goes_on_without(sums: PeerSums, outcome: Outcome, who: str = DEVIATES) -> None:
    """All others have the sum of theirs."""
    rest = tuple(_honest(sums, who))
    for name in rest:
        assert name not in outcome.errors, outcome.errors
        total = outcome.totals[name]
        assert outcome.admitted[name] == rest
        assert total is not None and torch.equal(total, expected_of(sums, rest))


def _all_name(sums: PeerSums, outcome: Outcome, what: str, who: str = DEVIATES) -> None:
    """Every honest hospital ends with a line that says `what` and names `who`; nobody has the sum, or gave a key."""
    for name in _honest(sums, who):
        error = outcome.errors[name]
        assert isinstance(error, ProtocolError) and not isinstance(error, SumLostError), (name, error)
        assert what in str(error) and error.by == who and "\n" not in str(error), (name, error)
        assert name not in outcome.totals and len(sums.openings(name)) <= 1
    assert not [tag for sender, _, tag, _ in outcome.frames if tag.startswith("keys") and sender != who]


# ---- deviating provers -------------------------------------------------------------------------------------------------


def _changed(offset: int) -> Callable[..., Any]:
    return lambda original, *arguments: (original(*arguments) + offset) % PRIME


def _too_long(sums: PeerSums, monkeypatch: pytest.MonkeyPatch, who: str = DEVIATES) -> None:
    """It sends an update that is ten times as long as one may be, and says that it is not."""
    sums.summands[who] = update(77, 10)
    only_at(monkeypatch, who, proof_steps, "square_sum", lambda *_: 0)


@pytest.mark.parametrize(
    ("what", "offset"), [("", 0), ("bits_of", 1), ("products_of", 1), ("bits_of", 2**64), ("products_of", PRIME - 1)]
)
def test_a_large_update_does_not_pass_whatever_is_proven(
    what: str, offset: int, sums: PeerSums, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _too_long(sums, monkeypatch)
    if what:
        only_at(monkeypatch, DEVIATES, proof_steps, what, _changed(offset))
    with caplog.at_level(logging.WARNING):
        outcome = sums.run()
    _goes_on_without(sums, outcome)
    assert caplog.text.count("the proof of hospital-1 that its update is within its norm bound was not accepted") == 3
    assert outcome.totals[DEVIATES] is None


def test_a_proof_of_another_sketch_is_none(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(original: Any, *arguments: Any) -> Any:
        sketch, carries = original(*arguments)
        return sketch // 20, carries

    _too_long(sums, monkeypatch)
    only_at(monkeypatch, DEVIATES, proof_steps, "centred_sketch", shorter)
    _goes_on_without(sums, sums.run())


def test_who_says_that_another_one_answered_falsely_must_show_it(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It shows what it really has in common with hospital-2, its first verifier, whose answers follow from that."""
    _too_long(sums, monkeypatch)
    only_at(monkeypatch, DEVIATES, proof_steps.ProofSteps, "false_answers", lambda *_: ["hospital-2"])
    with caplog.at_level(logging.WARNING):
        _goes_on_without(sums, sums.run())
    assert caplog.text.count("hospital-1 accuses hospital-2, whose answer was right") == 3


@pytest.mark.parametrize(
    "shown", [{"seed": "00" * 32, "keys": ["00" * 32] * 2}, {"seed": 7}, None, {"keys": "x" * 999}]
)
def test_who_accuses_with_something_else_than_it_committed_to_is_not_believed(
    shown: Any, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuse(_original: Any, check: ShownAnswers, others: Any, _false: Any) -> None:
        shown_answers.say(check.links, others, "accused", false={"hospital-2": shown})

    _too_long(sums, monkeypatch)
    only_at(monkeypatch, DEVIATES, ShownAnswers, "accuse", accuse)
    _goes_on_without(sums, sums.run())


# ---- deviating verifiers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ["hospital-0", "hospital-2", "all"])
def test_whoever_answers_falsely_is_named_by_all_and_leaves_nobody_out(
    about: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(original: Any, *arguments: Any) -> Any:
        return {
            name: (answer + 1) % PRIME if about in (name, "all") else answer
            for name, answer in original(*arguments).items()
        }

    only_at(monkeypatch, DEVIATES, proof_steps.ProofSteps, "answers", answers)
    _all_name(sums, sums.run(), "false answers about a proof of 'update 1 0' were given by hospital-1")


def test_whoever_sends_other_answers_than_it_signed_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        original(links, receiver, tag, words + 1 if tag == "answers" else words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", other)
    _all_name(sums, sums.run(), "hospital-1 sent other answers about proofs than it signed")


def test_answers_that_are_no_elements_of_the_field_are_named_by_all(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that names nobody ends the run of all; so they go on without who sends these."""
    only_at(monkeypatch, DEVIATES, peer_norm_check, "stacked", lambda original, *given: original(*given) * 0 - 1)
    looks_away = lambda original, words, name: original(words * 0, name)  # noqa: E731
    only_at(monkeypatch, DEVIATES, peer_norm_check, "from_words", looks_away)
    _all_name(sums, sums.run(), "hospital-1 sent something else than elements of the field of a norm check")


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_of_a_proof_that_is_no_elements_of_the_field_is_named_by_its_first_verifier(
    part: int, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []

    def no_elements(original: Any, elements: Any) -> Any:
        sent.append(True)
        words = original(elements)
        return words * 0 - 1 if len(sent) == part else words

    only_at(monkeypatch, DEVIATES, peer_norm_check, "to_words", no_elements)
    outcome = sums.run()
    error = outcome.errors["hospital-2"]
    assert isinstance(error, ProtocolError) and error.by == DEVIATES, error
    assert "hospital-1 sent something else than elements of the field" in str(error)
    assert not outcome.totals


def test_two_that_agreed_on_a_seed_that_is_none_end_the_run_of_nobody_else(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-1 and its first verifier have committed to what reads as no seed; what it shows of that accuses nobody."""

    def accuse(_original: Any, check: ShownAnswers, others: Any, _false: Any) -> None:
        keys = [key.hex() for key in check.masks.own_keys("hospital-2")]
        shown_answers.say(check.links, others, "accused", false={"hospital-2": {"seed": "none", "keys": keys}})
        for piece in check.summands.kept_by("hospital-2", DEVIATES):
            words = check.summands.own[piece]
            shown_answers._show(check.links, others, f"accused hospital-2 {piece}", words)
        carries, bits, _, products = check.proofs.corrections
        for part, elements in (("carries", carries), ("bits", bits), ("products", products)):
            shown_answers._show(check.links, others, f"accused {part}", shown_answers.to_words(elements))

    def committed(original: Any, check: PeerNormCheck) -> Any:
        said, empty = original.__get__(check), peer_norm_check.seed_hash(b"")
        if threading.current_thread().name == DEVIATES:
            said["seeds"][check._others_of(DEVIATES).index("hospital-2")] = empty
        elif threading.current_thread().name == "hospital-2":
            said["seeds"][3 + check._others_of("hospital-2").index(DEVIATES)] = empty
        return said

    original = PeerNormCheck.committed
    monkeypatch.setattr(PeerNormCheck, "committed", property(lambda check: committed(original, check)))
    _too_long(sums, monkeypatch)
    only_at(monkeypatch, DEVIATES, ShownAnswers, "accuse", accuse)
    _goes_on_without(sums, sums.run())


def test_a_hospital_that_commits_to_another_seed_than_it_has_ends_the_run_with_both_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(original: Any, seed: bytes) -> Any:
        hashed.append(original(seed))
        return "0" * 64 if len(hashed) == 1 else hashed[-1]

    hashed: list[str] = []
    only_at(monkeypatch, DEVIATES, peer_norm_check, "seed_hash", another)
    outcome = sums.run()
    for name in _honest(sums):
        assert "committed to different seeds of a proof" in outcome.said(name), outcome.said(name)
        assert DEVIATES in outcome.said(name) and not sums.openings(name)


# ---- words -------------------------------------------------------------------------------------------------------------

WORDS = ["heard", "sketch", "carries", "bits", "products", "answers", "judged"]


@pytest.mark.parametrize("word", WORDS)
def test_a_sum_is_lost_with_who_says_nothing_from_a_word_on(
    word: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent: list[bool] = []

    def withheld(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
        if isinstance(value, dict) and value.get("word") == word:
            silent.append(True)
        if not silent:
            original(links, receiver, tag, value)

    only_at(monkeypatch, DEVIATES, Links, "send_object", withheld)
    only_at(monkeypatch, DEVIATES, Links, "send_tensor", withheld)
    outcome = sums.run()
    for name in _honest(sums):
        error = outcome.errors[name]
        assert isinstance(error, SumLostError) and error.lost == DEVIATES, error
    assert not outcome.totals


@pytest.mark.parametrize("part", ["carries", "bits", "products"])
def test_who_withholds_a_part_of_its_proof_is_named_by_its_first_verifier(
    part: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def withheld(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        if tag != f"proof {part}":
            original(links, receiver, tag, words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", withheld)
    outcome = sums.run()
    assert not outcome.totals
    assert isinstance(outcome.errors["hospital-2"], SumLostError) and outcome.errors["hospital-2"].lost == DEVIATES
    for name in _honest(sums, DEVIATES, "hospital-2"):
        assert f"was given up by hospital-2: {DEVIATES} is late" in outcome.said(name), outcome.said(name)


def test_a_part_of_a_proof_that_is_not_what_was_signed_is_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        original(links, receiver, tag, words + 1 if tag == "proof bits" else words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", other)
    outcome = sums.run()
    assert "hospital-1 sent another part of its proof than it signed" in outcome.said("hospital-2")
    assert not outcome.totals


@pytest.mark.parametrize("word", ["carries", "bits", "products", "answers"])
def test_whoever_tells_two_hospitals_different_things_is_named(
    word: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first verifier, or who is told of its answers first, hears the truth."""

    def twice(original: Any, domain: Any, links: Any, names: Any, subject: Subject, values: Any) -> Any:
        if subject.word != word:
            return original(domain, links, names, subject, values)
        said = original(domain, links, names[:1], subject, values)
        original(domain, links, names[1:], subject, {**values, "digest": "1" * 64})
        return said

    only_at(monkeypatch, DEVIATES, peer_norm_check, "say_signed", twice)
    outcome = sums.run()
    for name in _honest(sums):
        assert name not in outcome.totals
        if word == "answers":  # whoever was told something else than it was sent finds that at once
            continue
        assert "hospital-1 said one thing to" in outcome.said(name), outcome.said(name)
    if word == "answers":
        assert "hospital-1 sent other answers about proofs than it signed" in outcome.said("hospital-3")


@pytest.mark.parametrize("word", ["sketch", "carries", "bits", "products"])
def test_a_number_that_was_not_committed_to_is_named(
    word: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody chooses what is drawn."""

    def another(original: Any, check: PeerNormCheck, said: str, step: int, values: Any, take: Any) -> Any:
        values = {**values, "number": "00" * 32} if said == word else values
        return original(check, said, step, values, take)

    only_at(
        monkeypatch,
        DEVIATES,
        PeerNormCheck,
        "_all_say",
        lambda original, *given: another(original, *given) if len(given) == 5 else original(*given),
    )
    _all_name(sums, sums.run(), "hospital-1 showed another part of the coin than it committed to")


def test_nobody_shows_a_number_before_what_it_is_drawn_for_is_there(sums: PeerSums) -> None:
    order: list[tuple[str, str]] = []

    def watch(sender: str, receiver: str, frame: Any) -> None:
        word = frame.payload.get("word") if isinstance(frame.payload, dict) else frame.tag.split("/")[-1]
        order.append((f"{word} {sender}", receiver))

    assert not sums.run(watch).errors
    for at, name in enumerate(sums.hospitals):
        before = sums.hospitals[at - 1]  # whose first verifier it is
        for part in ("carries", "bits", "products"):
            shown = min(place for place, (what, _) in enumerate(order) if what == f"{part} {name}")
            assert order.index((f"proof {part} {before}", name)) < shown


# ---- what was checked is what is summed --------------------------------------------------------------------------------


def _another_total(monkeypatch: pytest.MonkeyPatch, who: str, error: int) -> None:
    """An opener that adds to its total, and tells of its own slice what fits: without a check its summand would be another one."""

    def changed(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = original(tensor)
        words += error
        return words

    def consistent(original: Any, fixed: Any, linear: Any) -> Any:
        from dataclasses import replace

        opened = fixed.slices.opened_by(who, fixed.admitted)
        own = {piece: words + error if piece in opened else words for piece, words in fixed.own.items()}
        return original(replace(fixed, own=own), linear)

    only_at(monkeypatch, who, slice_totals, "own_copy", changed)
    only_at(monkeypatch, who, slice_totals, "_combinations", consistent)


def test_an_opener_cannot_exchange_its_own_slice_after_the_check(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    _another_total(monkeypatch, DEVIATES, 12345)
    _all_name(sums, sums.run(), "a slice of 'round 1' was not what was checked, by hospital-1")


@pytest.mark.parametrize("long", ["hospital-0", "hospital-2"])
def test_an_opener_cannot_exchange_a_slice_that_it_opens_or_has_kept_by_another_one_since(
    long: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens the slice of hospital-0, which was left out, too; or hospital-2, which kept its copy, was left out."""
    sums = checked_sums(tmp_path, monkeypatch, 4, (long,))
    sums.proposer = "hospital-3"
    _another_total(monkeypatch, DEVIATES, 12345)
    outcome = sums.run()
    for name in _honest(sums, DEVIATES, long):
        assert "was not what was checked, by hospital-1" in outcome.said(name), outcome.said(name)
    assert [name for name, total in outcome.totals.items() if total is not None] == []


def test_a_keeper_that_lies_about_its_copy_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def false(original: Any, fixed: Any, linear: Any) -> Any:
        from dataclasses import replace

        return original(replace(fixed, kept={piece: words + 1 for piece, words in fixed.kept.items()}), linear)

    only_at(monkeypatch, DEVIATES, slice_totals, "_combinations", false)
    _all_name(sums, sums.run(), "a slice of 'round 1' was not what was checked, by hospital-1")


def test_a_copy_that_is_not_what_was_signed_has_not_come(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender, or who keeps it, is out; with a check the sum is then made anew without it."""

    def other(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        original(links, receiver, tag, words + 1 if tag.startswith("copy") else words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", other)
    outcome = sums.run()
    assert not outcome.totals
    lost = {getattr(outcome.errors[name], "lost", "") for name in _honest(sums)}
    assert lost <= {DEVIATES, "hospital-2"} and len(lost) == 1, outcome.errors


def test_a_proposer_that_fixes_a_set_without_one_has_that_one_left_out_and_opens_nothing(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(original: Any, hospitals: Any, proposer: str, came: Any) -> Any:
        return tuple(name for name in original(hospitals, proposer, came) if name != "hospital-2")

    only_at(monkeypatch, "hospital-0", peer_sum, "who_has_all", without)
    outcome = sums.run()
    assert not outcome.totals
    for error in outcome.errors.values():
        assert isinstance(error, SumLostError) and error.lost == "hospital-2", error


def test_two_together_pass_and_gain_what_the_bounds_of_all_allow(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-2 answers for hospital-1 with another share of its sketch than it has, so that all is true of none."""
    begun = PeerNormCheck._begun

    def pool(check: PeerNormCheck) -> Any:
        proofs = begun(check)
        lie = check.sign_hash.fold(update(77, 10).int())
        if check.me == "hospital-2":
            proofs.shares[DEVIATES] = proofs.shares[DEVIATES] - lie
        elif check.me == DEVIATES:
            share, modulus = proofs.shares_of_mine["hospital-2"], 1 << check.test.ring_bits
            proofs.shares_of_mine["hospital-2"] = (share - proof_steps.whole_numbers(lie)) % modulus
        return proofs

    sums.summands[DEVIATES] = update(77, 10)
    monkeypatch.setattr(PeerNormCheck, "_begun", pool)
    outcome = sums.run()
    for name in sums.hospitals:
        assert "the sum of 4 updates within their norm bound is" in outcome.said(name), outcome.errors
