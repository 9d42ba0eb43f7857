"""Who joins a run among peers, admits somebody, or tells of one that leaves, and deviates: it is found, and the others go on.

Parties are threads in virtual time; a deviation replaces a function where the deviating hospital's thread calls it.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ProtocolError
from mpc_fl.federation import peer_announcements, peer_joining, peer_program
from mpc_fl.federation.peer_admission import Admission
from mpc_fl.federation.peer_announcements import Announced, Announcement
from mpc_fl.federation.peer_joining import Joining
from tests.attacks.test_peer_rounds import proposes_two, went_on, without
from tests.federation.test_peer_membership import FOUR, ROUNDS, require_joined
from tests.support.peer_rounds import among_peers, names, require_sound
from tests.support.peer_sums import only_at
from tests.support.training_in_memory import Training

NEWCOMER = "hospital-3"
LATE = {NEWCOMER: "transcript update 1 0"}


def with_a_newcomer(directory: Path, monkeypatch: pytest.MonkeyPatch, **federation: Any) -> Training:
    return among_peers(directory, monkeypatch, 4, federation={**FOUR, **federation}, training=ROUNDS)


def never_took_part(run: Training) -> None:
    """The members finished without the newcomer, in one view of each round."""
    require_sound(run, names(3))
    assert run.said[NEWCOMER] != "finished", run.said
    assert not [tag for sender, tag in run.sent if sender == NEWCOMER and tag.startswith("peers update")]
    assert not went_on(run), went_on(run)


def test_a_newcomer_with_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, NEWCOMER, peer_program, "digest_of_common", lambda *_: "0" * 64)
    run.run(late=LATE)
    never_took_part(run)


def test_a_newcomer_with_the_model_of_a_round_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the ledger that it is given, not the state, and says that it has what it should have."""

    def take(_original: Any, *_rest: Any) -> None:
        pass

    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, NEWCOMER, peer_joining, "take_given", take)
    run.run(late=LATE)
    never_took_part(run)


def test_a_newcomer_of_another_federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_a_newcomer(tmp_path, monkeypatch)
    foreign = tmp_path / "foreign"
    make_local_identities([NEWCOMER], {NEWCOMER: foreign})
    run.placed[NEWCOMER] = run.placed[NEWCOMER].with_values(site={"identity": str(foreign)})
    run.run(late=LATE)
    never_took_part(run)
    assert any("the certificate of hospital-3 is not signed by this federation's authority" in line for line in run.log)


def test_one_that_the_rule_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(
        tmp_path,
        monkeypatch,
        5,
        federation={"hospitals": 5, "founders": 3, "admission": ["hospital-4"]},
        training=ROUNDS,
    )
    run.placed.pop("hospital-4")
    run.run(late=LATE)
    never_took_part(run)


def test_a_member_gives_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newcomer finds out, names it, and takes the state from another one."""

    def given(original: Any, common: Any, number: int) -> torch.Tensor:
        state: torch.Tensor = original(common, number).clone()
        state[-1] ^= 1
        return state

    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-0", peer_joining, "given_form", given)
    run.run(late=LATE)
    require_joined(run, NEWCOMER, names(3))
    assert any(line.startswith("hospital-0 gave what cannot be") for line in run.log), run.log[-30:]


def test_a_member_that_admits_somebody_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-2 gives no vote. hospital-0 gives the newcomer the state without it, and takes it in when it proposes round 3."""
    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-2", Admission, "vote", lambda *_: None)
    only_at(monkeypatch, "hospital-0", Admission, "lacking", lambda *_: "")
    run.run(late=LATE)
    require_sound(run, names(3))
    found = "round 3 under hospital-0 came to nothing: hospital-0 admitted hospital-3 with 2 votes, and it needs 3"
    assert any(line.startswith(found) for line in run.log), "\n".join(run.log)
    assert not [tag for sender, tag in run.sent if sender == NEWCOMER and tag.startswith("peers update")]


