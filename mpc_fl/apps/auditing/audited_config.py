"""The configuration with which a run is made again to be audited: its privacy, steps and federation, with canaries for data. Pure.

What is claimed of privacy rests on the clipping norm, the noise, who is drawn, and how many steps there are: all that is the run's
own. The network is a linear one over one feature for each canary, and the learning rate is such that canaries are not
learned: how far a step goes changes nothing that is released but its scale. What comes after an opening is left out (the
aggregator's optimizer, means of models), and so are other openings than those of training, which have noise of their own.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import EvaluationSection
from mpc_fl.config.training import AugmentationSection, TrainingSection
from mpc_fl.errors import ConfigError
from mpc_fl.evidence.canaries import CLASSES, largest_movement
from mpc_fl.federation.planning import sample_rate_of
from mpc_fl.learning.data.loading import patients_per_hospital, public_sizes
from mpc_fl.learning.privacy.accounting import PrivacyBudget, calibrate_noise_multiplier
from mpc_fl.learning.training.schedules import learning_rate_factor
from mpc_fl.roles import AGGREGATOR

_WATCHED_ROUNDS = 2
_DEVIATIONS = 6  # of noise that the learning rate leaves room for
_OF_POSTPROCESSING = ("strategy", "server_learning_rate", "server_momentum", "server_adaptivity", "proximal", "trainable",
                      "average_last", "ema_decay", "local_normalisation", "class_weights", "gradient_clipping",
                      "sampling_seed")  # fmt: skip


@dataclass(frozen=True)
class AuditedRun:
    """A run to audit: its configuration, the noise multiplier that its hospitals had (None without noise), and how many canaries
    each repetition of it has."""

    config: Config
    noise_multiplier: float | None
    canaries: int

    @property
    def honest(self) -> int:
        """Hospitals whose noise is in every sum: those that pool see through all else."""
        if self.config.privacy.mechanism == "none":
            return 1
        return self.config.federation.hospitals - self.config.absent_noise()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.rounds * self.config.training.local_steps


def fewest_patients(config: Config) -> int:
    """With how many training patients a hospital may take part. Raises `ConfigError` where nothing public says it."""
    if config.privacy.mechanism == "none":
        return config.federation.smallest_site
    return max(public_sizes(config).smallest, config.federation.smallest_site)


def audited_config(run: AuditedRun, out: Path) -> Config:
    """The configuration of one repetition, whose privacy ledgers lie in `out`. Raises `ConfigError` where it cannot be audited."""
    config, privacy = run.config, run.config.privacy
    _require_auditable(run)
    plain = {name: value for name, value in TrainingSection().model_dump().items() if name in _OF_POSTPROCESSING}
    bounds = dict[str, int]()
    if privacy.mechanism != "none":
        sizes = public_sizes(config)
        bounds = {"smallest_hospital": sizes.smallest, "largest_hospital": max(sizes.largest, run.canaries)}
    return config.with_values(
        task="simulate",
        data={
            "source": "csv",
            "classes": list(CLASSES),
            "table": {"features": run.canaries + 1},
            "features": None,
            "normalise": "none",
            "validation_fraction": 0.0,
            "subset": {},
            "partition": {},
        },
        model={
            "architecture": "linear",
            "initial_weights": None,
            "normalisation": "frozen",
            "weight_standardisation": False,
        },
        training={
            **plain,
            "augmentation": AugmentationSection().model_dump(),
            "keep_momentum": config.keeps_momentum,
            "learning_rate": _slow_learning_rate(run),
        },
        evaluation=EvaluationSection().model_dump(),
        privacy={"noise_multiplier": run.noise_multiplier, **bounds},
        aggregation={"norm_check": False, "norm_bound": None},
        inference={"public_features": None},
        **in_one_process(out),
    )


def shadow_config(config: Config, out: Path) -> Config:
    """The configuration of a run with half of its patients, drawn anew: as likely to draw each of them, with its noise and network.

    Raises `ConfigError` where hospitals are too small to leave half of their patients out.
    """
    changes: dict[str, Any] = {
        "training": {"batch_size": max(1, round(config.training.batch_size / 2)), "sampling_seed": None}
    }
    if config.privacy.mechanism != "none":
        sizes = public_sizes(config)
        fewest = math.floor(sizes.smallest / 2 - _DEVIATIONS / 2 * math.sqrt(sizes.smallest))
        if fewest < 1:
            raise ConfigError(
                f"a hospital may have {sizes.smallest} patients, too few to leave half of them out",
                "audit a run whose hospitals have 50 training patients or more with --shadows",
            )
        rate = sample_rate_of(config, 0)
        changes["privacy"] = {"smallest_hospital": fewest, "largest_hospital": sizes.largest}
        changes["training"]["batch_size"] = max(1, round(rate * fewest))
    return config.with_values(
        task="simulate",
        aggregation={"norm_check": False, "norm_bound": None},
        evaluation={"groups": {}},
        **changes,
        **in_one_process(out),
    )


def viewed_config(config: Config, noise_multiplier: float | None, out: Path) -> Config:
    """The configuration of sums that are watched: one step in each of two rounds at most, on the run's own data, with its network,
    noise and hospitals; the same patients are drawn in each run."""
    plain = {name: value for name, value in TrainingSection().model_dump().items() if name in _OF_POSTPROCESSING}
    rounds = min(_WATCHED_ROUNDS, config.training.rounds)
    changes = {**plain, "trainable": config.training.trainable, "rounds": rounds, "local_steps": 1, "sampling_seed": 1}
    return config.with_values(
        task="simulate",
        data={"validation_fraction": 0.0},
        training=changes,
        evaluation=EvaluationSection().model_dump(),
        privacy={"noise_multiplier": noise_multiplier},
        aggregation={"norm_check": False, "norm_bound": None},
        **in_one_process(out),
    )


def noise_of_steps(config: Config) -> float:
    """The noise multiplier with which a hospital's own noise would have kept this run, which had none, to its epsilon."""
    patients = min(patients_per_hospital(config))
    steps = config.training.rounds * config.training.local_steps
    budget = PrivacyBudget(config.privacy.epsilon, config.privacy.delta)
    return calibrate_noise_multiplier(budget, sample_rate_of(config, patients), steps)


