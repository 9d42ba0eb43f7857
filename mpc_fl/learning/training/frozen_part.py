"""What the trained layers of a network read of each training record, computed once, where layers before them are not trained.

With `training.trainable: head` or `last:N` nothing before the first trained layer is trained, so in every step it makes the same of
a record. A hospital computes that when a record is first drawn, and keeps it for the rest of the run: a step passes through the
trained part alone. Gradients, clipping, the update and its order are those of the whole network, up to rounding. With
`site.feature_cache` it is kept on the disk as well, sealed, and a later run or a resumed one reads it.

A record passes through by itself, in memory of its own, as in `feature_extractor`: what is kept of it is a function of that
record alone, bit for bit, whoever else is in the data set. So with distributed noise its rounded gradient still is
(`per_sample_gradients.rounded_sum`).

Steps take the whole network, and the log says why, where copies of records are drawn anew in every step, where normalisation is
each hospital's own, where no single value leads from the frozen part to the trained one, where the frozen part draws or keeps
something, and where all values together exceed `LARGEST_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.device import Device, on_device, repeatable
from mpc_fl.learning.models.feature_cache import CachedValues, FeatureCache
from mpc_fl.learning.models.own_networks import said_of_network
from mpc_fl.learning.models.splitting import split_before_trained

log = logging.getLogger(__name__)

LARGEST_BYTES = 2 << 30  # of a hospital's values in memory: 34,000 records at the last block of EfficientNet-Lite0


class FrozenOutputs:
    """Float32 (N, *`shape`), a row for each training record; rows that nobody has asked for are not computed yet."""

    def __init__(self, shape: tuple[int, ...], device: Device, code: str = "") -> None:
        """`shape` is one row, as `frozen_outputs_of` finds it; `device` computes in float32. `code` says which package a
        network of others is of."""
        self._row, self._device, self._code = shape, device.exact, code
        self._frozen: nn.Module | None = None
        self._settings = ""
        self._cache: FeatureCache | None = None
        self._kept: CachedValues | None = None
        self._records, self._values = torch.empty(0), torch.empty(0, *shape)
        self._known = torch.zeros(0, dtype=torch.bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...), as a tensor has it."""
        return len(self), *self._row

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Float32 (n, *shape) of records int64 (n,)."""
        for row in rows.unique().tolist():
            if not self._known[row]:
                assert self._frozen is not None  # `begin` came first: else there are no rows
                self._values[row] = _value(self._frozen, self._records[row])
                self._known[row] = True
                if self._kept is not None:
                    self._kept.keep(self._records[row], self._values[row])
        return self._values[rows]

    def keep_in(self, cache: FeatureCache | None) -> None:
        """Read rows from this cache, and keep there what is computed; None: in memory alone. Before `begin`."""
        self._cache = cache

    def begin(self, frozen: nn.Module, records: torch.Tensor) -> None:
        """Take the frozen part and the records float32 (N, ...) that will pass through it; read what the cache has of them.

        Called again, they are to be the same: raises `ModelError` where not, since what is kept would be of another network.
        """
        settings = _settings_digest(frozen, self._device, self._code)
        if self._frozen is None:
            self._frozen, self._settings, self._records = on_device(frozen, self._device), settings, records
            self._values = torch.empty(len(records), *self._row)
            self._known = torch.zeros(len(records), dtype=torch.bool)
            self._read()
        elif settings != self._settings or records is not self._records:
            raise ModelError(
                "what stands before the trained layers of the network has changed in the run",
                "start this hospital anew",
            )

    def _read(self) -> None:
        if self._cache is None:
            return
        self._kept = self._cache.values_of(self._settings, self._row)
        for row, record in enumerate(self._records):
            value = self._kept.value(record)
            if value is not None:
                self._values[row], self._known[row] = value, True
        self._kept.say_damaged()
        log.info(
            "what the trained layers read of %d of %d records is of the cache %s",
            int(self._known.sum()), len(self), self._cache.directory,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainedPartRecords:
    """Training records as the trained part reads them (`PatientRecords`)."""

    inputs: FrozenOutputs
    labels: torch.Tensor
    records_of_patient: Sequence[torch.Tensor]


def kept_bytes(shape: Sequence[int], records: int) -> int:
    """Bytes in memory of so many values of this shape."""
    return 4 * math.prod(shape) * records


def frozen_outputs_of(model: nn.Module, config: Config, device: Device, records: int) -> FrozenOutputs | None:
    """Where steps may pass through the trained part of `model` alone, a place for what it reads of so many training records; None
    where they take the whole network, for a reason that the log says unless all of it is trained, its biases, or adapters.

    Public records show whether the frozen part draws or keeps something.
    """
    training = config.training
    if not training.computes_frozen_part_once:
        if training.trains_last_layers:
            varies = training.augmentation.varies
            _say_whole("copies of records are drawn anew" if varies else "normalisation is this hospital's own")
        return None
    parts = split_before_trained(model)
    if parts is None:
        _say_whole("it cannot be cut before what is trained")
        return None
    frozen, shape = on_device(parts[0], device.exact), config.data.input_shape
    waves = torch.sin(torch.arange(2 * torch.Size(shape).numel()) * 0.9).reshape(2, *shape)
    try:
        first, _, again = (_value(frozen, waves[row]) for row in (0, 1, 0))
    except ModelError:  # the whole network then says what is wrong
        return None
    if not torch.equal(first.contiguous().view(torch.int32), again.contiguous().view(torch.int32)):
        _say_whole("what is before the trained layers gives another value of the same record")
        return None
    needed = kept_bytes(first.shape, records)
    if needed > LARGEST_BYTES:
        most = _mebibytes(LARGEST_BYTES)
        _say_whole(f"what the trained layers read of {records} records takes {_mebibytes(needed)}, more than {most}")
        return None
    log.info("steps begin at the trained layers: what they read takes %s", _mebibytes(needed))
    return FrozenOutputs(tuple(first.shape), device, said_of_network(config, model))


def _say_whole(why: str) -> None:
    log.info("steps pass through the whole network: %s", why)


def _mebibytes(count: int) -> str:
    return f"{math.ceil(count / (1 << 20))} MiB"


def trained_part_of(model: nn.Module) -> nn.Module:
    """The trained part of a network for which `frozen_outputs_of` has a place, with its parameters as they are now."""
    return _parts(model)[1]


def trained_part_and_records(
    model: nn.Module, data: PatientRecords, outputs: FrozenOutputs
) -> tuple[nn.Module, TrainedPartRecords]:
    """The trained part of `model`, and its training records as that reads them. Raises `ModelError` where what stands before it
    is not what it was."""
    frozen, trained = _parts(model)
    assert isinstance(data.inputs, torch.Tensor)  # of the whole network
    outputs.begin(frozen, data.inputs)
    return trained, TrainedPartRecords(outputs, data.labels, data.records_of_patient)


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    parts = split_before_trained(model)
    assert parts is not None  # how a network is cut depends on its structure alone
    return parts


@torch.no_grad()
def _value(frozen: nn.Module, record: torch.Tensor) -> torch.Tensor:
    """What the frozen part makes of one record, float32 without the first dimension. Raises `ModelError`."""
    try:
        with repeatable():
            value = frozen(record[None].clone(memory_format=torch.contiguous_format))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        if (exhausted := exhaustion(error)) is not None:
            raise exhausted from None
        value = None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.dim() < 2 or len(value) != 1:
        shape = "x".join(map(str, record.shape))
        raise ModelError(
            f"what stands before the trained layers of the network takes no record of {shape}",
            "choose another model.architecture",
        )
    return value[0]


def _settings_digest(frozen: nn.Module, device: Device, code: str) -> str:
    """SHA-256 of all that values follow from besides their record, as hex: the operations and layers of the frozen part, its
    parameters and buffers, and where it is computed, since others round otherwise."""
    layers = [f"{name} {type(layer).__qualname__} {layer.extra_repr()}" for name, layer in frozen.named_modules()]
    graph = frozen.code if isinstance(frozen, fx.GraphModule) else ""
    where = {"torch": str(torch.__version__), "device": device.words, "threads": torch.get_num_threads()}
    digest = hashlib.sha256(json.dumps([code, graph, layers, where], sort_keys=True).encode())
    for name, tensor in [*frozen.named_parameters(), *frozen.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
