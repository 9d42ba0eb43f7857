"""Runs to audit that cost little: one step over everybody, or a few, and seeds that make an audit the same each time."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest

from mpc_fl.apps.audit_summary import BoundFound
from mpc_fl.apps.auditing.audited_config import AuditedRun
from mpc_fl.apps.auditing.privacy_audit import AuditPlan, PrivacyAudit, audit_privacy
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.stream_cipher import Seed

NOISE = 2.3  # one step over everybody costs epsilon 1.45 at delta 1e-4


def same_seeds(monkeypatch: pytest.MonkeyPatch, begin: int = 0) -> None:
    """Let seeds of the system be a fixed sequence: which canaries are in, and all noise."""
    numbers = itertools.count(begin * 1000)
    monkeypatch.setattr(Seed, "from_system", lambda: Seed(hashlib.sha256(b"audit %d" % next(numbers)).digest()))


def audited(mechanism: str, **training: Any) -> Config:
    """A run of three hospitals of 100 patients and more, of whom a step takes everybody unless `training` says otherwise."""
    steps = {"rounds": 1, "local_steps": 1, "batch_size": 100, "per_sample_gradients": "hooks", **training}
    private = {} if mechanism == "none" else {"smallest_hospital": 100}
    privacy = {"mechanism": mechanism, "delta": 1e-4, "epsilon": 8.0, "spare_rounds": 0, **private}
    return parse_config({"name": "audited", "training": steps, "privacy": privacy}, "test")


def audit(config: Config, canaries: int, repetitions: int, of_patients: bool = True) -> PrivacyAudit:
    """An audit with so many canaries in each repetition."""
    noise = None if config.privacy.mechanism == "none" else NOISE
    return audit_privacy(AuditPlan(AuditedRun(config, noise, canaries), repetitions, of_patients), lambda *_: None)


def contradictions(found: PrivacyAudit) -> list[BoundFound]:
    """Lower bounds that exceed the accountant's."""
    return [bound for bound in found.bounds if bound.contradicts]
