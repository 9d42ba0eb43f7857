"""What an injection does: which run, whom it strikes, when and how. Chosen at random, the same for the same seed and number.

The moment is a part of the time that the victim lives in a run which nobody disturbs, so it is the same in every repetition only as
far as the machine is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpc_fl.roles import AGGREGATOR, DEALER, MODEL_OWNER, hospital_names

LAUNCHER, FORK_SERVER, ASKING = "launcher", "fork server", "asking hospital"
HOSPITALS, FIVE_HOSPITALS = tuple(hospital_names(3)), tuple(hospital_names(5))
KILL, TERM, STOP, STOP_AND_CONT = "KILL", "TERM", "STOP", "STOP and CONT"
SILENCE_TIMEOUT = 10.0  # seconds; the shortest that the product allows
SHORT_STOP = 3.0  # seconds; harms nobody, also when the last sign of life (every 5 s) was long ago
LONG_STOP = 25.0

SETTINGS: dict[str, Any] = {
    "name": "soak",
    "data": {"source": "phantoms", "image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 6, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
    "privacy": {"delta": 1e-3},
    "inference": {"engine": "fast", "limit": 20, "batch_size": 2},
    "serving": {"images_per_minute": 10_000, "images_per_day": 10_000},
    "runtime": {"connect_timeout": 30.0, "receive_timeout": 30.0, "silence_timeout": SILENCE_TIMEOUT},
}
_DISTRIBUTED = {"privacy": {"mechanism": "distributed", "noise_multiplier": 4.0, "epsilon": 50.0, "delta": 1e-3}}
_QUORUM = {"federation": {"quorum": 2}}
_PEERS = {"federation": {"coordinator": "none", "hospitals": 3, "quorum": 3}}
_FIVE_PEERS = {"federation": {"coordinator": "none", "hospitals": 5, "quorum": 3}}
_SAME_RECORDS = {"training": {**SETTINGS["training"], "sampling_seed": 1}, "privacy": {"mechanism": "none"}}


@dataclass(frozen=True)
class Variant:
    """One kind of run: its task, what it changes of `SETTINGS`, and who can be struck in it."""

    task: str
    changes: dict[str, Any]
    victims: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration file of it."""
        return {name: {**SETTINGS[name], **self.changes.get(name, {})} if isinstance(SETTINGS.get(name), dict)
                else self.changes.get(name, SETTINGS.get(name)) for name in {**SETTINGS, **self.changes}}  # fmt: skip

    @property
    def may_lose(self) -> tuple[str, ...]:
        """Parties without which it goes on."""
        federation = self.changes.get("federation", {})
        hospitals = hospital_names(federation.get("hospitals", len(HOSPITALS)))
        return tuple(hospitals) if federation.get("quorum", len(hospitals)) < len(hospitals) else ()

    @property
    def group(self) -> str:
        """What `--task` calls it: its task, or peers for a run without an aggregator."""
        return "peers" if self.changes.get("federation", {}).get("coordinator") == "none" else self.task

    @property
    def same_model(self) -> bool:
        """Whether a run that loses nobody has the model of one that nobody disturbs, bit for bit."""
        return self.settings["privacy"].get("mechanism") == "none" and "sampling_seed" in self.settings["training"]


_OF_TRAINING = (*HOSPITALS, AGGREGATOR, LAUNCHER, FORK_SERVER)
_OF_FIVE = (*FIVE_HOSPITALS, LAUNCHER, FORK_SERVER)
VARIANTS = {
    "train": Variant("train", {}, _OF_TRAINING),
    "train, distributed noise": Variant("train", _DISTRIBUTED, _OF_TRAINING),
    "train, quorum 2 of 3": Variant("train", _QUORUM, _OF_TRAINING),
    "train, quorum and distributed noise": Variant("train", {**_QUORUM, **_DISTRIBUTED}, _OF_TRAINING),
    "train, quorum, hospitals started again": Variant("train", {**_QUORUM, "runtime": {"restarts": 1}}, _OF_TRAINING),
    "peers, all three": Variant("train", {**_PEERS, **_SAME_RECORDS}, (*HOSPITALS, LAUNCHER, FORK_SERVER)),
    "peers, quorum 3 of 5": Variant("train", {**_FIVE_PEERS, **_SAME_RECORDS}, _OF_FIVE),
    "peers, quorum and distributed noise": Variant("train", {**_FIVE_PEERS, **_DISTRIBUTED}, _OF_FIVE),
    "infer": Variant("infer", {}, (HOSPITALS[0], MODEL_OWNER, DEALER, LAUNCHER, FORK_SERVER)),
    "serve": Variant("serve", {}, (MODEL_OWNER, DEALER, ASKING, LAUNCHER, FORK_SERVER)),
}


@dataclass(frozen=True)
class Injection:
    """`moment` is a part of the victim's life, from 0 to 1; `pause` are the seconds from STOP to CONT, else 0."""

    number: int
    variant: str
    victim: str
    signal: str
    moment: float
    pause: float

    @property
    def words(self) -> str:
        """For a line of a report."""
        lasting = f" after {self.pause:.1f} s" if self.pause else ""
        return (
            f"{self.number}: {self.variant}: {self.signal}{lasting} to {self.victim} at {self.moment:.2f} of its life"
        )


def injection(seed: int, number: int, tasks: Sequence[str]) -> Injection:
    """The one of this number. Depends on nothing but the arguments."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311 - chooses what to break, hides nothing
    name = draw.choice([name for name, variant in VARIANTS.items() if variant.group in tasks])
    victim = draw.choice(VARIANTS[name].victims)
    signals = [KILL, TERM, STOP, STOP_AND_CONT]
    if victim in (LAUNCHER, FORK_SERVER):
        signals.remove(STOP)  # whoever stops the command itself for good waits for nothing
    signal = draw.choice(signals)
    short = draw.random() < 0.5
    pause = draw.uniform(0.1, SHORT_STOP) if short else draw.uniform(SHORT_STOP, LONG_STOP)
    return Injection(number, name, victim, signal, draw.random(), pause if signal == STOP_AND_CONT else 0.0)
