"""Secure statistics: what the sums of integer counts say, against numpy and scikit-learn; noise against its law.

Statistical tests draw fresh noise; each states its false-alarm rate.
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from mpc_fl.apps import formats
from mpc_fl.apps.report import figures, run_files, training_sections
from mpc_fl.apps.summaries import Header, TrainingSummary
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.data import FEATURE_CONSTANT
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import (
    ConfigError,
    DataError,
    HeadroomError,
    ModelError,
    PrivacyBudgetError,
    ProtocolError,
    SecrecyError,
)
from mpc_fl.federation.feature_statistics import (
    FeaturePlan,
    decode_features,
    encode_features,
    patient_vectors,
    plan_features,
    require_enough_patients,
    vector_norm,
)
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.evaluation import (
    CALIBRATION_RESOLUTION,
    RELIABILITY_BINS,
    SCORE_BINS,
    Evaluation,
    area_resolution,
    area_under_curve,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
    require_evaluation_headroom,
    score_edges,
)
from mpc_fl.learning.models.model_file import load_model, load_normalisation, save_model
from mpc_fl.learning.privacy.accounting import epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import add_patients
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.apps.test_summaries import TRAIN
from tests.support.harness import run_parties

torch.set_num_threads(1)


def predictions(count: int, classes: int, seed: int, sharpness: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) * sharpness
    logits[torch.arange(count), labels] += 1.0
    return torch.softmax(logits, dim=1), labels


def summed(parts: list[tuple[torch.Tensor, torch.Tensor]], classes: int) -> Evaluation:
    """As hospitals and aggregator do it, but for the masks."""
    total = sum(encode_evaluation(evaluate_locally(*part), 10_000) for part in parts)
    assert isinstance(total, torch.Tensor)
    return decode_evaluation(total, classes)


def calibration_error_by_loops(chances: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al., equation 3, record by record."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(chances, labels, strict=True):
        confidence, predicted = max(row), int(np.argmax(row))
        bins.setdefault(min(int(confidence * RELIABILITY_BINS), RELIABILITY_BINS - 1), []).append(
            (float(confidence), predicted == label)
        )
    error = 0.0
    for members in bins.values():
        gap = sum(right for _, right in members) / len(members) - sum(c for c, _ in members) / len(members)
        error += len(members) / len(labels) * abs(gap)
    return error


# --- evaluation -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(0, 2**31))
def test_sums_over_hospitals_say_what_pooled_records_say(classes: int, sizes: list[int], seed: int) -> None:
    """Counts exactly; AUC, Brier score and calibration error within the stated resolution."""
    parts = [predictions(size, classes, seed + rank) for rank, size in enumerate(sizes)]
    evaluation = summed(parts, classes)
    chances = torch.cat([part[0] for part in parts]).double().numpy()
    labels = torch.cat([part[1] for part in parts]).numpy()
    assert evaluation.records == len(labels)
    assert evaluation.class_counts == np.bincount(labels, minlength=classes).tolist()
    if not len(labels):
        assert evaluation.accuracy == evaluation.calibration_error == evaluation.brier_score == 0.0
        assert evaluation.macro_area is None
        return
    expected = confusion_matrix(labels, chances.argmax(1), labels=range(classes))
    assert np.array_equal(evaluation.confusion.numpy(), expected)
    for label, area in enumerate(evaluation.areas):
        own = labels == label
        bound = area_resolution(*evaluation.scores[label].tolist())
        if own.all() or not own.any():
            assert area is None and bound is None
            continue
        assert area is not None and bound is not None
        assert abs(area - roc_auc_score(own, chances[:, label])) <= bound + 1e-12
        assert abs(evaluation.brier_scores[label] - brier_score_loss(own, chances[:, label])) <= CALIBRATION_RESOLUTION
    everything = np.square(chances - np.eye(classes)[labels]).sum(axis=1).mean()
    assert abs(evaluation.brier_score - everything) <= classes * CALIBRATION_RESOLUTION
    assert abs(evaluation.calibration_error - calibration_error_by_loops(chances, labels)) <= CALIBRATION_RESOLUTION
    if not any(area is None for area in evaluation.areas):
        macro, bound = evaluation.macro_area, evaluation.macro_area_resolution
        assert macro is not None and bound is not None
        pooled = [roc_auc_score(labels == label, chances[:, label]) for label in range(classes)]
        assert abs(macro - sum(pooled) / classes) <= bound + 1e-12


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0, 16.0])
def test_the_area_is_that_of_the_scores_however_sure_a_model_is(sharpness: float) -> None:
    """Bins follow the size of the logits, so that the AUC hardly moves."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(600) % 3
    logits = torch.randn(600, 3, generator=generator, dtype=torch.float64)
    logits[torch.arange(600), labels] += 1.5
    chances = torch.softmax(sharpness * logits, dim=1)
    evaluation = evaluate_locally(chances, labels)
    pooled = [roc_auc_score(labels == label, chances[:, label]) for label in range(3)]
    assert evaluation.macro_area == pytest.approx(sum(pooled) / 3, abs=0.003)
    assert evaluation.macro_area_resolution is not None and evaluation.macro_area_resolution < 0.03


