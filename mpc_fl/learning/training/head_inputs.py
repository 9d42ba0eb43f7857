"""What the head of a network reads of each training record, computed once, where the head alone is trained.

Nothing before the head is trained (`training.trainable: head`), so in every step it makes the same of a record. A hospital computes
that when a record is first drawn, and keeps it in memory for the rest of the run: a step passes through the head alone. Gradients,
clipping, the update and its order are those of the whole network, up to rounding.

A record passes through by itself, in memory of its own, as in `feature_extractor`: what is kept of it is a function of that
record alone, bit for bit, whoever else is in the data set. So with distributed noise its rounded gradient still is
(`per_sample_gradients.rounded_sum`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.learning.data.dataset import PatientRecords
from mpc_fl.learning.device import Device, on_device, repeatable
from mpc_fl.learning.models.splitting import split_before_trained


class HeadInputs:
    """Float32 (N, *`shape`), a row for each training record; rows that nobody has asked for are not computed yet."""

    def __init__(self, shape: tuple[int, ...], device: Device) -> None:
        """`shape` is one row, as `head_inputs_of` finds it; `device` computes in float32."""
        self._row, self._device = shape, device.exact
        self._frozen: nn.Module | None = None
        self._digest = b""
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
        return self._values[rows]

    def begin(self, frozen: nn.Module, records: torch.Tensor) -> None:
        """Take what stands before the head and the records float32 (N, ...) that will pass through it.

        Called again, they are to be the same: raises `ModelError` where not, since what is kept would be of another network.
        """
        digest = _digest(frozen)
        if self._frozen is None:
            self._frozen, self._digest, self._records = on_device(frozen, self._device), digest, records
            self._values = torch.empty(len(records), *self._row)
            self._known = torch.zeros(len(records), dtype=torch.bool)
        elif digest != self._digest or records is not self._records:
            raise ModelError(
                "what stands before the head of the network has changed in the run", "start this hospital anew"
            )


@dataclass(frozen=True)
class HeadRecords:
    """Training records as the head reads them (`PatientRecords`)."""

    inputs: HeadInputs
    labels: torch.Tensor
    records_of_patient: Sequence[torch.Tensor]


def head_inputs_of(model: nn.Module, config: Config, device: Device) -> HeadInputs | None:
    """Where steps may train the head of `model` alone, a place for what it reads; None where they take the whole network.

    That is where something else is trained as well, where copies of records are drawn anew in every step, and for a network that
    cannot be cut before its head, or draws or keeps something before it. Public records show that.
    """
    training = config.training
    if training.trainable != "head" or training.augmentation.varies or training.local_normalisation:
        return None
    parts = split_before_trained(model)
    if parts is None:
        return None
    frozen, shape = on_device(parts[0], device.exact), config.data.input_shape
    waves = torch.sin(torch.arange(2 * torch.Size(shape).numel()) * 0.9).reshape(2, *shape)
    try:
        first, _, again = (_value(frozen, waves[row]) for row in (0, 1, 0))
    except ModelError:  # the whole network then says what is wrong
        return None
    same = torch.equal(first.contiguous().view(torch.int32), again.contiguous().view(torch.int32))
    return HeadInputs(tuple(first.shape), device) if same else None


def head_of(model: nn.Module) -> nn.Module:
    """The head of a network for which `head_inputs_of` has a place, with its parameters as they are now."""
    return _parts(model)[1]


def head_and_records(model: nn.Module, data: PatientRecords, inputs: HeadInputs) -> tuple[nn.Module, HeadRecords]:
    """The head of `model`, and its training records as the head reads them. Raises `ModelError` where what stands before the head
    is not what it was."""
    frozen, head = _parts(model)
    assert isinstance(data.inputs, torch.Tensor)  # of the whole network
    inputs.begin(frozen, data.inputs)
    return head, HeadRecords(inputs, data.labels, data.records_of_patient)


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    parts = split_before_trained(model)
    assert parts is not None  # how a network is cut depends on its structure alone
    return parts


@torch.no_grad()
def _value(frozen: nn.Module, record: torch.Tensor) -> torch.Tensor:
    """What stands before the head makes of one record, float32 without the first dimension. Raises `ModelError`."""
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
            f"what stands before the head of the network takes no record of {shape}",
            "choose another model.architecture",
        )
    return value[0]


def _digest(network: nn.Module) -> bytes:
    """SHA-256 of parameters and buffers, their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
