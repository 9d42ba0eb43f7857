"""Who leaves, joins and comes back while a run among peers goes on, in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpc_fl.audit.ledger_audit import Copy, parse_line, verify_copies
from mpc_fl.audit.ledger_file import now
from mpc_fl.audit.peer_record import lines_of
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block
from mpc_fl.crypto.certificates import load_root
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.files import read_json_lines
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.support.peer_rounds import among_peers, model_of, names, require_sound, same
from tests.support.training_in_memory import KILLED, SETTINGS, Sleeper, Training


def blocks_of(run: Training, name: str) -> list[Block]:
    return [parse_line(line) for line in (run.party(name) / LEDGER_FILE).read_bytes().splitlines()]


def told_of(run: Training, name: str) -> dict[str, list[str]]:
    """What the blocks in the ledger of this hospital tell, by what they are about."""
    blocks = blocks_of(run, name)
    return {block.about: told for block, told in zip(blocks, lines_of(blocks), strict=True)}


def leaving(run: Training, **after: int) -> None:
    """These hospitals leave after these rounds."""
    for name, number in after.items():
        name = name.replace("_", "-")
        run.placed[name] = run.placed[name].with_values(site={"leave_after": number})


@pytest.mark.parametrize("leaver", ["hospital-4", "hospital-2"], ids=["proposes nothing", "proposes the next round"])
def test_one_leaves_and_the_others_go_on(leaver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, training={**SETTINGS["training"], "rounds": 3})
    leaving(run, **{leaver.replace("-", "_"): 1})
    run.run()
    others = [name for name in names(5) if name != leaver]
    require_sound(run, others)
    assert run.said[leaver] == "finished"
    told = told_of(run, others[0])
    of_next = next(lines for about, lines in told.items() if about.startswith("round 2"))
    assert f"Left, as it said: {leaver}" in of_next
    assert not any("Lost" in line for lines in told.values() for line in lines)
    # It has the ledger and the model up to there.
    own = (run.party(leaver) / LEDGER_FILE).read_bytes()
    whole = (run.party(others[0]) / LEDGER_FILE).read_bytes()
    assert whole.startswith(own) and blocks_of(run, leaver)[-1].about.startswith("round 1")
    assert not same(model_of(run, leaver), model_of(run, others[0]))
    assert [line["round"] for line in read_json_lines(run.party(leaver) / ROUNDS_FILE)] == [0, 1]


def test_the_ledger_names_proposers_and_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    leaving(run, hospital_2=1)  # which proposes round 2
    run.run()
    told = told_of(run, "hospital-0")
    assert told["round 1"] == ["Proposed by hospital-1"]
    assert told["round 2 (1)"] == [
        "Proposed by hospital-3, under view 1: the one before came to nothing",
        "Left, as it said: hospital-2",
    ]


def test_too_many_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, 3)
    leaving(run, hospital_2=1)
    run.run()
    assert run.said["hospital-2"] == "finished"
    for name in ("hospital-0", "hospital-1"):
        assert "QuorumError" in run.said[name] or "PeerLostError" in run.said[name], run.said
    assert any("hospital-2" in run.said[name] for name in ("hospital-0", "hospital-1"))
    authority = load_root(load_identity(run.party("hospital-0") / "identity", "hospital-0").authority, "test")
    copies = [Copy(name, name, (run.party(name) / LEDGER_FILE).read_bytes()) for name in names(3)]
    (missing,) = verify_copies(copies, authority, now()).findings
    assert "the end of the run is missing" in missing.what


# ---- joining -------------------------------------------------------------------------------------------------------------

FOUR = {"hospitals": 4, "founders": 3, "quorum": 3}
ROUNDS = {**SETTINGS["training"], "rounds": 4}


def rounds_of(run: Training, name: str) -> list[int]:
    return [line["round"] for line in read_json_lines(run.party(name) / ROUNDS_FILE)]


def require_joined(run: Training, name: str, others: list[str]) -> dict[str, list[str]]:
    """All finished with one model and one ledger, which tells that `name` joined; what it tells."""
    require_sound(run, others)
    assert run.said[name] == "finished", (run.said, run.log[-30:])
    assert same(model_of(run, name), model_of(run, others[0]))
    assert (run.party(name) / LEDGER_FILE).read_bytes() == (run.party(others[0]) / LEDGER_FILE).read_bytes()
    return told_of(run, name)


@pytest.mark.parametrize("rule", ["all", "quorum", ["hospital-3"]], ids=["all", "quorum", "list"])
def test_one_joins_while_the_run_goes_on(rule: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = {**FOUR, "admission": rule}
    run = among_peers(tmp_path, monkeypatch, 4, federation=federation, training=ROUNDS)
    run.run(late={"hospital-3": "transcript update 2 0"})
    told = require_joined(run, "hospital-3", names(3))
    assert "Joined: hospital-3" in told["the hospitals of round 3"]
    assert rounds_of(run, "hospital-3") == [3, 4]
    assert not [line for lines in told.values() for line in lines if "Lost" in line or "came to nothing" in line]
    takes_part = {line["round"]: line["hospitals"] for line in read_json_lines(run.party("hospital-0") / ROUNDS_FILE)}
    assert takes_part[2] == names(3) and takes_part[3] == names(4)


def test_one_joins_and_another_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, 4, federation=FOUR, training={**SETTINGS["training"], "rounds": 6})
    leaving(run, hospital_1=4)
    run.run(late={"hospital-3": "transcript update 2 0"})
    assert run.said["hospital-1"] == "finished"
    told = require_joined(run, "hospital-3", ["hospital-0", "hospital-2"])
    assert "Joined: hospital-3" in told["the hospitals of round 3"]
    of_fifth = next(lines for about, lines in told.items() if about.startswith("round 5"))
    assert "Left, as it said: hospital-1" in of_fifth
    assert blocks_of(run, "hospital-0")[-1].parties == ("hospital-0", "hospital-2", "hospital-3")


def test_who_was_not_counted_weighs_what_is_left_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patients were counted over the founders; the weights of all together stay at most 1 (`preparation.heaviest_weight`)."""
    weights = dict[str, list[int]]()
    run = among_peers(tmp_path, monkeypatch, 4, federation=FOUR, training=ROUNDS)
    original = Hospital.weight.fget  # type: ignore[attr-defined]

    def weight(self: Hospital) -> int:
        found: int = original(self)
        weights.setdefault(self.name, []).append(found)
        return found

    monkeypatch.setattr(Hospital, "weight", property(weight))
    run.run(late={"hospital-3": "transcript update 2 0"})
    require_joined(run, "hospital-3", names(3))
    total = 1 << (2 * 3 * 30 - 1).bit_length()  # three of four are counted
    assert max(weights["hospital-3"]) <= total // 2
    assert sum(max(each) for each in weights.values()) <= total


