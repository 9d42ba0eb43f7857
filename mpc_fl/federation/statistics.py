"""Secure statistics: evaluation of the global model over all hospitals, from one sum of hidden counts.

Each hospital counts on its own test patients (`evaluation`); the secure sum of the counts is opened, no hospital's own
numbers are. The opened counts carry no noise: they concern the held-out test patients and are stated in
docs/threat-model.md. Statistics of training patients are in `feature_statistics`.
"""

from __future__ import annotations

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.learning.models.evaluation import (
    SCORE_BINS,
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
    require_evaluation_headroom,
)
from mpc_fl.sharing.opening import SecretDomain, open_to
from mpc_fl.sharing.secure_sum import secure_sum

__all__ = ["SCORE_BINS", "Evaluation", "evaluate_locally", "secure_evaluation"]


def secure_evaluation(
    domain: SecretDomain, own: Private[Evaluation] | None, classes: int, count_bound: int, opener: str, why: str
) -> Evaluation | None:
    """Sum all hospitals' evaluations and open the sum to `opener`; parties without patients pass `None`.

    One opening of `evaluation_length(classes)` counts. Raises `HeadroomError` when a count exceeds `count_bound` or sums
    could be inexact, before anything is sent.
    """
    require_evaluation_headroom(len(domain.runtime.world), count_bound)
    if own is None:
        counts = torch.zeros(evaluation_length(classes), dtype=torch.int64)
    else:
        counts = encode_evaluation(own.inside_protocol(), count_bound)
    shared = secure_sum(domain, Private("evaluation counts", counts), 0, "sum of evaluation counts")
    opened = open_to(domain, shared, [opener], why)
    return None if opened is None else decode_evaluation(opened.long(), classes)
