"""A trial on this machine's GPU of what distributed noise rests on: a record's part of a rounded sum is its own, bit for bit.

`per_sample_gradients.rounded_sum` says why it holds. On a GPU shapes alone must decide which kernels run and in what order they
add. They do: algorithms are deterministic, none is chosen by trial, matrix products have one workspace of a fixed size, memory
comes at addresses that are multiples of 512 bytes, and cuDNN is off, because it falls back to another kernel where its workspace
does not fit (`device`). Kernels do not look at the numbers, so what public records show of one device, network and method
holds for patients' records.

Nothing of patients is used. A trial that fails refuses the run: it can find a device that does otherwise, and is not the proof.
"""

from __future__ import annotations

import torch
from torch import nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.learning.training.per_sample_gradients import Method, rounded_sum, sum_cross_entropy

_RECORDS = 20  # more than a batch has places


def require_independent_records(
    model: nn.Module, input_shape: tuple[int, ...], mechanism: DistributedGaussian, method: Method
) -> None:
    """Raise `ModelError` unless sums over public records of `input_shape` are, bit for bit, those of each alone added up.

    `model` is the network that gradients are taken of, where it computes (`device.on_device`). Takes as long as some 40 records.
    """
    ramp = torch.linspace(-1.0, 1.0, torch.Size(input_shape).numel()).reshape(1, *input_shape)
    sizes = torch.logspace(-1, 1, _RECORDS).reshape(-1, *(1 for _ in input_shape))
    records, labels = ramp * sizes, torch.arange(_RECORDS) % 2

    def total(rows: torch.Tensor) -> torch.Tensor:
        return rounded_sum(model, sum_cross_entropy, records[rows], labels[rows], mechanism, method).total

    alone = [total(torch.tensor([row])) for row in range(_RECORDS)]
    for rows in (torch.arange(_RECORDS), torch.arange(_RECORDS).flip(0), torch.arange(0, _RECORDS, 3)):
        if not torch.equal(
            total(rows), torch.stack([alone[int(row)] for row in rows]).sum(dim=0, dtype=mechanism.dtype)
        ):
            raise ModelError(
                "on this device a record's gradient depends on the others of its batch, so distributed noise would hide nobody",
                "set site.device to cpu",
            )
