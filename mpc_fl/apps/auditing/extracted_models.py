"""Extraction of a run's model by its answers: how many queries make a copy that agrees with it, with labels alone and with logits.

Whoever asks has phantoms of their own, of the run's kind and size, knows the architecture and trains a network of it on what was
answered (`evidence.extraction`). The answers are those of the model in the clear; an encrypted diagnosis gives the same but for
roundings, so quotas of a service can be set by the curve (`serving.images_per_day`, `serving.images_per_day_of_all`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mpc_fl.apps.views_summary import Extraction
from mpc_fl.config.config import Config
from mpc_fl.evidence.extraction import Fidelity, Lessons, fidelity_curve
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.phantoms import make_phantoms
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.model_file import load_model, load_normalisation

FEWEST_QUERIES, _HELD_OUT = 25, 1000
# Added to the run's seed: images and weights of their own.
_OF_QUERIES, _OF_HELD_OUT, _OF_STUDENT = 1_000_003, 2_000_003, 3_000_017


def counts_up_to(most: int) -> list[int]:
    """Numbers of queries: 25 and its doubles up to `most`, which is the last."""
    counts = list[int]()
    while (count := FEWEST_QUERIES << len(counts)) < most:
        counts.append(count)
    return [*counts, most]


def extract_model(path: Path, config: Config, most: int, told: Callable[[int, int], None]) -> Extraction:
    """Extract the model in a file of a run on phantoms, with up to `most` queries. `told(done, of)` follows, student by student.

    Raises `ModelError` for a file that is not the run's model, `DataError` for classes that phantoms do not have.
    """
    model, counts = load_model(path, config), counts_up_to(most)
    normalisation = load_normalisation(path, config)

    def inputs_of(patients: int, offset: int) -> torch.Tensor:
        drawn = make_phantoms(patients, len(config.data.classes), config.data.image_size, config.seed + offset, "test")
        images = torch.from_numpy(drawn.images[:patients])[:, None].expand(-1, config.data.channels, -1, -1)
        labels, owners = torch.from_numpy(drawn.labels[:patients]), torch.arange(patients)
        records = Dataset(images.contiguous(), labels, owners, tuple(map(str, range(patients))))
        return normalised(as_records(records, config), normalisation).inputs

    asked, held_out = inputs_of(most, _OF_QUERIES), inputs_of(_HELD_OUT, _OF_HELD_OUT)
    logits, classes = predict(model, asked), predict(model, held_out).argmax(1)
    begun, student_config = 0, config.with_values(seed=config.seed + _OF_STUDENT, model={"initial_weights": None})

    def fresh() -> nn.Module:
        nonlocal begun
        told(begun, 2 * len(counts))
        begun += 1
        return initial_model(student_config)

    def curve(answers: torch.Tensor) -> list[tuple[int, float]]:
        found: list[Fidelity] = fidelity_curve(fresh, (asked, answers), (held_out, classes), counts, Lessons())
        return [(point.queries, point.share) for point in found]

    by_labels, by_logits = curve(logits.argmax(1)), curve(logits)
    told(2 * len(counts), 2 * len(counts))
    least = float(torch.bincount(classes).max()) / len(classes)
    return Extraction(len(classes), least, by_labels, by_logits)
