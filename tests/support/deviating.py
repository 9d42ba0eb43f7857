"""A federation of real processes of which some deviate: every other party runs its unmodified program.

A deviation is a function of a test module; it runs in the process of its party before the party's program and replaces
what it likes there. It writes what it got to the directory `evidence`, which the test reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.errors import MpcFlError
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.support.harness import SPAWN

Deviation = Callable[[Path], None]
HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 16,
        "per_sample_gradients": "vmap",
    },
    "privacy": {"mechanism": "local", "noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 50.0},
    "runtime": {"connect_timeout": 60.0, "receive_timeout": 40.0},
}


def run_and_report(name: str, config: Config, results: Any) -> None:
    """Run a party's program in this process as its site does, say how it ended, and exit as it would."""
    from mpc_fl.apps.runs.party_process import run_party

    try:
        run_party(name, config, lambda *_: None)
    except MpcFlError as error:
        code, said = error.exit_code, str(error)
    except Exception as error:  # noqa: BLE001 - a defect, or a deviating party, which may end as it likes
        code, said = 1, f"{type(error).__name__}: {error}"
    else:
        code, said = 0, "finished"
    results.put((name, said))
    if code:
        results.close()
        results.join_thread()  # os._exit would drop what is still queued
        os._exit(code)


def _party(name: str, values: dict[str, Any], deviation: Deviation | None, evidence: Path, results: Any) -> None:
    from mpc_fl.apps.runs.party_process import set_up_log

    config = parse_config(values, name)
    set_up_log(config.site.log)
    if deviation is not None:
        deviation(evidence)
    run_and_report(name, config, results)


class Federation:
    """Three hospitals and an aggregator on this machine, each in a process of its own."""

    def __init__(self, directory: Path, **changes: dict[str, Any]) -> None:
        from mpc_fl.apps.runs.local_parties import place_parties

        values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
        self.config = parse_config(values, "test")
        self.directory = directory
        self.placed = place_parties(self.config, directory)
        self.evidence = directory / "evidence"
        self.evidence.mkdir()

    def run(self, deviations: Mapping[str, Deviation], resume: bool = False, timeout: float = 120.0) -> dict[str, str]:
        """Run all parties to their end; what each said last, "" where it was killed."""
        results = SPAWN.Queue()
        processes = {}
        for name in party_names(self.config):
            values = self.placed[name].with_values(site={"resume": resume}).model_dump(mode="json")
            arguments = (name, values, deviations.get(name), self.evidence, results)
            processes[name] = SPAWN.Process(target=_party, args=arguments, name=name)
            processes[name].start()
        said: dict[str, str] = {}
        try:
            for name, process in processes.items():
                process.join(timeout=timeout)
                assert process.exitcode is not None, f"{name} did not end; so far {said}"
                if process.exitcode < 0:
                    said[name] = ""
            while set(said) != set(processes):
                name, words = results.get(timeout=10)
                said[name] = words
        finally:
            for process in processes.values():
                if process.is_alive():
                    process.kill()
                process.join()
        return said

    def party(self, name: str) -> Path:
        """The directory of a party."""
        return self.directory / "parties" / name

    def charges(self, name: str) -> list[dict[str, Any]]:
        """The records of a hospital's privacy ledger that count as released."""
        records = PrivacyLedger(self.party(name) / f"{name}-privacy.sqlite3", name).records()
        return [record for record in records if record["released"]]

    def openings(self, name: str) -> list[dict[str, Any]]:
        """What a party recorded before it opened it."""
        path = self.party(name) / OPENINGS_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
