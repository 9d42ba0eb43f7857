"""A party that stops answering is given up by whoever waits for it, wherever it stops; nobody else is, and the run goes on.

Whole runs in virtual time (`tests.support.training_in_memory`), so nothing here depends on the speed of the machine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_in_memory import FOR_GOOD, KILLED, SETTINGS, Sleeper, Training

HEALTHY = ("aggregator", "hospital-0", "hospital-2")
TWO = ["hospital-0", "hospital-2"]
ALL = ["hospital-0", "hospital-1", "hospital-2"]
LOCAL = {"mechanism": "local", "noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 200.0, "spare_rounds": 2}
DISTRIBUTED = {"mechanism": "distributed", "noise_multiplier": 4.0, "delta": 1e-3, "epsilon": 200.0}
NORMALISED = {
    "image_size": 8,
    "normalise": "secure",
    "normalise_noise_multiplier": 2.0,
    "phantoms": {"train_patients": 90, "test_patients": 12},
}
KINDS: dict[str, dict[str, Any]] = {
    "no noise": {},
    "no noise, inputs normalised": {"data": NORMALISED},
    "local noise, norms checked": {"privacy": LOCAL, "aggregation": {"norm_check": True}},
    "local noise, all else noised": {
        "privacy": LOCAL,
        "data": NORMALISED,
        "training": {**SETTINGS["training"], "batch_size": 16},
        "evaluation": {"every": 1, "noise_multiplier": 20.0},
    },
    "distributed noise": {"privacy": DISTRIBUTED, "training": {**SETTINGS["training"], "local_steps": 2}},
    "distributed noise, norms checked": {"privacy": DISTRIBUTED, "aggregation": {"norm_check": True}},
}


def blamed(training: Training) -> set[str]:
    """Who is said to be late, by whomever."""
    return set(re.findall(r"(\S+) is late", "\n".join([*training.log, *training.said.values()])))


def run_with(directory: Path, sleeper: Sleeper | None, **changes: dict[str, Any]) -> Training:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(directory, patch, **changes)
        training.run(*([] if sleeper is None else [sleeper]))
    return training


def assert_the_others_go_on(training: Training, where: Any) -> None:
    ended = {name: training.said[name] for name in HEALTHY}
    assert set(ended.values()) == {"finished"}, (where, ended, training.log)
    assert blamed(training) <= {"hospital-1"}, (where, training.log)
    assert sorted(training.rounds) == [0, 1, 2] and training.rounds[2] in (TWO, ALL)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_late_where_nobody_sleeps(kind: str, tmp_path: Path) -> None:
    training = run_with(tmp_path, None, **KINDS[kind])
    assert set(training.said.values()) == {"finished"}, training.said
    assert training.clock.monotonic() < 2.0 and not blamed(training)


@pytest.mark.parametrize(
    ("kind", "before", "missing_from"),
    [
        ("no noise", "present", 0),  # while it reads its data
        ("no noise", "beginning 0 0/ledger certificate", 0),
        ("no noise", "ready number of patients", 0),
        ("no noise", "confirm number of patients", 0),
        ("no noise", "ready evaluation 0", 1),  # its counts stay closed, and it does not sign
        ("no noise", "ready update 2", 2),
        ("no noise", "confirm update 2", 2),
        ("no noise", "keys update 2", 3),  # those of others open the sum; it does not sign
        ("no noise", "ledger 2 openings round 1", 2),
        ("no noise", "ledger 4 end", 3),
        ("no noise, inputs normalised", "ready sum of features", 0),
        ("local noise, norms checked", "check update 2", 2),
        ("distributed noise", "ready gradient 1 0 1", 1),
    ],
)
def test_a_hospital_that_sleeps_is_named_and_the_others_go_on(
    kind: str, before: str, missing_from: int, tmp_path: Path
) -> None:
    sleeper = Sleeper("hospital-1", before)
    training = run_with(tmp_path, sleeper, **KINDS[kind])
    assert sleeper.slept
    assert_the_others_go_on(training, before)
    assert blamed(training) == {"hospital-1"}
    assert training.rounds == {number: TWO if number >= missing_from else ALL for number in range(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        pytest.param(kind, seconds, marks=() if (kind, seconds) == ("no noise", FOR_GOOD) else pytest.mark.long)
        for kind in KINDS
        for seconds in (FOR_GOOD, KILLED)
    ],
)
def test_wherever_a_hospital_sleeps_or_dies_the_others_go_on(kind: str, seconds: float, tmp_path: Path) -> None:
    """Before each of its messages."""
    for at in range(100):
        sleeper = Sleeper("hospital-1", at, seconds)
        training = run_with(tmp_path / str(at), sleeper, **KINDS[kind])
        if not sleeper.slept:
            assert at > 20
            return
        assert_the_others_go_on(training, at)
    raise AssertionError("it sent more messages than that?")


ROUNDS = 6


def run_until_it_is_back(directory: Path, sleeper: Sleeper, kind: str) -> Training:
    """The others take 15 s and 3 s for each update, of 20 s that they have."""
    changes = dict(KINDS[kind])
    changes["training"] = {**SETTINGS["training"], **changes.get("training", {}), "rounds": ROUNDS}
    with pytest.MonkeyPatch.context() as patch:
        training = Training(directory, patch, **changes)
        training.run(sleeper, training={"hospital-0": 15.0, "hospital-2": 3.0})
    ended = {name: training.said[name] for name in HEALTHY}
    assert set(ended.values()) == {"finished"}, (sleeper.at, ended, training.log)
    assert blamed(training) <= {"hospital-1"}, (sleeper.at, training.log)
    return training


@pytest.mark.parametrize("before", ["beginning 0 0/ledger 0 start", "ready number", "confirm update 2", "ledger 3 op"])
def test_a_hospital_that_wakes_takes_part_again(before: str, tmp_path: Path) -> None:
    training = run_until_it_is_back(tmp_path, Sleeper("hospital-1", before, 30.0), "no noise")
    assert training.said["hospital-1"] == "finished" and "hospital-1" in blamed(training)
    assert training.rounds[ROUNDS] == ALL and TWO in training.rounds.values()
    files = [(training.party(name) / "model.safetensors").read_bytes() for name in (*HEALTHY, "hospital-1")]
    assert len(set(files)) == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)  # a run for each of a hospital's messages
@pytest.mark.parametrize("seconds", [30.0, 60.0])
@pytest.mark.parametrize("kind", ["no noise", "local noise, norms checked", "distributed noise"])
def test_wherever_a_hospital_sleeps_it_comes_back(kind: str, seconds: float, tmp_path: Path) -> None:
    for at in range(100):
        sleeper = Sleeper("hospital-1", at, seconds)
        training = run_until_it_is_back(tmp_path / str(at), sleeper, kind)
        if not sleeper.slept:
            return
        if training.ended["aggregator"] > sleeper.since + seconds + 40.0:  # two rounds more
            assert training.said["hospital-1"] == "finished", (at, training.said, training.log)
    raise AssertionError("it sent more messages than that?")


@pytest.mark.parametrize(
    "before", ["present", "beginning 0 0/ledger catch up", "ready number", "summand update 1", "ledger 2 openings"]
)
def test_where_nobody_may_be_missing_the_one_that_sleeps_is_named_by_all(before: str, tmp_path: Path) -> None:
    training = run_with(tmp_path, Sleeper("hospital-1", before), federation={"quorum": None})
    assert all("hospital-1" in training.said[name] for name in HEALTHY), training.said
    assert blamed(training) == {"hospital-1"}
    assert training.clock.monotonic() < (82.0 if before == "present" else 22.0)


def test_hospitals_that_stop_within_their_summands_cost_nobody_a_place(tmp_path: Path) -> None:
    """Two may send at a time: two that stop there kept all others from sending, and these were left out as late."""
    two = [Sleeper(name, "summand update 1") for name in ("hospital-0", "hospital-1")]
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch, federation={"hospitals": 5, "quorum": 3})
        training.run(*two, training=dict.fromkeys(("hospital-2", "hospital-3", "hospital-4"), 1.0))
    for name in ("aggregator", "hospital-2", "hospital-3", "hospital-4"):
        assert training.said[name] == "finished", (training.said, training.log)
    assert blamed(training) == {"hospital-0", "hospital-1"}
    assert training.rounds[1] == ["hospital-2", "hospital-3", "hospital-4"]


def test_too_few_are_told_the_quorum_of_the_configuration(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch)
        training.run(Sleeper("hospital-1", "ready number"), Sleeper("hospital-2", "ready update 1"))
    said = training.said["aggregator"]
    assert "1 hospitals are left and the quorum is 2; hospital-2 missing" in said, training.said
    assert "aggregator stopped: " in training.said["hospital-0"] and blamed(training) == {"hospital-1", "hospital-2"}


def test_counts_that_stay_closed_say_so_and_name_the_quorum(tmp_path: Path) -> None:
    training = run_with(tmp_path, Sleeper("hospital-1", "ready evaluation 0"))
    log = "\n".join(training.log)
    assert "2 hospitals are left and this sum is opened over all 3 or not at all (the quorum is 2); hospital-1" in log
    assert "'round 0: evaluation counts' is not opened: too few hospitals are left" in log


def test_a_hospital_that_was_late_hears_that_it_was(tmp_path: Path) -> None:
    training = run_until_it_is_back(tmp_path, Sleeper("hospital-1", "ready update 2", 30.0), "no noise")
    assert "this hospital was left out of 'round 2: mean update': it was late" in training.log


# ---- what a party cannot do is heard at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("quorum", [None, 2])
def test_a_hospital_that_cannot_begin_tells_the_others_at_once(quorum: int | None, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch, federation={"quorum": quorum})
        (training.party("hospital-1") / "hospital-1-privacy.sqlite3").write_bytes(b"no database" * 1000)
        training.run()
    assert "hospital-1-privacy.sqlite3" in training.said["hospital-1"]
    assert training.clock.monotonic() < 2.0, "nobody waited for it"
    if quorum is None:
        assert all(training.said[name].startswith("PeerLostError: ") for name in HEALTHY)
        assert all("hospital-1 stopped: its privacy budget" in training.said[name] for name in HEALTHY), training.said
    else:
        assert {training.said[name] for name in HEALTHY} == {"finished"}, training.said
        assert set(map(tuple, training.rounds.values())) == {tuple(TWO)}


def test_an_aggregator_that_cannot_go_on_tells_the_others_at_once(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch)
        (training.party("aggregator") / "reveal_ledger.jsonl").write_bytes(b"no ledger\n")
        training.run()
    assert "reveal" in training.said["aggregator"]
    assert all("aggregator stopped" in training.said[name] for name in ALL), training.said
    assert training.clock.monotonic() < 2.0, "nobody waited for it"
