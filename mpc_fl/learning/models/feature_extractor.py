"""Features of images from something public, computed in the clear by whoever has the image: at training and at diagnosis.

An extractor is a network whose weights everybody can have (of ImageNet, say), without its last linear layer, or scattering,
which has no weights. Because it is public and acts on one image at a time, it takes no part in any protocol: to training and
to encrypted diagnosis the features are the record. What is learned, and what stays secret at the model owner, is the network
on top (`model.architecture`, usually `linear`): thousands of parameters instead of millions, so far less noise for the same
privacy (Tramer and Boneh, ICLR 2021; De et al., 2022).

Exactly, for one image: scale the pixels as the network's weights expect it; f = network(image) / |.| (with
`stages` the network gives the averages of several blocks, each at norm 1); with `mirror` the mean of
f and of the mirror's, at norm 1 again; the constant 0.1 is put beside. Images are taken one at a time, each with its mirror,
so a record is a function of that image alone, bit for bit, whoever else is in the data set: privacy is counted by patient.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.data import FEATURE_CONSTANT, FeatureSection
from mpc_fl.errors import DataError, ModelError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import CONSTANTS, Normalisation
from mpc_fl.learning.device import Device, device_of, on_device
from mpc_fl.learning.models.architectures import build_network
from mpc_fl.learning.models.batch_norm import freeze_normalisation
from mpc_fl.learning.models.feature_cache import FeatureCache, Progress, settings_digest
from mpc_fl.learning.models.foreign_weights import fit_weights
from mpc_fl.learning.models.stages import Stages
from mpc_fl.learning.models.weights_store import find, load

# What weights expect of pixels in [0, 1] that do not say it themselves.
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_IMAGENET_CLASSES = 1000
_EXTRACTORS_KEPT = 2


@dataclass(frozen=True)
class FeatureExtractor:
    """Makes records of images: `network` gives float32 (N, `size`) of scaled images (N, `channels`, H, W)."""

    network: nn.Module
    size: int
    channels: int
    mirror: bool
    scale: Normalisation | None = None

    @torch.no_grad()
    def records(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Records float32 (N, size + 1) of images float32 (N, 1 or 3, H, W) in [0, 1]. Grey is taken for all channels.

        Raises `ModelError` for images the network does not take, or whose features are not finite.
        """
        records = torch.full((len(images), self.size + 1), FEATURE_CONSTANT)
        for row, image in enumerate(images):
            records[row, : self.size] = self._features(image)
            if progress is not None:
                progress(row + 1, len(images))
        if not bool(torch.isfinite(records).all()):
            raise ModelError("an image has features that are not finite", "check data.features.weights")
        return records

    def _features(self, image: torch.Tensor) -> torch.Tensor:
        if len(image) != self.channels:
            image = image.mean(dim=0, keepdim=True).expand(self.channels, -1, -1)
        views = torch.stack([image, image.flip(-1)]) if self.mirror else image[None]
        if self.scale is not None:
            views = self.scale.apply(views)
        try:
            outputs = self.network(views.contiguous(memory_format=torch.channels_last)).flatten(1)
        except (RuntimeError, ValueError, AssertionError) as error:
            if (exhausted := exhaustion(error)) is not None:
                raise exhausted from None
            size = "x".join(map(str, image.shape))
            raise ModelError(
                f"the feature extractor takes no image of {size}", "set data.image_size to what it takes"
            ) from None
        if outputs.shape[1] != self.size:
            raise ModelError(
                f"the feature extractor gives {outputs.shape[1]} features, {self.size} are configured",
                "correct data.features.count",
            )
        return to_norm_1(to_norm_1(outputs).mean(dim=0))


def to_norm_1(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., F) divided by their L2 norms; zero stays zero."""
    return nn.functional.normalize(vectors, dim=-1)


def without_last_layer(network: nn.Module) -> tuple[nn.Module, int]:
    """The network without its last linear layer, in place, and how many numbers that layer took. Raises `ModelError`."""
    linear = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear or not linear[-1][0]:
        raise ModelError(
            "the feature extractor does not end in a linear layer", "choose another data.features.extractor"
        )
    path, layer = linear[-1]
    network.set_submodule(path, nn.Identity())
    return network, layer.in_features


@functools.lru_cache(_EXTRACTORS_KEPT)
def _extractor(features: FeatureSection, place: Path | None, device: Device) -> FeatureExtractor:
    if features.extractor == "scattering":
        from mpc_fl.learning.models.scattering import Scattering

        return FeatureExtractor(on_device(Scattering().eval(), device), features.size, 1, features.mirror)
    assert features.weights is not None  # `FeatureSection` saw to it
    tensors, description = load(features.weights, place)
    if description.get("architecture") != features.extractor:
        raise ModelError(
            f"the weights {features.weights[:12]} are those of '{description.get('architecture')}', not of "
            f"'{features.extractor}'",
            "correct data.features.extractor or data.features.weights",
        )
    whole = freeze_normalisation(build_network(features.extractor, _IMAGENET_CLASSES)).eval()
    fit_weights(whole, tensors)  # what it replaces is the last layer at most
    network, size = (Stages(whole, features.stages), features.size) if features.stages else without_last_layer(whole)
    if size != features.size:
        raise ModelError(
            f"{features.extractor} gives {size} features, {features.size} are configured", "correct data.features.count"
        )
    try:
        constants = description.get(CONSTANTS)
        scale = _IMAGENET if constants is None else Normalisation.from_json(constants)
    except DataError:
        raise ModelError(
            f"the weights {features.weights[:12]} say nothing usable of their inputs", "import them again"
        ) from None
    return FeatureExtractor(on_device(network.eval().requires_grad_(False), device), size, 3, features.mirror, scale)


def extractor_of(config: Config) -> FeatureExtractor | None:
    """What makes records of images in such a configuration; None where images are the records.

    Raises `ModelError` when its weights are not on this machine, or are not what the configuration says, `ConfigError` for a
    device that is not there.
    """
    if config.data.features is None:
        return None
    return _extractor(config.data.features, config.site.weights, device_of(config).exact)


def require_weights(config: Config) -> None:
    """Raise `ModelError` where weights that the configuration names are not on this machine, or are not what they should be."""
    named = [config.model.initial_weights, None if config.data.features is None else config.data.features.weights]
    for digest in named:
        if digest is not None:
            find(digest, config.site.weights)


def as_records(
    images: Dataset, config: Config, progress: Progress | None = None, cache: FeatureCache | None = None
) -> Dataset:
    """The records of images, as the configuration wants them: of the cache where it has them, else computed.

    `progress(done, of)` follows each image that takes time.
    """
    extractor = extractor_of(config)
    if extractor is None:
        return images
    if not len(images):
        return replace(images, inputs=torch.zeros(0, *config.data.input_shape))
    if cache is None:
        return replace(images, inputs=extractor.records(images.inputs, progress))
    kept = cache.values_of(settings_digest(config), config.data.input_shape)
    return replace(images, inputs=kept.records(images.inputs, extractor.records, progress))
