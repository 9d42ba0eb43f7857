"""What a party holds of the global model, as digests: every sum is bound to the model that its summands were made with.

A hospital takes them from what it received, the aggregator from what it sent. Hospitals that were given different models
have different digests, so different transcripts (`aggregation.transcript`), and masks that do not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import Scalar
from mpc_fl.config.config import Config


@dataclass
class ModelDigests:
    """SHA-256 of the global parameters, the frozen statistics, the normalisation of inputs, and what calibrates the final
    model; empty before there are any."""

    parameters: str = ""
    statistics: str = ""
    normalisation: str = ""
    calibration: str = ""

    def take(self, **tensors: torch.Tensor | None) -> None:
        """Take the digest of each of these tensors in its place: `parameters`, `statistics`, `normalisation` or `calibration`."""
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self, name, tensor_digest(tensor))


def sum_terms(config: Config, weight_total: int, digests: ModelDigests) -> dict[str, Scalar]:
    """What shapes the summands of a training run's sums, as this party holds it (`AgreedSum.seen`)."""
    return {
        "session": config.federation.session,
        "configuration": config.digest(),
        "weight total": weight_total,
        **vars(digests),
    }
