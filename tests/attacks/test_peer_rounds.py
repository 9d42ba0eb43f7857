"""A hospital that deviates while it proposes: two sets, two plans, another model, a view that nobody asked for.

It is named, nothing is opened under its proposal, and the others go on under the next view. Parties are threads in virtual time; a
deviation replaces a function where the deviating hospital's thread calls it, and everybody else runs the unmodified program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.aggregation import peer_sum
from mpc_fl.aggregation.signed_words import Signed
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.ledger_file import now
from mpc_fl.audit.peer_signing import PeerSigners
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, sign_block, to_json
from mpc_fl.errors import SumLostError
from mpc_fl.federation import peer_attendance, peer_program
from mpc_fl.federation.peer_proposal import Complete, Proposals
from mpc_fl.federation.peer_settling import Settling
from tests.support.peer_rounds import among_peers, names, require_sound
from tests.support.peer_sums import only_at
from tests.support.training_in_memory import Training

PROPOSER = "hospital-1"  # of round 1
Values = dict[str, Any]


def proposes_two(monkeypatch: pytest.MonkeyPatch, told: tuple[str, ...], other: Callable[[Values], Values]) -> None:
    """The proposer of round 1 says `other` of its proposal to these, and the honest one to the others; both signed."""

    def say(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Values) -> Signed:
        if subject.word != "proposal" or values["number"] != 1 or values["view"] != 0:
            return original(domain, links, to, subject, values)  # type: ignore[no-any-return]
        original(domain, links, [name for name in to if name in told], subject, other(values))
        return original(domain, links, [name for name in to if name not in told], subject, values)  # type: ignore[no-any-return]

    only_at(monkeypatch, PROPOSER, peer_attendance, "say_signed", say)


def without(values: Values, *left_out: str) -> Values:
    """The same proposal without some hospitals."""
    hospitals = [name for name in values["hospitals"] if name not in left_out]
    kept = {key: {name: values[key][name] for name in hospitals} for key in ("starts", "present")}
    return {**values, "hospitals": hospitals, **kept}


def went_on(run: Training) -> list[str]:
    """What was logged of views of round 1 that came to nothing."""
    return [line for line in run.log if line.startswith("round 1 under")]


def opened_under(run: Training, view: int) -> list[str]:
    """Whoever made a slice of the update of round 1 under this view."""
    return [f"{sender} {tag}" for sender, tag in run.sent if tag.startswith(f"peers update 1 {view} ")]


TWO_SETS = [
    (("hospital-2", "hospital-3"), ("hospital-0",)),
    (("hospital-4",), ("hospital-2",)),
    (("hospital-4",), ("hospital-4",)),
]


@pytest.mark.parametrize(("told", "left_out"), TWO_SETS)
def test_two_sets(
    told: tuple[str, ...], left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, honest = among_peers(tmp_path, monkeypatch), [name for name in names(5) if name != PROPOSER]
    proposes_two(monkeypatch, told, lambda values: without(values, *left_out))
    run.run()
    assert any(f"{PROPOSER} said one thing to" in line and "signed both" in line for line in went_on(run)), run.log
    require_sound(run, honest)  # also who was left out by what was said to it alone
    assert not [line for line in run.log if " is late" in line]
    assert not opened_under(run, 0) and opened_under(run, 1)


def test_two_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    proposes_two(monkeypatch, ("hospital-2",), lambda values: {**values, "weight_total": 2 * values["weight_total"]})
    run.run()
    assert any(f"{PROPOSER} sent another total of weights" in line for line in went_on(run)), run.log
    require_sound(run, names(5))
    assert not opened_under(run, 0)


def test_another_state_than_the_hospitals_said_that_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(values: Values) -> Values:
        present = {name: {**said, "state": "0" * 64} for name, said in values["present"].items()}
        return {**values, "present": present}

    run = among_peers(tmp_path, monkeypatch)
    proposes_two(monkeypatch, tuple(names(5)), changed)
    run.run()
    assert any(f"{PROPOSER} says of hospital-0 what it did not sign" in line for line in went_on(run)), run.log
    require_sound(run, names(5))
    assert not opened_under(run, 0)


def test_too_few_hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    proposes_two(monkeypatch, tuple(names(5)), lambda values: without(values, "hospital-2", "hospital-3", "hospital-4"))
    run.run()
    assert any("fewer than 3" in line and PROPOSER in line for line in went_on(run)), run.log
    require_sound(run, names(5))
    assert not opened_under(run, 0)


def test_one_with_another_model_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(original: Any, common: Any) -> str:
        found = original(common)
        return "0" * 64 if common.patients else found  # type: ignore[no-any-return]

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, PROPOSER, peer_program, "digest_of_common", digest)
    run.run()
    require_sound(run, [name for name in names(5) if name != PROPOSER])
    assert "finished" not in run.said[PROPOSER]


def test_a_view_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-2 would propose under view 1, and says so at once: nobody has signed that view 0 is over, so nobody follows."""

    def at_once(original: Any, self: Proposals, standing: Any, view: int, *rest: Any) -> Any:
        return original(self, standing, 1 if standing.number == 1 and not view else view, *rest)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-2", Proposals, "own_presence", at_once)
    run.run()
    require_sound(run, [name for name in names(5) if name != "hospital-2"])
    assert opened_under(run, 0) and not opened_under(run, 1)


