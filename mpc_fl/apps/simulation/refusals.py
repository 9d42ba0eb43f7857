"""What a simulation cannot do yet, said in one line before anything starts: nothing that was asked for is left out in silence."""

from __future__ import annotations

from pathlib import Path

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError


def require_simulable(config: Config) -> None:
    """Raise `ConfigError` for a configuration that asks for what only real parties have, naming the setting."""
    federation, site = config.federation, config.site
    refused: dict[str, tuple[bool, str]] = {
        "federation.coordinator none": (
            config.among_peers,
            "set it to aggregator: the model is the same, bit for bit, with noise off",
        ),
        "aggregation.norm_check": (config.aggregation.norm_check, "set it to false"),
        "evaluation.groups": (bool(config.evaluation.groups.attributes), "leave it out"),
        "runtime.restarts": (config.runtime.restarts > 0, "set it to 0: no hospital is lost"),
        "federation.evaluate_incomplete": (federation.evaluate_incomplete, "set it to false: no hospital is lost"),
        "site.train_alone": (site.train_alone, "leave it out: this is for a hospital of its own"),
        "site.resume": (site.resume, "leave it out, and begin anew"),
        "site.privacy_ledger": (
            site.privacy_ledger is not None,
            "leave it null: what a simulation spends counts in the run alone",
        ),
        "site.watch": (bool(site.watch), "leave it empty"),
        "site.training_processes": (site.training_processes > 1, "set it to 1: hospitals share the processors"),
        "site.device": (site.device != "cpu", "set it to cpu"),
        "site.feature_cache": (isinstance(site.feature_cache, Path), "set it to memory"),
        "site.data_of hospital": (site.data_of == "hospital", "leave it null: the data are divided over all hospitals"),
    }
    for what, (asked, fix) in refused.items():
        if asked:
            raise ConfigError(f"a simulation has no {what}", fix)
