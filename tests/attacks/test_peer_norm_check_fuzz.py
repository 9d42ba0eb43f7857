"""Messages of a norm check among peers in which something else stands than should: whoever sends them is named, or they do nothing.

The sender signs what it sends where that is signed, so that signatures are no help. As `test_peer_fuzz`, with a check in the sum.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from mpc_fl.aggregation import peer_norm_check, peer_sum, proof_steps, slice_totals
from mpc_fl.errors import ProtocolError, SumLostError
from mpc_fl.links.links import Links
from tests.attacks.test_peer_fuzz import JUNK, TENSORS
from tests.support.checked_peer_sums import checked_sums, expected_of, update
from tests.support.peer_sums import PeerSums, only_at

DEVIATES = "hospital-1"
WORDS = {
    "slices": ("check",),
    "heard": ("repeated", "fixed"),
    "sketch": ("number", "repeated"),
    "carries": ("number", "digest", "repeated"),
    "bits": ("number", "digest", "repeated"),
    "products": ("number", "digest", "repeated"),
    "answers": ("digest", "repeated"),
    "judged": ("repeated",),
    "accused": ("false",),
    "combinations": ("kept",),
}
PLACES = [(word, key) for word, keys in WORDS.items() for key in (*keys, "word")]


def _accuses(sums: PeerSums, patch: pytest.MonkeyPatch) -> None:
    """Its update is too long; it says that it is not, and that its first verifier answered falsely."""
    sums.summands[DEVIATES] = update(77, 10)
    only_at(patch, DEVIATES, proof_steps, "square_sum", lambda *_: 0)
    only_at(patch, DEVIATES, proof_steps.ProofSteps, "false_answers", lambda *_: ["hospital-2"])


def _require_harmless(sums: PeerSums) -> None:
    """No other hospital ends with an error that ends its run, but where nobody can tell which of two deviates."""
    outcome = sums.run()
    for name in sums.hospitals:
        if name == DEVIATES:
            continue
        error, total = outcome.errors.get(name), outcome.totals.get(name)
        if error is not None and not isinstance(error, SumLostError) and "committed to different" not in str(error):
            assert isinstance(error, ProtocolError) and error.by == DEVIATES, (name, error)
        assert error is None or str(error).isprintable()
        if total is not None:
            assert torch.equal(total, expected_of(sums, outcome.admitted[name]))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_a_word_of_a_check(place: tuple[str, str]) -> None:
    word, key = place

    @settings(max_examples=6, deadline=None)
    @given(junk=JUNK)
    def run(junk: Any) -> None:
        def signed(original: Any, domain: Any, links: Any, names: Any, subject: Any, values: Any) -> Any:
            is_it = subject.word == word and key in values
            return original(domain, links, names, subject, {**values, key: junk} if is_it else values)

        def sent(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
            is_it = value.get("word") == word and (key == "word" or "signature" not in value)
            original(links, receiver, tag, {**value, key: junk} if is_it else value)

        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            sums = checked_sums(Path(directory), patch)
            if word == "accused":
                _accuses(sums, patch)
            for where in (peer_sum, slice_totals, peer_norm_check):
                only_at(patch, DEVIATES, where, "say_signed", signed)
            only_at(patch, DEVIATES, Links, "send_object", sent)
            _require_harmless(sums)

    run()


ACCUSED = [f"accused {what}" for what in ("hospital-2", "carries", "bits", "products")]


@pytest.mark.slow
@pytest.mark.parametrize("change", range(len(TENSORS)))
@pytest.mark.parametrize("tag", ["copy", "proof carries", "proof bits", "proof products", "answers", *ACCUSED])
def test_a_tensor_of_a_check(tag: str, change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(original: Any, links: Any, receiver: str, to: str, words: torch.Tensor) -> None:
        original(links, receiver, to, TENSORS[change](words) if to.startswith(tag) else words)

    sums = checked_sums(tmp_path, monkeypatch)
    if tag in ACCUSED:
        _accuses(sums, monkeypatch)
    only_at(monkeypatch, DEVIATES, Links, "send_tensor", sent)
    _require_harmless(sums)
