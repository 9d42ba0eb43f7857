"""Clipped sums of per-sample gradients: four implementations, one mathematics.

`layers` is a plain backward pass and a product for each layer (`layer_gradients`), `hooks` is Opacus's GradSampleModule, `vmap` is
torch.func, `loop` is one plain backward pass per record. Which is fastest depends on the network, so `choose_per_sample_method`
measures; tests hold all of them against Opacus's own gradients.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from mpc_fl.errors import ExhaustedError, ModelError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.learning.device import CPU, Device, on_device, repeatable
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.rewriting import without_in_place
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian, add_patients
from mpc_fl.learning.training.augmentation import (
    AugmentedRecords,
    Inputs,
    copies_of,
    copies_per_record,
    records_of,
    unchanged,
)
from mpc_fl.learning.training.batch_pieces import copies_at_once
from mpc_fl.learning.training.layer_gradients import by_layers
from mpc_fl.learning.training.record_places import places_of, record_batches

Method = Literal["layers", "vmap", "loop", "hooks"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_GRADIENT_BYTES = 1 << 30
_HOOKS_PARAMETERS = 1_000_000
_ROUNDING = 0.1  # of a gradient, between two methods: products may be in bfloat16


class ClippedSum(NamedTuple):
    """Sum over records of clipped gradients, a tensor per trainable parameter; norms before clipping (N,); losses (N,).

    Only the sum has bounded sensitivity; norms and losses are the hospital's own and never leave it.
    """

    gradients: list[torch.Tensor]
    norms: torch.Tensor
    losses: torch.Tensor


def sum_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy summed over the batch: logits float32 (N, classes), labels int64 (N,), each times the weight of its class
    where there are `class_weights`, float32 (classes,)."""
    return nn.functional.cross_entropy(logits, labels, weight=class_weights, reduction="sum")


def _weighted_sum(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    """A loss for trials: however large logits (N, classes) are, gradients do not vanish as those of cross-entropy do."""
    return (logits * torch.arange(1, logits.shape[1] + 1)).sum()


def loss_with(class_weights: Sequence[float] | None) -> Loss:
    """Summed cross-entropy with these public weights of classes. They come before clipping, so they change no sensitivity."""
    if class_weights is None:
        return sum_cross_entropy
    return functools.partial(sum_cross_entropy, class_weights=torch.tensor(class_weights))


Chunk = tuple[list[torch.Tensor], torch.Tensor]


def _by_loop(model: nn.Module, loss: Loss, copies: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """One backward pass per record; never holds more than one gradient."""
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    for row in range(len(copies)):
        value = loss(model(copies[row]), labels[row].expand(copies.shape[1]))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        yield [gradient.unsqueeze(0) for gradient in gradients], value.detach().reshape(1)


def _unsuitable(what: str, error: Exception) -> ModelError:
    return ModelError(f"{what}: {(str(error).splitlines() or [''])[0][:120]}", "set training.per_sample_gradients=loop")


def _by_vmap(model: nn.Module, loss: Loss, copies: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """Vectorised over records (torch.func)."""
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model)}

    def record_loss(values: dict[str, torch.Tensor], record: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, values, (record,)), label.expand(len(record)))

    try:
        gradients, values = vmap(grad_and_value(record_loss), in_dims=(None, 0, 0))(parameters, copies, labels)
    except (RuntimeError, NotImplementedError) as error:
        raise exhaustion(error) or _unsuitable("torch.func cannot vectorise this model", error) from None
    yield [gradients[name] for name in parameters], values.detach()