def in_one_process(out: Path) -> dict[str, dict[str, Any]]:
    """Sections as a run has them whose hospitals are all in this process, with privacy ledgers in `out`."""
    return {
        "federation": {
            "coordinator": AGGREGATOR,
            "founders": None,
            "admission": "all",
            "session": secrets.token_hex(16),
            "names": {},
            "addresses": {},
            "dial_out_only": [],
            "relay": None,
            "evaluate_incomplete": False,
        },
        "runtime": {"restarts": 0, "record_messages": False},
        "site": {
            **dict.fromkeys(
                ("identity", "privacy_ledger", "address", "listen", "mlflow_uri", "leave_after", "data_of")
            ),
            "out": str(out),
            "watch": [],
            "resume": False,
            "train_alone": False,
            "training_processes": 1,
            "device": "cpu",
            "precision": "float32",
            "feature_cache": "memory",
        },
    }


def _slow_learning_rate(run: AuditedRun) -> float:
    """One with which even a canary that is drawn in every step, with all noise in its favour, stays clipped to the end."""
    training, privacy = run.config.training, run.config.privacy
    noise = run.noise_multiplier or 0.0
    farthest = 2 * run.steps + _DEVIATIONS * noise * math.sqrt(
        run.steps
    )  # a fault may take a canary twice, or double the noise
    gathered = 1 / (1 - training.momentum)
    return largest_movement() * training.batch_size / (privacy.clipping_norm**2 * farthest * gathered)


def rates_of(run: AuditedRun) -> list[float]:
    """The learning rate of each step, in order."""
    training, slow = run.config.training, _slow_learning_rate(run)
    numbers = ((number, step) for number in range(1, training.rounds + 1) for step in range(training.local_steps))
    return [slow * learning_rate_factor(training, number, step) for number, step in numbers]


def sample_rate(run: AuditedRun) -> float:
    """With which probability a step draws a canary that is there; without noise at least that, for all but one audit in 10^9."""
    most = run.canaries / 2 + 3 * math.sqrt(run.canaries)  # canaries that are there
    return sample_rate_of(run.config, max(math.ceil(most), fewest_patients(run.config)))  # counts without noise alone


def _require_auditable(run: AuditedRun) -> None:
    privacy, patients = run.config.privacy, max(fewest_patients(run.config), run.canaries)
    if privacy.mechanism != "none" and privacy.delta * patients >= 1:
        raise ConfigError(
            f"{run.canaries} canaries at a time are too many for delta {privacy.delta:g}, which must be below one over the number "
            "of a hospital's patients",
            f"take --at-once {max(1, math.ceil(1 / privacy.delta) - 1)} or fewer",
        )
