"""Compiled kernels are exact with every instruction set, a wrong one is never used, and nothing fails where there are none."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mpc_fl.errors import ConfigError
from mpc_fl.inference.fast.kernels import compiled
from mpc_fl.inference.fast.kernels.compiled import CompiledConvolution, InstructionSet
from tests.inference.fast.kernels.test_integer_linear import EXTREMES, elements, exact, geometries
from tests.support.compiled_kernels import LIBRARY, SETS, needs_library

torch.set_num_threads(1)

PLAIN = ((1, 1), (0, 0), (1, 1), 1)
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def convolved(by: InstructionSet, weights: torch.Tensor, images: torch.Tensor, *geometry: object) -> torch.Tensor:
    """By the library; the size of the result is that of torch's convolution."""
    size = functional.conv2d(images[:1].float(), weights.float(), None, *geometry).shape[2:]  # type: ignore[arg-type]
    return CompiledConvolution(by, weights, *geometry)(images, (size[0], size[1]))  # type: ignore[arg-type]


@needs_library
@settings(max_examples=150, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 1 << 30), last=st.booleans())
def test_convolutions_are_exact_for_every_geometry(
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[object, ...]], seed: int, last: bool
) -> None:
    weight_shape, image_shape, options = geometry
    draw = torch.Generator().manual_seed(seed)
    weights, images = elements(draw, *weight_shape), elements(draw, *image_shape)
    expected = exact(weights, images, *options)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    for by in SETS:
        assert torch.equal(convolved(by, weights, images, *options), expected), by.name


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 50),
    multiplicity=st.sampled_from([1, 1, 1, 2]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 1 << 30),
)
def test_depthwise_convolutions_are_exact(
    channels: int, multiplicity: int, kernel: int, stride: int, padding: int, dilation: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights, images = elements(draw, channels * multiplicity, 1, kernel, kernel), elements(draw, 2, channels, 9, 11)
    options = ((stride, stride), (padding, padding), (dilation, dilation), channels)
    for by in SETS:
        assert torch.equal(convolved(by, weights, images, *options), exact(weights, images, *options)), by.name


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("weight_shape", "image_shape", "geometry"),
    [
        ((40, 64, 3, 3), (1, 64, 40, 40), ((1, 1), (1, 1), (1, 1), 1)),  # several blocks of pixels, panels and summands
        ((16, 3, 7, 7), (2, 3, 45, 45), ((2, 2), (3, 3), (1, 1), 1)),
        ((200, 700, 1, 1), (1, 700, 7, 7), ((1, 1), (0, 0), (1, 1), 1)),  # summands of one segment beyond a block
        ((200, 700, 1, 1), (1, 700, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),  # one pixel, so threads share panels
        ((96, 8, 3, 3), (2, 32, 24, 24), ((2, 2), (1, 1), (1, 1), 4)),
        ((150, 1, 5, 5), (2, 150, 30, 30), ((2, 2), (2, 2), (1, 1), 150)),
    ],
)
def test_work_is_divided_without_seams(
    threads: int, weight_shape: tuple[int, ...], image_shape: tuple[int, ...], geometry: tuple[object, ...]
) -> None:
    draw = torch.Generator().manual_seed(0)
    weights, images = elements(draw, *weight_shape), elements(draw, *image_shape)
    expected = exact(weights, images, *geometry)
    torch.set_num_threads(threads)
    for by in SETS:
        result = convolved(by, weights, images, *geometry)
        assert torch.equal(result, expected), by.name
        assert result.is_contiguous(memory_format=torch.channels_last)


@needs_library
def test_nothing_is_written_beside_the_result() -> None:
    """The last panel and the last tile are not whole: what lies after the result in memory stays as it was."""
    draw = torch.Generator().manual_seed(0)
    for outputs, channels, groups in ((5, 7, 1), (21, 21, 21)):
        weights, images = elements(draw, outputs, channels // groups, 3, 3), elements(draw, 1, channels, 9, 8)
        for by in SETS:
            place = torch.full((7 * 6 * outputs + 64,), 77, dtype=torch.int32)
            kernel = CompiledConvolution(by, weights, (1, 1), (0, 0), (1, 1), groups)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", lambda *shape, dtype, at=place: at[:-64].view(*shape))
                found = kernel(images, (7, 6))
            assert torch.equal(found, exact(weights, images, 1, 0, 1, groups)), by.name
            assert (place[-64:] == 77).all(), by.name


@needs_library
@pytest.mark.parametrize("left", EXTREMES)
def test_sums_of_equal_extreme_values_wrap_correctly(left: int) -> None:
    for right in EXTREMES:
        images = torch.full((1, 4608, 1, 3), left, dtype=torch.int32)
        weights = torch.full((17, 4608, 1, 1), right, dtype=torch.int32)
        for by in SETS:
            assert torch.equal(convolved(by, weights, images, *PLAIN), exact(weights, images)), by.name


# ---- which are used ------------------------------------------------------------------------------------------------------


class _WrongLibrary:
    """The library, but one element of every result of an instruction set is off by one."""

    def __init__(self, library: ctypes.CDLL, wrong: int) -> None:
        self._library, self._wrong = library, wrong

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)

    def ring_kernels_convolve(self, number: int, layer: object, *rest: int) -> int:
        code = int(self._library.ring_kernels_convolve(number, layer, *rest))
        if number == self._wrong:
            ctypes.c_uint32.from_address(rest[2]).value ^= 1
        return code


@needs_library
def test_an_instruction_set_that_is_wrong_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert LIBRARY is not None
    wrong = _WrongLibrary(LIBRARY, SETS[0].number)
    monkeypatch.setattr(compiled, "_load", lambda _: (wrong, ""))
    with caplog.at_level("WARNING"):
        found = compiled._choice({})
    assert f"by {SETS[0].name} give wrong results" in caplog.text
    assert found.used is None or found.used.name == SETS[1].name
    assert (found.used is None) == (len(SETS) == 1)
    assert not compiled._passes_self_test(replace(SETS[0], library=wrong))  # type: ignore[arg-type]


@needs_library
def test_the_best_instruction_set_is_used_unless_another_is_asked_for() -> None:
    for wanted, by in ({}, SETS[0]), *(({compiled.VARIABLE: by.name}, by) for by in SETS):
        assert str(compiled._choice(wanted)) == f"compiled, {by.name}"
    missing = next(name for name in compiled._NAMES if name not in [by.name for by in SETS])
    with pytest.raises(ConfigError, match=f"{compiled.VARIABLE} is {missing}, which this processor does not have"):
        compiled._choice({compiled.VARIABLE: missing})


def test_kernels_can_be_turned_off_and_a_wrong_word_is_refused() -> None:
    off = compiled._choice({compiled.VARIABLE: "off"})
    assert off.used is None and str(off) == f"torch and numpy ({compiled.VARIABLE} is off)"
    with pytest.raises(ConfigError, match="MPC_FL_KERNELS is 'fast': set it to off or one of avx512"):
        compiled._choice({compiled.VARIABLE: "fast"})


def test_without_a_library_there_are_none_and_to_ask_for_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_LIBRARY", tmp_path / "ring_kernels.so")
    assert "for want of a C compiler" in str(compiled._choice({}))
    with pytest.raises(ConfigError, match="MPC_FL_KERNELS is avx2, but no kernels were built"):
        compiled._choice({compiled.VARIABLE: "avx2"})
    (tmp_path / "ring_kernels.so").write_bytes(b"no library")
    assert "ring_kernels.so is no library of these sources for this machine" in str(compiled._choice({}))


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_INTERFACE", compiled._INTERFACE + 1)
    assert "was built from other sources" in str(compiled._choice({}))


# ---- how they are built --------------------------------------------------------------------------------------------------


def _build(place: Path, compiler: str | None) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` on a copy of what it needs."""
    native = Path("mpc_fl/inference/fast/kernels/native")
    shutil.copytree(REPOSITORY / native, place / native, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, place / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH")}
    environment |= {} if compiler is None else {"CC": compiler}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_compiler_installation_goes_on(tmp_path: Path) -> None:
    done = _build(tmp_path, "/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    assert "ring_kernels" in done.stderr and not list(tmp_path.rglob("*.so"))


@pytest.mark.slow  # the compiler takes some seconds
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_the_sources_build_the_library_that_is_looked_for(tmp_path: Path) -> None:
    done = _build(tmp_path, None)
    assert done.returncode == 0, done.stderr
    library, why_not = compiled._load(tmp_path / compiled._LIBRARY.relative_to(REPOSITORY))
    assert library is not None, why_not
    assert all(compiled._passes_self_test(by) for by in compiled.instruction_sets(library))
