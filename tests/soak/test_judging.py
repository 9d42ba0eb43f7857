"""The soak's own judgement: what it takes for bad, and that it can be repeated. No processes: `make soak` has those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpc_fl.config.config import parse_config, party_names
from tests.soak import judging, results
from tests.soak.__main__ import TASKS
from tests.soak.judging import Ended
from tests.soak.plan import (
    ASKING,
    FIVE_HOSPITALS,
    FORK_SERVER,
    KILL,
    LAUNCHER,
    STOP,
    STOP_AND_CONT,
    TERM,
    VARIANTS,
    Injection,
    injection,
)

PROGRESS = "progress: training 12 of 50, 34 s\nprogress: hospital-1 lost, 35 s\n"
FROZEN = "hospital-1 has given no sign of life for 10 s in phase 'x': see its log"


def struck(victim: str, signal: str, variant: str = "train", pause: float = 0.0) -> Injection:
    return Injection(1, variant, victim, signal, 0.5, pause)


def ended(code: int, line: str = "") -> Ended:
    return Ended(code, PROGRESS + (f"mpc-fl: {line}\n" if line else ""), 1.0)


def test_the_same_seed_and_number_choose_the_same() -> None:
    chosen = [injection(7, number, TASKS) for number in range(400)]
    assert chosen == [injection(7, number, TASKS) for number in range(400)]
    assert chosen != [injection(8, number, TASKS) for number in range(400)]
    assert {choice.variant for choice in chosen} == set(VARIANTS)
    assert {choice.signal for choice in chosen} == {KILL, TERM, STOP, STOP_AND_CONT}
    assert {choice.victim for choice in chosen} == {name for of in VARIANTS.values() for name in of.victims}
    assert all((choice.pause > 0) == (choice.signal == STOP_AND_CONT) for choice in chosen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_has_a_configuration_that_holds_and_strikes_who_takes_part(variant: str) -> None:
    kind = VARIANTS[variant]
    config = parse_config({**kind.settings, "task": kind.task}, variant)
    assert set(kind.victims) - {LAUNCHER, FORK_SERVER, ASKING} == set(party_names(config)) - (
        {"hospital-1", "hospital-2"} if kind.task == "infer" else set()
    )


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("mpc-fl: hospital-1 was killed by signal 9: all other parties were stopped", "hospital-1"),
        (f"mpc-fl: hospital-0 failed: {FROZEN}", "hospital-1"),
        (f"mpc-fl: hospital-0 failed: aggregator stopped: {FROZEN}", "hospital-1"),
        ("mpc-fl: hospital-1 failed: no sign of life for 15 s: it was killed, see its log", "hospital-1"),
        ("mpc-fl: hospital-2 failed: aggregator is late", "aggregator"),
        ("mpc-fl: something else", None),
    ],
)
def test_the_cause_is_the_last_of_a_chain(line: str, name: str | None) -> None:
    assert judging.blamed(line) == name


@pytest.mark.parametrize(
    ("injection", "how"),
    [
        (struck("hospital-1", KILL), ended(11, "hospital-1 was killed by signal 9: all other parties were stopped")),
        (struck("hospital-1", KILL), ended(0)),
        (struck("hospital-1", STOP), ended(11, f"hospital-0 failed: aggregator stopped: {FROZEN}")),
        (struck("hospital-1", KILL, "train, quorum 2 of 3"), ended(0)),
        (struck("hospital-1", STOP_AND_CONT, pause=2.0), ended(0)),
        (struck("hospital-1", STOP_AND_CONT, pause=20.0), ended(11, f"hospital-0 failed: {FROZEN}")),
        (struck(LAUNCHER, KILL), Ended(-9, "", 1.0)),
        (struck(LAUNCHER, TERM), ended(143, "interrupted by SIGTERM: nothing was left running")),
        (
            struck(LAUNCHER, TERM),
            ended(143, "interrupted by SIGTERM: nothing was left running; --resume goes on from the last round"),
        ),
        (struck(LAUNCHER, TERM), Ended(-15, "", 1.0)),
        (struck(FORK_SERVER, KILL), ended(11, "the process that parties are forked from was killed by signal 9: all")),
    ],
)
def test_what_is_right(injection: Injection, how: Ended) -> None:
    assert judging.judge_command(injection, how) == []


@pytest.mark.parametrize(
    ("injection", "how"),
    [
        (struck("hospital-1", KILL), ended(11, "hospital-2 was killed by signal 9")),
        (struck("hospital-1", STOP), ended(11, "hospital-2 failed: aggregator is late in phase 'x'")),
        (struck("hospital-1", KILL), ended(11)),
        (struck("hospital-1", KILL), Ended(11, "mpc-fl: hospital-1 was killed\nmpc-fl: and more\n", 1.0)),
        (
            struck("hospital-1", KILL),
            Ended(11, "connect        0/4 0:00:00\nmpc-fl: hospital-1 was killed by signal 9\n", 1.0),
        ),
        (struck("hospital-1", KILL), Ended(1, "Traceback (most recent call last):\n", 1.0)),
        (struck("hospital-1", KILL, "train, quorum 2 of 3"), ended(11, "hospital-1 was killed by signal 9")),
        (struck("hospital-1", STOP_AND_CONT, pause=2.0), ended(11, f"hospital-0 failed: {FROZEN}")),
        (struck(LAUNCHER, STOP_AND_CONT, pause=20.0), ended(11, f"hospital-0 failed: {FROZEN}")),
        (struck(LAUNCHER, TERM), ended(143)),
        (struck(LAUNCHER, KILL), Ended(-15, "", 1.0)),
        (struck(FORK_SERVER, TERM), ended(11, "the process that parties are forked from was killed by signal 15")),
        (struck("hospital-1", KILL), ended(0, "something is wrong all the same")),
    ],
)
def test_what_is_bad(injection: Injection, how: Ended) -> None:
    assert judging.judge_command(injection, how)


def test_a_hospital_that_asks_is_told_which_half_of_the_service_went() -> None:
    injection = struck("dealer", STOP, "serve")
    assert not judging.judge_asking(
        injection, ended(8, "model-owner stopped: dealer has given no sign of life for 10 s")
    )
    assert not judging.judge_asking(injection, ended(8, "model-owner did not connect within 30 s"))
    assert judging.judge_asking(injection, ended(8, "model-owner has given no sign of life for 10 s"))
    assert judging.judge_asking(injection, ended(8))


def test_only_the_one_that_was_struck_may_be_lost() -> None:
    assert not judging.judge_lost(struck("hospital-1", KILL), ["hospital-1", "hospital-1"])
    assert judging.judge_lost(struck("hospital-1", KILL), ["hospital-2"])
    assert judging.judge_lost(struck("hospital-1", STOP_AND_CONT, pause=1.0), ["hospital-1"])


def test_without_an_aggregator_no_hospital_is_needed_where_the_quorum_is_less_than_all() -> None:
    assert VARIANTS["peers, all three"].may_lose == ()
    assert VARIANTS["peers, quorum 3 of 5"].may_lose == FIVE_HOSPITALS
    assert not judging.judge_command(struck("hospital-4", KILL, "peers, quorum 3 of 5"), ended(0))
    assert judging.judge_command(struck("hospital-4", KILL, "peers, quorum 3 of 5"), ended(11, "hospital-4 was killed"))


def test_a_run_that_lost_nobody_must_have_the_model_of_an_undisturbed_one(tmp_path: Path) -> None:
    assert {name for name, variant in VARIANTS.items() if variant.same_model} == {
        "peers, all three", "peers, quorum 3 of 5"
    }  # fmt: skip
    for name, value in (("undisturbed", 1.0), ("same", 1.0), ("another", 1.0 + 2**-23)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    assert results.another_model(tmp_path / "same", tmp_path / "undisturbed") == []
    assert results.another_model(tmp_path / "another", tmp_path / "undisturbed")


def test_logs_show_no_traceback_and_no_defect() -> None:
    assert judging.judge_logs({"a": "hospital-1 is late\n"}) == []
    assert judging.judge_logs({"a": "x\nTraceback (most recent call last):\n", "b": "unexpected KeyError (a defect)"}) == [
        "a: Traceback (most recent call last):", "b: unexpected KeyError (a defect)"
    ]  # fmt: skip


def test_what_is_half_written_is_found(tmp_path: Path) -> None:
    failed = tmp_path / "run.failed"
    (failed / "parties").mkdir(parents=True)
    (failed / "parties" / "metrics.jsonl").write_text('{"round": 0}\n')
    assert results.failed_badly(tmp_path / "run") == []
    (failed / "parties" / "metrics.jsonl").write_text('{"round": 0}\n{"rou')
    (failed / ".model.safetensors.partial").touch()
    assert len(results.failed_badly(tmp_path / "run")) == 2
    (tmp_path / "run.partial").mkdir()
    assert len(results.failed_badly(tmp_path / "run")) == 3
    assert results.training_incomplete(tmp_path / "run.failed") and results.diagnosis_incomplete(failed)
