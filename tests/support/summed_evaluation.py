"""An evaluation summed on CrypTen's shares and opened by `open_to`, for tests of sums; a run's goes through a closed sum."""

from __future__ import annotations

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.learning.models.evaluation import Evaluation, decode_evaluation, encode_evaluation, evaluation_length
from mpc_fl.sharing.opening import SecretDomain, open_to
from mpc_fl.sharing.secure_sum import secure_sum


def summed_evaluation(
    domain: SecretDomain, own: Evaluation | None, classes: int, opener: str, why: str
) -> Evaluation | None:
    """The sum of all evaluations at `opener`, `None` elsewhere; parties without patients pass `None`."""
    counts = torch.zeros(evaluation_length(classes), dtype=torch.int64)
    if own is not None:
        counts = encode_evaluation(own, 100)
    shared = secure_sum(domain, Private("evaluation counts", counts), 0, "sum of evaluation counts")
    opened = open_to(domain, shared, [opener], why)
    return None if opened is None else decode_evaluation(opened.long(), classes)