def test_edges_of_score_bins_increase_and_lie_alike_on_both_sides() -> None:
    edges = score_edges()
    assert edges.shape == (SCORE_BINS - 1,) and bool((edges.diff() > 0).all())
    assert torch.allclose(edges + edges.flip(0), torch.ones(SCORE_BINS - 1, dtype=torch.float64))
    chances = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    scores = evaluate_locally(chances, torch.tensor([1, 0, 0])).scores
    assert scores[0].sum(dim=0).nonzero().flatten().tolist() == [0, SCORE_BINS // 2, SCORE_BINS - 1]


def test_the_resolution_of_the_area_is_reached() -> None:
    """All own scores just above all others within one bin: the histogram sees ties, the scores tell all apart."""
    negative, positive = [0, 7, 0], [0, 3, 0]
    assert area_under_curve(negative, positive) == 0.5 and area_resolution(negative, positive) == 0.5
    assert area_resolution([3, 0], [0, 4]) == 0.0 and area_resolution([1], [0]) is None


def test_reliability_by_hand() -> None:
    chances = torch.tensor([[0.95, 0.05], [0.9375, 0.0625], [0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    evaluation = evaluate_locally(chances, torch.tensor([0, 1, 1, 0]))
    filled = {index: entry for index, entry in enumerate(evaluation.reliability_bins) if entry[0]}
    assert filled == {5: (1, 0.5, 1.0), 7: (1, 0.75, 1.0), 9: (2, pytest.approx(0.94375, abs=5e-4), 0.5)}
    assert evaluation.calibration_error == pytest.approx((2 * 0.44375 + 0.25 + 0.5) / 4, abs=5e-4)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    """Labels drawn from the probabilities themselves. The error's mean is about sum sqrt(n_b) / n, 0.013 here."""
    generator = torch.Generator().manual_seed(4)
    chances = torch.softmax(torch.randn(4000, 3, generator=generator), dim=1)
    labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    assert evaluate_locally(chances, labels).calibration_error < 0.03
    sharp = torch.softmax(8 * chances.log(), dim=1)
    assert evaluate_locally(sharp, labels).calibration_error > 0.2


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=6, max_size=6))
def test_models_that_diverged_keep_counts_in_range(values: list[float]) -> None:
    evaluation = evaluate_locally(torch.tensor(values).reshape(2, 3), torch.tensor([0, 2]))
    assert decode_evaluation(encode_evaluation(evaluation, 2), 3).records == 2
    assert int(evaluation.squared_errors.max()) <= 2 << 10 and 0 <= evaluation.brier_score <= 3


def test_evaluations_survive_encoding_and_contradictions_are_refused() -> None:
    evaluation = evaluate_locally(*predictions(50, 3, 1))
    encoded = encode_evaluation(evaluation, 50)
    assert encoded.shape == (evaluation_length(3),) == (9 + 384 + 30 + 3,)
    back = decode_evaluation(encoded, 3)
    for name in ("confusion", "scores", "reliability", "squared_errors"):
        assert torch.equal(getattr(back, name), getattr(evaluation, name))
    json.dumps(back.to_json(), allow_nan=False)
    with pytest.raises(HeadroomError, match="more test records"):
        encode_evaluation(evaluation, 49)
    for place in (0, 20, 394, 409):
        wrong = encoded.clone()
        wrong[place] += 1
        with pytest.raises(ProtocolError, match="contradicts itself"):
            decode_evaluation(wrong, 3)
    with pytest.raises(ProtocolError, match="another shape"):
        decode_evaluation(encoded[1:], 3)


@given(st.integers(1, 64), st.integers(1, 1 << 50))
def test_evaluation_headroom_is_exactly_what_float64_holds(hospitals: int, bound: int) -> None:
    fits = hospitals * bound * 2**10 < 2**53
    if fits:
        require_evaluation_headroom(hospitals, bound)
        assert int(float(hospitals * bound * 2**10 - 1)) == hospitals * bound * 2**10 - 1
    else:
        with pytest.raises(HeadroomError):
            require_evaluation_headroom(hospitals, bound)


def test_the_report_shows_calibration_and_skipped_files(tmp_path: Path) -> None:
    final = evaluate_locally(*predictions(200, 3, 5)).to_json()

    def run_with(evaluation: dict[str, Any]) -> run_files.Run:
        return run_files.Run(tmp_path, Header(kind="train"), {**TRAIN, "final": evaluation}, {})

    text = training_sections.calibration(run_with(final))
    assert formats.percent(final["calibration_error"]) in text and "<img" in text and "Calibration." in text
    assert f"{final['auc_macro']:.3f}" in text
    old = {name: value for name, value in final.items() if name not in ("reliability", "brier")}
    assert "Not shown" in training_sections.calibration(run_with(old))

    def skipped(**counts: int) -> list[tuple[str, object, str]]:
        trained = {key: value for key, value in TRAIN.items() if key != "skipped_files"}
        return run_files.skipped(TrainingSummary.from_json({**trained, **counts}))

    assert skipped(skipped_files=3)[0][:2] == ("Skipped files", 3)
    assert skipped(skipped_files=0) == skipped() == []
    empty = figures.reliability_diagram([(0, None, None)] * RELIABILITY_BINS)
    assert figures.svg_uri(empty).startswith("data:image/svg+xml")


# --- features ---------------------------------------------------------------------------------------------------------


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: tuple[torch.Tensor, ...]


def configured(mechanism: str = "none", hospitals: int = 3, noise: float = 4.0, **sections: Any) -> Config:
    privacy = {"mechanism": mechanism, "noise_multiplier": 1.0} | sections.pop("privacy", {})
    data = {"image_size": 8, "channels": 3, "normalise": "secure", "normalise_noise_multiplier": noise}
    return parse_config({"data": data, "privacy": privacy, "federation": {"hospitals": hospitals}, **sections}, "test")


def some_records(patients: int, seed: int, channels: int = 3) -> Records:
    """One to three images per patient, a class of its own for each, channels of different mean and spread."""
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(patients), generator.integers(1, 4, patients))
    centre, spread = np.linspace(0.3, 0.6, channels), np.linspace(0.05, 0.2, channels)
    noise = generator.normal(size=(len(owners), channels, 8, 8))
    inputs = np.clip(centre[:, None, None] + spread[:, None, None] * noise, 0, 1)
    labels = torch.from_numpy(generator.integers(0, 3, patients))[owners]
    rows = tuple(torch.from_numpy(np.flatnonzero(owners == patient)) for patient in range(patients))
    return Records(torch.from_numpy(inputs.astype(np.float32)), labels, rows)


def opened(plan: FeaturePlan, hospitals: list[Records]) -> torch.Tensor:
    total = torch.zeros(plan.length, dtype=torch.int64)
    for data in hospitals:
        total += encode_features(plan, data, Seed.from_system()).inside_protocol()
    return total


def by_numpy(hospitals: list[Records]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation per channel where every patient counts as one, and patients per class."""
    inputs = np.concatenate([data.inputs.double().numpy() for data in hospitals])
    weights = np.concatenate([_weights(data) for data in hospitals])
    flat = inputs.reshape(len(inputs), inputs.shape[1], -1)
    mean = np.average(flat.mean(axis=2), axis=0, weights=weights)
    squares = np.average(np.square(flat - mean[:, None]).mean(axis=2), axis=0, weights=weights)
    labels = np.concatenate([data.labels.numpy() for data in hospitals])
    return mean, np.sqrt(squares), np.bincount(labels, weights=weights, minlength=3)


def _weights(data: Records) -> np.ndarray:
    weights = np.empty(len(data.labels))
    for rows in data.records_of_patient:
        weights[rows.numpy()] = 1 / len(rows)
    return weights


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(0, 2**31))
def test_feature_statistics_without_noise_are_those_of_all_patients(sizes: list[int], seed: int) -> None:
    hospitals = [some_records(size, seed + rank) for rank, size in enumerate(sizes)]
    plan = plan_features(configured(hospitals=len(sizes)))
    found = decode_features(plan, opened(plan, hospitals))
    mean, deviation, counts = by_numpy(hospitals)
    np.testing.assert_allclose(found.normalisation.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.normalisation.deviation, deviation, atol=1e-5)
    np.testing.assert_allclose(found.class_counts, counts, atol=1e-4)
    assert found.patients == pytest.approx(sum(sizes), abs=1e-4) and found.mean_error == 0.0 and plan.event() is None
    together = torch.cat([found.normalisation.apply(data.inputs) for data in hospitals]).double().numpy()
    weights = np.concatenate([_weights(data) for data in hospitals])
    flat = together.reshape(len(together), 3, -1)
    np.testing.assert_allclose(np.average(flat.mean(axis=2), axis=0, weights=weights), 0, atol=1e-4)
    np.testing.assert_allclose(np.average(np.square(flat).mean(axis=2), axis=0, weights=weights), 1, atol=1e-3)


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([0.0, 1.0, -5.0, 7.0, 0.5, math.nan, math.inf, -math.inf]), min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_no_patient_moves_the_sum_by_more_than_the_sensitivity(count: int, values: list[float], label: int) -> None:
    """Whatever its inputs are and however many records it has."""
    plan = plan_features(configured("distributed"))
    inputs = torch.tensor(values).reshape(1, 3, 1, 1).expand(count, 3, 8, 8)
    patient = Records(inputs, torch.full((count,), label), (torch.arange(count),))
    assert float(patient_vectors(plan, patient).double().norm()) <= vector_norm(3) * (1 + 1e-6)
    plan = replace(plan, private=False)
    alone = opened(plan, [patient])
    assert sum(value * value for value in alone.tolist()) <= plan.mechanism.sensitivity**2
    others = some_records(4, count)
    shifted = tuple(rows + count for rows in others.records_of_patient)
    together = Records(
        torch.cat([patient.inputs, others.inputs]),
        torch.cat([patient.labels, others.labels]),
        (*patient.records_of_patient, *shifted),
    )
    assert torch.equal(opened(plan, [together]) - opened(plan, [others]), alone)


def test_the_bound_on_a_patients_vector_is_reached() -> None:
    """Black images: every value at its bound, every square too."""
    plan = plan_features(configured())
    patient = Records(torch.zeros(1, 3, 8, 8), torch.tensor([0]), (torch.tensor([0]),))
    assert float(patient_vectors(plan, patient).norm()) == pytest.approx(vector_norm(3), rel=1e-6)


@pytest.mark.parametrize(
    ("mechanism", "colluders", "quorum", "relying"),
    [("distributed", 1, 5, 4), ("distributed", 1, 4, 3), ("distributed", 2, 4, 2), ("local", 1, 5, 1)],
)
def test_the_noise_of_those_relied_on_is_that_of_the_event(
    mechanism: str, colluders: int, quorum: int, relying: int
) -> None:
    """`relying` = quorum - colluders shares add up to (z B)^2. Chi-square of 40 x 9 draws, false-alarm rate 1e-7."""
    config = configured(mechanism, 5, 4.0, privacy={"colluders": colluders})
    plan = plan_features(config, quorum)
    event = plan.event()
    assert event is not None and (event.noise_multiplier, event.sample_rate, event.steps) == (4.0, 1.0, 1)
    assert 0 < event.total_variation < 2.0**-100
    sigma = 4.0 * plan.mechanism.sensitivity
    nobody = Records(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64), ())
    draws = torch.stack([opened(plan, [nobody] * relying) for _ in range(40)]).double().numpy().reshape(-1) / sigma
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], len(draws))
    assert low < np.square(draws).sum() < high
    assert abs(draws.mean()) < 5.33 / len(draws) ** 0.5  # false-alarm rate 1e-7
    assert stats.kstest(draws, "norm").pvalue > 1e-7


def test_noised_statistics_are_near_and_say_how_near() -> None:
    """100 times three hospitals of 60 patients; what noise did to the sums, in units of `mean_error`, is standard normal.

    Chi-square of 600, false-alarm rate 1e-7. So little noise that no deviation meets its bounds.
    """
    hospitals = [some_records(60, rank) for rank in range(3)]
    plan = plan_features(configured("distributed", noise=0.05))
    mean, deviation, counts = by_numpy(hospitals)
    exact, patients = opened(replace(plan, private=False), hospitals), counts.sum()
    pulls = []
    for _ in range(100):
        total = exact.clone()
        for _ in hospitals:
            plan.mechanism.noise_share.add_to(total, Seed.from_system())
        found = decode_features(plan, total)
        means, deviations = np.array(found.normalisation.mean), np.array(found.normalisation.deviation)
        values = (means - 0.5) * found.patients - (mean - 0.5) * patients
        # Squares were summed less 1/8 and doubled.
        squares = (deviations**2 + (means - 0.5) ** 2 - 0.125) * found.patients
        squares -= (deviation**2 + (mean - 0.5) ** 2 - 0.125) * patients
        pulls.append(np.concatenate([values, 2 * squares]) / (found.mean_error * found.patients))
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], 600)
    assert low < np.square(pulls).sum() < high


def test_two_attempts_never_draw_the_same_noise() -> None:
    plan, data = plan_features(configured("local")), some_records(5, 1)
    seed = Seed.from_system()
    first = encode_features(plan, data, seed).inside_protocol()
    with pytest.raises(SecrecyError):
        encode_features(plan, data, seed)
    assert not torch.equal(first, encode_features(plan, data, Seed.from_system()).inside_protocol())


@given(
    st.integers(2, 64), st.integers(1, 1 << 24), st.floats(1e-3, 1e3), st.sampled_from(["none", "local", "distributed"])
)
def test_headroom_is_proven_before_the_run(hospitals: int, bound: int, noise: float, mechanism: str) -> None:
    config = configured(mechanism, hospitals, noise, aggregation={"count_bound": bound})
    try:
        plan = plan_features(config)
    except HeadroomError as error:
        assert hospitals * bound > 1 << 24 and "count_bound" in str(error)
        return
    planned = plan.mechanism
    largest = planned.patients_bound * planned.sensitivity + (planned.noise_share.largest if plan.private else 0)
    assert planned.patients_bound >= bound and hospitals * largest < 1 << 53


def test_impossible_plans_sums_and_sizes_are_refused() -> None:
    plan = plan_features(configured("distributed", noise=2.0))
    with pytest.raises(PrivacyBudgetError, match="nobody to add noise"):
        plan_features(configured("distributed", 3, privacy={"colluders": 1}), quorum=1)
    with pytest.raises(PrivacyBudgetError, match="quorum of 4 among 3"):
        plan_features(configured(), quorum=4)
    with pytest.raises(ProtocolError, match="exceeds its bound"):
        decode_features(plan, torch.full((plan.length,), plan.mechanism.largest_sum + 1))
    with pytest.raises(ProtocolError, match="another shape"):
        decode_features(plan, torch.zeros(plan.length - 1, dtype=torch.int64))
    with pytest.raises(PrivacyBudgetError, match="exceeds the number of patients"):
        decode_features(plan, torch.zeros(plan.length, dtype=torch.int64))
    few = plan_features(configured(aggregation={"count_bound": 2}))
    with pytest.raises(HeadroomError, match="more patients"):
        encode_features(few, some_records(few.mechanism.patients_bound + 1, 0), Seed.from_system())
    with pytest.raises(ConfigError, match="reference_ranges"):
        parse_config({"data": {"source": "breast_cancer", "classes": ["a", "b"], "normalise": "secure"}}, "test")


@given(st.data())
def test_constants_stay_in_range_whatever_the_noise(data: st.DataObject) -> None:
    plan = plan_features(configured("distributed"))
    largest = plan.mechanism.largest_sum
    values = data.draw(st.lists(st.integers(-largest, largest), min_size=plan.length, max_size=plan.length))
    try:
        found = decode_features(plan, torch.tensor(values))
    except PrivacyBudgetError:
        return
    assert all(0 <= mean <= 1 for mean in found.normalisation.mean)
    assert all(1 / 64 <= deviation <= 0.5 for deviation in found.normalisation.deviation)


def test_the_event_enters_ledger_and_budget(tmp_path: Path) -> None:
    event = plan_features(configured("distributed", noise=8.0)).event()
    assert event is not None
    ledger = PrivacyLedger(tmp_path / "ledger.json", "hospital-0")
    ledger.charge(event, run="test", round_number=0)
    assert ledger.spent() == [event]
    # One Gaussian release: the closed form epsilon = 1/(2 z^2) + sqrt(2 log(1/delta)) / z bounds it from above.
    assert 0.2 < epsilon_of(ledger.spent(), 1e-4) < 1 / 128 + (2 * math.log(1e4)) ** 0.5 / 8


def test_tables_are_normalised_within_their_reference_ranges() -> None:
    ranges = [[0.0, 1.0 + column] for column in range(30)]
    table = {"source": "breast_cancer", "classes": ["malignant", "benign"], "normalise": "secure"}
    config = parse_config(
        {"data": {**table, "table": {"reference_ranges": ranges}}, "privacy": {"mechanism": "none"}}, "test"
    )
    hospitals = [load_hospital(config, rank, "train") for rank in range(3)]
    plan = plan_features(config)
    assert (plan.low, plan.high) == (-2.0, 2.0)
    assert all(plan.low <= float(data.inputs.min()) and float(data.inputs.max()) <= plan.high for data in hospitals)
    total = sum(encode_features(plan, data, Seed.from_system()).inside_protocol() for data in hospitals)
    assert isinstance(total, torch.Tensor)
    found = decode_features(plan, total)
    pooled = torch.cat([data.inputs for data in hospitals]).double().numpy()
    np.testing.assert_allclose(found.normalisation.mean, pooled.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.normalisation.deviation, pooled.std(axis=0).clip(4 / 64), atol=1e-4)
    changed = normalised(hospitals[0], found.normalisation)
    assert torch.equal(changed.labels, hospitals[0].labels) and not torch.equal(changed.inputs, hospitals[0].inputs)
    assert normalised(hospitals[0], None) is hospitals[0]


FEATURES = {"source": "phantoms", "features": {"extractor": "scattering"}, "normalise": "secure"}


def features_of_images(config: Config, patients: int, seed: int) -> Dataset:
    """Records as an extractor makes them: norm 1, and a constant. Two of each patient."""
    size, generator = config.data.input_shape[0] - 1, torch.Generator().manual_seed(seed)
    common = torch.ones(size) / size**0.5
    vectors = torch.nn.functional.normalize(common + 0.02 * torch.randn(2 * patients, size, generator=generator), dim=1)
    inputs = torch.cat([vectors, torch.full((2 * patients, 1), FEATURE_CONSTANT)], dim=1)
    owners = torch.arange(2 * patients) // 2
    return Dataset(inputs, owners % 3, owners, ("",) * (2 * patients))


@pytest.mark.parametrize("mechanism", ["none", "local", "distributed"])
def test_the_mean_of_features_of_images_is_taken_off_them(mechanism: str) -> None:
    config = parse_config(
        {"data": FEATURES, "model": {"architecture": "linear"}, "privacy": {"mechanism": mechanism}}, "test"
    )
    plan, hospitals = plan_features(config), [features_of_images(config, 200, seed) for seed in range(3)]
    assert plan.length == 3 + config.data.input_shape[0] - 1
    vectors = patient_vectors(plan, hospitals[0])
    assert float(vectors.norm(dim=1).max()) <= plan.mechanism.clipping_norm  # nobody is clipped
    # One patient more or less, with the largest features there can be, moves the sum by no more than the noise is made for.
    largest = features_of_images(config, 1, 9)
    total, moved = torch.zeros(plan.length, dtype=torch.int64), torch.zeros(plan.length, dtype=torch.int64)
    add_patients(plan.mechanism, total, [vectors])
    add_patients(plan.mechanism, moved, [torch.cat([vectors, 9 * patient_vectors(plan, largest)])])
    assert float((moved - total).double().norm()) <= plan.mechanism.sensitivity
    seeds = [Seed(bytes([number]) * 32) for number in range(1, 4)]  # one draw of a thousand has too much noise to go on
    shares = [encode_features(plan, data, seed).inside_protocol() for data, seed in zip(hospitals, seeds, strict=True)]
    found = decode_features(plan, torch.stack(shares).sum(dim=0))
    pooled = torch.cat([data.inputs for data in hospitals])
    mean, error = torch.tensor(found.normalisation.mean), max(1e-6, 6 * found.mean_error)
    assert float((mean[:-1] - pooled[:, :-1].mean(dim=0)).abs().max()) <= error and mean[-1] == 0
    assert abs(found.patients - 600) <= max(1e-3, 600 * 12 * found.mean_error / plan.count_weight)
    centred = normalised(hospitals[0], found.normalisation).inputs
    torch.testing.assert_close(centred[:, :-1].norm(dim=1), torch.ones(400))
    assert bool((centred[:, -1] == hospitals[0].inputs[:, -1]).all())
    assert (plan.event() is None) == (mechanism == "none")


def test_a_model_file_says_of_which_features_it_is(tmp_path: Path) -> None:
    config = parse_config({"data": FEATURES, "model": {"architecture": "linear"}}, "test")
    size = config.data.input_shape[0]
    constants = Normalisation((*[0.01] * (size - 1), 0.0), (1.0,) * size, to_norm_1=True)
    model = build_model(config)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(3, size)]
    assert not any(bool(parameter.any()) for parameter in model.parameters())
    save_model(tmp_path / "model", model, config, constants)
    assert load_normalisation(tmp_path / "model", config) == constants
    load_model(tmp_path / "model", config)
    for features in (None, {"extractor": "scattering", "mirror": False}):
        with pytest.raises(ModelError, match="the configuration"):
            load_model(tmp_path / "model", config.with_values(data={"features": features}))


def test_a_model_file_keeps_the_constants_of_its_inputs(tmp_path: Path) -> None:
    config = configured()
    model = build_model(config, seed=1)
    constants = Normalisation((0.1, 1 / 3, 0.7), (0.2, 1e-3, 0.5))
    assert Normalisation.of_tensor(constants.tensor(), config) == constants
    save_model(tmp_path / "model", model, config, constants)
    assert load_normalisation(tmp_path / "model", config) == constants
    loaded = load_model(tmp_path / "model", config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    plain = config.with_values(data={"normalise": "none"})
    for read in (load_model, load_normalisation):
        with pytest.raises(ModelError, match="has a normalisation of inputs, data.normalise is 'none'"):
            read(tmp_path / "model", plain)
    save_model(tmp_path / "plain", model, plain)
    assert load_normalisation(tmp_path / "plain", plain) is None
    for read in (load_model, load_normalisation):
        with pytest.raises(ModelError, match="has no normalisation of inputs, data.normalise is 'secure'"):
            read(tmp_path / "plain", config)
    with pytest.raises(ModelError, match="pass it on"):
        save_model(tmp_path / "forgotten", model, config)
    assert not (tmp_path / "forgotten").exists()


@pytest.mark.parametrize("constants", [[1], {"mean": [0.1], "deviation": [0.2]}, {"mean": [0, 0, "x"], "deviation": [1, 1, 1]},
                                       {"mean": [0, 0, 0], "deviation": [1, 0, 1]}, {"mean": [0, 0, None]}])  # fmt: skip
def test_constants_that_cannot_be_are_refused(constants: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from mpc_fl.learning.models.model_file import describe

    config = configured()
    state = build_model(config, seed=1).state_dict()
    description = json.dumps({**describe(config), "normalisation_of_inputs": constants})
    save_file(state, tmp_path / "model", metadata={"mpc-fl": description})
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "model", config)
    assert "\n" not in str(caught.value) and str(tmp_path / "model") in str(caught.value)
    with pytest.raises(DataError):
        Normalisation((math.nan,), (1.0,))
    with pytest.raises(DataError, match="has 3 constants"):
        Normalisation((0.0,) * 3, (1.0,) * 3).apply(torch.zeros(2, 1, 8, 8))


# --- between real processes -------------------------------------------------------------------------------------------

WORLD = ["hospital-0", "hospital-1", "aggregator"]


def evaluate_and_measure(links: Any, directory: str) -> dict[str, Any]:
    """One evaluation and one feature sum, each opened once to the aggregator."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.crypto.secrecy import Private
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.opening import open_to
    from mpc_fl.sharing.secure_sum import secure_sum
    from tests.support.summed_evaluation import summed_evaluation

    plan, rank = plan_features(configured(hospitals=2)), WORLD.index(links.name)
    with CrypTenRuntime(links, WORLD, None, fraction_bits=24) as runtime:
        domain = runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        own = None if rank == 2 else evaluate_locally(*predictions(40, 3, rank))
        evaluation = summed_evaluation(domain, own, 3, "aggregator", "evaluation counts")
        summand = Private("aggregator's zero", torch.zeros(plan.length, dtype=torch.int64))
        if rank < 2:
            summand = encode_features(plan, some_records(20, rank), Seed.from_system())
        opened = open_to(domain, secure_sum(domain, summand, 0, "feature sums"), ["aggregator"], "normalisation")
    if opened is None:
        return {"evaluation": evaluation, "normalisation": None}
    constants = decode_features(plan, opened.long()).normalisation
    assert evaluation is not None
    return {"evaluation": evaluation.to_json(), "normalisation": constants}


@pytest.mark.processes
def test_parties_open_one_sum_and_nothing_of_a_site(tmp_path: Path) -> None:
    results = run_parties(evaluate_and_measure, WORLD, tmp_path, str(tmp_path))
    assert all(results[name] == {"evaluation": None, "normalisation": None} for name in WORLD[:2])
    pooled = summed([predictions(40, 3, rank) for rank in range(2)], 3)
    assert results["aggregator"]["evaluation"] == copy.deepcopy(pooled.to_json())
    mean, _, _ = by_numpy([some_records(20, rank) for rank in range(2)])
    np.testing.assert_allclose(results["aggregator"]["normalisation"].mean, mean, atol=1e-6)
    for name in WORLD:
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(record["what"], record["shape"]) for record in records] == [
            ("sum of evaluation counts", [evaluation_length(3)]),
            ("feature sums", [3 + 2 * 3]),
        ]


def test_so_few_patients_that_their_number_may_be_lost_in_noise_are_refused_before_the_run() -> None:
    """`check` said that a run of 119 patients can work, which was lost at its first sum."""
    plan = plan_features(configured("distributed", noise=2.0))

    def enough(before: bool) -> int:
        with pytest.raises(PrivacyBudgetError, match="training patients are needed") as refused:
            require_enough_patients(plan, 0, before)
        least = int(re.findall("([0-9]+) training patients", str(refused.value))[0])
        require_enough_patients(plan, least + 1, before)
        return least

    assert enough(before=True) == pytest.approx(enough(before=False) * 7 / 4, abs=2)
