"""Hospitals that deviate in a peer sum, against others that run the program unchanged: named by all, and nothing opens.

`hospital-1` deviates unless a test says otherwise; `hospital-0` proposes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation import peer_sum, slice_totals
from mpc_fl.aggregation.signed_words import Subject
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.errors import ProtocolError, SumLostError
from mpc_fl.links.frames import Frame
from mpc_fl.sharing.closed_sum import SummandMasks
from tests.support.peer_sums import Outcome, PeerSums, expected, only_at

DEVIATES = "hospital-1"


@pytest.fixture(params=[3, 5])
def sums(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerSums:
    return PeerSums(tmp_path, monkeypatch, request.param)


def _honest(sums: PeerSums, *but: str) -> list[str]:
    return [name for name in sums.hospitals if name not in (but or (DEVIATES,))]


def _all_name(sums: PeerSums, outcome: Outcome, what: str, who: str = DEVIATES) -> None:
    """Every honest hospital ends with a line that says `what` and names `who` alone; nobody has the sum, or gave a key."""
    for name in _honest(sums, who):
        error = outcome.errors[name]
        assert isinstance(error, ProtocolError) and not isinstance(error, SumLostError), (name, error)
        assert what in str(error) and who in str(error) and "\n" not in str(error), (name, error)
        others = [other for other in _honest(sums, who) if other != name]
        assert not [other for other in others if other in str(error).split(" and another to ")[0]], (name, error)
        assert name not in outcome.totals and not sums.openings(name)
    assert not [tag for sender, _, tag, _ in outcome.frames if tag.startswith("keys") and sender != who]


# ---- deviating openers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [1, -(2**31), 2**24])
def test_an_opener_with_a_wrong_slice_is_named(error: int, sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is off by half of the ring in one word."""

    def changed(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = original(tensor)
        words[5] += error
        return words

    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", changed)
    _all_name(sums, sums.run(), "a slice of 'round 1' was not opened rightly, by hospital-1")


def test_an_opener_that_shows_other_slices_than_it_confirmed_is_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its total is wrong, and the slice that it shows of hospital-0 would make it right."""

    def changed(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = original(tensor)
        words[5] += 1
        return words

    def shown(original: Any, fixed: Any, tag: str, words: torch.Tensor) -> None:
        if tag == "shown hospital-1 hospital-0":
            words = words.clone()
            words[5] += 1
        original(fixed, tag, words)

    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", changed)
    only_at(monkeypatch, DEVIATES, slice_totals, "_send", shown)
    _all_name(sums, sums.run(), "a slice of 'round 1' was not opened rightly, by hospital-1")


def test_an_opener_that_withholds_its_slice_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def withheld(original: Any, fixed: Any, tag: str, words: torch.Tensor) -> None:
        if not tag.startswith("total"):
            original(fixed, tag, words)

    only_at(monkeypatch, DEVIATES, slice_totals, "_send", withheld)
    outcome = sums.run()
    for name in _honest(sums):
        error = outcome.errors[name]
        assert isinstance(error, SumLostError) and error.lost == DEVIATES and "is late" in str(error), error
        assert not sums.openings(name)
    assert not outcome.totals


def test_an_opener_that_withholds_its_slice_from_one_is_named_by_that_one_to_all(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def withheld(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        if not (tag.startswith("total") and receiver == "hospital-0"):
            original(links, receiver, tag, words)

    from mpc_fl.links.links import Links

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", withheld)
    outcome = sums.run()
    assert not outcome.totals
    assert isinstance(outcome.errors["hospital-0"], SumLostError) and outcome.errors["hospital-0"].lost == DEVIATES
    for name in _honest(sums, DEVIATES, "hospital-0"):
        assert f"was given up by hospital-0: {DEVIATES} is late" in outcome.said(name)
        assert not sums.openings(name)


def test_an_opener_with_a_slice_of_another_round_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was right in round 1, and is signed for round 2."""
    kept: list[torch.Tensor] = []

    def earlier(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = original(tensor)
        kept.append(words)
        return words if len(kept) == 1 else _Fixed(kept[0].clone())

    class _Fixed(torch.Tensor):
        """Nothing is added to it any more."""

        def __iadd__(self, _other: Any) -> Any:
            return self

    def as_plain(original: Any, fixed: Any, tag: str, words: torch.Tensor) -> None:
        original(fixed, tag, words.as_subclass(torch.Tensor))

    sums.numbers = (1, 2)
    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", earlier)
    only_at(monkeypatch, DEVIATES, slice_totals, "_send", as_plain)
    outcome = sums.run()
    for name in _honest(sums):
        assert "was not opened rightly, by hospital-1" in outcome.said(name)
        assert len(sums.openings(name)) == 1
        first = outcome.totals[name]
        assert first is not None and torch.equal(first, expected(sums.hospitals, sums.elements, number=1))


def test_a_word_about_another_sum_is_no_word_about_this_one(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another(original: Any, domain: Any, links: Any, names: Any, subject: Subject, values: Any) -> Any:
        return original(domain, links, names, Subject("0" * 64, subject.word), values)

    only_at(monkeypatch, DEVIATES, slice_totals, "say_signed", of_another)
    _all_name(sums, sums.run(), "hospital-1 did not sign what it said ('total'), or of another sum")


def _say_two_versions(monkeypatch: pytest.MonkeyPatch, where: Any, word: str, change: Any, who: str = DEVIATES) -> None:
    """What is signed of a word and said to the first of the others is `change`d for the rest of them."""

    def twice(original: Any, domain: Any, links: Any, names: Any, subject: Subject, values: Any) -> Any:
        if subject.word != word:
            return original(domain, links, names, subject, values)
        said = original(domain, links, names[:1], subject, values)
        original(domain, links, names[1:], subject, change(values))
        return said

    only_at(monkeypatch, who, where, "say_signed", twice)


def test_an_opener_that_tells_different_slices_to_different_hospitals_is_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []

    def kept(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        made.append(original(tensor))
        return made[-1]

    def two(original: Any, fixed: Any, tag: str, words: torch.Tensor) -> None:
        if not tag.startswith("total"):
            original(fixed, tag, words)
            return
        for number, name in enumerate(fixed.peers):
            fixed.links.send_tensor(name, tag, words + (number > 0))

    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", kept)
    only_at(monkeypatch, DEVIATES, slice_totals, "_send", two)
    _say_two_versions(
        monkeypatch, slice_totals, "total", lambda values: {"hashes": {DEVIATES: tensor_digest(made[0] + 1)}}
    )
    _all_name(sums, sums.run(), "hospital-1 said one thing to")


def test_an_opener_that_sends_another_slice_than_it_signed_is_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_at(
        monkeypatch,
        DEVIATES,
        slice_totals,
        "_send",
        lambda original, fixed, tag, words: original(fixed, tag, words + 1),
    )
    _all_name(sums, sums.run(), "hospital-1 sent another total of a slice of 'round 1' than it signed")


@pytest.mark.parametrize("signed", ["false", "right"])
def test_an_opener_that_sends_the_right_total_to_one_hospital_alone_is_named_by_who_sees_that(
    signed: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits at that one, which must not open the sum while the others give it up. All keys of the deviating one leave."""
    made: list[torch.Tensor] = []

    def kept(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        made.append(original(tensor))
        return made[-1]

    def false() -> torch.Tensor:
        words = made[0].clone()
        words[5] += 1
        return words

    def signs(original: Any, domain: Any, links: Any, names: Any, subject: Subject, values: Any) -> Any:
        if subject.word == "total" and signed == "false":
            values = {"hashes": {DEVIATES: tensor_digest(false())}}
        return original(domain, links, names, subject, values)

    def sends(original: Any, fixed: Any, tag: str, words: torch.Tensor) -> None:
        for name in fixed.peers:
            right = not tag.startswith("total") or name == fixed.peers[0]
            fixed.links.send_tensor(name, tag, words if right else false())

    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", kept)
    only_at(monkeypatch, DEVIATES, slice_totals, "say_signed", signs)
    only_at(monkeypatch, DEVIATES, slice_totals, "_send", sends)
    only_at(monkeypatch, DEVIATES, slice_totals, "_compare", lambda original, *said: original(*said) and {})
    outcome = sums.run()
    first = sums.hospitals[2]  # whom hospital-1 speaks to first
    for name in _honest(sums):
        assert name not in outcome.totals and not sums.openings(name), name
        if (name == first) == (signed == "false"):
            assert "hospital-1 sent another total of a slice of 'round 1' than it signed" in outcome.said(name)
    assert not [tag for sender, _, tag, _ in outcome.frames if tag.startswith("keys") and sender != DEVIATES]


@pytest.mark.parametrize("piece", ["hospital-0", "hospital-1", "nobody"])
def test_whoever_says_falsely_that_a_slice_does_not_fit_is_named(
    piece: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accused(original: Any, links: Any, names: Any, word: str, **values: Any) -> None:
        original(links, names, word, **(values | ({"failed": [piece]} if word == "repeated" else {})))

    only_at(monkeypatch, DEVIATES, slice_totals, "say", accused)
    _all_name(sums, sums.run(), "hospital-1 says that a slice of 'round 1' does not fit, which does")


# ---- liars in the linear check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ["hospital-0", DEVIATES, "hospital-2"])
def test_a_liar_about_one_slice_is_named_and_not_its_opener(
    about: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so itself of its own slice, which it opens and has to show."""
    places = list(sums.hospitals)
    told: list[int] = []

    def false(original: Any, words: torch.Tensor) -> Any:
        told.append(0)
        numbers = original(words)
        if places[len(told) - 1] == about:
            numbers[3] ^= 1
        return numbers

    def lies_to_itself(original: Any, linear: Any, total: Any, given: Any) -> bool:
        checked.append(0)
        return bool(original(linear, total, given)) and places[len(checked) - 1] != about

    checked: list[int] = []
    only_at(monkeypatch, DEVIATES, slice_totals, "as_numbers", false)
    only_at(monkeypatch, DEVIATES, slice_totals, "fits", lies_to_itself)
    _all_name(sums, sums.run(), "a slice of 'round 1' was not opened rightly, by hospital-1")


def test_a_liar_about_all_slices_that_shows_nothing_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def false(original: Any, words: torch.Tensor) -> Any:
        return [number ^ 1 for number in original(words)]

    only_at(monkeypatch, DEVIATES, slice_totals, "as_numbers", false)
    outcome = sums.run()
    for name in _honest(sums):
        assert "was not opened rightly, by hospital-1:" in outcome.said(name), outcome.said(name)
        assert name not in outcome.totals and not sums.openings(name)


def test_a_liar_that_tells_different_numbers_to_different_hospitals_is_named(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(values: Any) -> Any:
        return {"of": {piece: [number ^ 1 for number in numbers] for piece, numbers in values["of"].items()}}

    _say_two_versions(monkeypatch, slice_totals, "combinations", changed)
    _all_name(sums, sums.run(), "hospital-1 said one thing to")


def test_an_opener_that_lies_in_both_has_summed_another_summand(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check does not find, as its module says: it could have had this summand. It did not know the sum then."""
    error = torch.zeros(sums.elements, dtype=torch.int32)
    place = slice_totals.Slices(sums.hospitals, sums.elements).place(DEVIATES)
    error[place] = 12345

    def changed(original: Any, tensor: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = original(tensor)
        return words + 12345

    def consistent(original: Any, fixed: Any, linear: Any) -> Any:
        from dataclasses import replace

        own = {**fixed.own, DEVIATES: fixed.own[DEVIATES] + 12345}
        return original(replace(fixed, own=own), linear)

    only_at(monkeypatch, DEVIATES, slice_totals, "own_copy", changed)
    only_at(monkeypatch, DEVIATES, slice_totals, "_combinations", consistent)
    outcome = sums.run()
    assert not outcome.errors
    for total in outcome.totals.values():
        assert total is not None and torch.equal(total, expected(sums.hospitals, sums.elements) + error)


# ---- the coin, and what is repeated ------------------------------------------------------------------------------------


def _say_otherwise(monkeypatch: pytest.MonkeyPatch, where: Any, word: str, **changed: Any) -> None:
    def otherwise(original: Any, links: Any, names: Any, said: str, **values: Any) -> None:
        original(links, names, said, **{**values, **(changed if said == word else {})})

    only_at(monkeypatch, DEVIATES, where, "say", otherwise)


@pytest.mark.parametrize("number", ["00" * 32, "zz", 7, None])
def test_a_coin_that_does_not_fit_is_named(number: Any, sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    _say_otherwise(monkeypatch, slice_totals, "coin", number=number)
    _all_name(sums, sums.run(), "hospital-1 showed another part of the coin than it committed to")


def test_nobody_shows_its_part_of_the_coin_before_all_totals_are_there(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, str]] = []

    def watch(sender: str, receiver: str, frame: Frame) -> None:
        word = frame.payload.get("word") if isinstance(frame.payload, dict) else frame.tag.split("/")[-1].split(" ")[0]
        order.append((f"{word} {sender}", receiver))

    assert not sums.run(watch).errors
    for name in sums.hospitals:
        shown = min(at for at, (what, _) in enumerate(order) if what == f"coin {name}")
        totals = [at for at, (what, receiver) in enumerate(order) if what.startswith("total ") and receiver == name]
        assert len(totals) == 2 * (len(sums.hospitals) - 1) and max(totals) < shown


@pytest.mark.parametrize("word", ["coin", "repeated", "confirm"])
def test_whoever_repeats_what_nobody_said_is_named(word: str, sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    false = {name: ["0" * 64, "00"] for name in sums.hospitals}
    where = peer_sum if word == "confirm" else slice_totals
    _say_otherwise(monkeypatch, where, word, repeated=false)
    outcome = sums.run()
    for name in _honest(sums):
        assert outcome.said(name).startswith("hospital-1 repeats what "), outcome.said(name)
        assert "never signed" in outcome.said(name) and name not in outcome.totals


# ---- slices, keys and sets ---------------------------------------------------------------------------------------------


def test_whoever_commits_to_two_things_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    _say_two_versions(monkeypatch, peer_sum, "slices", lambda values: {**values, "coin": "0" * 64})
    _all_name(sums, sums.run(), "hospital-1 said one thing to")


def test_a_slice_that_is_not_what_was_signed_has_not_come(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sender, or the only one to whom it sent it, is left out, as if it had not sent it."""
    from mpc_fl.links.links import Links

    def other(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        original(links, receiver, tag, words + 1 if tag == "slice" else words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", other)
    with caplog.at_level(logging.WARNING):
        outcome = sums.run()
    rest = tuple(_honest(sums))
    assert {name: outcome.admitted[name] for name in rest} == dict.fromkeys(rest, rest)
    for name in rest:
        total = outcome.totals[name]
        assert total is not None and torch.equal(total, expected(rest, sums.elements))
    assert any("hospital-1 sent another slice of 'round 1' than it signed" in line for line in caplog.messages)


def test_whoever_hands_on_another_slice_than_it_signed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hospital 3 is lost, so its slices go to hospital 4, which names hospital 1; the others pass on its word."""
    from mpc_fl.links.links import Links

    sums = PeerSums(tmp_path, monkeypatch, 5)

    def watch(sender: str, _receiver: str, frame: Frame) -> None:
        if sender == "hospital-3" and isinstance(frame.payload, dict) and frame.payload.get("word") == "arrived":
            sums.network.drop("hospital-3")

    def other(original: Any, links: Any, receiver: str, tag: str, words: torch.Tensor) -> None:
        original(links, receiver, tag, words + 1 if tag == "slice hospital-3" else words)

    only_at(monkeypatch, DEVIATES, Links, "send_tensor", other)
    outcome = sums.run(watch)
    assert "hospital-1 sent another slice of 'round 1' than it signed" in outcome.said("hospital-4")
    for name in ("hospital-0", "hospital-2"):
        assert "was given up by hospital-4: hospital-1 sent another slice of 'round 1'" in outcome.said(name)
    assert not outcome.totals and not any(sums.openings(name) for name in sums.hospitals)


def test_a_false_key_is_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    def false(original: Any, *arguments: Any) -> torch.Tensor:
        keys: torch.Tensor = original(*arguments)
        keys[0, 0] ^= 1
        return keys

    only_at(monkeypatch, DEVIATES, SummandMasks, "keys_for", false)
    outcome = sums.run()
    for name in _honest(sums):
        assert "hospital-1 sent another key of 'update 1 0' than it committed to" in outcome.said(name)
        assert name not in outcome.totals


def test_two_that_commit_to_different_keys_are_named(sums: PeerSums, monkeypatch: pytest.MonkeyPatch) -> None:
    only_at(monkeypatch, DEVIATES, SummandMasks, "commitments", lambda original, masks: original(masks)[::-1])
    outcome = sums.run()
    for name in _honest(sums):
        assert "committed to different keys" in outcome.said(name) and DEVIATES in outcome.said(name)
        assert name not in outcome.totals and not sums.openings(name)


def test_a_proposer_that_names_two_sets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = PeerSums(tmp_path, monkeypatch, 5)
    part = list(sums.hospitals[:4])
    _say_two_versions(monkeypatch, peer_sum, "fixed", lambda values: {**values, "hospitals": part}, "hospital-0")
    outcome = sums.run()
    for name in sums.hospitals[1:4]:
        assert outcome.said(name).startswith("hospital-0 said one thing to "), outcome.said(name)
    assert not [name for name in sums.hospitals if outcome.totals.get(name) is not None]
    assert not [tag for _, _, tag, _ in outcome.frames if tag.startswith("keys")]


@pytest.mark.parametrize(
    ("hospitals", "what"),
    [
        (["hospital-0", "hospital-7"], "hospital-0 fixed 'update 1 0' over hospitals that do not belong to it"),
        (["hospital-1", "hospital-0"], "hospital-0 fixed 'update 1 0' over hospitals that do not belong to it"),
        (["hospital-1"], "1 hospitals are left and the quorum is 2"),
    ],
)
def test_a_set_that_may_not_be_is_refused(
    hospitals: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = PeerSums(tmp_path, monkeypatch)

    def otherwise(original: Any, domain: Any, links: Any, names: Any, subject: Subject, values: Any) -> Any:
        told = [*hospitals, *(name for name in ["hospital-1"] if name not in hospitals)]
        return original(domain, links, names, subject, {"hospitals": told} if subject.word == "fixed" else values)

    only_at(monkeypatch, "hospital-0", peer_sum, "say_signed", otherwise)
    outcome = sums.run()
    assert what in outcome.said("hospital-1")
    assert not outcome.totals and not sums.openings("hospital-1")


def test_one_that_falsely_gives_up_is_named_and_nobody_else_is_lost(
    sums: PeerSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gives_up(original: Any, fixed: Any, told: Any) -> Any:
        raise ProtocolError("hospital-0 is a liar", "")

    only_at(monkeypatch, DEVIATES, slice_totals, "_coin", gives_up)
    outcome = sums.run()
    for name in _honest(sums):
        error = outcome.errors[name]
        assert "was given up by hospital-1: hospital-0 is a liar" in str(error)
        assert isinstance(error, SumLostError) and error.lost == ""
