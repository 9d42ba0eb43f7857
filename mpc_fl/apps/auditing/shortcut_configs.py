"""The configurations with which an audit of shortcuts trains again: a probe of sites, without one site, at one site alone. Pure.

Network, mechanism, noise, sampling, steps and recipe are the run's own; noise is calibrated to the run's epsilon again. Each says
below what cannot be the same, and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpc_fl.apps.auditing.audited_config import in_one_process
from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import EvaluationSection
from mpc_fl.errors import ConfigError
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.data.records import is_one_hospitals
from mpc_fl.roles import hospital_names

FEWEST_HOSPITALS = 2  # of a federation
_UNCHECKED: dict[str, Any] = {"norm_check": False, "norm_bound": None}
_WITHOUT_GROUPS: dict[str, Any] = {"groups": {}}  # of which simulations have none


def require_films(config: Config) -> None:
    """Raise `ConfigError` for a run without films, or whose simulated hospitals have the same ones or no common model."""
    if config.data.is_table:
        raise ConfigError(
            "records of this run are rows of a table, and shortcuts are looked for in images",
            "audit a run on images or phantoms",
        )
    if config.data.partition.method == "none" and not is_one_hospitals(config):
        raise ConfigError(
            "with data.partition.method none every hospital has the same films: no site can be told from another",
            "audit a run whose hospitals have films of their own",
        )
    if config.training.local_normalisation:
        raise ConfigError(
            "with training.local_normalisation each hospital has a model of its own, and the run's is none of them",
            "audit a run without it",
        )


def run_again_config(config: Config, out: Path) -> Config:
    """That of the run as it was, in one process."""
    return config.with_values(
        task="simulate", evaluation=_WITHOUT_GROUPS, aggregation=_UNCHECKED, **in_one_process(out)
    )


def probe_config(config: Config, out: Path) -> Config:
    """That of a probe: the run's training with hospitals for classes, and privacy ledgers in `out`.

    A hospital has one class alone here, so steps on its own would lead it to the answer that all is its own: every step
    is a sum of its own, as many steps as in the run. Weights of the run's classes and what chooses and calibrates are left out.
    """
    stepwise = {} if config.privacy.mechanism == "distributed" else _each_step_a_round(config)
    return config.with_values(
        task="simulate",
        data={
            "classes": hospital_names(config.federation.hospitals),
            "validation_fraction": 0.0,
            "phantoms": {**config.data.phantoms.model_dump(mode="json"), "shortcut": {}},
        },
        training={"class_weights": None, **stepwise},
        privacy=_public_sizes(config) | _spare_rounds(config, bool(stepwise)),
        evaluation=EvaluationSection().model_dump(),
        aggregation=_UNCHECKED,
        **in_one_process(out),
    )


def left_out_config(config: Config, out: Path) -> Config:
    """That of the run with one hospital less. Raises `ConfigError` where two are all there are."""
    hospitals = config.federation.hospitals - 1
    if hospitals < FEWEST_HOSPITALS:
        raise ConfigError(
            "of two hospitals none can be left out: what is left is one alone", "take --no-left-out, or more hospitals"
        )
    sections, quorum, colluders = in_one_process(out), config.federation.quorum, config.privacy.colluders
    fewer = None if quorum is None else min(quorum, hospitals)
    sections["federation"] |= {"hospitals": hospitals, "quorum": fewer}
    pooling = None if colluders is None else min(colluders, (fewer or hospitals) - 2)
    return config.with_values(
        task="simulate",
        privacy=_public_sizes(config) | {"colluders": pooling},
        evaluation=_WITHOUT_GROUPS,
        aggregation=_UNCHECKED,
        **sections,
    )


def alone_config(config: Config, out: Path) -> Config:
    """That of one hospital by itself, whose noise is all its own; where every step was a sum, each is a round here.

    The last model is taken, and it is not calibrated.
    """
    distributed = config.privacy.mechanism == "distributed"
    privacy = _public_sizes(config) | _spare_rounds(config, distributed)
    return config.with_values(
        task="simulate",
        data={"validation_fraction": 0.0},
        training=_each_step_a_round(config) if distributed else {},
        privacy=privacy | ({"mechanism": "local"} if distributed else {}),
        evaluation=EvaluationSection().model_dump(),
        aggregation=_UNCHECKED,
        **in_one_process(out),
    )


def _public_sizes(config: Config) -> dict[str, Any]:
    """Public bounds of a hospital's patients, as numbers: those of phantoms would follow from how many hospitals there are."""
    if config.privacy.mechanism == "none":
        return {}
    sizes = public_sizes(config)
    return {"smallest_hospital": sizes.smallest, "largest_hospital": sizes.largest}


def _spare_rounds(config: Config, each_step_a_round: bool) -> dict[str, Any]:
    """As many spare steps as in the run, so that noise is the same."""
    return {"spare_rounds": config.privacy.spare_rounds * (config.training.local_steps if each_step_a_round else 1)}


def _each_step_a_round(config: Config) -> dict[str, Any]:
    """Values of `training` with which every local step is a round, which the aggregator's momentum goes on over."""
    return {
        "strategy": "fedsgd",
        "rounds": config.training.rounds * config.training.local_steps,
        "local_steps": 1,
        "keep_momentum": False,
        "proximal": 0.0,
        "average_last": None,
        "ema_decay": None,
        "server_learning_rate": None,
        "server_momentum": None,
        "server_adaptivity": None,
    }
