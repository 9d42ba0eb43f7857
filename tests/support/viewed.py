"""Runs whose views are audited, small enough for a test, and records of messages made without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.message_record import MESSAGES_DIRECTORY, MessageRecord
from mpc_fl.roles import AGGREGATOR


def viewed(mechanism: str = "none", **federation: Any) -> Config:
    """A run of three hospitals on phantoms of 8 x 8 whose updates have 1,067 words."""
    values: dict[str, Any] = {
        "name": "viewed",
        "data": {"image_size": 8, "phantoms": {"train_patients": 60, "test_patients": 12}},
        "model": {"architecture": "mlp", "hidden": [16]},
        "training": {"rounds": 2, "local_steps": 1, "batch_size": 8, "per_sample_gradients": "vmap"},
        "privacy": {"mechanism": mechanism},
        "federation": federation,
    }
    return parse_config(values, "test")


def record_at(run: Path, party: str = AGGREGATOR) -> MessageRecord:
    """An empty record of one party of a run."""
    return MessageRecord(run / "parties" / party / MESSAGES_DIRECTORY, 1 << 24)


def tensor_frame(tag: str, payload: torch.Tensor) -> Frame:
    """A message that holds a tensor."""
    return Frame(Kind.TENSOR, tag, 0, payload, payload.numel() * payload.element_size())
