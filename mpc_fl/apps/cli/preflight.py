"""Before a process of a training run starts: all that can be refused, and what there is to say of data, features and ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpc_fl.apps.cli.options import say, say_beside
from mpc_fl.apps.formats import size
from mpc_fl.errors import DataError, MpcFlError

if TYPE_CHECKING:
    from mpc_fl.apps.estimates import TrainingEstimate
    from mpc_fl.config.config import Config
    from mpc_fl.federation.ledger_forecast import LedgerForecast
    from mpc_fl.learning.data.loading import SharedPatients


def shared_patients_of(config: Config) -> SharedPatients:
    """Test patients that train somewhere, too."""
    from mpc_fl.learning.data.loading import shared_patients

    return shared_patients(config)


def about_features(config: Config) -> str | None:
    """Whether features of images, or what the trained layers read, will be read or computed; None where there are none."""
    if config.data.features is None and not config.training.computes_frozen_part_once:
        return None  # without torch
    from mpc_fl.learning.models import feature_cache

    return feature_cache.about_features(config)


def say_features(config: Config) -> None:
    """Say so, where there are any."""
    about = about_features(config)
    if about is not None:
        say(about)


def packages_of(config: Config) -> dict[str, str]:
    """Installed packages whose code the configuration runs, by the setting that names them."""
    from mpc_fl.installed_code import is_reference, package_of
    from mpc_fl.learning.data.loaders import loader_package

    loader, network = loader_package(config), config.model.architecture
    named = {} if loader is None else {"data.source": str(loader)}
    return named | ({"model.architecture": str(package_of(network))} if is_reference(network) else {})


def refuse_shared_patients(config: Config) -> None:
    """Raise `DataError` naming them, where the configuration says so."""
    found = shared_patients_of(config) if config.data.shared_patients == "refuse" else None
    if found is not None and found.names:
        raise DataError(found.described, "part the patients, or set data.shared_patients to leave_out or keep")


def say_shared_patients(config: Config, as_json: bool) -> None:
    """Name test patients that train somewhere, and say what becomes of them; on standard error beside JSON."""
    found = shared_patients_of(config)
    if found.names:
        become = "they stay in the test set" if config.data.shared_patients == "keep" else "left out of the test set"
        say_beside(f"{found.described}; {become} (data.shared_patients).", as_json)


def forecasts_of(config: Config, found: TrainingEstimate, at: str | None = None) -> list[LedgerForecast]:
    """What privacy ledgers that outlive runs leave for this one, where they hold something: of the hospital `at`, or all."""
    from mpc_fl.federation.ledger_forecast import ledger_forecast

    if config.site.privacy_ledger is None:
        return []
    lines = [line for line in found.privacy if at in (None, line.hospital)]
    forecasts = (ledger_forecast(config, line.hospital, line.patients) for line in lines)
    return [forecast for forecast in forecasts if forecast is not None]


def preflight(
    config: Config, resume: bool = False, patients: list[int] | None = None, at: str | None = None
) -> TrainingEstimate | None:
    """Everything that can be refused before a process starts. Raises the error the run would raise.

    `patients`: training patients of each hospital, where they are known already, or of the one hospital `at` by itself. What a
    run that goes on may still release follows from the hospitals' ledgers (None for it): they plan it themselves.
    """
    from mpc_fl.apps.runs.curves import require_watchers
    from mpc_fl.apps.runs.estimate import estimate_training
    from mpc_fl.apps.runs.party_process import require_site_allows
    from mpc_fl.federation.feature_statistics import plan_features, require_enough_patients
    from mpc_fl.federation.planning import headroom_of
    from mpc_fl.learning.data.loading import patients_per_hospital
    from mpc_fl.learning.data.records import is_one_hospitals
    from mpc_fl.learning.device import device_of
    from mpc_fl.learning.models.earlier_model import begun_anew
    from mpc_fl.learning.models.feature_extractor import require_weights

    require_site_allows(config, at, by_itself=at is not None)
    headroom_of(config).require()
    device_of(config)
    require_watchers(config)
    require_weights(config)
    if config.model.initial_weights is not None:
        begun_anew(config)
    refuse_shared_patients(config)
    if patients is None:
        patients = patients_per_hospital(config)
    alone = at if is_one_hospitals(config) else None
    if config.data.normalise == "secure" and alone is None:
        require_enough_patients(plan_features(config), sum(patients), before=True)
    return None if resume else estimate_training(config, patients, alone)


def require_memory(config: Config, found: TrainingEstimate) -> None:
    """Of this machine: for all parties when the launcher runs them here, for one hospital when the others have addresses."""
    from mpc_fl.apps.runs.estimate import available_memory, memory_here, parties_here

    parties = parties_here(config)
    needed, available = memory_here(config, found.memory_bytes_per_hospital), available_memory()
    if available is not None and needed > available:
        raise MpcFlError(
            f"{parties} {'parties need' if parties > 1 else 'party needs'} about {size(needed)} of memory together, "
            f"{size(available)} are available",
            "use fewer hospitals, a smaller training.batch_size, or training.per_sample_gradients=loop",
        )
