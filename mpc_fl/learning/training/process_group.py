"""Local training of one hospital in several processes of its machine.

Each step, processes 0..N-1, of which 0 is the hospital's own:
  1. process 0 draws the patients and sends every process the current parameters and its share of the records
  2. each process clips the gradient of each of its records and sums (`clipped_sum`)
  3. the N sums are added up at process 0
  4. process 0 alone adds the noise and steps; the others hold no seed and draw nothing

The clipped sum is the same whichever process adds which record, so the result is that of one process up to the order of
floating-point additions. torch's DistributedDataParallel cannot do this: its backward pass averages gradients over the
records of all processes before any one patient's gradient could be clipped, so a single patient can move the average
without bound, and noise scaled to the clipping norm hides nobody. Without differential privacy nothing is clipped, and
steps 2 and 3 are DistributedDataParallel's (Li et al., VLDB 2020).

This is process 0's side; `group_process` is the others', and says how they meet and what they are trusted with.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import multiprocessing
import multiprocessing.resource_tracker
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpc_fl.config.config import Config
from mpc_fl.config.deadlines import deadlines_of
from mpc_fl.errors import MpcFlError
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.training.augmentation import AugmentedRecords, Inputs, records_of
from mpc_fl.learning.training.group_process import (
    GroupTerms,
    Whole,
    averaging,
    join_group,
    obey_commands,
    shared_gradient,
    tell,
)
from mpc_fl.learning.training.per_sample_gradients import ClippedSum, Method, clipped_sum, loss_with

_EXPLAIN_GRACE = 5.0
_END_GRACE = 3.0
_FIX = "the round is lost; see the system's log and its free memory, or set site.training_processes=1"

Share = tuple[Inputs, torch.Tensor]

log = logging.getLogger(__name__)


class TrainingProcessError(MpcFlError):
    """A process of local training died or was late; the message names it. The round is lost, nothing was released."""

    exit_code = 12


@dataclass
class _Member:
    """What process 0 knows of another one. `lost`: its error may only be the consequence of another's."""

    rank: int
    process: Any
    pipe: Connection
    answers: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    lost: bool = False

    def listen(self) -> None:
        """Take up all it has said."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                event = json.loads(self.pipe.recv_bytes())
                if "error" in event:
                    self.error, self.lost = event["error"], event["lost"]
                else:
                    self.answers.append(event)

    def vanished(self) -> bool:
        """It has ended and said nothing about it."""
        ended = self.process.exitcode is not None
        self.listen()
        return ended and self.error is None

    def __str__(self) -> str:
        return f"{self.process.name} (pid {self.process.pid})"


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started within never see Ctrl-C or a hang-up, which reach them too: process 0 ends them."""
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainingGroup:
    """Process 0's view of the processes that share out each step; `training_group` makes and ends it.

    Call `begin_round` once per round, then `clipped_sum` (private) or `mean_gradient` (plain) once per step. Every
    failure, also of the caller's own part, ends the other processes, and the group with them.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: int,
        start_timeout: float,
        step_timeout: float,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        """Start `processes` - 1 others for networks of the structure of `model`, each with this one's torch threads.

        `step_timeout`, in seconds, bounds every wait for another process in a step. `class_weights` are those of the loss.
        Raises `TrainingProcessError` when one ends at once or has not started within `start_timeout`.
        """
        self.processes = processes
        self._loss = loss_with(class_weights)
        self._step_timeout = step_timeout
        self._waiting_since, self._patience = time.monotonic(), start_timeout
        self._members: list[_Member] = []
        self._averaging: DistributedDataParallel | None = None
        # The launcher's parties are daemons, which may have no children lest these be orphaned. Ours watch their parent.
        multiprocessing.current_process().daemon = False
        context = multiprocessing.get_context("spawn")
        structure = copy.deepcopy(model).to("meta")  # no values: they follow over gloo
        directory = Path(tempfile.mkdtemp(prefix="mpc-fl-"))  # mode 0700
        threads = torch.get_num_threads()
        terms = GroupTerms(processes, directory / "meeting", structure, threads, step_timeout, class_weights)
        try:
            with self._failures_explained():
                for rank in range(1, processes):
                    here, there = context.Pipe()
                    process = context.Process(
                        target=obey_commands,
                        args=(rank, terms, there),
                        name=f"local training process {rank}",
                        daemon=True,
                    )
                    with _interrupts_held_back():
                        process.start()
                    there.close()
                    self._members.append(_Member(rank, process, here))
                self._answers()
                self._group = join_group(terms.meeting, 0, processes, step_timeout)
                self._answers()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        log.info("local training in %d processes", processes)

    def begin_round(self, model: nn.Module, private: bool) -> None:
        """Send the buffers of `model`, the copy that is trained in this round; prepare averaging if not `private`.

        `model` has the structure the group was made for. Raises `TrainingProcessError`.
        """
        with self._failures_explained():
            self._command(None, do="round", private=private)
            for buffer in model.buffers():
                self._group.broadcast(buffer, 0).wait()
            self._averaging = None if private else averaging(model, self._group)
            self._answers()

    def clipped_sum(
        self, model: nn.Module, inputs: Inputs, labels: torch.Tensor, clipping_norm: float, method: Method
    ) -> ClippedSum:
        """`per_sample_gradients.clipped_sum` of the cross-entropy, each process with its share of the records.

        `inputs` float32 (N, ...) or augmented, `labels` int64 (N,). Raises what that function raises, and `TrainingProcessError`
        when a process dies or is late.
        """
        with self._failures_explained():
            shares = self._shares(inputs, labels)
            self._command(shares, do="clipped sum", clipping_norm=clipping_norm, method=method)
            self._send(model, shares)
            own = clipped_sum(model, self._loss, *shares[0], clipping_norm, method)
            self._answers()
            total = torch.cat([gradient.reshape(-1) for gradient in own.gradients])
            self._group.reduce(total, 0).wait()
            measured = [torch.stack([own.norms, own.losses])]
            for rank, (_, share) in enumerate(shares[1:], start=1):
                measured.append(torch.empty(2, len(share)))
                if len(share):
                    self._group.recv([measured[-1]], rank, 0).wait()
        pieces = total.split([gradient.numel() for gradient in own.gradients])
        gradients = [piece.view_as(gradient) for piece, gradient in zip(pieces, own.gradients, strict=True)]
        norms, losses = torch.cat(measured, dim=1)
        return ClippedSum(gradients, norms, losses)

    def mean_gradient(self, model: nn.Module, inputs: Inputs, labels: torch.Tensor) -> float:
        """Mean gradient of N >= 1 records into the `.grad` of `model`, that of `begin_round`; returns the summed loss.

        Raises `TrainingProcessError` when a process dies or is late.
        """
        with self._failures_explained():
            if self._averaging is None or self._averaging.module is not model:
                raise ValueError("begin_round(model, private=False) comes first")
            shares = self._shares(inputs, labels)
            self._command(shares, do="mean gradient", records=len(inputs))
            self._send(model, shares)
            whole = Whole(len(inputs), self.processes)
            loss = shared_gradient(self._averaging, self._loss, *shares[0], whole)
            return loss + sum(answer["loss"] for answer in self._answers())

    def close(self) -> None:
        """End the other processes, by force if they do not end by themselves within seconds. May be called again."""
        for member in self._members:
            member.pipe.close()
        deadline = time.monotonic() + _END_GRACE
        for member in self._members:
            member.process.join(max(0.0, deadline - time.monotonic()))
            member.process.kill()
            member.process.join()
        self._members, self._averaging = [], None

    def _shares(self, inputs: Inputs, labels: torch.Tensor) -> list[Share]:
        return list(zip(inputs.tensor_split(self.processes), labels.tensor_split(self.processes), strict=True))

    def _command(self, shares: list[Share] | None, **command: Any) -> None:
        if not self._members:
            raise TrainingProcessError("the processes of local training have ended", "start a new group")
        self._waiting_since, self._patience = time.monotonic(), self._step_timeout
        for member in self._members:
            inputs = shares[member.rank][0] if shares else None
            shape = None if inputs is None else list(records_of(inputs).shape)
            transformed = list(inputs.transformations.shape) if isinstance(inputs, AugmentedRecords) else None
            tell(member.pipe, shape=shape, transformed=transformed, **command)

    def _send(self, model: nn.Module, shares: list[Share]) -> None:
        self._group.broadcast(flatten_parameters(model), 0).wait()
        for rank, (inputs, labels) in enumerate(shares):
            tensors = [records_of(inputs), labels]
            tensors += [inputs.transformations] if isinstance(inputs, AugmentedRecords) else []
            for tensor in tensors if rank and len(labels) else ():
                self._group.send([tensor.contiguous()], rank, 0).wait()

    def _answers(self) -> list[dict[str, Any]]:
        """One answer of every process. Raises `TrainingProcessError` if one is late, `OSError` for errors and deaths."""
        deadline = time.monotonic() + self._patience
        while missing := [member for member in self._members if not member.answers]:
            waiting = [thing for member in missing for thing in (member.pipe, member.process.sentinel)]
            if not connection.wait(waiting, max(0.0, deadline - time.monotonic())):
                raise self._late(missing[0])
            for member in missing:
                member.listen()
                if member.error is not None or member.vanished():
                    raise ConnectionError
        return [member.answers.pop(0) for member in self._members]

    @contextlib.contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """End the group on any failure; if another process is to blame, say which."""
        try:
            yield
        except BaseException as error:
            # Gloo raises RuntimeError for a lost or late process, pipes raise OSError.
            blamed = self._blame() if isinstance(error, (RuntimeError, OSError)) else None
            for member in self._members:
                member.process.kill()
            self.close()
            if blamed is None:
                raise
            raise blamed from None

    def _blame(self) -> TrainingProcessError | None:
        """Whom to blame for a failed wait: who died, else who failed by itself, else who is silent; None: nobody."""
        late = time.monotonic() - self._waiting_since >= self._patience
        # Those who wait for the culprit will report that they lost it.
        deadline = time.monotonic() + _EXPLAIN_GRACE
        while time.monotonic() < deadline:
            dead = [member for member in self._members if member.vanished()]
            failed = [member for member in self._members if member.error is not None]
            if dead or any(not member.lost for member in failed) or len(failed) >= len(self._members) - late:
                break
            time.sleep(0.02)
        if dead:
            code = dead[0].process.exitcode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
            return TrainingProcessError(f"{dead[0]} {how}", _FIX)
        silent = [member for member in self._members if member.error is None]
        if late and silent and all(member.lost for member in failed):
            return self._late(silent[0])
        if failed:
            culprit = min(failed, key=lambda member: member.lost)
            return TrainingProcessError(f"{culprit} failed: {culprit.error}", _FIX)
        return None

    def _late(self, member: _Member) -> TrainingProcessError:
        return TrainingProcessError(f"{member} is late: no answer within {self._patience:g} s", _FIX)


@contextlib.contextmanager
def training_group(config: Config, model: nn.Module) -> Iterator[TrainingGroup | None]:
    """The `site.training_processes` of this hospital for networks of the structure of `model`, ended with the block.

    None for a single process: `train_locally` then does everything itself. Starting takes seconds: one group serves
    all rounds. Raises `TrainingProcessError` when a process does not start.
    """
    if config.site.training_processes == 1:
        yield None
        return
    # Half of what the others wait for this hospital, so that it can tell the cause before they give it up.
    step_timeout = deadlines_of(config).summand / 2
    processes, weights = config.site.training_processes, config.training.class_weights
    group = TrainingGroup(model, processes, config.runtime.connect_timeout, step_timeout, weights)
    try:
        yield group
    finally:
        group.close()
