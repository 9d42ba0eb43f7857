"""What a diagnosis gives the hospital, of either engine, and the files it keeps for itself: readable by its user alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from mpc_fl.config.config import Config
from mpc_fl.errors import MpcFlError, ProtocolError
from mpc_fl.files import finite, write_text, written_whole
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.calibration import Calibration

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Diagnosis:
    """The hospital's result for one image, and the seconds its batch took per image.

    `logits`, float (classes,), is None where inference.reveal opens the label alone; `predicted` is the class's index. The
    offsets of a `calibration` are in both already.
    `doubt` says why what was opened is no result, where it is none. The hospital keeps that to itself while the session
    lasts: a batch asked for again, or an error, would tell the model owner something that is true of the image.
    """

    logits: torch.Tensor | None
    seconds: float
    predicted: int
    doubt: str | None = None
    calibration: Calibration | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, seconds: float, doubt: str | None = None) -> Diagnosis:
        """From opened logits (classes,)."""
        return cls(logits, seconds, int(logits.argmax()), doubt)

    @classmethod
    def of_label(cls, label: int, classes: int, seconds: float) -> Diagnosis:
        """From an opened label, which is one of the `classes` unless somebody deviated."""
        return cls(None, seconds, label, None if label < classes else "its label is none of the classes")

    @property
    def probabilities(self) -> torch.Tensor | None:
        """Softmax of the logits, calibrated if the model is, computed at the hospital; None without logits."""
        if self.logits is None:
            return None
        logits = self.logits.double()
        if self.calibration is None:
            return torch.softmax(logits, dim=0)
        return self.calibration.probabilities(logits - torch.tensor(self.calibration.offsets))


def _rounded(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else [round(value, 6) for value in values.tolist()]


def write_results(config: Config, images: Dataset, results: list[Diagnosis], out: Path) -> None:
    """Write the hospital's results, then for its own report its images (both readable by this user only).

    The results come first: a disk that fills up with images does not cost a diagnosis. Raises `MpcFlError`.

    Images with a doubtful result have none, see `require_no_doubt`.
    """
    lines = []
    for index, result in enumerate(results):
        if result.doubt is not None:
            continue
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
    write_text(out / RESULTS_FILE, "".join(line + "\n" for line in lines))
    if not config.data.is_table:
        pixels = (images.inputs * 255).round().clamp(0, 255).to(torch.uint8)
        try:
            with written_whole(out / "images.safetensors") as temporary:
                temporary.write_bytes(save({"images": pixels.contiguous()}))  # save_file hides what the system says
        except MpcFlError as error:
            raise type(error)(error.what, f"the diagnoses are in {RESULTS_FILE} beside it; {error.fix}") from None


def require_no_doubt(results: list[Diagnosis]) -> None:
    """Say, once the session has ended as all sessions end, which images have no result. Raises `ProtocolError`.

    The message holds no value that was opened.
    """
    doubtful = [index for index, result in enumerate(results) if result.doubt is not None]
    if doubtful:
        others = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
        raise ProtocolError(
            f"image {doubtful[0] + 1} of {len(results)}{others} got no result: {results[doubtful[0]].doubt}; by chance, or "
            "because the model owner did not compute with the agreed model",
            "the other results are written; asking about this image again soon tells the model owner that this happened",
        )
