"""What a diagnosis gives the hospital, of either engine, and the files it keeps for itself: readable by its user alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpc_fl.config.config import Config
from mpc_fl.files import finite, write_text, written_whole
from mpc_fl.learning.data.dataset import Dataset


@dataclass(frozen=True)
class Diagnosis:
    """The hospital's result for one image, and the seconds its batch took per image.

    `logits`, float (classes,), is None where inference.reveal opens the label alone; `predicted` is the class's index.
    """

    logits: torch.Tensor | None
    seconds: float
    predicted: int

    @classmethod
    def of(cls, logits: torch.Tensor, seconds: float) -> Diagnosis:
        """From opened logits (classes,)."""
        return cls(logits, seconds, int(logits.argmax()))

    @property
    def probabilities(self) -> torch.Tensor | None:
        """Softmax of the logits, computed at the hospital; None without logits."""
        return None if self.logits is None else torch.softmax(self.logits.double(), dim=0)


def _rounded(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else [round(value, 6) for value in values.tolist()]


def write_results(config: Config, images: Dataset, results: list[Diagnosis], out: Path) -> None:
    """Write the hospital's results and, for its own report, its images (both readable by this user only)."""
    lines = []
    for index, result in enumerate(results):
        line = {
            "index": index,
            "name": images.names[index],
            "label": int(images.labels[index]),
            "predicted": result.predicted,
            "probabilities": _rounded(result.probabilities),
            "logits": _rounded(result.logits),
            "seconds": round(result.seconds, 4),
        }
        lines.append(json.dumps(finite(line)))
    if not config.data.is_table:
        pixels = (images.inputs * 255).round().clamp(0, 255).to(torch.uint8)
        with written_whole(out / "images.safetensors") as temporary:
            save_file({"images": pixels.contiguous()}, temporary)
    write_text(out / "results.jsonl", "\n".join(lines) + "\n")
