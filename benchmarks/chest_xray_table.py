"""Accuracy on real chest X-rays against epsilon: what hospitals reach together and alone, with a linear layer on public features.

    nice python benchmarks/chest_xray_table.py --data DIR --out docs/chest_xray_table.md

DIR/{train,test}/<class>/ as for `mpc-fl train`. Rows: all patients in one place (`central`), one hospital by itself (`alone`), and
the federation with either noise. The patient is the unit of privacy, and the mean of the features is charged as in a run
(`plan_release`). Everything is computed in this process by the functions that hospitals and aggregator call, without masks:
masks cancel exactly, so a run of `mpc-fl train` gives the same up to the draw of the noise. Features are computed once.

The seed divides the patients; noise comes from the system. Intervals: both seeds and test patients are drawn anew (2,000 times,
a patient's records together), so they cover the choice of either.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from mpc_fl.apps.runs.run_directory import versions
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.feature_statistics import decode_features, encode_features, plan_features
from mpc_fl.federation.global_model import initial_model
from mpc_fl.federation.planning import mechanism_of, plan_release, releases_beside_steps, sample_rate_of
from mpc_fl.files import write_json, write_text
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.partition import partition_equal, patient_of
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.privacy.accounting import epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import mean_gradient, noised_share
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.iterate_average import IterateAverage
from mpc_fl.learning.training.per_sample_gradients import rounded_sum, sum_cross_entropy, working_copy
from mpc_fl.learning.training.sampling import sample_patients
from mpc_fl.learning.training.server_optimizers import server_optimizer

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {"lite0": "chest_xray.yaml", "scattering": "chest_xray_scattering.yaml"}
ROWS = {
    "central": "central",
    "alone": "one hospital alone (mean of all)",
    "local": "federated, local noise",
    "distributed": "federated, distributed noise",
}
RESAMPLES = 2000
FIGURES = ("accuracy", "balanced accuracy", "macro AUC", "MCC")


@dataclass(frozen=True)
class Result:
    """One row at one seed: probabilities (M, records, classes) of its M models, and epsilon of what was released."""

    features: str
    row: str
    epsilon: float | None
    seed: int
    spent: float | None
    seconds: float
    probabilities: torch.Tensor


# ---- data --------------------------------------------------------------------------------------------------------------


def restricted(dataset: Dataset, patients: Sequence[int]) -> Dataset:
    """The records of some patients only."""
    rows = torch.cat([dataset.records_of_patient[patient] for patient in patients])
    number = {patient: position for position, patient in enumerate(patients)}
    owners = torch.tensor([number[int(patient)] for patient in dataset.patients[rows]])
    return Dataset(
        dataset.inputs[rows], dataset.labels[rows], owners, tuple(dataset.names[row] for row in rows.tolist())
    )


def divided(dataset: Dataset, hospitals: int, seed: int) -> list[Dataset]:
    """Patients over hospitals, as a run with this seed divides them."""
    labels = torch.stack([dataset.labels[records[0]] for records in dataset.records_of_patient]).numpy()
    names = [patient_of(dataset.names[int(records[0])]) for records in dataset.records_of_patient]
    return [restricted(dataset, part.tolist()) for part in partition_equal(names, labels, hospitals, seed)]


def records(config: Config) -> tuple[Dataset, Dataset]:
    """Records of all patients in one place: training and test."""
    whole = config.with_values(data={"partition": {"method": "none"}})
    sets = []
    for split in ("train", "test"):
        began = time.monotonic()
        sets.append(as_records(load_hospital(whole, 0, split), whole))
        say(f"{config.name}: features of {len(sets[-1])} {split} images in {time.monotonic() - began:.0f} s")
    return sets[0], sets[1]


# ---- training ----------------------------------------------------------------------------------------------------------


def centred(config: Config, hospitals: list[Dataset], test: Dataset) -> tuple[list[Dataset], Dataset]:
    """All records less the noised mean of the training patients' features."""
    if config.data.normalise == "none":
        return hospitals, test
    plan = plan_features(config)
    parts = [encode_features(plan, data, Seed.from_system()).inside_protocol() for data in hospitals]
    normalisation = decode_features(plan, torch.stack(parts).sum(dim=0)).normalisation
    return [normalised(data, normalisation) for data in hospitals], normalised(test, normalisation)


