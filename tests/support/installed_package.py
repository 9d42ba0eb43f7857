"""A tiny package as pip leaves it: modules and metadata in a directory that a test puts on the path."""

from __future__ import annotations

from pathlib import Path


def install(place: Path, name: str, source: str, version: str = "1.0", loader: str | None = None) -> Path:
    """Write the package `name`, one module of the same name, into `place`; `loader` announces its function `load` so."""
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.py").write_text(source)
    metadata = place / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    (metadata / "RECORD").write_text(f"{name}.py,,\n{metadata.name}/METADATA,,\n")
    if loader is not None:
        (metadata / "entry_points.txt").write_text(f"[mpc_fl.loaders]\n{loader} = {name}:load\n")
    return place


NETWORK = """
import torch
from torch import nn

def network(input_shape, classes):
    channels = input_shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * (input_shape[1] // 2) * (input_shape[2] // 2), classes),
    )
"""
LOADER = """
import numpy as np

def load(path, split, input_shape, classes):
    count = 90 if split == "train" else 30
    labels = np.arange(count, dtype=np.int64) % len(classes)
    records = np.full((count, *input_shape), 0.5, dtype=np.float32) * (1 + labels.reshape(-1, 1, 1, 1)) / len(classes)
    return {"records": records.astype(np.float32), "labels": labels, "patients": [f"{split}-{i}" for i in range(count)]}
"""
