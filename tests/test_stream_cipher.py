"""The stream cipher: one use per label, right distributions, no influence of torch's generator.

Statistical tests use fixed thresholds; the seeds are fresh, so each states how often it fails by chance.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.errors import SecrecyError
from mpc_fl.stream_cipher import Seed

FALSE_ALARM = 1e-7


def test_known_answer() -> None:
    """Pins derivation and cipher: parties of different versions must not draw different masks unnoticed."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    label = b"s" + (4).to_bytes(4, "little") + b"mask" + b"i" + (1).to_bytes(4, "little") + b"7"
    derived = hmac.new(key, b"mpc-fl stream" + label + b"\x01", hashlib.sha256).digest()
    expected = Cipher(algorithms.AES256(derived), modes.CTR(bytes(16))).encryptor().update(bytes(800))
    assert Seed(key).stream("mask", 7).words(100, np.int64).tobytes() == expected


def test_same_seed_and_label_give_the_same_values_and_others_do_not() -> None:
    key = bytes(32)
    first = Seed(key).stream("a", 1).ring_elements((1000,))
    assert torch.equal(first, Seed(key).stream("a", 1).ring_elements((1000,)))
    for other in (Seed(key).stream("a", 2), Seed(key).stream("a", "1"), Seed(key).derive("a", 1).stream("a", 1)):
        assert not torch.equal(first, other.ring_elements((1000,)))


def test_a_label_is_used_once() -> None:
    seed = Seed.from_system()
    seed.stream("round", 1)
    with pytest.raises(SecrecyError, match="used twice"):
        seed.stream("round", 1)
    seed.derive("round", 1)
    with pytest.raises(SecrecyError, match="used twice"):
        seed.derive("round", 1)


@given(
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
)
def test_labels_are_encoded_injectively(one: list[str | int], other: list[str | int]) -> None:
    from mpc_fl.stream_cipher import _encode_label

    assert (_encode_label(one) == _encode_label(other)) == (one == other)


def test_seeds_are_not_shown_or_pickled() -> None:
    seed = Seed(b"k" * 32)
    assert "k" * 5 not in repr(seed)
    with pytest.raises(SecrecyError):
        pickle.dumps(seed)


def test_torch_seed_has_no_influence() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(Seed.from_system().stream("x").ring_elements((64,)))
    assert not torch.equal(*draws)


@pytest.mark.parametrize("bits", [1, 8, 20, 64])
def test_ring_elements_are_uniform(bits: int) -> None:
    values = Seed.from_system().stream("x").ring_elements((200_000,), bits).numpy().view(np.uint64)
    top = (values >> np.uint64(max(0, bits - 8))) & np.uint64(255)
    observed = np.bincount(top.astype(np.int64), minlength=min(256, 2**bits))
    assert stats.chisquare(observed).pvalue > FALSE_ALARM
    assert bits == 64 or int(values.max()) < 2**bits


def test_below_is_uniform_and_in_range() -> None:
    values = Seed.from_system().stream("x").below(100, 100_000)
    assert values.min() >= 0 and values.max() < 100
    assert stats.chisquare(np.bincount(values, minlength=100)).pvalue > FALSE_ALARM


def test_gaussian_has_the_normal_distribution() -> None:
    values = Seed.from_system().stream("x").gaussian((200_001,)).numpy()
    assert values.shape == (200_001,)
    assert stats.kstest(values, "norm").pvalue > FALSE_ALARM
    assert abs(values.std() - 1) < 5.5 / np.sqrt(2 * len(values))  # 5.5 standard errors: 4e-8
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5.5 / np.sqrt(len(values))


def test_empty_shapes() -> None:
    stream = Seed.from_system().stream("x")
    assert stream.ring_elements((0, 3)).shape == (0, 3)
    assert stream.gaussian((0,)).shape == (0,)
