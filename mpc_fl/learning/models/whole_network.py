"""All that a record goes through from a picture, or a row of a table, to class probabilities, as one network.

Readers, public features, the scale of inputs, the network and its calibration are parts of their own here, since at training and at
diagnosis different parties compute them. A model that is given away needs them together: whoever has the file alone would
leave one out, and get answers that look like answers. What cannot be a record gets NaN, which nobody takes for a diagnosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.data import FEATURE_CONSTANT, DataSection
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.feature_extractor import FeatureExtractor, extractor_of, to_norm_1
from mpc_fl.learning.models.input_layers import PictureLayer, TableLayer
from mpc_fl.learning.models.model_file import load_calibration, load_model, load_normalisation
from mpc_fl.learning.models.scattering_in_reals import in_reals


@dataclass(frozen=True)
class TrainedModel:
    """A network as its model file has it, in evaluation mode, with what stands before and after it."""

    data: DataSection
    network: nn.Module
    extractor: FeatureExtractor | None = None
    normalisation: Normalisation | None = None
    calibration: Calibration | None = None

    @classmethod
    def read(cls, path: Path, config: Config) -> TrainedModel:
        """Of a model file, with the public weights that `data.features` names; all of it on the CPU.

        Raises `ModelError` where one of them is not here, or is not what the configuration says.
        """
        config = config.with_values(site={"device": "cpu"})
        return cls(
            config.data,
            load_model(path, config).requires_grad_(False),
            extractor_of(config),
            load_normalisation(path, config),
            load_calibration(path, config),
        )

    @torch.no_grad()
    def answers(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities (N, classes) of what a reader gives, by the parts of training and diagnosis.

        `records`: images float32 (N, C, size, size), or rows of features (N, F). Class offsets are in the logits, as in a
        diagnosis, and in no probability.
        """
        inputs = records if self.extractor is None else self.extractor.records(records)
        logits = self.network(inputs if self.normalisation is None else self.normalisation.apply(inputs))
        if self.calibration is None:
            return logits, torch.softmax(logits, dim=-1)
        return logits + torch.tensor(self.calibration.offsets), self.calibration.probabilities(logits)


class WholeNetwork(nn.Module):
    """Pictures or rows, as `PictureLayer` and `TableLayer` take them, to logits and probabilities float32 (N, classes).

    The same as a reader and `TrainedModel.answers`, up to rounding. NaN stands for an input that a reader would have refused.
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        side, classes = model.data.image_size, len(model.data.classes)
        self.inputs = TableLayer(model.data.table) if model.data.is_table else PictureLayer(model.data)
        self.features = nn.Identity() if model.extractor is None else FeatureLayer(model.extractor, side)
        self.scale = nn.Identity() if model.normalisation is None else ScaleLayer(model.normalisation)
        self.network = in_reals(model.network, side)
        self.calibration = model.calibration or Calibration.none(classes)
        self.register_buffer("offsets", torch.tensor(self.calibration.offsets))
        self.eval().requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, whose largest is the class, and probabilities."""
        records, known = self.inputs(inputs)
        logits = self.network(self.scale(self.features(records)))
        answers = (logits + self.get_buffer("offsets"), self.calibration.probabilities(logits))
        moved, probabilities = (torch.where(known[:, None], answer, torch.nan) for answer in answers)
        return moved, probabilities


class FeatureLayer(nn.Module):
    """Images float32 (N, 1 or 3, H, W) to records (N, F + 1), like `FeatureExtractor.records`, all images at once."""

    def __init__(self, extractor: FeatureExtractor, side: int) -> None:
        super().__init__()
        self.network = in_reals(extractor.network, side)
        self.scale = nn.Identity() if extractor.scale is None else ScaleLayer(extractor.scale)
        self.channels, self.mirror = extractor.channels, extractor.mirror

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features at norm 1, and the constant."""
        if images.shape[1] != self.channels:
            images = images.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        features = self._features(images)
        if self.mirror:
            features = (features + self._features(images.flip(-1))) / 2
        features = to_norm_1(features)
        return torch.cat([features, torch.full_like(features[:, :1], FEATURE_CONSTANT)], dim=1)

    def _features(self, views: torch.Tensor) -> torch.Tensor:
        return to_norm_1(self.network(self.scale(views)).flatten(1))


class ScaleLayer(nn.Module):
    """Float32 (N, C, H, W) or (N, F) to the same shape, like `Normalisation.apply`."""

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(normalisation.mean))
        self.register_buffer("deviation", torch.tensor(normalisation.deviation))
        self.to_norm_1 = normalisation.to_norm_1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised inputs."""
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        scaled = (inputs - self.get_buffer("mean").reshape(shape)) / self.get_buffer("deviation").reshape(shape)
        if self.to_norm_1:
            return torch.cat([to_norm_1(scaled[:, :-1]), scaled[:, -1:]], dim=1)
        return scaled
