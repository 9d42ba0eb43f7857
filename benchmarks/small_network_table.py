"""What federation and its noise cost on real chest X-rays: central, one hospital alone, federated, with either noise.

    nice python benchmarks/small_network_table.py --data DIR --set training.batch_size=128 --out docs/small_network_table.md

DIR/{train,test}/<class>/ as for `mpc-fl train`. Every row trains the same network from the same initial weights, takes the
same number of steps in all, and is tested on the same records, those of all hospitals. Federated rows are real runs of
`mpc-fl train`, a process per party; the others train in this process, with the library's own local training. The seed sets
division, initial weights and sampling; noise always comes from the system, so rows with noise repeat only up to noise.

All rows take augmentation, schedule and average of the configuration; those without noise shorten the mean gradient of a batch.

Patients per step: training.batch_size at each hospital; `central` draws as many from all patients as the hospitals do
together. Learning rate: every row takes the best of a short list (`--rates`, with noise `--private-rates`) on a fifth of the
training patients, kept aside for that alone, at the first seed; then it trains on all. Rows without noise choose with a third
of the patients per step, to save time. No test record has a part in it. The choice itself is not private: epsilon covers
the training that follows.

Interval over seeds: Wilson's for the mean accuracy with every test record counted once, however many seeds there are. It
covers the choice of test records, not that of training patients. Differences are paired: record by record, with records
of one patient counted as one cluster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.runs.run_directory import versions
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError
from mpc_fl.federation.global_model import initial_model
from mpc_fl.files import write_json, write_text
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital, patients_per_hospital
from mpc_fl.learning.data.partition import partition_equal, patient_of
from mpc_fl.learning.models.evaluation import evaluate_locally, predict
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.privacy.accounting import PrivacyBudget, SubsampledGaussian, calibrate_noise_multiplier, epsilon_of
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.iterate_average import global_average
from mpc_fl.learning.training.sampling import sampling_rate

REPOSITORY = Path(__file__).resolve().parent.parent
GRADIENT_CLIPPING = 1.0  # of rows without noise, which diverge at the higher rates without it
KEPT_ASIDE = 5  # one patient in this many decides on a learning rate
ROWS = {
    "central": "central, no privacy",
    "alone": "one hospital alone (mean of all)",
    "federated": "federated, no noise",
    "local": "federated, local noise",
    "distributed": "federated, distributed noise",
    "central-private": "central, differentially private",
}
PRIVATE, EXTRA = ("local", "distributed", "central-private"), "central-private"
PAIRS = (("federated", "alone"), ("central", "federated"), ("distributed", "local"), ("federated", "distributed"))


@dataclass(frozen=True)
class Result:
    """One row at one seed: figures of the evaluation, and for each test record the share of models that are right."""

    row: str
    seed: int
    figures: dict[str, float]
    correct: torch.Tensor
    epsilon: float | None
    rate: float
    seconds: float


# ---- data --------------------------------------------------------------------------------------------------------------


def together(config: Config) -> Config:
    """All patients in one place: no division, as many patients per step as the hospitals have together."""
    batch = config.training.batch_size * config.federation.hospitals
    return by_itself(config.with_values(data={"partition": {"method": "none"}}, training={"batch_size": batch}))


def by_itself(config: Config) -> Config:
    """One party with all steps: its momentum lasts over rounds, which only say when a model enters the average of models."""
    return config.with_values(training={"keep_momentum": None if config.privacy.mechanism == "distributed" else True})


def restricted(dataset: Dataset, patients: Sequence[int]) -> Dataset:
    """The records of some patients only."""
    rows = torch.cat([dataset.records_of_patient[patient] for patient in patients])
    number = {patient: position for position, patient in enumerate(patients)}
    owners = torch.tensor([number[int(patient)] for patient in dataset.patients[rows]])
    names = tuple(dataset.names[row] for row in rows.tolist())
    return replace(dataset, inputs=dataset.inputs[rows], labels=dataset.labels[rows], patients=owners, names=names)


def kept_aside(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Training patients without every fifth, and those."""
    labels = torch.stack([dataset.labels[records[0]] for records in dataset.records_of_patient]).numpy()
    names = [patient_of(dataset.names[int(records[0])]) for records in dataset.records_of_patient]
    aside, *rest = [part.tolist() for part in partition_equal(names, labels, KEPT_ASIDE, seed)]
    return restricted(dataset, [patient for part in rest for patient in part]), restricted(dataset, aside)


# ---- training ----------------------------------------------------------------------------------------------------------


def trained(config: Config, data: Dataset, noise: float | None = None, rank: int = 0) -> torch.nn.Module:
    """Rounds of local training by one party alone."""
    return averaged(config, [data], noise, rank)