def test_a_silent_proposer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(original: Any, self: Proposals, standing: Any, *rest: Any) -> Any:
        if standing.number == 1:
            run.clock.wait(run.never, float("inf"))
        return original(self, standing, *rest)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, PROPOSER, Proposals, "proposed", nothing)
    run.run(silent=(PROPOSER,))
    require_sound(run, [name for name in names(5) if name != PROPOSER])
    assert any(f"{PROPOSER} proposed nothing within" in line for line in went_on(run)), run.log


def test_two_signatures_of_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are genuine, so two ledgers would have two seals: nobody keeps the block."""

    def say(original: Any, self: PeerSigners, to: list[str], tag: str, value: dict[str, Any]) -> None:
        if tag == "signed" and self.drafted is not None and self.drafted.about == "round 1":
            another = to_json(sign_block(self.drafted, self.ledger.identity, now()))
            original(self, ["hospital-2"], tag, {**value, "signature": another})
            to = [name for name in to if name != "hospital-2"]
        original(self, to, tag, value)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, PROPOSER, PeerSigners, "_say", say)
    run.run()
    named = [name for name, said in run.said.items() if f"{PROPOSER} gave one signature of a block to" in said]
    assert "hospital-2" in named and len(named) >= 3, run.said
    for name in names(5):
        blocks = [parse_line(line) for line in (run.party(name) / LEDGER_FILE).read_bytes().splitlines()]
        assert [block.about for block in blocks] == ["the run begins", "round 0"]


@pytest.mark.parametrize("view", [0, 10**9])
def test_a_complete_block_that_nobody_else_signed(view: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-3 gives up the first sum, and then says that it holds a block of the round with the signatures of all."""
    gave_up, claimed = list[str](), list[Complete]()

    def gives_up(original: Any, fixed: Any) -> Any:
        if not gave_up:
            gave_up.append(fixed.transcript)
            raise SumLostError("a sum that nothing was lost of", "")
        return original(fixed)

    def present(original: Any, self: Proposals, standing: Any, number: int, reason: Any, ledger: Any, own: Any) -> Any:
        if standing.number == 0 and number == 1:
            draft = ledger.draft("openings", "round 0", tuple(names(4)), {"global model": "0" * 64})
            signature = sign_block(draft, ledger.identity, now())
            signatures = tuple(replace(signature, party=name) for name in names(4))
            claimed.append(Complete(view, replace(draft, signatures=signatures)))
            own = claimed[-1]
        return original(self, standing, number, reason, ledger, own)

    def completed(original: Any, self: Settling, own: Any, *rest: Any) -> Any:
        return original(self, claimed[-1] if claimed else own, *rest)

    run = among_peers(tmp_path, monkeypatch, 4)
    only_at(monkeypatch, "hospital-3", peer_sum, "checked_totals", gives_up)
    only_at(monkeypatch, "hospital-3", Proposals, "own_presence", present)
    only_at(monkeypatch, "hospital-3", Settling, "completed", completed)
    run.run()
    assert gave_up and claimed
    require_sound(run, names(3))
    assert any("hospital-3 says that" in line for line in run.log)
    assert any("hospital-3 is left out of round 0" in line for line in run.log)
