"""The processes 1..N-1 of a hospital that trains in several: each adds its share of the clipped gradients of a step.

They meet process 0 through torch.distributed's gloo on the loopback address; a file in a private directory, removed as
soon as they have met, says on which ports. Gloo neither encrypts nor authenticates: the machine and those who can run
programs on it are trusted, as they are with the images. Commands travel as JSON over a pipe of each process, tensors
over gloo, the structure of the network as an argument of the spawned process. A process keeps no record of a patient
longer than its step, holds no seed, and ends when its pipe or its parent does.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpc_fl.errors import MpcFlError
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.training.augmentation import AugmentedRecords, Inputs, copies_per_record, records_of
from mpc_fl.learning.training.batch_pieces import pieces_of
from mpc_fl.learning.training.per_sample_gradients import Loss, Method, clipped_sum, loss_with, working_copy

_LOOPBACK = "127.0.0.1"


def join_group(meeting: Path, rank: int, processes: int, timeout: float) -> dist.ProcessGroup:
    """The gloo group of all processes, listening on the loopback address only. Blocks until everybody has joined."""
    limit = timedelta(seconds=timeout)
    store = dist.FileStore(str(meeting), processes)
    store.set_timeout(limit)
    # A group of its own rather than torch's global one: its address is given here and not by the environment or the
    # host's name, and the hospital's process keeps no global state.
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = limit
    group = dist.ProcessGroup(store, rank, processes)
    backend = dist.ProcessGroupGloo(store, rank, processes, options)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group.barrier().wait()
    return group


def averaging(model: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
    """The model with gradients averaged over the group. A static graph may have parameters that get no gradient."""
    return DistributedDataParallel(model, process_group=group, forward_sync_buffers=False, static_graph=True)


@dataclass(frozen=True)
class Whole:
    """What a mean gradient is divided by: the `records` of a step in all `processes`."""

    records: int
    processes: int


def shared_gradient(
    model: DistributedDataParallel, loss: Loss, inputs: Inputs, labels: torch.Tensor, whole: Whole
) -> float:
    """Mean gradient over the records of all processes into `.grad`; returns this process's summed loss.

    In pieces that fit memory; the gradients of all but the last are added up before they are averaged over the processes.
    """
    copies = copies_per_record(inputs)
    # The average of N gradients is to be the sum over all records / their number.
    weight, total = whole.processes / whole.records, 0.0
    pieces = list(pieces_of(inputs, labels)) if len(inputs) else []
    if not pieces:  # every process must take part in the average
        record = records_of(inputs)
        pieces, weight = [(record.new_zeros(1, *record.shape[1:]), labels.new_zeros(1))], 0.0
    for number, (piece, own) in enumerate(pieces, start=1):
        last = number == len(pieces)
        value = loss((model if last else model.module)(piece), own) / copies
        if last:  # averages what has been added up in `.grad`
            (value * weight).backward()
        else:
            _accumulate(model.module, value * weight)
        total += float(value.detach()) if weight else 0.0
    return total


def _accumulate(model: nn.Module, value: torch.Tensor) -> None:
    """Add the gradient of `value` to `.grad` without a word to the other processes: a static graph knows no `no_sync`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def tell(pipe: Connection, **message: Any) -> None:
    """One JSON message between process 0 and another."""
    pipe.send_bytes(json.dumps(message).encode())


def _end_with_parent() -> NoReturn:
    """The parent's end is seen also after kill -9, and while this process computes or waits for others."""
    parent = multiprocessing.parent_process()
    connection.wait([parent.sentinel] if parent else [])
    os._exit(3)


def _receive_share(
    group: dist.ProcessGroup, shape: list[int], transformed: list[int] | None
) -> tuple[Inputs, torch.Tensor]:
    """A share of the records, with their transformations of shape `transformed` where they are augmented."""
    tensors = [torch.empty(shape), torch.empty(shape[:1], dtype=torch.int64)]
    tensors += [] if transformed is None else [torch.empty(transformed)]
    for tensor in tensors if shape[0] else ():
        group.recv([tensor], 0, 0).wait()
    records, labels, *transformations = tensors
    return AugmentedRecords(records, *transformations) if transformations else records, labels


class _TrainingProcess:
    """One of the processes 1..N-1: obeys commands until its pipe ends."""

    def __init__(self, model: nn.Module, loss: Loss, group: dist.ProcessGroup, pipe: Connection) -> None:
        self._model, self._loss, self._group, self._pipe = model, loss, group, pipe
        self._averaging: DistributedDataParallel | None = None

    def obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "round":
            self._begin_round(command["private"])
            return
        parameters = flatten_parameters(self._model)
        self._group.broadcast(parameters, 0).wait()
        load_flat_parameters(self._model, parameters)
        inputs, labels = _receive_share(self._group, command["shape"], command["transformed"])
        if command["do"] == "clipped sum":
            self._clipped_sum(inputs, labels, command["clipping_norm"], command["method"])
        else:
            self._mean_gradient(inputs, labels, command["records"])

    def _begin_round(self, private: bool) -> None:
        for buffer in self._model.buffers():
            self._group.broadcast(buffer, 0).wait()
        self._averaging = None if private else averaging(self._model, self._group)
        tell(self._pipe, computed=True)

    def _clipped_sum(self, inputs: Inputs, labels: torch.Tensor, clipping_norm: float, method: Method) -> None:
        own = clipped_sum(self._model, self._loss, inputs, labels, clipping_norm, method)
        tell(self._pipe, computed=True)
        self._group.reduce(torch.cat([gradient.reshape(-1) for gradient in own.gradients]), 0).wait()
        if len(inputs):
            self._group.send([torch.stack([own.norms, own.losses])], 0, 0).wait()

    def _mean_gradient(self, inputs: Inputs, labels: torch.Tensor, records: int) -> None:
        assert self._averaging is not None
        self._model.zero_grad()
        whole = Whole(records, self._group.size())
        loss = shared_gradient(self._averaging, self._loss, inputs, labels, whole)
        tell(self._pipe, computed=True, loss=loss)


@dataclass(frozen=True)
class GroupTerms:
    """What all processes of a group start with.

    They meet in the file `meeting`; `structure` is the network on the meta device, `threads` those of torch in each
    process; `timeout` bounds every wait for another process, in seconds; `class_weights` are those of the loss.
    """

    processes: int
    meeting: Path
    structure: nn.Module
    threads: int
    timeout: float
    class_weights: tuple[float, ...] | None = None


def obey_commands(rank: int, terms: GroupTerms, pipe: Connection) -> None:
    """The program of process `rank`: join the others, then serve process 0 until it ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(terms.threads)
    try:
        model = working_copy(terms.structure.to_empty(device="cpu"))
        tell(pipe, started=True)
        group = join_group(terms.meeting, rank, terms.processes, terms.timeout)
        process = _TrainingProcess(model, loss_with(terms.class_weights), group, pipe)
        tell(pipe, joined=True)
        while True:
            process.obey(json.loads(pipe.recv_bytes()))
    except (EOFError, ConnectionError):
        os._exit(0)  # process 0 has closed the pipe; a thread of gloo must not keep this one
    except BaseException as error:  # noqa: BLE001 - the last frame of the process: report, then end with a code
        # The message of an unforeseen error could quote data, so only its type is told.
        text = str(error) if isinstance(error, MpcFlError) else f"unexpected {type(error).__name__}"
        with contextlib.suppress(OSError):
            tell(pipe, error=text, lost=isinstance(error, RuntimeError))
        os._exit(1)
