"""Clipped sums of per-sample gradients: three implementations, one mathematics.

`hooks` is Opacus's GradSampleModule, `vmap` is torch.func, `loop` is one plain backward pass per record. Which
is fastest depends on the network, so `choose_per_sample_method` measures; tests hold all of them against Opacus's own gradients.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.rewriting import without_in_place
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian, add_patients

Method = Literal["vmap", "loop", "hooks"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_VMAP_BYTES = 1 << 30
_HOOKS_PARAMETERS = 1_000_000
# Places of a batch under distributed noise: with more, fewer batches are needed, and more places stay empty.
_FEWEST_PLACES, _MOST_PLACES = 16, 64
_GRADIENT_ELEMENTS = 1 << 19  # of a batch with more than the fewest places


class ClippedSum(NamedTuple):
    """Sum over records of clipped gradients, a tensor per trainable parameter; norms before clipping (N,); losses (N,).

    Only the sum has bounded sensitivity; norms and losses are the hospital's own and never leave it.
    """

    gradients: list[torch.Tensor]
    norms: torch.Tensor
    losses: torch.Tensor


def sum_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the batch: logits float32 (N, classes), labels int64 (N,)."""
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


Chunk = tuple[list[torch.Tensor], torch.Tensor]


def _by_loop(model: nn.Module, loss: Loss, inputs: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """One backward pass per record; never holds more than one gradient."""
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    for row in range(len(inputs)):
        value = loss(model(inputs[row : row + 1]), labels[row : row + 1])
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        yield [gradient.unsqueeze(0) for gradient in gradients], value.detach().reshape(1)


def _unsuitable(what: str, error: Exception) -> ModelError:
    return ModelError(f"{what}: {str(error).splitlines()[0][:120]}", "set training.per_sample_gradients=loop")


def _by_vmap(model: nn.Module, loss: Loss, inputs: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """Vectorised over records (torch.func), in chunks whose gradients fit the memory bound."""
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model)}
    size = max(1, _VMAP_BYTES // (4 * max(1, sum(parameter.numel() for parameter in parameters.values()))))

    def record_loss(values: dict[str, torch.Tensor], record: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, values, (record.unsqueeze(0),)), label.unsqueeze(0))

    per_record = vmap(grad_and_value(record_loss), in_dims=(None, 0, 0))
    for start in range(0, len(inputs), size):
        try:
            gradients, values = per_record(parameters, inputs[start : start + size], labels[start : start + size])
        except (RuntimeError, NotImplementedError) as error:
            raise _unsuitable("torch.func cannot vectorise this model", error) from None
        yield [gradients[name] for name in parameters], values.detach()


def _by_hooks(model: nn.Module, loss: Loss, inputs: torch.Tensor, labels: torch.Tensor) -> Iterator[Chunk]:
    """Opacus's own rules, layer by layer, for the whole batch at once; no BatchNorm, frozen or not."""
    from opacus.grad_sample import GradSampleModule

    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for layer in shared.modules():  # the hooks act on layers in training mode; dropout stays off
        layer.training = next(layer.parameters(recurse=False), None) is not None
    try:
        observed = GradSampleModule(shared, loss_reduction="sum", strict=True)
    except NotImplementedError:
        raise ModelError(
            "Opacus's hooks cannot handle this model, it has trainable layers with buffers such as BatchNorm",
            "set training.per_sample_gradients=auto, or model.normalisation=group",
        ) from None
    try:
        parameters = [parameter for _, parameter in trainable_parameters(model)]
        try:
            logits = observed(inputs.detach().requires_grad_())  # its backward hooks warn about constant inputs
            rows = zip(logits.split(1), labels.split(1), strict=True)
            losses = torch.stack([loss(logit, label) for logit, label in rows])
            losses.sum().backward()
        except RuntimeError as error:
            raise _unsuitable("Opacus's hooks cannot handle this model", error) from None
        samples = [(parameter, getattr(parameter, "grad_sample", None)) for parameter in parameters]
        yield [p.new_zeros((len(inputs), *p.shape)) if g is None else g for p, g in samples], losses.detach()
    finally:
        observed.to_standard_module()
        for parameter in model.parameters():
            parameter.grad = None


_IMPLEMENTATIONS: dict[str, Callable[[nn.Module, Loss, torch.Tensor, torch.Tensor], Iterator[Chunk]]] = {
    "loop": _by_loop,
    "vmap": _by_vmap,
    "hooks": _by_hooks,
}


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    clipping_norm: float,
    method: Method = "loop",
) -> ClippedSum:
    """Clip each record's gradient to L2 norm `clipping_norm` and sum (Abadi et al. 2016, Algorithm 1).

    `inputs` float32 (N, ...), `labels` int64 (N,), `loss` sums over its batch. N = 0 gives zeros. The methods differ in
    speed and memory, and in rounding (about 1e-7), in nothing else. A record whose gradient is not finite counts as
    zero: otherwise one patient could spoil the sum. Raises `ModelError` if `method` cannot handle the model.
    """
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    sums = [torch.zeros_like(parameter, requires_grad=False).reshape(-1) for parameter in parameters]
    norms, losses = [], []
    chunks = _IMPLEMENTATIONS[method](model, loss, inputs, labels) if len(inputs) else iter(())
    for gradients, values in chunks:
        rows = [gradient.detach().reshape(len(values), -1) for gradient in gradients]
        chunk_norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]).double().norm(dim=0)
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


