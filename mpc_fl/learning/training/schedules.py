"""How the learning rate goes over all steps of a run: up at first, then constant or down along half a cosine.

The cosine is that of Loshchilov and Hutter (ICLR 2017) without restarts. The number of a step follows from round and step within
the round, so a round that is made anew has the rates it had, and a run that goes on has them, too.
"""

from __future__ import annotations

import math

from mpc_fl.config.training import TrainingSection


def learning_rate_factor(settings: TrainingSection, round_number: int, step: int) -> float:
    """What the learning rate is multiplied with in `step` (from 0) of round `round_number` (from 1), in (0, 1].

    The first `warm_up` of all steps rise evenly to 1; `cosine` then falls towards 0, which the step after the last would have.
    """
    steps = settings.rounds * settings.local_steps
    number, rising = (round_number - 1) * settings.local_steps + step, round(settings.warm_up * steps)
    if rising and number < rising:
        return (number + 1) / (rising + 1)
    if settings.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (number - rising) / (steps - rising))) / 2
