"""The stream cipher: one use per label, right distributions, no influence of torch's generator.

Statistical tests use fixed thresholds; the seeds are fresh, so each states how often it fails by chance.
"""

from __future__ import annotations

import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from tests.support.views import views

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


@pytest.mark.parametrize(("bits", "word"), [(1, "uint8"), (8, "uint8"), (9, "uint16"), (20, "uint32"), (33, "int64")])
def test_short_elements_are_the_low_bits_of_the_narrowest_words(bits: int, word: str) -> None:
    """Pins how much key stream an element takes: both ends of a pair must agree on it."""
    count = 2**20 + 3  # more than one piece
    words = Seed(bytes(32)).stream("x").words(count, np.dtype(word).type)
    elements = Seed(bytes(32)).stream("x").ring_elements((count,), bits)
    assert elements.dtype == torch.int64
    assert np.array_equal(elements.numpy(), words.astype(np.int64) & (2**bits - 1))


@pytest.mark.parametrize("bits", [0, 65])
def test_elements_have_1_to_64_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="1 .. 64"):
        Seed.from_system().stream("x").ring_elements((3,), bits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 2**18 + 1)])
def test_masks_combined_in_place_are_those_drawn_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = np.int64 if dtype == torch.int64 else np.int32
    mask = torch.from_numpy(Seed(bytes(32)).stream("x").words(int(np.prod(shape)), draw)).reshape(shape)
    start = Seed.from_system().stream("start").ring_elements(shape).to(dtype)
    for name, expected in (
        ("add_to", start + mask),
        ("subtract_from", start - mask),
        ("exclusive_or_into", start ^ mask),
    ):
        total = start.clone()
        getattr(Seed(bytes(32)).stream("x"), name)(total)
        assert torch.equal(total, expected), name


@settings(max_examples=200, deadline=None)
@given(views())
def test_masks_go_into_views_in_row_order_and_nowhere_else(view: torch.Tensor) -> None:
    """Both ends of a mask see the order of elements alone, however these lie in memory."""
    base = view if view._base is None else view._base
    draw = np.int64 if view.dtype == torch.int64 else np.int32
    mask = torch.from_numpy(Seed(bytes(32)).stream("x").words(view.numel(), draw)).reshape(view.shape)
    for name, expected in (("add_to", view + mask), ("subtract_from", view - mask), ("exclusive_or_into", view ^ mask)):
        start, elements = base.clone(), view.clone()
        getattr(Seed(bytes(32)).stream("x"), name)(view)
        assert torch.equal(view, expected), name
        view.copy_(elements)
        assert torch.equal(base, start), f"{name} changed what lies beside the view"


def test_masks_go_into_a_view_of_many_pieces() -> None:
    base = torch.zeros(3, 2**18 + 1, dtype=torch.int64)
    Seed(bytes(32)).stream("x").add_to(base.t())
    mask = torch.from_numpy(Seed(bytes(32)).stream("x").words(base.numel(), np.int64)).reshape(-1, 3)
    assert torch.equal(base, mask.t())


@pytest.mark.parametrize(
    "total",
    [
        torch.zeros(4),
        torch.zeros(4, dtype=torch.int16),
        torch.zeros(4).long().expand(3, 4),
        torch.arange(6).unfold(0, 3, 1),
    ],
    ids=["float", "16 bits", "expanded", "overlapping windows"],
)
def test_masks_go_into_integers_with_a_place_for_each_only(total: torch.Tensor) -> None:
    before = total.clone()
    with pytest.raises(ValueError, match="masks go into int64 or int32"):
        Seed.from_system().stream("x").add_to(total)
    assert torch.equal(total, before)


def test_a_label_is_used_once_among_threads() -> None:
    class SlowSet(set[bytes]):
        """Leaves time between looking a label up and adding it."""

        def __contains__(self, mark: object) -> bool:
            known = super().__contains__(mark)
            time.sleep(0.01)
            return known

    seed, gate = Seed.from_system(), threading.Barrier(4)
    seed._used = SlowSet()
    outcomes = []

    def use() -> None:
        gate.wait(timeout=10)
        try:
            seed.stream("label")
            outcomes.append("drawn")
        except SecrecyError:
            outcomes.append("refused")

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(outcomes) == ["drawn", "refused", "refused", "refused"]


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
    from mpc_fl.crypto.stream_cipher import _encode_label

    assert (_encode_label(one) == _encode_label(other)) == (one == other)


def test_seeds_are_not_shown_or_pickled() -> None:
    seed = Seed(b"k" * 32)
    assert "k" * 5 not in repr(seed)
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SecrecyError):
            duplicate(seed)


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
