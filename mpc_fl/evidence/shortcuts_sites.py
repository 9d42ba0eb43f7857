"""Whether the site can be told from an image: what a probe says, beside what somebody says who sees no image. Pure.

Who sees no image says the site that most records are from; who knows the diagnosis as well says the site that most records of that
diagnosis are from. A probe has to be better than both: hospitals whose patients have other diseases can be told by the disease.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mpc_fl.evidence.shortcuts_tested import Answers, Estimate, Resampled, estimate


@dataclass(frozen=True)
class SiteGuesses:
    """How often a probe is right about the site, and how often without any image: `chance`, and `by_diagnosis` where that is known.

    `gain`: accuracy less the better of both, over the same resampled patients. `area`: mean over sites of the area below the curve.
    """

    accuracy: Estimate
    area: Estimate
    chance: float
    by_diagnosis: float
    gain: Estimate

    @property
    def told(self) -> bool:
        """Whether the image says where it is from."""
        return self.gain.low > 0


def site_guesses(answers: Answers, diagnoses: torch.Tensor, seed: int) -> SiteGuesses:
    """What a probe's answers, whose labels are sites, are worth; `diagnoses` int64 (N,) are the classes of the records."""
    sites, truth = answers.labels.numpy(), diagnoses.numpy()
    table = np.zeros((int(truth.max()) + 1, int(sites.max()) + 1))
    np.add.at(table, (truth, sites), 1)
    drawn = Resampled(answers.labels, answers.patients, np.random.default_rng(seed))
    best = (sites == table.argmax(axis=1)[truth]).astype(float)
    most = (sites == table.sum(axis=0).argmax()).astype(float)
    blind = max(best, most, key=lambda guess: float(guess.mean()))
    accuracy, gain = drawn.mean(answers.right), drawn.mean(answers.right - blind)
    area = drawn.area(np.asarray(torch.softmax(answers.logits.double(), dim=1).numpy()))
    return SiteGuesses(estimate(*accuracy), estimate(*area), float(most.mean()), float(best.mean()), estimate(*gain))
