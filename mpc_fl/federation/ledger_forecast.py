"""What a hospital's privacy ledger leaves for a run, said before it: used, left, and the noise that the run would have.

Noise is calibrated to what is left of the budget, so a run on a ledger that is nearly spent is drowned in it. A person decides
whether such a run is worth what it spends. Nothing here leaves the hospital.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.config.config import Config
from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.federation.planning import plan_release, run_name
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.links.party_links import site_directory

NEARLY_SPENT = 2.0  # times the noise of an empty ledger, from which on a run is to be asked for


def privacy_ledger_of(config: Config, name: str) -> PrivacyLedger:
    """The privacy ledger of hospital `name`, over all its runs. Raises `ConfigError` where nothing says where it lies."""
    path = (config.site.privacy_ledger or site_directory(config)) / f"{name}-privacy.sqlite3"
    return PrivacyLedger(path, name, config.data.counted_unit)


@dataclass(frozen=True)
class LedgerForecast:
    """Epsilon `used` of `target` by all runs in a ledger, and the noise multipliers of this run with it and with an empty one."""

    hospital: str
    used: float
    target: float
    noise_multiplier: float
    with_an_empty_ledger: float

    @property
    def times(self) -> float:
        """How many times as much noise as with an empty ledger."""
        return self.noise_multiplier / self.with_an_empty_ledger

    @property
    def described(self) -> str:
        """In a sentence."""
        noises = (
            f"the noise multiplier is {self.noise_multiplier:.3g}, with an empty ledger {self.with_an_empty_ledger:.3g}"
        )
        used, left = f"epsilon {self.used:.3g} of {self.target:g} is used", f"{self.target - self.used:.3g} is left"
        return f"{self.hospital}: of the privacy ledger {used}, {left}; {noises}"

    @property
    def is_nearly_spent(self) -> bool:
        """Whether the noise is more than `NEARLY_SPENT` times that with an empty ledger."""
        return self.times > NEARLY_SPENT

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return {**asdict(self), "nearly_spent": self.is_nearly_spent}

    def require_worth(self) -> None:
        """Raise `PrivacyBudgetError` where the ledger is nearly spent."""
        if self.is_nearly_spent:
            raise PrivacyBudgetError(
                f"{self.described}: {self.times:.1f} times as much",
                "say --anyway for a run of little use, or agree on a larger privacy.epsilon; nothing was spent",
            )


def ledger_forecast(config: Config, name: str, patients: int) -> LedgerForecast | None:
    """What the ledger of hospital `name` leaves for a run over `patients`; None without privacy, or where it holds nothing.

    Reads the ledger and charges nothing. Raises what `planning.plan_release` raises, and `PrivacyBudgetError` for a ledger
    that is damaged, or over which no epsilon holds any more.
    """
    if config.privacy.mechanism == "none":
        return None
    ledger = privacy_ledger_of(config, name)
    # What a run of this session has reserved and not released it makes anew; without a session it is another run's.
    spent = ledger.spent(run_name(config) if config.federation.session else None)
    if not spent:
        return None
    planned, fresh = (plan_release(config, patients, past, name) for past in (spent, []))
    assert planned is not None and fresh is not None  # there is a mechanism
    used = ledger.epsilon(config.privacy.delta, config.privacy.accountant)
    return LedgerForecast(name, used, config.privacy.epsilon, planned.noise_multiplier, fresh.noise_multiplier)
