"""What a session with a standing model owner is for, as its name says, and what its parties must agree on beforehand."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from mpc_fl.config.config import Config
from mpc_fl.config.data import DataSection
from mpc_fl.roles import is_hospital

TASK = "serve"  # what parties of a served session agree to do

_SESSION = re.compile(r"([^/]+)/(fill-)?[0-9a-f]{32}")


@dataclass(frozen=True)
class Visit:
    """What a session is for: a hospital asks about images, or fills its pool. At most one of each at a time."""

    hospital: str
    purpose: Literal["diagnose", "fill"] = "diagnose"

    def new_session(self) -> str:
        """A fresh name of a session: 'hospital-2/<32 hex digits>', or 'hospital-2/fill-<32 hex digits>'."""
        return f"{self.hospital}/{'fill-' if self.purpose == 'fill' else ''}{secrets.token_hex(16)}"

    @classmethod
    def of_session(cls, session: str) -> Visit | None:
        """What a session's name says; None when it is no session's name."""
        found = _SESSION.fullmatch(session)
        if found is None or not is_hospital(found.group(1)):
            return None
        return cls(found.group(1), "fill" if found.group(2) else "diagnose")

    def __str__(self) -> str:
        return self.hospital if self.purpose == "diagnose" else f"{self.hospital}, filling its pool"


def service_digest(config: Config) -> str:
    """SHA-256, as hex, of what a hospital and a standing model owner must agree on, and that is held against the model's file.

    Which images a hospital asks about is its own matter, how they become inputs is not.
    What is revealed is the model owner's choice: it tells it when a session begins (`receipt_exchange`).
    """
    inference, data = config.inference, config.data
    shared: dict[str, Any] = {
        "inputs": [list(data.input_shape), list(data.classes), data.normalise],
        "inference": [inference.engine, inference.batch_size],
        "model": config.model.model_dump(mode="json"),
    }
    if config.evaluation.calibrate != "none":  # the hospital is told with what
        shared["calibrate"] = config.evaluation.calibrate
    films, usual = ([of.not_square, of.frame] for of in (data, DataSection()))
    if films != usual:  # earlier versions did not say it
        shared["films"] = films
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
