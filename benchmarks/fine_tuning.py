"""What of a public network is trained under privacy: the head alone, biases, the last block, or adapters of low rank.

    nice python benchmarks/fine_tuning.py --data DIR --trainable head bias last:3 lora:4 --rate 0.2

EfficientNet-Lite0 with its published weights on real chest X-rays, DIR/{train,test}/<class>/ as for `mpc-fl train`, hospitals with
distributed noise. Everything is computed in this process by the functions that hospitals and aggregator call, without masks: masks
cancel exactly, so a run of `mpc-fl train` gives the same up to the draw of the noise. Sampling and noise come from the system.

What stands before the first trained layer is the same in every step, so each record passes through it once, alone, as it does in
`mpc-fl train` with `head` and `last:N`; there `lora:R` and `bias` pass through the whole network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.global_model import initial_model, normalisation_of_weights
from mpc_fl.federation.planning import mechanism_of, plan_release, sample_rate_of
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.models.splitting import split_before_trained
from mpc_fl.learning.privacy.accounting import epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import mean_gradient, noised_share
from mpc_fl.learning.training.per_sample_gradients import Method, rounded_sum, sum_cross_entropy, working_copy
from mpc_fl.learning.training.sampling import sample_patients
from mpc_fl.learning.training.server_optimizers import server_optimizer

WEIGHTS = "8601c9ea396013b30ad83d20fd807105937e97c949ec69c298b121392715d197"
METHODS: dict[str, Method] = {"lora": "vmap", "bias": "vmap", "last": "vmap", "head": "vmap"}


def configured(arguments: argparse.Namespace, trainable: str) -> Config:
    values: dict[str, Any] = {
        "seed": 1,
        "data": {
            "source": "images",
            "image_size": arguments.size,
            "channels": 3,
            "wrong_size": "resize",
            "normalise": "weights",
        },
        "model": {"architecture": "efficientnet_lite0", "initial_weights": WEIGHTS},
        "training": {
            "trainable": trainable,
            "rounds": 1,
            "local_steps": arguments.steps,
            "batch_size": arguments.batch,
            "learning_rate": arguments.rate,
            "momentum": 0.9,
        },
        "privacy": {
            "mechanism": "distributed",
            "epsilon": arguments.epsilon,
            "delta": 1e-5,
            "clipping_norm": arguments.clipping,
            "smallest_hospital": 870,
        },
        "site": {"data": str(arguments.data)},
    }
    return parse_config(values, "the benchmark")


@torch.no_grad()
def passed_through(front: nn.Module, data: Dataset) -> Dataset:
    """One record at a time, so that each value is that record's alone."""
    return replace(data, inputs=torch.cat([front(record[None]) for record in data.inputs]))


def trained(config: Config, model: nn.Module, hospitals: list[Dataset], method: Method) -> nn.Module:
    """Every step a sum of clipped gradients to which each hospital has added its part of the noise (`federated_sgd`)."""
    optimizer, mechanism, working = server_optimizer(config), mechanism_of(config), working_copy(model)
    seeds, parameters, rate = (
        [Seed.from_system() for _ in hospitals],
        flatten_parameters(working),
        sample_rate_of(config, 0),
    )
    for step in range(config.training.local_steps):
        total, losses, count = torch.zeros(mechanism.parameters, dtype=mechanism.dtype), 0.0, 0
        for data, seed in zip(hospitals, seeds, strict=True):
            rows = sample_patients(data.records_of_patient, rate, seed.stream("sampling", step))
            sums = rounded_sum(working, sum_cross_entropy, data.inputs[rows], data.labels[rows], mechanism, method)
            losses, count = losses + float(sums.losses.sum()), count + len(rows)
            share = noised_share(mechanism, Private("gradients", sums.total), seed.derive("noise", step))
            total += share.inside_protocol()
        parameters = optimizer.step(parameters, mean_gradient(mechanism, total.long()))
        load_flat_parameters(working, parameters)
        say(f"  step {step + 1}: {count} records, mean loss {losses / max(1, count):.3f}")
    return working


@torch.no_grad()
def probabilities(model: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    return torch.cat([torch.softmax(model(chunk), dim=1) for chunk in inputs.split(32)]).numpy()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR with {train,test}/<class>/")
    parser.add_argument("--trainable", nargs="+", default=["head", "bias", "last:3", "lora:4"])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--size", type=int, default=96, help="sides of images")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64, help="expected patients of a hospital in a step")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.1], help="learning rates, a row each")
    parser.add_argument("--clipping", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates, data, rows = arguments.rate, None, []
    for trainable in arguments.trainable:
        arguments.rate = rates[0]
        config = configured(arguments, trainable)
        if data is None:
            scale, whole = normalisation_of_weights(config), config.with_values(data={"partition": {"method": "none"}})
            hospitals = [
                normalised(load_hospital(config, rank, "train"), scale) for rank in range(config.federation.hospitals)
            ]
            data = hospitals, normalised(load_hospital(whole, 0, "test"), scale)
        began, model = time.process_time(), initial_model(config)
        parts = split_before_trained(model)
        inputs, test = (
            data
            if parts is None
            else ([passed_through(parts[0], own) for own in data[0]], passed_through(parts[0], data[1]))
        )
        front_seconds, trainable_part = time.process_time() - began, model if parts is None else parts[1]
        for arguments.rate in rates:
            config, began = configured(arguments, trainable), time.process_time()
            planned = plan_release(config, min(own.patient_count for own in data[0]), [], "a hospital")
            assert planned is not None
            planned = replace(planned, steps=arguments.steps)
            epsilon = epsilon_of([planned], config.privacy.delta, config.privacy.accountant)
            say(f"{trainable}, rate {arguments.rate:g}: {len(flatten_parameters(model))} parameters, {planned}")
            method = METHODS[trainable.partition(":")[0]]
            predicted = probabilities(trained(config, trainable_part, inputs, method), test.inputs)
            labels = test.labels.numpy()
            area = roc_auc_score(labels, predicted / predicted.sum(axis=1, keepdims=True), multi_class="ovr")
            accuracy, balanced = (
                float((predicted.argmax(1) == labels).mean()),
                balanced_accuracy_score(labels, predicted.argmax(1)),
            )
            error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(labels))
            cells = [
                trainable, f"{len(flatten_parameters(model)):,}", f"{arguments.rate:g}", f"{epsilon:.2f}",
                f"{accuracy:.1%} +- {error:.1%}", f"{balanced:.1%}", f"{area:.3f}",
                f"{front_seconds:.0f}", f"{(time.process_time() - began) / arguments.steps:.1f}",
            ]  # fmt: skip
            rows.append("| " + " | ".join(cells) + " |")
            say(rows[-1])
    head = ("trained", "parameters", "rate", "epsilon", "accuracy", "balanced", "macro AUC", "once, s", "a step, s")
    print(f"{len(data[1]) if data else 0} test records; seconds of one core")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head) + "\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
