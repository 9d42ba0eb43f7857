"""Accuracy on real chest X-rays against epsilon: what hospitals reach together and alone.

    python benchmarks/chest_xray_table.py --data DIR --cache CACHE --out docs/chest_xray_table.md

DIR/{train,test}/<class>/ as for `mpc-fl train`. Models: a linear layer on features of EfficientNet-Lite0 or on scattering, and
the small network, which is trained as a whole. Rows: all patients in one place
(`central`), one hospital by itself (`alone`), and the federation with either noise. The patient is the unit of privacy, and
the mean of the features is charged as in a run (`plan_release`). Everything is computed by the functions that hospitals and
aggregator call, without masks and links: masks cancel exactly, so a run of `mpc-fl train` gives the same up to the draw of
the noise (`chest_xray_federation.py` makes such runs). Features are computed once, and kept in CACHE.

With `--block K` test records stay aside: the K-th quarter of the training patients, by the numbers in their names, is tested
by models of the others. Settings are chosen so. Neighbours in number were X-rayed at about the same time, so that this tells more
of other patients than a quarter drawn at random, which flatters.

The seed divides the patients; noise comes from the system. Intervals cover the choice of seeds and of test patients
(`mpc_fl/evidence/models_compared.py`). With `--json FILE` predictions, what is true of the test records, and the table are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpc_fl.apps.runs.memory import use_large_pages
from mpc_fl.apps.runs.run_directory import versions
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.evidence.models_compared import FIGURES, JudgedRecords, with_intervals
from mpc_fl.evidence.shortcuts_tested import Estimate
from mpc_fl.federation.feature_statistics import decode_features, encode_features, plan_features
from mpc_fl.federation.global_model import initial_model
from mpc_fl.federation.planning import mechanism_of, plan_release, releases_beside_steps, sample_rate_of
from mpc_fl.files import write_json, write_text, written_whole
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.partition import partition_equal, patient_of
from mpc_fl.learning.data.tables import Split
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.privacy.accounting import epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian, mean_gradient, noised_share
from mpc_fl.learning.training.augmentation import augmented
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.iterate_average import global_average
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    rounded_sum,
    sum_cross_entropy,
    working_copy,
)
from mpc_fl.learning.training.sampling import sample_patients
from mpc_fl.learning.training.schedules import learning_rate_factor
from mpc_fl.learning.training.server_optimizers import server_optimizer

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {"lite0": "chest_xray.yaml", "scattering": "chest_xray_scattering.yaml", "small": "chest_xray_small.yaml"}
NETWORKS = {"lite0": "Lite0, linear", "scattering": "scattering, linear", "small": "small network"}
# A sixth of the work of the file, so that all rows fit in an hour; chosen for that, not for accuracy.
SMALL_IN_AN_HOUR = (
    "training.local_steps=5",
    "training.learning_rate=0.5",
    "training.ema_decay=0.9",
    "training.augmentation.copies=1",
)
SMALL_WITHOUT_PRIVACY = {
    "local_steps": 10,
    "gradient_clipping": 1.0,
    "learning_rate": 0.02,
    "batch_size": 128,
    "ema_decay": 0.5,
}
RATE_AT_EPSILON_1 = 15.0  # of Lite0; scattering keeps its 30
SMALL_RATE_AT_EPSILON_1 = 0.25  # half of the small network's, as for Lite0; not searched for
RATE_WITHOUT_CLIPPING = 5.0  # of a linear layer on features; gradients of the other rows are clipped to a tenth
ROWS = {
    "central": "central",
    "alone": "one hospital alone (mean of all)",
    "local": "federated, local noise",
    "distributed": "federated, distributed noise",
}
SOURCES = ("data/image_files.py", "models/feature_extractor.py", "models/scattering.py", "models/efficientnet_lite.py")
NUMBERED, BLOCKS = re.compile(r"(.*?)(\d+)$"), 4
CORES = 2


@dataclass(frozen=True)
class Result:
    """One row at one seed: probabilities float64 (M, records, classes) of its M models, epsilon of what was released."""

    features: str
    row: str
    epsilon: float | None
    seed: int
    spent: float | None
    seconds: float
    probabilities: np.ndarray


@dataclass(frozen=True)
class Task:
    """What one process trains and evaluates: a row at one seed, on records that were kept as arrays (`stored`)."""

    features: str
    row: str
    epsilon: float | None
    seed: int
    config: Config
    files: tuple[Path, Path]
    block: int | None = None


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


def without_block(dataset: Dataset, block: int) -> tuple[Dataset, Dataset]:
    """All patients but a quarter of each kind of name (`person`, `IM-`, `NORMAL2-IM-`), in order of number; and that quarter."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for patient, rows in enumerate(dataset.records_of_patient):
        name = patient_of(dataset.names[int(rows[0])])
        found = NUMBERED.match(name)
        kind, number = (name, "0") if found is None else found.groups()
        kinds.setdefault(kind, []).append((int(number), patient))
    aside = set()
    for members in kinds.values():
        first, last = (len(members) * edge // BLOCKS for edge in (block, block + 1))
        aside.update(patient for _, patient in sorted(members)[first:last])
    rest = [patient for patient in range(dataset.patient_count) if patient not in aside]
    return restricted(dataset, rest), restricted(dataset, sorted(aside))


def restored(file: Path) -> Dataset:
    """A data set as `stored` left it."""
    with np.load(file, allow_pickle=False) as arrays:
        inputs, labels, patients = (torch.from_numpy(arrays[name]) for name in ("inputs", "labels", "patients"))
        return Dataset(inputs, labels, patients, tuple(arrays["names"].tolist()))


def stored(config: Config, split: Split, cache: Path) -> Path:
    """The file with the records of all patients in one place, which is made where it is not there yet.

    Its name says of what settings, code and files it was made.
    """
    whole = config.with_values(data={"partition": {"method": "none"}})
    assert config.site.data is not None
    images = sorted(path.relative_to(config.site.data).as_posix() for path in (config.site.data / split).rglob("*.*"))
    sources = [(REPOSITORY / "mpc_fl" / "learning" / name).read_bytes() for name in SOURCES]
    described = [whole.data.model_dump_json().encode(), *sources, *(name.encode() for name in images)]
    digest = hashlib.sha256(b"\n".join(described)).hexdigest()
    file = cache / f"{config.name}-{split}-{digest[:16]}.npz"
    if not file.exists():
        began = time.monotonic()
        data = as_records(load_hospital(whole, 0, split), whole)
        arrays = {name: getattr(data, name).numpy() for name in ("inputs", "labels", "patients")}
        cache.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as place, place.open("wb") as opened:
            np.savez(opened, names=np.array(data.names), **arrays)
        say(f"{config.name}: {len(data)} {split} records in {time.monotonic() - began:.0f} s")
    return file


# ---- training ----------------------------------------------------------------------------------------------------------


def centred(config: Config, hospitals: list[Dataset], test: Dataset) -> tuple[list[Dataset], Dataset]:
    """All records less the noised mean of the training patients' features."""
    if config.data.normalise == "none":
        return hospitals, test
    plan = plan_features(config)
    parts = [encode_features(plan, data, Seed.from_system()).inside_protocol() for data in hospitals]
    normalisation = decode_features(plan, torch.stack(parts).sum(dim=0)).normalisation
    return [normalised(data, normalisation) for data in hospitals], normalised(test, normalisation)


def fastest_method(config: Config, model: torch.nn.Module, mechanism: DistributedGaussian | None = None) -> Method:
    """How gradients of single patients are computed: as configured, or by trial on this machine."""
    if config.training.per_sample_gradients != "auto":
        return config.training.per_sample_gradients
    return choose_per_sample_method(model, config.data.input_shape, mechanism=mechanism)


def with_local_noise(config: Config, hospitals: list[Dataset]) -> torch.nn.Module:
    """Rounds of one step at every hospital, each with its own noise or none; the mean is stepped along."""
    model, optimizer = initial_model(config), server_optimizer(config)
    average = global_average(config)
    release = [plan_release(config, data.patient_count, [], "a hospital") for data in hospitals]
    seeds = [Seed.from_system() for _ in hospitals]
    velocities: list[torch.Tensor | None] = [None] * len(hospitals)
    method = None if config.privacy.mechanism == "none" else fastest_method(config, model)
    for number in range(1, config.training.rounds + 1):
        mean = torch.zeros(len(flatten_parameters(model)), dtype=torch.float64)
        for place, (data, planned, seed) in enumerate(zip(hospitals, release, seeds, strict=True)):
            noise, rate = (
                None if planned is None else planned.noise_multiplier,
                sample_rate_of(config, data.patient_count),
            )
            training = LocalTraining(config, noise, rate, None, method, velocity=velocities[place])
            trained = train_locally(model, data, training, number, seed)
            mean, velocities[place] = mean + trained.update.double() / len(hospitals), trained.velocity
        stepped = optimizer.step(flatten_parameters(model), -mean)
        load_flat_parameters(model, average.take(stepped, number - 1))
    return model


def with_distributed_noise(config: Config, hospitals: list[Dataset]) -> torch.nn.Module:
    """Every step a sum of clipped gradients to which each hospital has added its part of the noise."""
    model, optimizer, mechanism = initial_model(config), server_optimizer(config), mechanism_of(config)
    average, working = global_average(config), working_copy(model)
    seeds, parameters = [Seed.from_system() for _ in hospitals], flatten_parameters(model)
    rate, method = sample_rate_of(config, 0), fastest_method(config, model, mechanism)
    for position in range(config.global_models):
        total = torch.zeros(mechanism.parameters, dtype=mechanism.dtype)
        for data, seed in zip(hospitals, seeds, strict=True):
            rows = sample_patients(data.records_of_patient, rate, seed.stream("sampling", position))
            drawn = augmented(config.training.augmentation, data.inputs[rows], seed.derive("augmentation", position))
            sums = rounded_sum(working, sum_cross_entropy, drawn, data.labels[rows], mechanism, method)
            share = noised_share(mechanism, Private("gradients", sums.total), seed.derive("noise", position))
            total += share.inside_protocol()
        number, step = divmod(position, config.training.local_steps)
        factor = learning_rate_factor(config.training, number + 1, step)
        stepped = optimizer.step(parameters, mean_gradient(mechanism, total.long()), factor)
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
    smallest = patients // 10 * 10  # a public lower bound, not the number itself
    privacy: dict[str, Any] = {"mechanism": mechanism, "smallest_hospital": smallest, "largest_hospital": 2 * smallest}
    if epsilon is not None:
        privacy["epsilon"] = epsilon
    if config.data.features is None:
        if epsilon is None:  # as the file says
            return config.with_values(training=SMALL_WITHOUT_PRIVACY, privacy=privacy)
        hospitals = config.federation.hospitals if row == "central" else 1
        training: dict[str, Any] = {"batch_size": min(smallest, config.training.batch_size * hospitals)}
        if epsilon <= 1:
            training["learning_rate"] = SMALL_RATE_AT_EPSILON_1
        return config.with_values(training=training, privacy={**privacy, "delta": 1e-5})
    training = {"batch_size": smallest}
    if mechanism != "distributed":  # one step a round, so that steps are those of the federation
        steps = config.training.rounds * config.training.local_steps
        training = {"batch_size": smallest, "strategy": "fedsgd", "rounds": steps, "local_steps": 1}
    if epsilon is None:
        training["learning_rate"] = RATE_WITHOUT_CLIPPING
    elif epsilon <= 1 and config.data.features.extractor == "efficientnet_lite0":
        training["learning_rate"] = RATE_AT_EPSILON_1
    data: dict[str, Any] = {"normalise_noise_multiplier": config.data.normalise_noise_multiplier * 8 / (epsilon or 8)}
    if (
        row == "alone" and epsilon is not None and epsilon <= 1
    ):  # there are too few patients for the noise of their mean
        data["normalise"] = "none"
    return config.with_values(training=training, privacy=privacy, data=data)


@functools.lru_cache(maxsize=2)
def _data(files: tuple[Path, Path], block: int | None) -> tuple[Dataset, Dataset]:
    """Of training and of test."""
    return (restored(files[0]), restored(files[1])) if block is None else without_block(restored(files[0]), block)


def measure(task: Task) -> Result:
    """Train and evaluate one row at one seed."""
    torch.set_num_threads(1)
    began, (train, test), config = time.monotonic(), _data(task.files, task.block), task.config
    hospitals = divided(train, config.federation.hospitals, task.seed)
    groups = {"central": [[train]], "alone": [[hospital] for hospital in hospitals]}.get(task.row, [hospitals])
    found, spent = [], None
    for group in groups:
        patients = min(hospital.patient_count for hospital in group)
        own = configured(config, task.row, task.epsilon, patients)
        inputs, held_out = centred(own, group, test)
        train_with = with_distributed_noise if own.privacy.mechanism == "distributed" else with_local_noise
        found.append(torch.softmax(predict(train_with(own, inputs), held_out.inputs).double(), dim=1))
        spent = spent_by(own, patients)
    probabilities = torch.stack(found).numpy()
    return Result(task.features, task.row, task.epsilon, task.seed, spent, time.monotonic() - began, probabilities)


# ---- statistics and text -----------------------------------------------------------------------------------------------


def tested_on(test: Dataset) -> JudgedRecords:
    """What is true of the test records."""
    return JudgedRecords(test.labels.numpy(), test.patients.numpy())


def figures_of_row(results: Sequence[Result], test: Dataset) -> list[Estimate]:
    """Each of `FIGURES` over the seeds of one row, with intervals."""
    return with_intervals([result.probabilities for result in results], tested_on(test))


def line(results: Sequence[Result], figures: Sequence[Estimate]) -> str:
    """One row as Markdown."""
    first, cells = results[0], []
    for name, of in zip(FIGURES, figures, strict=True):
        if name.endswith("accuracy"):
            cells.append(f"{100 * of.value:.1f} % ({100 * of.low:.1f} to {100 * of.high:.1f})")
        else:
            cells.append(f"{of.value:.3f} ({of.low:.3f} to {of.high:.3f})")
    of = row_of(results)
    spent = "none" if of["spent"] is None else f"{of['spent']:.2f}"
    row = "federated" if first.row == "local" and first.epsilon is None else ROWS[first.row]
    return (
        f"| {NETWORKS[first.features]} | {row} | {spent} | {len(results)} | {' | '.join(cells)} | {of['seconds']:.0f} |"
    )


def row_of(results: Sequence[Result]) -> dict[str, Any]:
    """Which row it is, the largest epsilon that was spent in a training, and the mean of seconds."""
    first, spent = results[0], [result.spent for result in results if result.spent is not None]
    seconds = sum(result.seconds for result in results) / len(results)
    of = {"features": first.features, "row": first.row, "epsilon": first.epsilon, "seeds": len(results)}
    return {**of, "spent": max(spent, default=None), "seconds": seconds}


@contextlib.contextmanager
def cancelled_with(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Let an error end the pool without the tasks that wait, so that it is told at once."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tasks(arguments: argparse.Namespace, features: str) -> list[list[Task]]:
    """One list for each row of the table, a task for each seed."""
    shorter = SMALL_IN_AN_HOUR if features == "small" else ()
    config = load_config(REPOSITORY / "configs" / CONFIGS[features], [*shorter, *arguments.set])
    config = config.with_values(site={**config.site.model_dump(mode="json"), "data": str(arguments.data.resolve())})
    files = (stored(config, "train", arguments.cache), stored(config, "test", arguments.cache))
    rows = list[list[Task]]()
    for epsilon in arguments.epsilons:
        budget = None if math.isinf(epsilon) else epsilon
        for row in arguments.rows:
            # Without noise there is nothing to distribute.
            if budget is None and row == "distributed":
                continue
            rows.append([Task(features, row, budget, seed, config, files, arguments.block) for seed in arguments.seeds])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR with {train,test}/<class>/")
    parser.add_argument("--cache", type=Path, required=True, help="folder for records, made once")
    parser.add_argument("--features", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 8, 4, 2, 1], help="inf: no privacy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all rows")
    parser.add_argument(
        "--block", type=int, choices=range(BLOCKS), help="test on a quarter of the training patients instead"
    )
    parser.add_argument("--processes", type=int, default=CORES, help="rows trained at a time")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--json", type=Path, help="the predictions as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    use_large_pages()
    places = {str(arguments.data): "DIR", str(arguments.cache): "CACHE"}
    words = [places.get(word, word) for word in sys.argv[1:]]
    command, began = " ".join(["python", "benchmarks/chest_xray_table.py", *words]), time.monotonic()
    head = " | ".join(["model", "row", "epsilon", "seeds", *FIGURES, "seconds"])
    lines, results = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)], list[Result]()
    table = list[dict[str, Any]]()
    rows = [row for features in arguments.features for row in tasks(arguments, features)]
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool, cancelled_with(pool):
        waiting = [[pool.submit(measure, task) for task in row] for row in rows]
        for row, futures in zip(rows, waiting, strict=True):
            own, test = [future.result() for future in futures], _data(row[0].files, arguments.block)[1]
            results += own
            figures = figures_of_row(own, test)
            lines.append(line(own, figures))
            table.append(
                {**row_of(own), "figures": {name: vars(of) for name, of in zip(FIGURES, figures, strict=True)}}
            )
            say(lines[-1])
            made = f"Made {datetime.date.today()} in {(time.monotonic() - began) / 60:.0f} minutes by"
            about = f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}; one thread a process."
            text = "\n".join([f"{made}\n\n    {command}\n", *lines, "", about, ""])
            if arguments.out is not None:  # after every row, so that an interrupted run leaves what it has
                write_text(arguments.out, "# Chest X-rays: accuracy against epsilon\n\n" + text)
            if arguments.json is not None:
                values = [{**vars(item), "probabilities": item.probabilities.tolist()} for item in results]
                truth = {"labels": test.labels.tolist(), "patients": test.patients.tolist()}
                made_of = {"command": command, "versions": versions(), "test": truth}
                write_json(arguments.json, {**made_of, "table": table, "results": values})
    print(text)


if __name__ == "__main__":
    main()