def with_local_noise(config: Config, hospitals: list[Dataset]) -> torch.nn.Module:
    """Rounds of one step at every hospital, each with its own noise or none; the mean is stepped along."""
    model, optimizer = initial_model(config), server_optimizer(config)
    average = IterateAverage(config.training.average_last, config.global_models)
    release = [plan_release(config, data.patient_count, [], "a hospital") for data in hospitals]
    seeds = [Seed.from_system() for _ in hospitals]
    for number in range(1, config.training.rounds + 1):
        mean = torch.zeros(len(flatten_parameters(model)), dtype=torch.float64)
        for data, planned, seed in zip(hospitals, release, seeds, strict=True):
            noise, rate = (
                None if planned is None else planned.noise_multiplier,
                sample_rate_of(config, data.patient_count),
            )
            training = LocalTraining(config, noise, rate, None, "hooks")
            mean += train_locally(model, data, training, number, seed).update.double() / len(hospitals)
        stepped = optimizer.step(flatten_parameters(model), -mean)
        load_flat_parameters(model, average.take(stepped, number - 1))
    return model


def with_distributed_noise(config: Config, hospitals: list[Dataset]) -> torch.nn.Module:
    """Every step a sum of clipped gradients to which each hospital has added its part of the noise."""
    model, optimizer, mechanism = initial_model(config), server_optimizer(config), mechanism_of(config)
    average, working = IterateAverage(config.training.average_last, config.global_models), working_copy(model)
    seeds, parameters = [Seed.from_system() for _ in hospitals], flatten_parameters(model)
    rate = sample_rate_of(config, 0)
    for position in range(config.global_models):
        total = torch.zeros(mechanism.parameters, dtype=mechanism.dtype)
        for data, seed in zip(hospitals, seeds, strict=True):
            rows = sample_patients(data.records_of_patient, rate, seed.stream("sampling", position))
            sums = rounded_sum(working, sum_cross_entropy, data.inputs[rows], data.labels[rows], mechanism, "vmap")
            share = noised_share(mechanism, Private("gradients", sums.total), seed.derive("noise", position))
            total += share.inside_protocol()
        stepped = optimizer.step(parameters, mean_gradient(mechanism, total.long()))
        parameters = average.take(stepped, position)
        load_flat_parameters(working, parameters)
    load_flat_parameters(model, parameters)
    return model


def spent_by(config: Config, patients: int) -> float | None:
    """Epsilon of one patient over all that a run releases, lost rounds not among it."""
    planned = plan_release(config, patients, [], "a hospital")
    if planned is None:
        return None
    steps = config.training.rounds * config.training.local_steps
    lost = config.with_values(privacy={"spare_rounds": 0})
    events = [*releases_beside_steps(lost), replace(planned, steps=steps)]
    return epsilon_of(events, config.privacy.delta, config.privacy.accountant)


def configured(config: Config, row: str, epsilon: float | None, patients: int) -> Config:
    """The settings of a row: who adds the noise, and for whom it is enough."""
    mechanism = "none" if epsilon is None else "distributed" if row == "distributed" else "local"
    rounds, steps = config.training.rounds, config.training.local_steps
    training: dict[str, Any] = {"strategy": "fedsgd", "rounds": rounds * steps, "local_steps": 1}
    if mechanism == "distributed":
        training = {"rounds": rounds, "local_steps": steps}
    # A small clipping norm is better where noise is large.
    clipping = config.privacy.clipping_norm / (3.0 if epsilon is not None and epsilon < 4 else 1.0)
    smallest = patients // 10 * 10  # a public lower bound, not the number itself
    privacy: dict[str, Any] = {"mechanism": mechanism, "clipping_norm": clipping, "smallest_hospital": smallest}
    privacy["largest_hospital"] = 2 * smallest
    if epsilon is not None:
        privacy["epsilon"] = epsilon
    data: dict[str, Any] = {"normalise_noise_multiplier": config.data.normalise_noise_multiplier * 8 / (epsilon or 8)}
    if (
        row == "alone" and epsilon is not None and epsilon <= 1
    ):  # there are too few patients for the noise of their mean
        data["normalise"] = "none"
    return config.with_values(training={**training, "batch_size": smallest}, privacy=privacy, data=data)


def measure(
    features: str, row: str, config: Config, epsilon: float | None, seed: int, data: tuple[Dataset, Dataset]
) -> Result:
    """Train and evaluate one row at one seed."""
    began, (train, test) = time.monotonic(), data
    hospitals = divided(train, config.federation.hospitals, seed)
    groups = {"central": [[train]], "alone": [[hospital] for hospital in hospitals]}.get(row, [hospitals])
    found, spent = [], None
    for group in groups:
        patients = min(hospital.patient_count for hospital in group)
        own = configured(config, row, epsilon, patients)
        inputs, held_out = centred(own, group, test)
        train_with = with_distributed_noise if own.privacy.mechanism == "distributed" else with_local_noise
        found.append(torch.softmax(predict(train_with(own, inputs), held_out.inputs), dim=1))
        spent = spent_by(own, patients)
    return Result(features, row, epsilon, seed, spent, time.monotonic() - began, torch.stack(found))


