"""Whose data a party by itself has, and whether it may begin with them: before it dials anybody."""

from __future__ import annotations

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.federation.planning import require_smallest_site
from mpc_fl.learning.data.loading import patients_per_hospital
from mpc_fl.learning.data.records import is_one_hospitals
from mpc_fl.roles import is_hospital, split_name


def with_own_data(config: Config, name: str) -> Config:
    """The configuration of the party `name` that runs by itself: all that `site.data` holds is its own, unless it says otherwise.

    Raises `ConfigError` where a division is configured that would then have no effect.
    """
    if not is_hospital(name) or config.site.data_of is not None:
        return config
    own = config.with_values(site={"data_of": "hospital"})
    if is_one_hospitals(own) and config.data.partition.method == "dirichlet":
        raise ConfigError(
            "data.partition.method dirichlet divides one folder over simulated hospitals, and this one takes its whole folder",
            "remove data.partition, or set site.data_of to federation where all hospitals read the same folder",
        )
    return own


def own_patients(config: Config, name: str) -> int:
    """Training patients of hospital `name`, once it is clear that it can read its data and has enough of them.

    Raises what `load_hospital` would raise, and `DataError` for fewer patients than `federation.smallest_site`.
    """
    _, rank = split_name(name)
    counts = patients_per_hospital(config)
    patients = counts[0 if is_one_hospitals(config) else rank]
    require_smallest_site(config, patients, name)
    return patients
