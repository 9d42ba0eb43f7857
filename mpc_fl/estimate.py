"""What a run will need, before it: headroom, privacy, bytes, rounds of messages, memory."""

from __future__ import annotations

from typing import Any

import torch

from mpc_fl.config import Config
from mpc_fl.diagnosis import public_graph
from mpc_fl.federation import headroom_of
from mpc_fl.inference import cost
from mpc_fl.models import build_model, flatten_parameters
from mpc_fl.privacy import SubsampledGaussian, calibrate_noise_multiplier, epsilon_of
from mpc_fl.statistics import SCORE_BINS
from mpc_fl.training import sampling_rate
from mpc_fl.weights import flatten_buffers

_WORD = 8
_FLOAT = 4


def estimate_training(config: Config, patients: list[int]) -> dict[str, Any]:
    """Bytes, messages, privacy and headroom of a training run, with `patients[i]` training patients at hospital i."""
    model = build_model(config, config.data.input_shape, config.seed)
    parameters, buffers = len(flatten_parameters(model)), len(flatten_buffers(model))
    classes, rounds = len(config.data.classes), config.training.rounds
    counts = classes * classes + 2 * classes * SCORE_BINS
    hospitals = config.federation.hospitals
    up = rounds * _WORD * (parameters + 1 + counts) + _WORD * counts
    down = _FLOAT * (parameters + buffers) + rounds * _FLOAT * parameters
    headroom = headroom_of(config)
    return {
        "parameters": parameters,
        "rounds": rounds,
        "bytes_sent_per_hospital": up,
        "bytes_sent_by_aggregator": hospitals * down,
        "messages_per_hospital": 4 * rounds + 1,
        "headroom_bits_spare": round(headroom.bits_spare, 1),
        "memory_bytes_per_hospital": parameters * (3 * _FLOAT + 4 * _WORD),
        "privacy": [_privacy(config, rank, count) for rank, count in enumerate(patients)],
    }


def _privacy(config: Config, rank: int, patients: int) -> dict[str, Any]:
    name = f"hospital-{rank}"
    if config.privacy.mechanism == "none":
        return {"hospital": name, "patients": patients, "epsilon": None, "noise_multiplier": None}
    rate, steps = sampling_rate(config, patients), config.training.rounds * config.training.local_steps
    settings = config.privacy
    noise = settings.noise_multiplier
    if noise is None:
        noise = calibrate_noise_multiplier(settings.epsilon, settings.delta, rate, steps, [], settings.accountant, name)
    spent = epsilon_of([SubsampledGaussian(noise, rate, steps)], settings.delta, settings.accountant)
    return {
        "hospital": name,
        "patients": patients,
        "sampling_rate": rate,
        "steps": steps,
        "noise_multiplier": noise,
        "epsilon": spent,
        "target_epsilon": settings.epsilon,
        "delta": settings.delta,
    }


def estimate_inference(config: Config) -> dict[str, Any]:
    """Bytes, rounds and comparisons of one batch of encrypted inference, from shapes alone."""
    with torch.no_grad():
        graph = public_graph(config)
    shape = (config.inference.batch_size, *config.data.input_shape)
    return {"batch": config.inference.batch_size, "layers": len(graph.layers), **cost(graph, shape)}
