"""Which party a process is, and where its files lie: by word, or by the conventions of whatever started it. Pure.

One command line then serves all processes: torchrun and PyTorch jobs on Kubernetes set RANK and WORLD_SIZE, Slurm sets
SLURM_PROCID and SLURM_NTASKS, an indexed Kubernetes job sets JOB_COMPLETION_INDEX. Rank k is the k-th of
`config.party_names`: the hospitals, then the aggregator.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import ConfigError
from mpc_fl.roles import HOSPITAL_ROLE, hospital_name, is_hospital

PLACEHOLDER = "{party}"
# Rank and number of processes. A torchrun within a Slurm job numbers the processes, Slurm only the torchruns.
_CONVENTIONS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"), ("JOB_COMPLETION_INDEX", None))


def party_of(config: Config, role: str | None, rank: int | None, environment: Mapping[str, str]) -> str:
    """The name of the party this process is to run, one of `party_names(config)`.

    `role` is a role, a party's name, or what its site called it (`federation.names`); `rank` that of a hospital, or without a
    role that of any party. What is given so wins; the environment decides only where both are None. Raises `ConfigError` for an
    unknown role or rank, for a rank and role or a number of processes and of parties that contradict each other, and when
    nothing says who this is.
    """
    names = party_names(config)
    if role is not None:
        return _by_role(names, config.federation.chosen_names.called(role) or role, rank)
    if rank is not None:
        return _by_rank(names, rank, "--rank")
    for rank_key, size_key in _CONVENTIONS:
        if environment.get(rank_key):
            if size_key is not None:
                _check_size(names, size_key, _number(environment, size_key))
            return _by_rank(names, _number(environment, rank_key), rank_key)
    raise ConfigError(
        "nothing says which party this process is",
        f"give a role (with --rank for a hospital), or start {len(names)} processes with torchrun, srun or an indexed job",
    )


def site_of(config: Config, name: str) -> Config:
    """The configuration with `{party}` in every path of `site` replaced by this party's name."""
    paths = {
        key: str(value).replace(PLACEHOLDER, name)
        for key, value in config.site
        if isinstance(value, Path) and PLACEHOLDER in str(value)
    }
    return config.with_values(site=paths) if paths else config


def _by_role(names: list[str], role: str, rank: int | None) -> str:
    hospitals = [name for name in names if is_hospital(name)]
    if role == HOSPITAL_ROLE:
        if rank is None and len(hospitals) > 1:
            raise ConfigError(
                f"there are {len(hospitals)} hospitals", f"say which with --rank 0 to {len(hospitals) - 1}"
            )
        role = hospital_name(rank or 0)
        rank = None
    if role not in names:
        raise ConfigError(f"there is no party '{role}' in this task", f"the parties are {', '.join(names)}")
    if rank is not None and rank != names.index(role):
        raise ConfigError(f"{role} has rank {names.index(role)}, not {rank}", "give the role alone")
    return role


def _by_rank(names: list[str], rank: int, source: str) -> str:
    if not 0 <= rank < len(names):
        raise ConfigError(
            f"{source} is {rank}, the {len(names)} parties have ranks 0 to {len(names) - 1}", _listed(names)
        )
    return names[rank]


def _check_size(names: list[str], key: str, size: int) -> None:
    if size != len(names):
        raise ConfigError(f"{key} is {size}, the configuration has {len(names)} parties", _listed(names))


def _listed(names: list[str]) -> str:
    return f"start one process for each of {', '.join(names)}"


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{key} is {text[:20]!r}, not a number", f"let the launcher set {key}, or give a role")
    return int(text)