class RoundedSum(NamedTuple):
    """`total` integers (P,) of the mechanism's ring, norms before clipping and losses of each record (N,)."""

    total: torch.Tensor
    norms: torch.Tensor
    losses: torch.Tensor


def rounded_sum(
    model: nn.Module,
    loss: Loss,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    mechanism: DistributedGaussian,
    method: Method = "loop",
) -> RoundedSum:
    """Clip each record's gradient, round it to the mechanism's grid, and add up exactly; see `clipped_sum`.

    What a record adds depends on that record alone, bit for bit, whoever else is in the batch and in whatever order: else
    removing one patient would move digits of others, and the sum by more than its sensitivity. The kernels of matrix products
    and convolutions round differently by number of rows, place in the batch and alignment in memory. So all of these are
    the same for a record wherever it occurs: batches have one size, empty places hold zeros, every batch lies in memory
    of its own, and a record's place is read from its own content (`_batches`). Rows do not mix: each number of a record's
    gradient is computed from that record and the parameters, by a program that depends on shapes and threads alone.
    (`loop` has batches of one.) Norms and losses are in the order of the records.
    """
    total = torch.zeros(mechanism.parameters, dtype=mechanism.dtype)
    norms, losses = torch.zeros(len(inputs), dtype=torch.float64), torch.zeros(len(inputs))
    size = 1 if method == "loop" else _places(mechanism.parameters)
    for places, records in _batches(inputs, size):
        batch = inputs.new_zeros(size, *inputs.shape[1:])
        batch[places], batch_labels = inputs[records], labels.new_zeros(len(batch))
        batch_labels[places] = labels[records]
        first = 0
        for gradients, values in _IMPLEMENTATIONS[method](model, loss, batch, batch_labels):
            within = (places >= first) & (places < first + len(values))
            own, who = places[within] - first, records[within]
            if len(own):
                norms[who] = add_patients(mechanism, total, [gradient[own] for gradient in gradients])
                losses[who] = values[own]
            first += len(values)
    return RoundedSum(total, norms, losses)


def _places(parameters: int) -> int:
    """How many places a batch has for a network of this size: public, and the same in every step."""
    return max(_FEWEST_PLACES, min(_MOST_PLACES, _GRADIENT_ELEMENTS // parameters))


def _batches(inputs: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of at most `size` records that have different places: the places, and which records, int64 (N,) each.

    A record's place is a digest of its content, so it is the same in every batch and for every other data set.
    """
    waiting: list[list[int]] = [[] for _ in range(size)]
    for number, record in enumerate(inputs):
        digest = hashlib.blake2b(record.contiguous().numpy().tobytes(), digest_size=8).digest() if size > 1 else b""
        waiting[int.from_bytes(digest, "little") % size].append(number)
    while any(waiting):
        taken = [(place, numbers.pop()) for place, numbers in enumerate(waiting) if numbers]
        places, records = torch.tensor(taken, dtype=torch.int64).unbind(1)
        yield places, records


def working_copy(model: nn.Module) -> nn.Module:
    """A copy to train, in evaluation mode and without in-place operations where the model can be traced."""
    try:
        return without_in_place(copy.deepcopy(model).eval())
    except ModelError:
        return copy.deepcopy(model).eval()  # `loop` needs no rewriting


def choose_per_sample_method(
    model: nn.Module, input_shape: tuple[int, ...], batch_size: int = 32, mechanism: DistributedGaussian | None = None
) -> Method:
    """The fastest method for this model and batch size on this machine, measured on plain records of `input_shape`.

    With `mechanism` for sums that are rounded to its grid (`rounded_sum`), else for `clipped_sum`.

    Measures 2 to 32 records, as many as `loop` does in about 0.2 s. Left out are methods that cannot handle the model,
    `hooks` above a million parameters, and `vmap` where these gradients exceed 1 GB. The clock decides about speed
    only: all methods give the same sum up to rounding, and of each what a record adds to a rounded sum is its own.
    """
    working = working_copy(model)
    size = sum(parameter.numel() for _, parameter in trainable_parameters(working))

    def seconds(method: Method, count: int) -> float:
        inputs, labels = torch.zeros(count, *input_shape), torch.zeros(count, dtype=torch.int64)
        inputs.reshape(count, -1)[:] = torch.arange(count).unsqueeze(1) / count  # all alike would share one place
        start = time.perf_counter()
        if mechanism is None:
            clipped_sum(working, sum_cross_entropy, inputs, labels, 1.0, method)
        else:
            rounded_sum(working, sum_cross_entropy, inputs, labels, mechanism, method)
        return time.perf_counter() - start

    seconds("loop", 1)  # first calls are slower
    single = seconds("loop", 1)
    count = max(2, min(batch_size, 32, int(0.2 / single)))
    measured: dict[Method, float] = {"loop": seconds("loop", count)}
    candidates: list[Method] = ["vmap"] if 4 * size * count < _VMAP_BYTES else []
    if size <= _HOOKS_PARAMETERS:
        candidates.append("hooks")
    for method in candidates:
        try:
            seconds(method, 2)
            measured[method] = seconds(method, count)
        except ModelError:
            continue
    return min(measured, key=measured.__getitem__)