def test_a_vote_for_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer that shows a vote which nobody gave for it is admitted by none."""
    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-2", Admission, "vote", lambda *_: None)

    def answered(_original: Any, self: Joining, _givers: Any) -> None:
        votes = self.attendance.asking.votes
        votes["hospital-2"] = votes.get("hospital-1", "")

    only_at(monkeypatch, NEWCOMER, Joining, "_await_votes", answered)
    run.run(late=LATE)
    never_took_part(run)


@pytest.mark.parametrize(("said", "why"), [({}, "which did not say so"), ({"leaves": True}, "which did not sign that")])
def test_a_proposer_that_says_of_a_present_one_that_it_leaves(
    said: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves(values: dict[str, Any]) -> dict[str, Any]:
        of_it = {**values["present"]["hospital-4"], **said}
        return {**without(values, "hospital-4"), "leaving": {"hospital-4": of_it}}

    run = among_peers(tmp_path, monkeypatch)
    proposes_two(monkeypatch, tuple(names(5)), leaves)
    run.run()
    assert any(f"hospital-1 says that hospital-4 leaves, {why}" in line for line in went_on(run)), run.log
    require_sound(run, names(5))


# ---- announcements of addresses ------------------------------------------------------------------------------------------


@pytest.fixture
def announced(tmp_path: Path) -> dict[str, Announced]:
    """Of two hospitals of one federation, and of one that another federation certified."""
    make_local_identities(names(5), {name: tmp_path / name for name in names(5)})
    make_local_identities(["hospital-3"], {"hospital-3": tmp_path / "foreign"})
    later = ("hospital-3", "hospital-4")
    own = {
        name: Announced(load_identity(tmp_path / name, name), "session", later, ("hospital-0", "hospital-1"))
        for name in names(5)
    }
    return own | {"foreign": Announced(load_identity(tmp_path / "foreign", "hospital-3"), "session", later)}


def test_announcements_that_do_not_count(announced: dict[str, Announced], monkeypatch: pytest.MonkeyPatch) -> None:
    own, reader = announced["hospital-3"].made("somewhere.example:47100"), announced["hospital-0"]
    assert reader.checked(asdict(own), "hospital-1") == own
    false: list[tuple[str, Announcement]] = [
        ("did not sign", replace(own, address="elsewhere.example:47100")),
        ("did not sign", replace(own, until="2999-01-01T00:00:00+00:00")),
        ("did not sign", replace(announced["hospital-3"].made("x:1"), signature=own.signature)),
        ("did not sign", replace(announced["hospital-3"], session="another").made("x:1")),
        ("another party's", replace(own, party="hospital-4")),
        ("no hospital that joins later", announced["hospital-1"].made("x:1")),
        ("not signed by this federation's authority", announced["foreign"].made("x:1")),
        ("not host:port", announced["hospital-3"].made("nowhere")),
        ("not host:port", announced["hospital-3"].made("\x1b[2J:1")),
    ]
    for why, said in false:
        with pytest.raises(ProtocolError, match=f"hospital-1 passed on an announcement of .*{why}"):
            reader.checked(asdict(said), "hospital-1")
    behind = announced["hospital-3"].made("", ["hospital-0", "hospital-1"])
    assert reader.checked(asdict(behind), "hospital-1") == behind
    false = [
        ("did not sign", replace(behind, through="hospital-1")),
        ("not reached through relays", announced["hospital-3"].made("", ["hospital-2"])),
        ("not reached through relays", announced["hospital-3"].made("", ["hospital-0"] * 1000)),
        ("not reached through relays", replace(behind, through="hospital-0  hospital-1")),
        ("not reached through relays", announced["hospital-3"].made("x:1", ["hospital-0"])),
        ("not host:port", announced["hospital-3"].made("")),
    ]
    for why, said in false:
        with pytest.raises(ProtocolError, match=f"hospital-1 passed on an announcement of .*{why}"):
            reader.checked(asdict(said), "hospital-1")
    for value in ({}, {**asdict(own), "address": 5}):
        with pytest.raises(ProtocolError, match="hospital-1 passed on"):
            reader.checked(value, "hospital-1")
    later = peer_announcements.now() + datetime.timedelta(days=1, minutes=1)
    monkeypatch.setattr(peer_announcements, "now", lambda: later)
    with pytest.raises(ProtocolError, match="it is not of now"):
        reader.checked(asdict(own), "hospital-1")