def averaged(
    config: Config, hospitals: Sequence[Dataset], noise: float | None = None, rank: int = 0
) -> torch.nn.Module:
    """Federated averaging of hospitals in this process, in the clear, weighted by patients."""
    model, noise_seeds = initial_model(config), [Seed.from_system() for _ in hospitals]
    average, velocities = global_average(config), [None for _ in hospitals]
    total = sum(data.patient_count for data in hospitals)
    for number in range(1, config.training.rounds + 1):
        mean = torch.zeros_like(flatten_parameters(model))
        for index, data in enumerate(hospitals):
            sampling_seed, rate = config.seed * 1000 + rank + index, sampling_rate(config, data.patient_count)
            training = LocalTraining(config, noise, rate, sampling_seed, velocity=velocities[index])
            local = train_locally(model, data, training, number, noise_seeds[index])
            if float(local.update.abs().max()) > config.aggregation.update_bound:  # a hospital would refuse to send it
                raise ModelError("an update exceeds aggregation.update_bound", "lower training.learning_rate")
            mean += local.update * (data.patient_count / total)
            velocities[index] = local.velocity
        load_flat_parameters(model, average.take(flatten_parameters(model) + mean, number - 1))
    return model


def accuracy(model: torch.nn.Module, data: Dataset) -> float:
    return float((predict(model, data.inputs).argmax(1) == data.labels).double().mean())