# ---- statistics and text -----------------------------------------------------------------------------------------------


def figures_of(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """The `FIGURES` of one model, probabilities (N, classes)."""
    predicted = probabilities.argmax(axis=1)
    area = roc_auc_score(labels, probabilities / probabilities.sum(axis=1, keepdims=True), multi_class="ovr")
    accuracy = float((predicted == labels).mean())
    return accuracy, balanced_accuracy_score(labels, predicted), area, matthews_corrcoef(labels, predicted)


def interval(results: Sequence[Result], test: Dataset) -> list[tuple[float, float, float]]:
    """Mean of each figure over seeds and models, with a 95 % interval over seeds and test patients (bootstrap)."""
    labels, rows = test.labels.numpy(), [records.numpy() for records in test.records_of_patient]
    by_seed = [result.probabilities.numpy() for result in results]
    means = np.mean([[figures_of(model, labels) for model in models] for models in by_seed], axis=(0, 1))
    draw, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        models = by_seed[draw.integers(len(by_seed))]
        model = models[draw.integers(len(models))]
        chosen = np.concatenate([rows[patient] for patient in draw.integers(len(rows), size=len(rows))])
        if len(np.unique(labels[chosen])) == len(np.unique(labels)):
            drawn.append(figures_of(model[chosen], labels[chosen]))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return list(zip(means, low, high, strict=True))


def line(results: Sequence[Result], test: Dataset) -> str:
    first, found = results[0], interval(results, test)
    cells = []
    for name, (mean, low, high) in zip(FIGURES, found, strict=True):
        if name.endswith("accuracy"):
            cells.append(f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        else:
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
    spent = "none" if first.spent is None else f"{max(result.spent or 0.0 for result in results):.2f}"
    seconds = sum(result.seconds for result in results) / len(results)
    row = "federated" if first.row == "local" and first.epsilon is None else ROWS[first.row]
    return f"| {first.features} | {row} | {spent} | {len(results)} | {' | '.join(cells)} | {seconds:.0f} |"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR with {train,test}/<class>/")
    parser.add_argument("--features", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 8, 4, 2, 1], help="inf: no privacy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all rows")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--json", type=Path, help="the predictions as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = ["DIR" if word == str(arguments.data) else word for word in sys.argv[1:]]
    command, began = " ".join(["python", "benchmarks/chest_xray_table.py", *words]), time.monotonic()
    head = " | ".join(["features", "row", "epsilon", "seeds", *FIGURES, "seconds"])
    lines, results = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)], list[Result]()
    about: list[str] = []
    for features in arguments.features:
        config = load_config(REPOSITORY / "configs" / CONFIGS[features], arguments.set)
        config = config.with_values(site={**config.site.model_dump(mode="json"), "data": str(arguments.data.resolve())})
        data = records(config)
        about = [
            f"- Data: {data[0].patient_count} training patients over {config.federation.hospitals} hospitals; {len(data[1])} "
            f"test records of {data[1].patient_count} patients (data.shared_patients: {config.data.shared_patients}).",
            f"- Privacy: delta {config.privacy.delta:g}, unit the patient; epsilon is that of what was released.",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}; one thread.",
        ]
        for epsilon in arguments.epsilons:
            for row in arguments.rows:
                if math.isinf(epsilon) and row == "distributed":  # without noise there is nothing to distribute
                    continue
                budget = None if math.isinf(epsilon) else epsilon
                own = [measure(features, row, config, budget, seed, data) for seed in arguments.seeds]
                results += own
                lines.append(line(own, data[1]))
                say(lines[-1])
                made = f"Made {datetime.date.today()} in {(time.monotonic() - began) / 60:.0f} minutes by"
                text = "\n".join([f"{made}\n\n    {command}\n", *lines, "", *about, ""])
                if arguments.out is not None:  # after every row, so that an interrupted run leaves what it has
                    write_text(arguments.out, "# Chest X-rays: accuracy against epsilon\n\n" + text)
                if arguments.json is not None:
                    values = [{**vars(item), "probabilities": item.probabilities.tolist()} for item in results]
                    write_json(arguments.json, {"command": command, "results": values})
    print(text)


if __name__ == "__main__":
    main()
