"""Rounds among peers, in memory: the model of the mode with an aggregator, bit for bit; losses, and views that change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.runs.estimate import estimate_training
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.federation.audit_trail import figure_digest
from mpc_fl.files import read_json_lines
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR
from tests.support.peer_rounds import among_peers, model_of, names, require_sound, same
from tests.support.training_in_memory import FOR_GOOD, KILLED, SETTINGS, Sleeper, Training

FIXED = {**SETTINGS["training"], "sampling_seed": 5}
MANY = {"train_patients": 100, "test_patients": 20}
WAYS: list[tuple[int, dict[str, dict[str, Any]]]] = [
    (3, {"training": {"strategy": "fedavg", "local_steps": 2}, "data": {"normalise": "secure"}}),
    (
        5,
        {
            "training": {"strategy": "fedadam", "average_last": 2},
            "data": {"validation_fraction": 0.3, "phantoms": MANY},
        },
    ),
    (3, {"training": {"strategy": "fedsgd"}, "evaluation": {"every": 1}}),
    (
        3,
        {
            "training": {"strategy": "fedavg", "learning_rate": 0.3},
            "data": {"validation_fraction": 0.3, "phantoms": MANY},
            "evaluation": {"choose": "best", "calibrate": "both"},
        },
    ),
]


@pytest.mark.parametrize(("count", "changes"), WAYS, ids=["fedavg", "fedadam", "fedsgd", "chosen"])
def test_the_model_is_that_of_the_mode_with_an_aggregator(
    count: int, changes: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**changes, "training": {**FIXED, **changes["training"]}}
    if "data" in changes:
        changes["data"] = {**SETTINGS["data"], **changes["data"]}
    run = among_peers(tmp_path / "peers", monkeypatch, count, **changes)
    run.run()
    require_sound(run, names(count))
    led = Training(
        tmp_path / "led", monkeypatch, federation={"hospitals": count, "quorum": max(3, count // 2 + 1)}, **changes
    )
    led.run()
    assert set(led.said.values()) == {"finished"}, led.said
    assert same(model_of(run, "hospital-0"), model_of(led, AGGREGATOR))
    lines = read_json_lines(run.party("hospital-1") / ROUNDS_FILE)
    of_led = read_json_lines(led.party(AGGREGATOR) / "metrics.jsonl")
    keys = ("round", "evaluation", "hospitals", "validation", "chosen", "calibration")
    assert [[line.get(key) for key in keys] for line in lines] == [[line.get(key) for key in keys] for line in of_led]
    assert ("chosen" in lines[-1]) == (run.config.evaluation.choose == "best")


def test_distributed_noise_among_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mechanism": "distributed", "noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 90.0}
    training = {**SETTINGS["training"], "local_steps": 2}
    run = among_peers(tmp_path, monkeypatch, 3, privacy=privacy, training=training)
    run.run()
    require_sound(run, names(3))
    for name in names(3):
        ledger = PrivacyLedger(run.party(name) / f"{name}-privacy.sqlite3", name)
        assert [record["round"] for record in ledger.records() if record["released"]] == [1, 2]


def test_hospitals_send_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = {**SETTINGS["data"], "image_size": 16}, {"architecture": "mlp", "hidden": [64]}
    run = among_peers(tmp_path, monkeypatch, 3, data=data, model=model)
    run.run()
    expected = estimate_training(run.config, [10, 10, 10])
    assert expected.bytes_sent_by_aggregator == 0
    for name in names(3):
        phases = json.loads((run.party(name) / "traffic.json").read_text())["phases"].values()
        counts = [count for phase in phases for count in phase["peers"].values()]
        sent, messages = sum(count["bytes_sent"] for count in counts), sum(count["messages_sent"] for count in counts)
        assert 0.8 * sent < expected.bytes_sent_per_hospital < 1.25 * sent, sent
        assert 0.8 * messages < expected.messages_per_hospital < 1.25 * messages, messages


def test_a_round_that_is_made_anew_is_charged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mechanism": "distributed", "noise_multiplier": 3.0, "delta": 1e-3, "epsilon": 90.0, "spare_rounds": 2}
    run = among_peers(tmp_path, monkeypatch, privacy=privacy)
    run.run(Sleeper("hospital-1", "peers gradient 1 0 0 0/total", KILLED))
    others = [name for name in names(5) if name != "hospital-1"]
    require_sound(run, others)
    for name in others:
        ledger = PrivacyLedger(run.party(name) / f"{name}-privacy.sqlite3", name)
        assert [record["round"] for record in ledger.records() if record["released"]] == [1, 1, 2]


# hospital-1 proposes round 1, hospital-3 nothing in it but under the third view.
PLACES = ["agreed 1 0/", "transcript update 1 0", "peers update 1 0 0/slice", "peers update 1 0 0/word"]
PLACES += ["peers update 1 0 0/total", "keys update 1 0 0", "block 1 0/signed", "block 1 0/complete"]


@pytest.mark.parametrize("seconds", [KILLED, FOR_GOOD], ids=["killed", "stopped"])
@pytest.mark.parametrize("place", PLACES)
def test_who_proposes_is_lost_in_its_round(
    place: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch)
    sleeper = Sleeper("hospital-1", place, seconds)
    run.run(sleeper)
    assert sleeper.slept
    require_sound(run, [name for name in names(5) if name != "hospital-1"])
    assert any("hospital-1" in line for line in run.log)


@pytest.mark.parametrize(
    ("place", "heard"),
    [("transcript update 1 0", 2), ("peers update 1 0 0/word", 23)],
    ids=["before a sum begins", "before keys leave"],
)
def test_nobody_waits_for_who_gave_up(place: str, heard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-2 is killed between its words to two others: one has what it takes to go on, and the other gives up."""
    run = among_peers(tmp_path, monkeypatch)
    sleeper = Sleeper("hospital-2", place, KILLED, heard)
    run.run(sleeper)
    assert sleeper.slept
    others = [name for name in names(5) if name != "hospital-2"]
    require_sound(run, others)
    lasted = max(run.ended[name] for name in others) - sleeper.since
    assert lasted < run.config.runtime.receive_timeout / 4, run.log