def choose_rates(config: Config, row: str, rates: Sequence[float]) -> dict[str, float]:
    """Accuracy of each rate on patients kept aside, for one row.

    Sums are taken in the clear. Distributed noise on the sum of n hospitals of which t may collude is that of one place
    with n / (n - t) times the variance.
    """
    number, privacy, training = config.federation.hospitals, config.privacy, config.training
    clipping = None if row in PRIVATE else GRADIENT_CLIPPING
    config = config.with_values(
        training={"sampling_seed": config.seed, "gradient_clipping": clipping},
        privacy={"mechanism": "local" if row in PRIVATE else "none"},
    )
    if row not in PRIVATE:
        config = config.with_values(training={"batch_size": max(1, training.batch_size // number)})
    if row == "alone":
        config = by_itself(config)
    if row in ("central", "distributed", EXTRA):
        config = together(config)
    places = number if row in ("federated", "local") else 1
    splits = [kept_aside(load_hospital(config, rank, "train"), config.seed) for rank in range(places)]
    noise = None
    if row in PRIVATE:
        rate = max(sampling_rate(config, fit.patient_count) for fit, _ in splits)
        budget, steps = PrivacyBudget(privacy.epsilon, privacy.delta), training.rounds * training.local_steps
        noise = calibrate_noise_multiplier(budget, rate, steps)
        if row == "distributed":
            noise *= math.sqrt(number / (number - privacy.colluders))
    found = {}
    for rate in rates:
        try:
            model = averaged(config.with_values(training={"learning_rate": rate}), [fit for fit, _ in splits], noise)
            right = sum(accuracy(model, aside) * len(aside) for _, aside in splits)
            found[f"{rate:g}"] = right / sum(len(aside) for _, aside in splits)
        except ModelError:  # it diverged
            found[f"{rate:g}"] = 0.0
        print(f"rate {rate:g}, {row}: {found[f'{rate:g}']:.1%} of records kept aside", file=sys.stderr, flush=True)
    return found


# ---- rows --------------------------------------------------------------------------------------------------------------


def evaluated(model: torch.nn.Module, test: Dataset) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures, and which records are right, float64 (records,)."""
    probabilities = torch.softmax(predict(model, test.inputs).double(), dim=1)
    return evaluate_locally(probabilities, test.labels).to_json(), (probabilities.argmax(1) == test.labels).double()


def in_this_process(row: str, config: Config, test: Dataset) -> tuple[list[dict[str, Any]], torch.Tensor, float | None]:
    """The rows without federation."""
    if row == "alone":
        config = by_itself(config)
        hospitals = range(config.federation.hospitals)
        models = [trained(config, load_hospital(config, rank, "train"), rank=rank) for rank in hospitals]
        results = [evaluated(model, test) for model in models]
        correct = torch.stack([right for _, right in results]).mean(dim=0)
        return [figures for figures, _ in results], correct, None
    config, noise, epsilon = together(config), None, None
    data = load_hospital(config, 0, "train")
    if config.privacy.mechanism != "none":
        rate = sampling_rate(config, data.patient_count)
        steps = config.training.rounds * config.training.local_steps
        noise = calibrate_noise_multiplier(PrivacyBudget(config.privacy.epsilon, config.privacy.delta), rate, steps)
    model = trained(config, data, noise)
    if noise is not None:
        epsilon = epsilon_of([SubsampledGaussian(noise, rate, steps)], config.privacy.delta)
    figures, correct = evaluated(model, test)
    return [figures], correct, epsilon


def in_real_processes(config: Config, test: Dataset) -> tuple[list[dict[str, Any]], torch.Tensor, float | None]:
    """The federated rows, by the command a user gives. Its figures are those opened from the hospitals' secure sum."""
    with tempfile.TemporaryDirectory() as directory:
        write_text(Path(directory) / "config.yaml", config.to_yaml())
        command = [sys.executable, "-m", "mpc_fl", "train", f"{directory}/config.yaml", "--json"]
        command += ["--data", str(config.site.data), "--out", f"{directory}/run"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=3600)
        if done.returncode:
            raise SystemExit(done.stderr)
        summary = json.loads(done.stdout)
        _, correct = evaluated(load_model(Path(directory) / "run" / "model.safetensors", config), test)
    spent = [line["epsilon"] for line in summary["privacy"] if line["epsilon"] is not None]
    return [summary["final"]], correct, max(spent) if spent else None


def measure(row: str, config: Config, seed: int, rate: float, smallest: int) -> Result:
    """Train and evaluate one row at one seed."""
    began = time.monotonic()
    mechanism = {"local": "local", "distributed": "distributed", "central-private": "local"}.get(row, "none")
    config = config.with_values(
        seed=seed,
        training={
            "learning_rate": rate,
            "sampling_seed": seed,
            "gradient_clipping": GRADIENT_CLIPPING if mechanism == "none" else None,
        },
        privacy={"mechanism": mechanism, "smallest_hospital": smallest},
    )
    test = load_hospital(together(config), 0, "test")
    if row in ("federated", "local", "distributed"):
        evaluations, correct, epsilon = in_real_processes(config, test)
    else:
        evaluations, correct, epsilon = in_this_process(row, config, test)
    names = ("accuracy", "balanced_accuracy", "auc_macro")
    figures = {name: sum(item[name] for item in evaluations) / len(evaluations) for name in names}
    return Result(row, seed, figures, correct, epsilon, rate, time.monotonic() - began)


# ---- statistics and text -----------------------------------------------------------------------------------------------


def wilson(share: float, records: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (Wilson, JASA 1927) of a share of `records`, which need not be a whole number of them."""
    centre = (share + z * z / (2 * records)) / (1 + z * z / records)
    half = z * math.sqrt(share * (1 - share) / records + z * z / (4 * records * records)) / (1 + z * z / records)
    return centre - half, centre + half


def paired_difference(first: torch.Tensor, second: torch.Tensor, patients: torch.Tensor) -> tuple[float, float, float]:
    """Mean of first - second over records with its 95 % interval; records of one patient are one cluster."""
    difference = first - second
    mean = float(difference.mean())
    deviations = torch.zeros(int(patients.max()) + 1, dtype=torch.float64).index_add_(0, patients, difference - mean)
    half = 1.96 * float(deviations.square().sum().sqrt()) / len(difference)
    return mean, mean - half, mean + half


def line(result: Result, seed: str, records: int) -> str:
    low, high = wilson(result.figures["accuracy"], records)
    epsilon = "none" if result.epsilon is None else f"{result.epsilon:.2f}"
    accuracies = (
        f"{result.figures['accuracy']:.1%} | {low:.1%} to {high:.1%} | {result.figures['balanced_accuracy']:.1%}"
    )
    return (
        f"| {ROWS[result.row]} | {seed} | {accuracies} | {result.figures['auc_macro']:.3f} | {epsilon} "
        f"| {result.rate:g} | {result.seconds:.0f} |"
    )


def over_seeds(results: Sequence[Result]) -> Result:
    """Means over the seeds of one row; the largest epsilon."""
    count = len(results)
    figures = {name: sum(item.figures[name] for item in results) / count for name in results[0].figures}
    correct = torch.stack([item.correct for item in results]).mean(dim=0)
    epsilons = [item.epsilon for item in results if item.epsilon is not None]
    seconds = sum(item.seconds for item in results) / count
    return Result(results[0].row, -1, figures, correct, max(epsilons) if epsilons else None, results[0].rate, seconds)


def table(results: Sequence[Result], test: Dataset) -> list[str]:
    """Each seed and the mean over seeds of each row, then paired differences."""
    head = "row | seed | accuracy | 95 % interval | balanced accuracy | macro AUC | epsilon | learning rate | seconds"
    lines, means = [f"| {head} |", "|" + " --- |" * 9], {}
    for row in ROWS:
        own = [item for item in results if item.row == row]
        lines += [line(item, str(item.seed), len(test)) for item in own]
        if own:
            means[row] = over_seeds(own)
        if len(own) > 1:
            lines.append(line(means[row], f"mean of {len(own)}", len(test)))
    lines += ["", "| difference in accuracy, points | mean of seeds | 95 % interval, paired |", "| --- | --- | --- |"]
    for first, second in PAIRS:
        seeds = {item.seed for item in results if item.row == first} & {
            item.seed for item in results if item.row == second
        }
        if seeds:
            one, other = (
                over_seeds([item for item in results if item.row == row and item.seed in seeds])
                for row in (first, second)
            )
            mean, low, high = paired_difference(one.correct, other.correct, test.patients)
            lines.append(
                f"| {ROWS[first]}, minus {ROWS[second]} | {100 * mean:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |"
            )
    return lines


def settings(config: Config, test: Dataset, sizes: Sequence[int], found: dict[str, dict[str, float]]) -> list[str]:
    """What was run, on what."""
    training, privacy = config.training, config.privacy
    size = "x".join(map(str, config.data.input_shape))
    known = {patient_of(name) for name in load_hospital(together(config), 0, "train").names}
    shared = len({patient_of(name) for name in test.names} & known)
    steps = training.rounds * training.local_steps
    rates = "; ".join(
        f"{row}: {', '.join(f'{share:.1%} at {rate}' for rate, share in shares.items())}"
        for row, shares in found.items()
    )
    return [
        f"- Data: {sum(sizes)} training patients over {len(sizes)} hospitals ({', '.join(map(str, sizes))} at the first seed); "
        f"{len(test)} test records of {test.patient_count} patients; classes {', '.join(config.data.classes)}. "
        f"{shared} patient names of the test folder occur in the training folder as well (names are no proof of one person).",
        f"- Network: {config.model.architecture} at {size}. {steps} steps in all ({training.rounds} rounds of "
        f"{training.local_steps}), {training.batch_size} patients expected per step and hospital, momentum {training.momentum}.",
        f"- Privacy of the rows with noise: epsilon {privacy.epsilon:g} at delta {privacy.delta:g} per patient, clipping norm "
        f"{privacy.clipping_norm:g}; distributed noise withstands {privacy.colluders} colluding hospital(s).",
        f"- Accuracy on patients kept aside, by which learning rates were chosen: {rates or 'none'}.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}; "
        f"one thread per process.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR with {train,test}/<class>/")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "chest_xray_small.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all rows")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.01, 0.003], help="of rows without noise")
    parser.add_argument("--private-rates", type=float, nargs="+", default=[0.1, 0.03], help="of rows with noise")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--json", type=Path, help="the same figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.config, arguments.set)
    config = config.with_values(
        seed=arguments.seeds[0], privacy={"epsilon": arguments.epsilon}, site={"data": str(arguments.data.resolve())}
    )
    sizes, test = patients_per_hospital(config), load_hospital(together(config), 0, "test")
    smallest = min(sizes) // 10 * 10  # a public lower bound, not the number itself
    words = ["DIR" if word == str(arguments.data) else word for word in sys.argv[1:]]
    command, began = " ".join(["python", "benchmarks/small_network_table.py", *words]), time.monotonic()

    found, chosen = {}, {}
    for row in arguments.rows:
        rates = arguments.private_rates if row in PRIVATE else arguments.rates
        chosen[row] = rates[0]
        if len(rates) > 1:
            found[row] = choose_rates(config, row, rates)
            chosen[row] = float(max(found[row].items(), key=lambda item: item[1])[0])
    about, results = settings(config, test, sizes, found), []
    # The row that is only there for comparison comes last.
    rows = sorted(((seed, row) for seed in arguments.seeds for row in arguments.rows), key=lambda one: one[1] == EXTRA)
    for seed, row in rows:
        results.append(measure(row, config, seed, chosen[row], smallest))
        print(line(results[-1], str(seed), len(test)), file=sys.stderr, flush=True)
        # Written after every row, so that an interrupted run leaves what it has.
        made = f"Made {datetime.date.today()} in {(time.monotonic() - began) / 60:.0f} minutes by"
        text = [f"{made}\n\n    {command}\n", *table(results, test), "", *about]
        if arguments.out is not None:
            write_text(arguments.out, "\n".join(["# Chest X-rays: what federation and noise cost", "", *text, ""]))
        if arguments.json is not None:
            values = [{**vars(item), "correct": item.correct.tolist()} for item in results]
            write_json(arguments.json, {"command": command, "kept_aside": found, "results": values})
    print("\n".join(text))


if __name__ == "__main__":
    main()