def _by_hooks(model: nn.Module, loss: Loss, copies: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """Opacus's own rules, layer by layer, for all records at once; no BatchNorm, frozen or not."""
    from opacus.grad_sample import GradSampleModule

    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    # The hooks act on trained layers in training mode; dropout stays off, and so do batch statistics of BatchNorm that is
    # not trained, which would mix patients.
    for layer in shared.modules():
        layer.training = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    try:
        observed = GradSampleModule(shared, loss_reduction="sum", strict=True)
    except NotImplementedError:
        raise ModelError(
            "Opacus's hooks cannot handle this model, it has trainable layers with buffers such as BatchNorm",
            "set training.per_sample_gradients=auto, or model.normalisation=group",
        ) from None
    try:
        parameters = [parameter for _, parameter in trainable_parameters(model)]
        inputs, repeated = copies.flatten(0, 1), labels.repeat_interleave(copies.shape[1])
        try:
            logits = observed(inputs.detach().requires_grad_())  # its backward hooks warn about constant inputs
            losses = vmap(lambda logit, label: loss(logit[None], label[None]))(logits, repeated)
            losses.sum().backward()
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise exhaustion(error) or _unsuitable("Opacus's hooks cannot handle this model", error) from None
        samples = [(parameter, getattr(parameter, "grad_sample", None)) for parameter in parameters]
        # Of products in bfloat16 Opacus makes gradients in bfloat16; norms and sums are taken of float32.
        gradients = [p.new_zeros((len(inputs), *p.shape)) if g is None else g.to(p.dtype) for p, g in samples]
        yield [_over_copies(g, len(copies)) for g in gradients], _over_copies(losses.detach(), len(copies))
    finally:
        observed.to_standard_module()
        for parameter in model.parameters():
            parameter.grad = None


def _over_copies(values: torch.Tensor, records: int) -> torch.Tensor:
    """Sums (N, ...) over the copies of each of N records, from (N * K, ...), added one after the other, element by element."""
    return functools.reduce(torch.add, values.unflatten(0, (records, -1)).unbind(1))


# Gradients of the summed loss over the copies (N, K, ...) of each record, and that loss (N,).
_IMPLEMENTATIONS: dict[str, Callable[[nn.Module, Loss, torch.Tensor, torch.Tensor], Iterator[Chunk]]] = {
    "layers": by_layers,
    "loop": _by_loop,
    "vmap": _by_vmap,
    "hooks": _by_hooks,
}


def _of_records(
    model: nn.Module, loss: Loss, copies: torch.Tensor, labels: torch.Tensor, method: Method
) -> Iterator[Chunk]:
    """Gradient and loss of each record, both means over its copies (N, K, ...), in chunks of records.

    How it is cut depends on shapes alone. At most `copies_at_once` go through the network at once, and gradients held at once
    fit their memory bound.
    """
    count = copies.shape[1]
    at_once = copies_at_once(copies.shape[2:])
    if method != "loop":
        size = sum(parameter.numel() for _, parameter in trainable_parameters(model))
        at_once = max(1, min(at_once, _GRADIENT_BYTES // (4 * max(1, size))))
    records = max(1, at_once // count)
    for start in range(0, len(copies), records):
        of_records, own = copies[start : start + records], labels[start : start + records]
        # A single record may have more copies than go at once; then this is a chunk of one record.
        pieces = [_IMPLEMENTATIONS[method](model, loss, piece, own) for piece in of_records.split(at_once, dim=1)]
        for chunks in zip(*pieces, strict=True):
            gradients = [functools.reduce(torch.add, parts) for parts in zip(*(g for g, _ in chunks), strict=True)]
            values = functools.reduce(torch.add, (losses for _, losses in chunks))
            yield ([gradient / count for gradient in gradients], values / count) if count > 1 else (gradients, values)


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    inputs: Inputs,
    labels: torch.Tensor,
    clipping_norm: float,
    method: Method = "loop",
) -> ClippedSum:
    """Clip each record's gradient to L2 norm `clipping_norm` and sum (Abadi et al. 2016, Algorithm 1).

    `inputs` float32 (N, ...) or augmented, `labels` int64 (N,), `loss` sums over its batch. N = 0 gives zeros. The gradient of an
    augmented record is the mean over its copies. The methods differ in speed and memory, and in rounding (about 1e-7), in nothing
    else. A record whose gradient is not finite counts as zero: otherwise one patient could spoil the sum. Raises `ModelError` if
    `method` cannot handle the model.
    """
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    sums = [torch.zeros_like(parameter, requires_grad=False).reshape(-1) for parameter in parameters]
    norms, losses = [], []
    for gradients, values in _of_batch(model, loss, inputs, labels, method):
        rows = [gradient.detach().reshape(len(values), -1) for gradient in gradients]
        chunk_norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]).norm(
            dim=0
        )
        finite = torch.isfinite(chunk_norms)
        if not bool(finite.all()):
            rows = [torch.where(finite.unsqueeze(1), row, 0.0) for row in rows]
        # Opacus's factor C / (norm + 1e-6); the relative 1e-6 besides keeps rounding below the clipping norm.
        bounded = clipping_norm / (chunk_norms * (1 + 1e-6) + 1e-6)
        factors = torch.where(finite, bounded.clamp(max=1.0), 0.0)
        for total, row in zip(sums, rows, strict=True):
            total.addmv_(row.T, factors.to(row.dtype))
        norms.append(chunk_norms.float())
        losses.append(values)
    empty = torch.empty(0)
    return ClippedSum(
        [total.view_as(parameter) for total, parameter in zip(sums, parameters, strict=True)],
        torch.cat(norms) if norms else empty,
        torch.cat(losses) if losses else empty,
    )


def _of_batch(model: nn.Module, loss: Loss, inputs: Inputs, labels: torch.Tensor, method: Method) -> Iterator[Chunk]:
    """`_of_records` of a batch of any size, whose copies are made as they are needed."""
    records = max(1, copies_at_once(records_of(inputs).shape[1:]) // copies_per_record(inputs))
    for start in range(0, len(inputs), records):
        rows = slice(start, start + records)
        yield from _of_records(model, loss, copies_of(inputs[rows]), labels[rows], method)


class RoundedSum(NamedTuple):
    """`total` integers (P,) of the mechanism's ring, norms before clipping and losses of each record (N,)."""

    total: torch.Tensor
    norms: torch.Tensor
    losses: torch.Tensor


def rounded_sum(
    model: nn.Module,
    loss: Loss,
    inputs: Inputs,
    labels: torch.Tensor,
    mechanism: DistributedGaussian,
    method: Method = "loop",
) -> RoundedSum:
    """Clip each record's gradient, round it to the mechanism's grid, and add up exactly; see `clipped_sum`.

    What a record adds depends on that record alone, bit for bit, whoever else is in the batch and in whatever order: else
    removing one patient would move digits of others, and the sum by more than its sensitivity. The kernels of matrix products
    and convolutions round differently by number of rows, place in the batch and alignment in memory. So all of these are
    the same for a record wherever it occurs: batches have one size, empty places hold zeros, every batch lies in memory
    of its own, and a record's place is read from its own content (`record_batches`). Rows do not mix: each number of a record's
    gradient is computed from that record and the parameters, by a program that depends on shapes and threads alone.
    (`loop` has batches of one.) An augmented record's copies are made of it alone (`augmentation`) and keep its place. On a GPU
    all this rests on how kernels are chosen there (`independent_records`). Norms and losses are in the order of the records.
    """
    total = torch.zeros(mechanism.parameters, dtype=mechanism.dtype)
    norms, losses = torch.zeros(len(inputs), dtype=torch.float64), torch.zeros(len(inputs))
    size = 1 if method == "loop" else places_of(mechanism.parameters)
    for places, records in record_batches(records_of(inputs), size):
        copies = copies_of(inputs[records])
        batch, batch_labels = copies.new_zeros(size, *copies.shape[1:]), labels.new_zeros(size)
        batch[places], batch_labels[places] = copies, labels[records]
        first = 0
        for gradients, values in _of_records(model, loss, batch, batch_labels, method):
            within = (places >= first) & (places < first + len(values))
            own, who = places[within] - first, records[within]
            if len(own):
                norms[who] = add_patients(mechanism, total, [gradient.cpu()[own] for gradient in gradients])
                losses[who] = values[own]
            first += len(values)
    return RoundedSum(total, norms, losses)


def require_gradients_of_each(model: nn.Module, input_shape: tuple[int, ...], method: Method) -> None:
    """Raise `ModelError` unless the gradients of a method are each of one record of `input_shape` alone.

    `hooks` has all records in the network, and takes the first dimension of what each layer reads for them: a network that
    mixes records, or has them in another dimension, gives gradients in which a patient moves those of others, and clipping bounds
    none of that. So does one that keeps something from one record to the next, whatever the method. On public records, with
    parameters of which none is zero, a record's gradient has to stay as it is, bit for bit, whatever another one is, and to be
    that of `loop` up to rounding.
    """
    trial = copy.deepcopy(model)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(trainable_parameters(trial)):
            waves = torch.sin(1.7 * torch.arange(parameter.numel(), device=parameter.device) + number)
            width = max(1, parameter[0].numel()) if parameter.dim() else 1
            parameter.add_(waves.view_as(parameter) / math.sqrt(width))
    records = torch.sin(torch.arange(3 * torch.Size(input_shape).numel()) * 0.9).reshape(3, *input_shape)
    labels = torch.arange(3) % 2

    def gradients(first: torch.Tensor, by: Method) -> torch.Tensor:
        batch = torch.cat([first[None], records[1:]]).unsqueeze(1)
        chunks = [
            torch.cat([gradient.detach().reshape(len(values), -1).cpu() for gradient in of_each], dim=1)
            for of_each, values in _of_records(trial, _weighted_sum, batch, labels, by)
        ]
        return torch.cat(chunks)[1:]

    fix = "let the network keep each record by itself, in the first dimension, and nothing from one call to the next"
    refused = ModelError(
        f"training.per_sample_gradients={method} gives gradients of this network that depend on other records, so clipping "
        "would not bound one patient",
        fix if method == "loop" else f"set it to loop, or {fix}",
    )
    try:
        found, alone = gradients(records[0], method), gradients(records[0], "loop")
        others = [gradients(first, method) for first in (-3 * records[0], torch.full_like(records[0], math.nan))]
    except ModelError:
        raise
    except RuntimeError as error:  # shapes that do not fit
        raise exhaustion(error) or refused from None
    if not all(torch.equal(found, other) for other in others):
        raise refused
    apart = torch.linalg.vector_norm((found - alone).double(), dim=1)
    if bool((apart > _ROUNDING * torch.linalg.vector_norm(alone.double(), dim=1)).any()):
        raise refused


def working_copy(model: nn.Module) -> nn.Module:
    """A copy to train, in evaluation mode and without in-place operations where the model can be traced."""
    try:
        return without_in_place(copy.deepcopy(model).eval())
    except ModelError:
        return copy.deepcopy(model).eval()  # `loop` needs no rewriting


def choose_per_sample_method(
    model: nn.Module,
    input_shape: tuple[int, ...],
    batch_size: int = 32,
    mechanism: DistributedGaussian | None = None,
    device: Device = CPU,
    copies: int = 1,
) -> Method:
    """The fastest method for this model and batch size on this device, measured on plain records of `input_shape`.

    With `copies` of each record, which are all alike then and take as long. With `mechanism` for sums that are rounded to its
    grid (`rounded_sum`), else for `clipped_sum`.

    Measures 2 to 32 records, as many as `loop` does in about 0.2 s. Left out are methods that cannot handle the model,
    `hooks` above a million parameters, and `vmap` where these gradients exceed 1 GB. The clock decides about speed
    only: all methods give the same sum up to rounding, and of each what a record adds to a rounded sum is its own.
    """
    working = on_device(working_copy(model), device)
    size = sum(parameter.numel() for _, parameter in trainable_parameters(working))

    def seconds(method: Method, count: int) -> float:
        records, labels = torch.zeros(count, *input_shape), torch.zeros(count, dtype=torch.int64)
        records.reshape(count, -1)[:] = torch.arange(count).unsqueeze(1) / count  # all alike would share one place
        inputs = records if copies == 1 else AugmentedRecords(records, unchanged(count, copies))
        start = time.perf_counter()
        with repeatable():
            if mechanism is None:
                float(clipped_sum(working, sum_cross_entropy, inputs, labels, 1.0, method).gradients[0].sum())  # waits
            else:
                rounded_sum(working, sum_cross_entropy, inputs, labels, mechanism, method)
        return time.perf_counter() - start

    with repeatable():
        require_gradients_of_each(working, input_shape, "loop")
    seconds("loop", 1)  # first calls are slower
    single = seconds("loop", 1)
    count = max(2, min(batch_size, 32, int(0.2 / single)))
    measured: dict[Method, float] = {"loop": seconds("loop", count)}
    candidates: list[Method] = ["layers", "vmap"] if 4 * size * count < _GRADIENT_BYTES else ["layers"]
    if size <= _HOOKS_PARAMETERS:
        candidates.append("hooks")
    for method in candidates:
        try:
            with repeatable():
                require_gradients_of_each(working, input_shape, method)
            seconds(method, 2)
            measured[method] = seconds(method, count)
        except (ModelError, ExhaustedError):
            continue
    return min(measured, key=measured.__getitem__)
