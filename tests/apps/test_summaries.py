"""Summaries of runs: written as they always were, read from any version, refused in one line when damaged."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch

from mpc_fl.apps.costs import Cost, PartyCosts
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.summaries import (
    KINDS,
    ChosenRound,
    Comparison,
    DiagnosisSummary,
    FittedCalibration,
    ImageResult,
    PrivacySpent,
    ServedDiagnosisSummary,
    TrainingSummary,
    parse_summary,
)
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.model_origin import ModelOrigin
from mpc_fl.errors import DataError
from mpc_fl.learning.models.evaluation import Evaluation

FINAL: dict[str, Any] = {
    "records": 4, "accuracy": 0.75, "accuracy_low": 0.3, "accuracy_high": 0.95, "balanced_accuracy": 0.75,
    "class_counts": [2, 2], "confusion": [[2, 0], [1, 1]], "scores": [[[1, 1], [0, 2]], [[2, 0], [1, 1]]],
    "auc": [0.75, None], "auc_macro": 0.75, "auc_resolution": 0.1, "brier": 0.4, "brier_by_class": [0.2, 0.2],
    "calibration_error": 0.1, "reliability": [[0, None, None], [4, 0.8, 0.75]], "noise": None,
}  # fmt: skip
PRIVACY: dict[str, Any] = {
    "hospital": "hospital-0", "epsilon": 7.5, "delta": 0.0001, "noise_multiplier": 1.25, "target_epsilon": 8,
    "mechanism": "local", "per_sample_gradients": "loop",
}  # fmt: skip
RESULT: dict[str, Any] = {
    "index": 0, "name": "scan.png", "label": -1, "predicted": 1, "probabilities": [0.25, 0.75], "logits": [0.0, 1.1],
    "seconds": 3.25,
}  # fmt: skip
COST: dict[str, Any] = {
    "seconds": 2.5, "processor_seconds": 1.0, "gpu_seconds": None, "joules": 12.0, "bytes_sent": 7, "bytes_received": 8,
    "messages_sent": 1, "waits": 0, "seconds_waited": 0.5,
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "kind": "train", "name": "demo", "synthetic": True, "rounds": 2, "parameters": 1234,
    "hospitals": ["hospital-0", "hospital-1"], "skipped_files": 1, "seconds": 61.5, "command": "mpc-fl train c.yaml",
    "versions": {"python": "3.11.9"}, "final": FINAL, "privacy": [PRIVACY],
    "took_part": {"0": ["hospital-0", "hospital-1"], "1": ["hospital-0"]}, "lost": ["hospital-1"],
    "evaluated_round": 2, "shared_patients": 0, "began_with": None,
    "unit": "image", "treatments": {"resized": 4}, "validation": None, "chosen": {"round": 1, "figures": {"1": 0.5}},
    "calibration": {"temperature": 2.0, "offsets": [0.0, 0.5]}, "simulated": False, "groups": None,
    "names": {"hospital-0": "charite"},
    "costs": {"hospital-0": {"phases": {"data": COST}, "total": COST, "energy": "estimated", "grams_co2": 0.1}}, "central": False,
}  # fmt: skip
INFER: dict[str, Any] = {
    "kind": "infer", "name": "demo", "synthetic": False, "images": 1, "skipped_files": 0, "classes": ["a", "b"],
    "seconds": 12.0, "seconds_per_image": 3.25, "command": "mpc-fl infer c.yaml", "versions": {},
    "comparison": {"largest_logit_difference": None, "classes_agree": True, "plaintext_seconds_per_image": 0.01},
    "model_file": {"sha256": "5" * 64, "signed": False, "words": "could not be checked"}, "unreported": None,
    "results": [RESULT], "names": None, "costs": None,
}  # fmt: skip
ASK: dict[str, Any] = {
    "kind": "ask", "name": "demo", "hospital": "hospital-2", "synthetic": False, "images": 1, "classes": ["a", "b"],
    "seconds": 12.0, "seconds_per_image": 3.25, "command": "mpc-fl infer c.yaml", "versions": {},
    "refused": "come back tomorrow", "revealed": "logits", "unreported": None, "results": [RESULT], "names": None,
    "costs": None,
}  # fmt: skip


@pytest.mark.parametrize("content", [TRAIN, INFER, ASK], ids=lambda content: content["kind"])
def test_what_was_read_is_written_with_the_same_keys_values_and_order(content: dict[str, Any]) -> None:
    header, found = parse_summary(json.dumps(content))
    assert found == content and header.kind == content["kind"] and header.command == content["command"]
    summary = KINDS[header.kind].from_json(found)
    assert json.dumps(summary.to_json()) == json.dumps(content)


def test_a_summary_made_here_has_the_keys_of_its_file() -> None:
    result = ImageResult(**RESULT)
    final = Scores(**{**FINAL, "reliability": [tuple(row) for row in FINAL["reliability"]]})
    shared = {key: INFER[key] for key in ("name", "synthetic", "images", "classes", "seconds", "seconds_per_image")}
    shared |= {"command": INFER["command"], "versions": {}, "results": [result]}
    trained = {key: value for key, value in TRAIN.items() if key != "kind"}
    chosen = {"chosen": ChosenRound(1, {"1": 0.5}), "calibration": FittedCalibration(2.0, [0.0, 0.5])}
    costs = {"hospital-0": PartyCosts({"data": Cost(**COST)}, Cost(**COST), "estimated", 0.1)}
    made = [
        TrainingSummary(**{**trained, "final": final, "privacy": [PrivacySpent(**PRIVACY)], **chosen, "costs": costs}),
        DiagnosisSummary(
            **shared,
            skipped_files=0,
            comparison=Comparison(None, True, 0.01),
            model_file=ModelOrigin("5" * 64, False, "could not be checked"),
        ),  # fmt: skip
        ServedDiagnosisSummary(**shared, hospital="hospital-2", refused=ASK["refused"], revealed="logits"),
    ]
    assert [json.dumps(summary.to_json()) for summary in made] == [json.dumps(kind) for kind in (TRAIN, INFER, ASK)]


def test_scores_are_those_that_an_evaluation_writes() -> None:
    counts = Evaluation(
        torch.tensor([[2, 0], [1, 1]]),
        torch.zeros(2, 2, 20, dtype=torch.int64),
        torch.zeros(3, 10, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    ).to_json()
    assert json.dumps(asdict(typed(Scores, counts, "metrics.jsonl"))) == json.dumps(counts)


def test_absences_are_the_hospitals_that_a_round_did_without() -> None:
    assert TrainingSummary.from_json(TRAIN).absences() == {"1": ["hospital-1"]}


@pytest.mark.parametrize(
    "key",
    [
        "skipped_files",
        "final",
        "took_part",
        "lost",
        "evaluated_round",
        "shared_patients",
        "began_with",
        "unit",
        "treatments",
        "chosen",
    ],
)
def test_a_training_of_an_earlier_version_is_read(key: str) -> None:
    summary = TrainingSummary.from_json({name: value for name, value in TRAIN.items() if name != key})
    assert getattr(summary, key) is None


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("rounds", "2", "summary.json: 'rounds' is not a whole number"),
        ("rounds", True, "summary.json: 'rounds' is not a whole number"),
        ("seconds", None, "summary.json: 'seconds' is not a number"),
        ("synthetic", 1, "summary.json: 'synthetic' is not true or false"),
        ("hospitals", "hospital-0", "summary.json: 'hospitals' is not of the form that this version reads"),
        ("hospitals", [3], "summary.json: 'hospitals' is not a text"),
        ("privacy", [[]], "summary.json: 'privacy' is not a JSON object"),
        ("privacy", [{**PRIVACY, "delta": "x"}], "summary.json: 'privacy': 'delta' is not a number"),
        ("final", {"records": 4}, "summary.json: 'final' lacks 'accuracy'"),
        ("final", {**FINAL, "reliability": [[0, None]]}, "summary.json: 'final': 'reliability' is not of the form"),
    ],
)
def test_a_damaged_summary_is_refused_in_one_line(key: str, value: object, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        TrainingSummary.from_json({**TRAIN, key: value})
    assert str(caught.value).startswith(complaint) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"kind": "x"}', '{"kind": "train", "versions": []}'])
def test_what_is_no_summary_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"^summary\.json"):
        parse_summary(text)


@dataclass(frozen=True)
class _Part:
    size: float


@dataclass(frozen=True)
class _Whole:
    parts: dict[str, _Part]
    pair: tuple[int, str | None] = (0, None)
    names: list[str] = field(default_factory=list)


def test_values_are_typed_and_never_converted() -> None:
    whole = typed(_Whole, {"parts": {"a": {"size": 1, "colour": 2}}, "pair": [3, None], "unknown": []}, "file")
    assert whole == _Whole({"a": _Part(1)}, (3, None))
    assert type(whole.parts["a"].size) is int
    with pytest.raises(DataError, match=r"^file lacks 'parts'"):
        typed(_Whole, {}, "file")
    with pytest.raises(DataError, match=r"^file: 'pair' is not a text"):
        typed(_Whole, {"parts": {}, "pair": [3, 4]}, "file")


@pytest.mark.parametrize(
    ("confusion", "records", "baseline"),
    [
        ([[3, 0], [1, 0]], 4, 0.75),
        ([[0, 2, 0], [2, 0, 0], [0, 0, 2]], 6, 1 / 3),
        ([[1, 0], [1, 0]], 100, 0.5),
        ([[9, 0], [0, 0]], 8, 1.0),
    ],
)
def test_the_baseline_is_the_accuracy_of_naming_the_largest_class(
    confusion: list[list[int]], records: int, baseline: float
) -> None:
    """Noised counts, the last two, make it neither less than one over the classes nor more than one."""
    assert typed(
        Scores, {**FINAL, "confusion": confusion, "records": records}, "summary.json"
    ).baseline == pytest.approx(baseline)
