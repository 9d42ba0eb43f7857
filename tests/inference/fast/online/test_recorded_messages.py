"""A whole evaluation, for the same seeds, with every instruction set and without: the same messages, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast.kernels import compiled, integer_linear
from mpc_fl.inference.fast.kernels.linear import linear_maps, weight_masks
from mpc_fl.inference.fast.network import encode_silently
from mpc_fl.inference.fast.online import comparison
from mpc_fl.inference.fast.online.evaluation import (
    EvaluationLink,
    HospitalEvaluation,
    OwnerEvaluation,
    as_channels_last,
    empty_share,
)
from mpc_fl.inference.fast.preprocessing import gate_correction
from mpc_fl.inference.fast.preprocessing.correlations import (
    corrections_of,
    correlation_plan,
    hospital_correlations,
    owner_correlations,
)
from mpc_fl.links.links import Links
from tests.inference.fast.online.test_evaluation import HOSPITAL, OWNER, Views, images, small
from tests.support.compiled_kernels import SETS, needs_library
from tests.support.harness import run_parties_in_memory

RECORDS = 3
KEYS = {HOSPITAL: bytes(31) + b"h", OWNER: bytes(31) + b"o", "weights": bytes(31) + b"w"}


def forget_choices() -> None:
    for choice in (
        compiled.kernels,
        integer_linear._fast_methods,
        comparison.fastest_steps,
        gate_correction.fastest_correction,
    ):
        choice.cache_clear()
    integer_linear._chosen.clear()


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    yield
    forget_choices()


def evaluation(links: Links) -> bytes:
    """One party's share of the logits; the correlations are those of fixed seeds."""
    network, integers = small()
    plan = correlation_plan(network, RECORDS, "logits")
    masks = linear_maps(network, weight_masks(network, Seed(KEYS["weights"])))
    link = EvaluationLink(links, OWNER if links.name == HOSPITAL else HOSPITAL, 0)
    if links.name == HOSPITAL:
        masked = {name: integers.weights[name] - weight_masks(network, Seed(KEYS["weights"]))[name] for name in masks}
        made = hospital_correlations(plan, Seed(KEYS[HOSPITAL]), linear_maps(network, masked))
        elements = encode_silently(network, torch.from_numpy(images(RECORDS))).numpy().view(np.uint32)
        return HospitalEvaluation(network, link, made).evaluate(as_channels_last(elements)).tobytes()
    corrections = dict(corrections_of(plan, Seed(KEYS[HOSPITAL]), Seed(KEYS[OWNER]), masks))
    owned = owner_correlations(plan, Seed(KEYS[OWNER]), corrections)
    weights = linear_maps(network, integers.weights)
    party = OwnerEvaluation(network, link, owned, weights, integers)
    return party.evaluate(empty_share(network, RECORDS)).tobytes()


def recorded(kernels: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bytes]]:
    """All tensors that both received, and their shares of the logits."""
    monkeypatch.setenv(compiled.VARIABLE, kernels)
    forget_choices()
    views = Views()
    shares = run_parties_in_memory(evaluation, [HOSPITAL, OWNER], prepare=views.watch)
    assert (compiled.kernels().used is None) == (kernels == "off")
    messages = [
        (receiver, tag, payload.tobytes())
        for receiver in (HOSPITAL, OWNER)
        for _, tag, payload in views.of[receiver]
        if isinstance(payload, np.ndarray)
    ]
    return [*messages, *((name, "share", shares[name]) for name in (HOSPITAL, OWNER))]


@needs_library
def test_messages_with_kernels_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorded("off", monkeypatch)
    assert len(expected) > 40 and sum(len(message) for _, _, message in expected) > 10_000
    for by in SETS:
        assert recorded(by.name, monkeypatch) == expected, by.name
