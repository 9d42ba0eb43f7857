"""Model extraction: a student trained on what a model answers, and how often both then agree. An attack, no bound. Pure.

Tramèr et al., *Stealing Machine Learning Models via Prediction APIs* (USENIX Security 2016); Jagielski et al., *High Accuracy and
High Fidelity Extraction* (USENIX Security 2020), who call the share of new images on which both say the same class **fidelity**.
The student learns from the classes alone, or from the probabilities that logits give. Whoever attacks has images of the kind and
knows the architecture; more queries, or cleverer ones, show more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpc_fl.learning.models.evaluation import predict


@dataclass(frozen=True)
class Lessons:
    """How a student learns: so many passes over its images, so many in a step, Adam's rate, and the seed of their order."""

    passes: int = 60
    at_once: int = 32
    rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Fidelity:
    """With so many queries a student agrees with the model on a `share` of new images."""

    queries: int
    share: float


def taught(student: nn.Module, inputs: torch.Tensor, answers: torch.Tensor, lessons: Lessons) -> nn.Module:
    """The student, trained in place on what was answered: classes int64 (n,), or logits float (n, classes)."""
    wanted = answers if answers.dtype == torch.int64 else answers.float().softmax(dim=1)
    generator = torch.Generator().manual_seed(lessons.seed)
    adam = torch.optim.Adam([value for value in student.parameters() if value.requires_grad], lr=lessons.rate)
    student.train()
    for _ in range(lessons.passes):
        for rows in torch.randperm(len(inputs), generator=generator).split(lessons.at_once):
            adam.zero_grad()
            nn.functional.cross_entropy(student(inputs[rows]), wanted[rows]).backward()
            adam.step()
    return student.eval()


def agreement(student: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> float:
    """The share of inputs for which the student says these classes, int64 (n,)."""
    return float((predict(student, inputs).argmax(1) == classes).double().mean())


def fidelity_curve(
    fresh: Callable[[], nn.Module],
    asked: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    counts: Sequence[int],
    lessons: Lessons,
) -> list[Fidelity]:
    """What students reach that were told the first so many answers: for each of `counts` one, `fresh` from its first weights.

    `asked` are inputs with the answers to them, as `taught` takes them; `held_out` are new inputs with the classes that the model
    says. Raises `ValueError` for more queries than there are answers.
    """
    inputs, answers = asked
    if max(counts) > len(inputs):
        raise ValueError("there are fewer answers than queries")
    students = ((count, taught(fresh(), inputs[:count], answers[:count], lessons)) for count in counts)
    return [Fidelity(count, agreement(student, *held_out)) for count, student in students]
