"""Names that sites choose: what one may be, that none passes for another party, and how texts for people carry them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.chosen_names import NO_NAMES, ChosenNames, check_chosen_name, look_alike, told_by_name
from mpc_fl.errors import IdentityError, LinkError, PeerLostError
from mpc_fl.roles import AGGREGATOR, DEALER, MODEL_OWNER, hospital_name, hospital_names

NAMES = ChosenNames.of({"hospital-0": "charite", "hospital-1": "st-thomas", "hospital-10": "ten", "aggregator": "rki"})
IDENTITIES = [*hospital_names(12), AGGREGATOR, DEALER, MODEL_OWNER]


@pytest.mark.parametrize(
    "name", ["charite", "st-thomas", "a", "7", "4th-clinic", "x" * 40, "hospital-berlin", "dealers"]
)
def test_a_site_may_choose(name: str) -> None:
    assert check_chosen_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "Charite", "charité", "st thomas", "-x", "x-", "x" * 41, "a.b", "a/b", "a_b", "a\n", "<b>", "a(b)", "١"],
)
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(IdentityError, match="cannot be the name of a site: choose 1 to 40 letters") as refused:
        check_chosen_name(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["hospital", "hospital-0", "hospital-17", "hospital-007", "hospital0", "hosp-ital-1", "h0spital-1", "hospita1-1",
     "hospital-o", "hospitai-l", "aggregator", "aggregat0r", "dealer", "deaier", "model-owner", "modelowner", "rnodel-owner",
     "model-ovvner"],
)  # fmt: skip
def test_what_reads_like_an_identity_is_refused(name: str) -> None:
    with pytest.raises(IdentityError, match="reads like the identity of a party"):
        check_chosen_name(name)


@given(st.text(st.sampled_from("abh01io5-lsrnmvw"), max_size=42))
def test_a_name_is_refused_or_is_what_the_form_says_and_stays_itself(name: str) -> None:
    try:
        assert check_chosen_name(name) == name
    except IdentityError as refused:
        assert "\n" not in str(refused)
        return
    assert re.fullmatch("[a-z0-9-]{1,40}", name) and name[0] != "-" != name[-1]
    assert name not in IDENTITIES and look_alike(name, name)
    assert ChosenNames.of({"hospital-3": name}).shown("hospital-3") == f"{name} (hospital-3)"


@given(st.integers(0, 999), st.data())
def test_no_spelling_of_an_identity_can_be_chosen(rank: int, data: st.DataObject) -> None:
    """Hyphens anywhere within, letters that look alike for each other."""
    alike = {"o": "o0", "0": "0o", "i": "i1l", "l": "l1i", "1": "1il", "s": "s5", "5": "5s"}
    letters = [data.draw(st.sampled_from(alike.get(letter, letter))) for letter in hospital_name(rank).replace("-", "")]
    spelled = "".join(letter + data.draw(st.sampled_from(["", "-"])) for letter in letters[:-1]) + letters[-1]
    with pytest.raises(IdentityError):
        check_chosen_name(spelled)


@pytest.mark.parametrize("other", ["st-thomas", "stthomas", "st-th0mas", "5t-thomas"])
def test_two_names_that_look_alike_are_refused(other: str) -> None:
    with pytest.raises(IdentityError, match="hospital-0 and hospital-2 have names that look alike: 'st-thomas' and "):
        ChosenNames.of({"hospital-0": "st-thomas", "hospital-2": other})


def test_what_a_file_says_is_kept_as_far_as_it_can_be_a_name() -> None:
    said = {
        "hospital-0": "charite",
        "hospital-1": "<script>",
        "hospital-2": "char1te",
        "../x": "ten",
        "hospital-3": "x",
    }
    assert ChosenNames.readable(said).pairs == (("hospital-0", "charite"), ("hospital-3", "x"))
    assert ChosenNames.readable(None) == NO_NAMES


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hospital-1 is late", "st-thomas (hospital-1) is late"),
        ("hospital-10, hospital-1, hospital-2", "ten (hospital-10), st-thomas (hospital-1), hospital-2"),
        ("a link (hospital-1): closed", "a link (st-thomas (hospital-1)): closed"),
        ("aggregator refused hospital-0.", "rki (aggregator) refused charite (hospital-0)."),
        ("see the log of aggregator", "see the log of rki (aggregator)"),
        ("the aggregator adds, an aggregator", "the aggregator adds, an aggregator"),
        ("set federation.coordinator to aggregator", "set federation.coordinator to aggregator"),
        ("runs/x/parties/hospital-0/out, logs/hospital-0.log", "runs/x/parties/hospital-0/out, logs/hospital-0.log"),
        ("hospital-0-privacy.sqlite3 from-hospital-1", "hospital-0-privacy.sqlite3 from-hospital-1"),
        ("federation.names.hospital-0", "federation.names.hospital-0"),
    ],
)
def test_parties_in_a_text_are_told_by_name(text: str, shown: str) -> None:
    assert NAMES.in_text(text) == shown
    assert NO_NAMES.in_text(text) == text


@given(
    st.lists(st.sampled_from([*IDENTITIES, "charite", "st-thomas", "the", " ", ", ", "(", ")", "/", ".", "log", ": "]))
)
def test_a_text_that_was_told_by_name_stays_as_it_is(words: list[str]) -> None:
    once = NAMES.in_text("".join(words))
    assert NAMES.in_text(once) == once
    for party, name in NAMES.pairs:
        once = once.replace(f"{name} ({party})", party)
    plain = "".join(words)
    for party, name in NAMES.pairs:  # what the words said themselves
        plain = plain.replace(f"{name} ({party})", party)
    assert once == plain


def test_an_error_tells_of_parties_by_name_for_the_user_and_no_earlier() -> None:
    error = PeerLostError("hospital-1", "hospital-1 is late", "see the log of hospital-1")
    assert error.for_peers == "hospital-1 is late"
    with pytest.raises(LinkError) as told, told_by_name(NAMES), told_by_name(NAMES):
        raise error
    assert str(told.value) == "st-thomas (hospital-1) is late: see the log of st-thomas (hospital-1)"
    assert told.value is error and error.peer == "hospital-1"  # what the program goes by