def test_what_a_newcomer_is_charged_is_what_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mechanism": "distributed", "noise_multiplier": 3.0, "delta": 1e-3, "epsilon": 90.0}
    run = among_peers(tmp_path, monkeypatch, 4, federation=FOUR, training=ROUNDS, privacy=privacy)
    run.run(late={"hospital-3": "transcript gradient 2 0"})
    require_joined(run, "hospital-3", names(3))
    charged = {}
    for name in names(4):
        ledger = PrivacyLedger(run.party(name) / f"{name}-privacy.sqlite3", name)
        charged[name] = [record["round"] for record in ledger.records() if record["released"]]
    assert charged == {**dict.fromkeys(names(3), [1, 2, 3, 4]), "hospital-3": [3, 4]}


@pytest.mark.parametrize("place", ["transcript update 1 0", "peers update 1 0 0/total", "block 1 0/complete"])
def test_one_that_was_lost_comes_back(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume, while the others go on; also one that had signed a block and does not know what became of it."""
    run = among_peers(tmp_path, monkeypatch, 5, training=ROUNDS)
    sleeper = Sleeper("hospital-2", place, KILLED)
    run.run(sleeper, again={"hospital-2": "transcript update 2"})
    assert sleeper.slept
    others = [name for name in names(5) if name != "hospital-2"]
    told = require_joined(run, "hospital-2", others)
    assert any("Came back: hospital-2" in lines for lines in told.values()), told


def test_one_that_was_left_out_comes_back_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, 5, training={**SETTINGS["training"], "rounds": 4})
    # Given up after 20 s; it is back while hospital-0 keeps the others waiting in round 2.
    run.run(Sleeper("hospital-2", "peers update 1 0 0/slice", 30.0), Sleeper("hospital-0", "transcript update 2", 15.0))
    told = require_joined(run, "hospital-2", [name for name in names(5) if name != "hospital-2"])
    assert any("Came back: hospital-2" in lines for lines in told.values()), told


# ---- who is counted on -----------------------------------------------------------------------------------------------------


def stopped(directory: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> Training:
    """A run of four that has stopped, as two were lost there; all are to go on."""
    run = among_peers(directory, monkeypatch, 4)
    run.run(Sleeper("hospital-2", place, KILLED), Sleeper("hospital-3", place, KILLED))
    assert "finished" not in set(run.said.values()), run.said
    run.placed = {name: config.with_values(site={"resume": True}) for name, config in run.placed.items()}
    run.start_anew()
    return run


def test_a_run_that_stopped_goes_on_without_one_where_no_block_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path, monkeypatch, "peers update 1 0 0/slice")
    run.placed.pop("hospital-3")
    run.run()
    require_sound(run, names(3))


def test_a_run_that_stopped_does_not_go_on_without_one_that_may_have_kept_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path, monkeypatch, "block 1 0/complete")
    away = run.placed.pop("hospital-3")
    run.run()
    assert "finished" not in set(run.said.values())
    assert any("to go on after all have stopped" in said and "hospital-3" in said for said in run.said.values()), (
        run.said
    )
    run.placed["hospital-3"] = away
    run.start_anew()
    run.run()
    require_sound(run, names(4))
