"""Strategies of federated training on the embedded default where hospitals differ: accuracy, and rounds to reach one.

All hospitals in one process, with the library's own training, server optimizers and evaluation; the sums are taken in
the clear, which gives the same numbers. SYNTHETIC phantoms, in two divisions: `labels`, Dirichlet proportions per class, and
`scanners`, equal classes but a contrast and brightness of its own at each hospital:

    python benchmarks/strategies.py

Every strategy trains on the same divisions, `--seeds` of them. Accuracy after the last round over the test records of
all seeds, with its 95 % Wilson interval; rounds to the target are the mean over the seeds, and the ratio is FedAvg's
divided by them. FedSGD takes one step per round, as many in all as FedAvg.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from typing import Any

import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.global_model import calibrate_own
from mpc_fl.federation.planning import sample_rate_of
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.evaluation import Evaluation, decode_evaluation, encode_evaluation, evaluate_locally
from mpc_fl.learning.models.parameters import flatten_parameters, join_parts, load_flat_parameters, shared_coordinates
from mpc_fl.learning.privacy.accounting import PrivacyBudget, calibrate_noise_multiplier
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.server_optimizers import server_optimizer

LOCAL_STEPS = 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"strategy": "fedprox", "proximal": 1.0},
    "fedavgm": {"strategy": "fedavgm"},
    "fedavgm, momentum 0.6": {"strategy": "fedavgm", "server_momentum": 0.6},
    "fedadam": {"strategy": "fedadam"},
    "fedyogi": {"strategy": "fedyogi"},
    "fedavg + local normalisation (FedBN)": {"local_normalisation": True},
    "fedsgd": {"strategy": "fedsgd", "local_steps": 1},
}


def configured(arguments: argparse.Namespace, division: str, seed: int, training: dict[str, Any]) -> Config:
    partition = {"method": "dirichlet", "alpha": arguments.alpha} if division == "labels" else {"method": "equal"}
    common = {"rounds": arguments.rounds, "local_steps": LOCAL_STEPS, "batch_size": 32, "sampling_seed": seed}
    common |= {"learning_rate": arguments.learning_rate, "per_sample_gradients": "vmap"}
    if training.get("local_steps") == 1:
        common["rounds"] = arguments.rounds * LOCAL_STEPS
    sizes = {"train_patients": arguments.patients, "test_patients": 300}
    values = {
        "seed": seed,
        "data": {"phantoms": sizes, "partition": partition},
        "federation": {"hospitals": arguments.hospitals},
        "privacy": {"mechanism": arguments.mechanism, "epsilon": arguments.epsilon, "delta": 1e-4},
        "training": {**common, **training},
    }
    return parse_config(values, "benchmark")


def noise_for(config: Config, patients: int) -> float | None:
    """What brings all rounds of a hospital to `privacy.epsilon`."""
    settings, training = config.privacy, config.training
    if settings.mechanism == "none":
        return None
    steps = training.rounds * training.local_steps
    return calibrate_noise_multiplier(
        PrivacyBudget(settings.epsilon, settings.delta), sample_rate_of(config, patients), steps
    )


def from_own_scanner(dataset: Dataset, rank: int, hospitals: int) -> Dataset:
    """Contrast from 1 down to 0.25, brightness shifted up at every second hospital and down at the others."""
    contrast = 1 - 0.75 * rank / (hospitals - 1)
    return replace(dataset, inputs=contrast * dataset.inputs + (1 - contrast) * (rank % 2))


def simulate(config: Config, division: str) -> list[Evaluation]:
    """The evaluation of all hospitals together after each round."""
    number = config.federation.hospitals
    data = [load_hospital(config, rank, "train") for rank in range(number)]
    held_out = [load_hospital(config, rank, "test") for rank in range(number)]
    if division == "scanners":
        data = [from_own_scanner(item, rank, number) for rank, item in enumerate(data)]
        held_out = [from_own_scanner(item, rank, number) for rank, item in enumerate(held_out)]
    weighted = config.counts_patients
    counts = torch.tensor([patients.patient_count if weighted else 1 for patients in data], dtype=torch.float64)
    noises = [noise_for(config, patients.patient_count) for patients in data]
    central = build_model(config)
    calibrate_batchnorm(central, public_phantoms(64, config))
    coordinates = shared_coordinates(central, config.training.local_normalisation)
    hospitals = [copy.deepcopy(central) for _ in data]
    for model, patients in zip(hospitals, data, strict=True):
        calibrate_own(model, patients.inputs, config)
    optimizer, noise_seeds = server_optimizer(config), [Seed.from_system() for _ in data]
    evaluations = []
    for number in range(1, config.training.rounds + 1):
        updates, own = [], []
        for rank, (model, patients, noise) in enumerate(zip(hospitals, data, noises, strict=True)):
            rate = sample_rate_of(config, patients.patient_count)
            seed = (config.training.sampling_seed or 0) * 1000 + rank
            training = LocalTraining(config, noise, rate, seed, "vmap")
            local = train_locally(model, patients, training, number, noise_seeds[rank])
            updates.append(local.update[coordinates].double())
            own.append(flatten_parameters(model) + local.update)
        mean = (torch.stack(updates) * counts.unsqueeze(1)).sum(dim=0) / counts.sum()
        shared = optimizer.step(flatten_parameters(central)[coordinates], -mean)
        load_flat_parameters(central, join_parts(shared, flatten_parameters(central), coordinates))
        total = []
        for model, patients, test, parameters in zip(hospitals, data, held_out, own, strict=True):
            load_flat_parameters(model, join_parts(shared, parameters, coordinates))
            calibrate_own(model, patients.inputs, config)
            with torch.no_grad():
                chances = torch.softmax(model(test.inputs).double(), dim=1)
            total.append(encode_evaluation(evaluate_locally(chances, test.labels), 1 << 20))
        evaluations.append(decode_evaluation(torch.stack(total).sum(dim=0), len(config.data.classes)))
    return evaluations


def rounds_to(evaluations: list[Evaluation], target: float) -> int | None:
    """The first round after which accuracy is at least `target`."""
    return next((number for number, item in enumerate(evaluations, start=1) if item.accuracy >= target), None)


def divisible_seeds(arguments: argparse.Namespace) -> list[int]:
    """Seeds that leave no hospital without patients."""
    seeds, seed = [], 0
    while len(seeds) < arguments.seeds:
        seed += 1
        config = configured(arguments, "labels", seed, {})
        try:
            sizes = [load_hospital(config, rank, "train").patient_count for rank in range(arguments.hospitals)]
            held_out = [load_hospital(config, rank, "test").patient_count for rank in range(arguments.hospitals)]
        except Exception:  # noqa: BLE001 - a division this skewed has an empty hospital
            continue
        if min(sizes) >= 20 and min(held_out) >= 1:
            seeds.append(seed)
    return seeds


def measure(name: str, division: str, arguments: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    began, runs = time.monotonic(), []
    for seed in seeds:
        runs.append(simulate(configured(arguments, division, seed, STRATEGIES[name]), division))
    last = [run[-1] for run in runs]
    pooled = decode_evaluation(torch.stack([encode_evaluation(item, 1 << 20) for item in last]).sum(dim=0), 3)
    reached = [rounds_to(run, arguments.target) for run in runs]
    low, high = pooled.confidence_interval()
    return {
        "division": division,
        "strategy": name,
        "accuracy": pooled.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_of_seeds": [round(item.accuracy, 4) for item in last],
        "calibration_error": pooled.calibration_error,
        "rounds_to_target": reached,
        "rounds": len(runs[0]),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hospitals", type=int, default=4)
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--alpha", type=float, default=0.5, help="Dirichlet parameter: the smaller, the more skewed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--mechanism", choices=["none", "local"], default="none")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--divisions", nargs="+", choices=["labels", "scanners"], default=["labels", "scanners"])
    parser.add_argument("--only", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, results = divisible_seeds(arguments), []
    if not arguments.json:
        head = f"rounds to {arguments.target:.0%} | ratio to {arguments.only[0]}"
        print(f"| division | strategy | accuracy | 95 % interval | of each seed | {head} |\n|{' --- |' * 7}")
    for division in arguments.divisions:
        base: float | None = None
        for index, name in enumerate(arguments.only):
            result = measure(name, division, arguments, seeds)
            reached = result["rounds_to_target"]
            mean = None if None in reached else sum(reached) / len(reached)
            base = mean if index == 0 else base
            # Where the first strategy did not reach the target, the ratio is at least this.
            result["ratio_of_rounds"] = None if mean is None else (base or arguments.rounds) / mean
            result["ratio_is_a_bound"] = base is None
            results.append(result)
            if not arguments.json:
                print(row(result, mean), flush=True)
    if arguments.json:
        described = {name: value for name, value in vars(arguments).items() if name not in ("json", "only")}
        print(json.dumps({**described, "used_seeds": seeds, "results": results}, indent=1))


def row(result: dict[str, Any], rounds: float | None) -> str:
    each = ", ".join(f"{value:.1%}" for value in result["accuracy_of_seeds"])
    shown = f"{rounds:.1f}" if rounds is not None else f"not in {result['rounds']}"
    ratio = (
        f"{'> ' * result['ratio_is_a_bound']}{result['ratio_of_rounds']:.2f}" if result["ratio_of_rounds"] else "n/a"
    )
    interval = f"{result['accuracy_low']:.1%} to {result['accuracy_high']:.1%}"
    names = f"{result['division']} | {result['strategy']}"
    return f"| {names} | {result['accuracy']:.1%} | {interval} | {each} | {shown} | {ratio} |"


if __name__ == "__main__":
    main()
