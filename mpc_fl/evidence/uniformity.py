"""Whether words are as uniform and as independent of others as masked ones must be: statistical tests, held together. Pure.

Each test gives a p-value: how probable words that are uniform and independent are to look so odd, or odder. Of one sequence of
words of k bits:

- **bytes** and **bits**: how often each value of a byte comes, and a one at each place of a word (chi-square).
- **runs**: how often neighbouring bits differ (Wald and Wolfowitz 1940; NIST SP 800-22, section 2.3).
- **serial correlation** of each word with the one after it, both read as fractions of 2^k (Knuth, TAOCP 2, section 3.3.2).

Of two sequences, `difference` is their difference in the ring, tested like one sequence: of two that carry the same mask it is
that of what was masked, and small. `correlation` is that of words with numbers, or with other words. `equal bits` says how often
the bits of two sequences agree at each place.

Many tests of one run are held at one level by Holm (1979): the probability that any of them is rejected though all words are as
they must be is at most that level, whatever depends on what. What passes is not proved to be uniform: these tests see what is
crude, and masks that were left out, used twice, or short are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mpc_fl.learning.models.shares import holm

FEWEST_WORDS = 1280  # below, a chi-square over 256 values of a byte has fewer than five expected at each
_BYTES = 256


def _chi_square_tail(statistic: float, freedom: int) -> float:
    """P[chi-square of so many degrees of freedom >= statistic]."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _normal_tail(score: float) -> float:
    """P[|N(0, 1)| >= |score|]."""
    return math.erfc(abs(score) / math.sqrt(2))


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """Ring elements int32 or int64, or bytes, of any shape, as unsigned words in row order, shape (count,).

    Raises `ValueError` for tensors of numbers that are no words.
    """
    unsigned = {torch.int32: np.uint32, torch.int64: np.uint64, torch.uint8: np.uint8}
    if tensor.dtype not in unsigned:
        raise ValueError(f"{tensor.dtype} are no words")
    return np.asarray(tensor.contiguous().numpy().reshape(-1).view(unsigned[tensor.dtype]))


def _ones_at_places(words: np.ndarray) -> np.ndarray:
    """How many words have a one at each place, the lowest first, int64 (bits,)."""
    bits = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
    return bits.sum(axis=0, dtype=np.int64)


def _bits_test(ones: np.ndarray, count: int) -> float:
    scores = (2 * ones - count) / math.sqrt(count)
    return _chi_square_tail(float((scores**2).sum()), len(ones))


def _fractions(words: np.ndarray) -> np.ndarray:
    """Words as fractions of 2^k less a half, times the root of 12: mean 0 and variance 1 where they are uniform."""
    return ((words.astype(np.float64) + 0.5) / 2.0 ** (8 * words.itemsize) - 0.5) * math.sqrt(12)


def byte_frequencies(words: np.ndarray) -> float:
    """The p-value of how often each value of a byte comes."""
    counts = np.bincount(words.view(np.uint8), minlength=_BYTES)
    expected = words.nbytes / _BYTES
    return _chi_square_tail(float(((counts - expected) ** 2).sum() / expected), _BYTES - 1)


def bit_frequencies(words: np.ndarray) -> float:
    """The p-value of how many words have a one at each place."""
    return _bits_test(_ones_at_places(words), len(words))


def runs_of_bits(words: np.ndarray) -> float:
    """The p-value of how often neighbouring bits differ."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    changes, most = int(np.count_nonzero(bits[1:] != bits[:-1])), len(bits) - 1
    return _normal_tail((2 * changes - most) / math.sqrt(most))


def correlation(words: np.ndarray, numbers: np.ndarray) -> float:
    """The p-value of the correlation of words, which are uniform, with as many numbers that do not depend on them.

    Numbers that are all equal correlate with nothing: 1.
    """
    centred = numbers - numbers.mean()
    length = float(np.linalg.norm(centred))
    return 1.0 if length == 0 else _normal_tail(float(_fractions(words) @ centred) / length)


def serial_correlation(words: np.ndarray) -> float:
    """The p-value of the correlation of each word with the one after it."""
    fractions = _fractions(words)
    return _normal_tail(float(fractions[:-1] @ fractions[1:]) / math.sqrt(len(words) - 1))


def equal_bits(words: np.ndarray, others: np.ndarray) -> float:
    """The p-value of how often the bits of two sequences of words agree, at each place."""
    return _bits_test(_ones_at_places(words ^ others), len(words))


def p_values_of_one(words: np.ndarray) -> dict[str, float]:
    """p-values by test of one sequence of unsigned words (count,). Raises `ValueError` for fewer than `FEWEST_WORDS` bytes."""
    if words.nbytes < FEWEST_WORDS:
        raise ValueError("too few words to tell anything")
    return {
        "bytes": byte_frequencies(words),
        "bits": bit_frequencies(words),
        "runs": runs_of_bits(words),
        "serial correlation": serial_correlation(words),
    }


def p_values_of_two(words: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """p-values by test of two sequences that should not depend on each other, the first uniform; unsigned (count,) each.

    Raises `ValueError` for sequences of different lengths or words, and too short ones.
    """
    if words.shape != others.shape or words.dtype != others.dtype:
        raise ValueError("sequences that are compared have the same length and words")
    of_difference = p_values_of_one(words - others)
    return {
        "difference: bytes": of_difference["bytes"],
        "difference: bits": of_difference["bits"],
        "difference: runs": of_difference["runs"],
        "correlation": correlation(words, _fractions(others)),
        "equal bits": equal_bits(words, others),
    }


def rejected(p_values: Sequence[float], level: float) -> list[bool]:
    """Which tests are rejected so that with probability 1 - `level` none of those is that should hold (Holm 1979)."""
    return [corrected <= level for corrected in holm(p_values)]