@pytest.mark.parametrize("at", [3, 17, 40, 61, 83, 120, 170, 215, 260])
def test_any_hospital_is_killed_anywhere(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = f"hospital-{at % 5}"
    run = among_peers(tmp_path, monkeypatch)
    sleeper = Sleeper(lost, at, KILLED)
    run.run(sleeper)
    finished = [name for name in names(5) if name != lost or not sleeper.slept]
    require_sound(run, finished)


def test_two_are_lost_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    run.run(Sleeper("hospital-1", "peers update 1 0 0/total", KILLED), Sleeper("hospital-2", "agreed 1 1", KILLED))
    require_sound(run, ["hospital-0", "hospital-3", "hospital-4"])
    assert any("hospital-3 is next" in line for line in run.log)


def test_below_the_quorum_all_end_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, 3)
    run.run(Sleeper("hospital-2", "peers update 1 0 0/total", KILLED))
    for name in ("hospital-0", "hospital-1"):
        assert "PeerLostError" in run.said[name] and "hospital-2" in run.said[name], run.said


def test_one_that_is_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    run.run(Sleeper("hospital-2", "peers update 1 0 0/slice", 15.0))
    require_sound(run, names(5))


def test_one_that_is_too_late_is_left_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    run.run(Sleeper("hospital-2", "peers update 1 0 0/slice", 45.0))
    require_sound(run, [name for name in names(5) if name != "hospital-2"])
    assert "LeftOutError: hospital-2 was left out" in run.said["hospital-2"]


STOPS = [
    "transcript evaluation 0 0",
    "peers update 1 0 0/total",
    "keys update 1 0 0",
    "block 1 0/signed",
    "block 1 0/complete",
]
STOPS += ["peers update 2 0 0/slice", "block 3 0/complete"]


@pytest.mark.parametrize("place", STOPS)
def test_a_run_that_stopped_goes_on_to_the_same_model(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"training": FIXED, "data": {**SETTINGS["data"], "normalise": "secure"}}
    whole = among_peers(tmp_path / "whole", monkeypatch, 3, **changes)
    whole.run()
    run = among_peers(tmp_path / "run", monkeypatch, 3, **changes)
    sleeper = Sleeper("hospital-2", place, KILLED)
    run.run(sleeper)
    assert sleeper.slept and "finished" not in set(run.said.values())
    run.placed = {name: config.with_values(site={"resume": True}) for name, config in run.placed.items()}
    run.start_anew()
    run.run()
    require_sound(run, names(3))
    assert same(model_of(run, "hospital-0"), model_of(whole, "hospital-0"))


