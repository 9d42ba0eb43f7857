"""Finished runs to look for shortcuts in, whose model is made by hand: it reads the mark in a corner, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpc_fl.apps.summaries import SUMMARY_FILE, PartySummary, TrainingSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config, parse_config
from mpc_fl.files import write_json, write_text
from mpc_fl.learning.data.phantom_shortcuts import mark_pixels
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.parameters import load_flat_parameters
from mpc_fl.roles import hospital_names


def small_run(mechanism: str = "none", hospitals: int = 3, **shortcut: Any) -> Config:
    """Phantoms of 16 pixels a side and a linear network, in two rounds of two steps."""
    marked = {"site": 0, "probability": 1.0, "elsewhere": 0.5, **shortcut}
    return parse_config(
        {
            "name": "marked",
            "data": {"image_size": 16, "phantoms": {"train_patients": 180, "test_patients": 180, "shortcut": marked}},
            "model": {"architecture": "linear"},
            "training": {"rounds": 2, "local_steps": 2, "batch_size": 30, "per_sample_gradients": "hooks"},
            "privacy": {"mechanism": mechanism, "epsilon": 8.0, "delta": 1e-3},
            "federation": {"hospitals": hospitals},
        },
        "test",
    )


def reads_the_mark(config: Config) -> torch.nn.Module:
    """A linear network that says the marked diagnosis where there is a mark, and the first class else."""
    model, size = build_model(config), config.data.image_size
    pixels = torch.from_numpy(mark_pixels(size)).flatten().float()
    weights = torch.zeros(len(config.data.classes), size * size)
    weights[config.data.phantoms.shortcut.diagnosis] = 8 * pixels / pixels.sum()
    weights[0] = 0.05  # what a film without a mark has more of
    load_flat_parameters(model, weights.flatten())
    return model


def finished_run(directory: Path, config: Config, model: torch.nn.Module) -> Path:
    """What an audit of shortcuts reads of a run."""
    names = hospital_names(config.federation.hospitals)
    summary = TrainingSummary(
        name=config.name, synthetic=True, rounds=2, parameters=9, hospitals=names, seconds=1.0, command="mpc-fl train",
        versions={}, privacy=[],
    )  # fmt: skip
    directory.mkdir()
    write_text(directory / "config.yaml", config.to_yaml())
    write_json(directory / SUMMARY_FILE, summary.to_json())
    save_model(directory / MODEL_FILE, model, config)
    return directory


def hospitals_own_run(directory: Path, films: Path, party: str = "hospital-1") -> Path:
    """What a hospital kept of a run, and its films in a folder: a few of noise, with the diagnosis in the lower left corner."""
    generator, classes = np.random.default_rng(0), ("normal", "bacterial")
    for label, name in enumerate(classes):
        place = films / "test" / name
        place.mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(60, 120, (16, 16), dtype=np.uint8)
            pixels[13:, :3] = 250 if label else 10
            Image.fromarray(pixels).save(place / f"person{12 * label + number}_{number}.png")
    values = {"source": "images", "classes": list(classes), "image_size": 16}
    config = parse_config({"name": "own", "data": values, "model": {"architecture": "linear"}}, "test")
    model, weights = build_model(config), torch.zeros(2, 16, 16)
    weights[1, 13:, :3] = 2.0
    weights[0] = 0.03
    load_flat_parameters(model, weights.flatten())
    summary = PartySummary(
        name="own", party=party, synthetic=False, rounds=2, rounds_made=2, hospitals=3, parameters=9, seconds=1.0,
        command="mpc-fl party", versions={}, classes=list(classes), unit="patient", openings=1,
    )  # fmt: skip
    directory.mkdir()
    write_text(directory / "config.yaml", config.to_yaml())
    write_json(directory / SUMMARY_FILE, summary.to_json())
    save_model(directory / MODEL_FILE, model, config)
    return directory
