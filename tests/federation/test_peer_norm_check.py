"""Rounds among peers whose norms are checked: the model of the mode with an aggregator; who is too large is named in the ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.runs.estimate import estimate_training
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.peer_record import lines_of
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block
from mpc_fl.crypto.secrecy import Private
from mpc_fl.federation import peer_round
from mpc_fl.roles import AGGREGATOR
from tests.support.peer_rounds import among_peers, model_of, names, require_sound, same
from tests.support.peer_sums import only_at
from tests.support.training_in_memory import FOR_GOOD, KILLED, SETTINGS, Sleeper, Training

FIXED = {**SETTINGS["training"], "sampling_seed": 5, "rounds": 1}
CHECKED = {"norm_check": True, "norm_bound": 10.0, "weighted": False}


def blocks_of(run: Training, name: str) -> list[Block]:
    return [parse_line(line) for line in (run.party(name) / LEDGER_FILE).read_bytes().splitlines()]


@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_model_is_that_of_the_mode_with_an_aggregator(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path / "peers", monkeypatch, count, training=FIXED, aggregation=CHECKED)
    run.run()
    require_sound(run, names(count))
    federation = {"hospitals": count, "quorum": max(3, count // 2 + 1)}
    led = Training(
        tmp_path / "led",
        monkeypatch,
        federation=federation,
        training=FIXED,
        aggregation={**CHECKED, "norm_check": False},
    )
    led.run()
    assert set(led.said.values()) == {"finished"}, led.said
    assert same(model_of(run, "hospital-0"), model_of(led, AGGREGATOR))
    openings = [opening for block in blocks_of(run, "hospital-0") for opening in block.openings]
    assert sum(opening.what == "whether each update is within its norm bound" for opening in openings) == 1


@pytest.mark.parametrize("coordinator", [AGGREGATOR, "none"])
@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_hospitals_send_what_was_estimated(
    coordinator: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is most of what they send for a small model."""
    federation = {"coordinator": coordinator, "hospitals": count, "quorum": 3}
    run = Training(tmp_path, monkeypatch, federation=federation, training=FIXED, aggregation=CHECKED)
    run.run()
    assert set(run.said.values()) == {"finished"}, run.said
    expected = estimate_training(run.config, [30 // count] * count)
    unchecked = estimate_training(run.config.with_values(aggregation={"norm_check": False}), [30 // count] * count)
    assert 2 * unchecked.bytes_sent_per_hospital < expected.bytes_sent_per_hospital
    for name in names(count):
        phases = json.loads((run.party(name) / "traffic.json").read_text())["phases"].values()
        counts = [count for phase in phases for count in phase["peers"].values()]
        sent, messages = (sum(count[key] for count in counts) for key in ("bytes_sent", "messages_sent"))
        assert 0.9 * sent < expected.bytes_sent_per_hospital < 1.1 * sent, (sent, expected)
        # Besides, a greeting to each peer, and a farewell unless the peer was faster.
        peers = len({peer for phase in phases for peer in phase["peers"]})
        least, most = messages - 2 * peers, messages - peers
        assert 0.8 * least < expected.messages_per_hospital < 1.25 * most, (messages, expected)


def _is_too_large(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    def large(original: Any, *arguments: Any) -> Any:
        trained = original(*arguments)
        encoded = trained.encoded.inside_protocol()
        return replace(trained, encoded=Private("update", (encoded * 5000).to(encoded.dtype)))

    only_at(monkeypatch, who, peer_round, "trained_update", large)


def test_a_hospital_with_a_large_update_is_named_by_all_in_a_signed_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch, 4, training=FIXED, aggregation=CHECKED)
    _is_too_large(monkeypatch, "hospital-3")
    run.run()
    rest = ["hospital-0", "hospital-1", "hospital-2"]
    require_sound(run, rest)
    blocks = blocks_of(run, "hospital-0")
    (refused,) = [block for block in blocks if "refusal of hospital-3" in block.values]
    assert refused.about == "round 1" and list(refused.parties) == rest
    summed = [opening.transcript for opening in refused.openings if opening.what == "sum of weighted updates"]
    assert summed == [refused.values["refusal of hospital-3"]]
    told = lines_of(blocks)[blocks.index(refused)]
    assert "Not shown to be within the norm bound: hospital-3" in told and not any("Lost" in line for line in told)
    assert sum("hospital-3 says that its update is beyond its norm bound" in line for line in run.log) == 3


PLACES = ["copy", "word", "proof carries", "proof products", "answers"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [KILLED, FOR_GOOD], ids=["killed", "stopped"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hospital_is_lost_within_the_check(
    place: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch, 4, training=FIXED, aggregation=CHECKED)
    sleeper = Sleeper("hospital-1", f"peers update 1 0 0/{place}", seconds, heard=5 if place == "word" else 0)
    run.run(sleeper)
    assert sleeper.slept
    require_sound(run, ["hospital-0", "hospital-2", "hospital-3"])


def test_distributed_noise_with_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mechanism": "distributed", "noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 90.0}
    run = among_peers(tmp_path, monkeypatch, 3, privacy=privacy, training=FIXED, aggregation={"norm_check": True})
    run.run()
    require_sound(run, names(3))