def test_a_run_that_stopped_does_not_go_on_without_one_that_may_have_kept_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch, 5, federation={"quorum": 5})
    run.run(Sleeper("hospital-2", "peers update 2 0 0/slice", KILLED))
    resumed = {"site": {"resume": True}, "federation": {"quorum": 5}}
    run.placed = {name: config.with_values(**resumed) for name, config in run.placed.items()}
    run.start_anew()
    run.run(Sleeper("hospital-2", 0, KILLED))
    assert "finished" not in set(run.said.values())


def given_more_rounds(run: Training, rounds: int) -> None:
    """Let all go on with `--resume` and so many rounds."""
    more = {"site": {"resume": True}, "training": {"rounds": rounds}}
    run.config = run.config.with_values(**more)
    run.placed = {name: config.with_values(**more) for name, config in run.placed.items()}
    run.start_anew()


def test_a_complete_run_is_given_more_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is that of a run which had all rounds from the beginning."""
    changes: dict[str, Any] = {"data": {**SETTINGS["data"], "normalise": "secure"}}
    whole = among_peers(tmp_path / "whole", monkeypatch, 3, training={**FIXED, "rounds": 4}, **changes)
    whole.run()
    run = among_peers(tmp_path / "run", monkeypatch, 3, training=FIXED, **changes)
    for rounds in (None, 3, 4):
        if rounds is not None:
            given_more_rounds(run, rounds)
        run.run()
        require_sound(run, names(3))
    assert same(model_of(run, "hospital-0"), model_of(whole, "hospital-0"))
    kinds = [parse_line(line).kind for line in (run.party("hospital-1") / LEDGER_FILE).read_bytes().splitlines()]
    assert kinds == ["start", *3 * ["openings"], "end", *2 * ["resume", "openings", "end"]]


@pytest.mark.parametrize("place", ["block 3 0/complete", "start 3 0/signed", "transcript update 3 0"])
def test_a_run_that_stopped_while_it_was_given_more_rounds_goes_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch, 3, training=FIXED)
    end = Sleeper("hospital-2", "block 3 0/complete", KILLED) if place == "block 3 0/complete" else None
    run.run(*[end] if end else [])
    assert end is None or end.slept
    given_more_rounds(run, 3)
    if end is None:
        sleeper = Sleeper("hospital-2", place, KILLED)
        run.run(sleeper)
        assert sleeper.slept and "finished" not in set(run.said.values())
        run.start_anew()
    run.run()
    require_sound(run, names(3))


def test_figures_of_validation_are_signed_where_all_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**SETTINGS["data"], "validation_fraction": 0.3, "phantoms": MANY}
    run = among_peers(tmp_path, monkeypatch, 3, data=data, evaluation={"validate_every": 1})
    run.run()
    require_sound(run, names(3))
    lines = {line["round"]: line for line in read_json_lines(run.party("hospital-0") / ROUNDS_FILE)}
    signed = dict[str, str | None]()
    for line in (run.party("hospital-0") / LEDGER_FILE).read_bytes().splitlines():
        block = parse_line(line)
        signed[block.about] = block.values.get("validation")
    for number in (1, 2):
        assert signed[f"round {number}"] == figure_digest(lines[number]["validation"][run.config.evaluation.criterion])


def test_a_sum_that_too_few_began_is_made_again_by_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-0 and hospital-1 begin a sum of round 1 alone: hospital-3 was lost before hospital-2 had its signature."""
    run = among_peers(tmp_path, monkeypatch, 4)
    sleeper = Sleeper("hospital-3", "transcript update 1 0", KILLED, heard=2)
    run.run(sleeper)
    assert sleeper.slept
    require_sound(run, names(3))


def test_who_gives_up_a_block_is_not_blamed_for_who_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only hospital-2 lacks the signature of hospital-3, which was lost, and gives up; the two others need it."""
    run = among_peers(tmp_path, monkeypatch, 4)
    sleeper = Sleeper("hospital-3", "block 0 0/signed", KILLED, heard=2)
    run.run(sleeper)
    assert sleeper.slept
    require_sound(run, names(3))
    assert not [line for line in run.log if "is left out of round" in line]


def test_who_was_late_is_not_left_out_where_the_quorum_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-1 and hospital-2 have lost a sum with hospital-0, and hospital-2 proposes next."""
    run = among_peers(tmp_path, monkeypatch, 3)
    sleeper = Sleeper("hospital-0", "transcript update 1 0", 30.0)
    run.run(sleeper)
    assert sleeper.slept
    require_sound(run, names(3))
    assert not [line for line in run.log if "is left out of round" in line]
