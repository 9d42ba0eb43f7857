"""Convolutions modulo 2^32 are exact: every method, every geometry, extreme values; a wrong kernel is never used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mpc_fl.inference.fast.kernels import compiled, integer_linear, limbs
from mpc_fl.inference.fast.kernels.integer_linear import Method, PreparedConvolution, PreparedLinear, convolve, linear

torch.set_num_threads(1)

EXTREMES = [-(1 << 31), (1 << 31) - 1, -1, 0, 1, 0x7F7F7F7F, 0x80808080 - (1 << 32), 0x00800080, 0x7FFF8000, -32896]
LIMB_METHODS: tuple[Method, ...] = ("bytes", "halves")
COMPILED: tuple[Method, ...] = ("compiled",) if compiled.kernels().used else ()  # see test_compiled


def _forget() -> None:
    limbs.usable.cache_clear()
    integer_linear._fast_methods.cache_clear()
    integer_linear._chosen.clear()


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The self-test and the choices of this process, forgotten before and after."""
    _forget()
    yield
    _forget()


@pytest.fixture
def without_kernels(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without compiled kernels: the choice is between limbs and integers."""
    monkeypatch.setattr(integer_linear, "kernels", lambda: compiled.Kernels(None, "a test of limbs"))


def elements(draw: torch.Generator, *shape: int, bits: int = 32) -> torch.Tensor:
    """Random int32 of so many bits, a third of them extreme where all bits are asked for."""
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=draw)
    if bits == 32:
        chosen = torch.tensor(EXTREMES)[torch.randint(0, len(EXTREMES), shape, generator=draw)]
        values = torch.where(torch.rand(shape, generator=draw) < 0.33, chosen, values)
    return values.to(torch.int32)


def exact(weights: torch.Tensor, images: torch.Tensor, *geometry: object) -> torch.Tensor:
    """The convolution in int64, which wraps modulo 2^64, reduced modulo 2^32."""
    return functional.conv2d(images.long(), weights.long(), None, *geometry).to(torch.int32)  # type: ignore[arg-type]


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[object, ...]]:
    """Weight shape, image shape, and (stride, padding, dilation, groups), with at least one output pixel."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    wide = draw(st.integers(1, 9))
    outputs = groups * draw(st.integers(1, 5))

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = [each + draw(st.integers(0, 7)) for each in least]
    images = (draw(st.integers(1, 3)), groups * wide, *size)
    return (outputs, wide, *kernel), images, (stride, padding, dilation, groups)


@settings(max_examples=150, deadline=None)
@given(
    geometry=geometries(),
    weight_bits=st.sampled_from([2, 8, 9, 16, 17, 24, 32]),
    seed=st.integers(0, 1 << 30),
    last=st.booleans(),
)
def test_convolutions_are_exact_for_every_geometry(
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[object, ...]], weight_bits: int, seed: int, last: bool
) -> None:
    weight_shape, image_shape, options = geometry
    draw = torch.Generator().manual_seed(seed)
    weights, images = elements(draw, *weight_shape, bits=weight_bits), elements(draw, *image_shape)
    expected = exact(weights, images, *options)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    for method in (*LIMB_METHODS, *COMPILED, "integers"):
        prepared = PreparedConvolution(weights, *options, method=method)  # type: ignore[arg-type]
        assert torch.equal(prepared(images), expected), method
    assert torch.equal(convolve(weights, images, *options), expected)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 12),
    multiplicity=st.integers(1, 3),
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
    weights = elements(draw, channels * multiplicity, 1, kernel, kernel)
    images = elements(draw, 2, channels, 9, 11)
    options = ((stride, stride), (padding, padding), (dilation, dilation), channels)
    expected = exact(weights, images, *options)
    for method in ("taps", *COMPILED):
        assert torch.equal(PreparedConvolution(weights, *options, method=method)(images), expected), method
    assert torch.equal(convolve(weights, images, *options), expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 600),
    columns=st.integers(1, 40),
    weight_bits=st.sampled_from([8, 16, 20, 32]),
    seed=st.integers(0, 1 << 30),
)
def test_matrix_products_are_exact(rows: int, inner: int, columns: int, weight_bits: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights, activations = elements(draw, columns, inner, bits=weight_bits), elements(draw, rows, inner)
    expected = (activations.long() @ weights.long().t()).to(torch.int32)
    for method in (*LIMB_METHODS, *COMPILED):
        assert torch.equal(PreparedLinear(weights, method)(activations), expected), method
    assert torch.equal(linear(weights, activations), expected)


@pytest.mark.parametrize("left", EXTREMES)
@pytest.mark.parametrize("right", EXTREMES)
def test_sums_of_equal_extreme_values_wrap_correctly(left: int, right: int) -> None:
    # All limbs at once at their extremes, with sums long enough to saturate 16-bit and to wrap 32-bit accumulators.
    for inner in (33, 4608):
        activations = torch.full((5, inner), left, dtype=torch.int32)
        weights = torch.full((3, inner), right, dtype=torch.int32)
        expected = (activations.long() @ weights.long().t()).to(torch.int32)
        for method in LIMB_METHODS:
            assert torch.equal(PreparedLinear(weights, method)(activations), expected), method


@pytest.mark.parametrize("method", LIMB_METHODS)
def test_accumulators_may_wrap(method: Method) -> None:
    inner = 300_000  # 300,000 products of 2^14 pass 2^31
    activations = torch.full((2, inner), 0x80808080 - (1 << 32), dtype=torch.int32)
    weights = torch.full((3, inner), 0x80808080 - (1 << 32), dtype=torch.int32)
    expected = (activations.long() @ weights.long().t()).to(torch.int32)
    assert torch.equal(PreparedLinear(weights, method)(activations), expected)


@pytest.mark.parametrize("shape", [(1, 64, 90, 56), (8, 64, 14, 14), (3, 16, 150, 40)])
def test_large_inputs_are_cut_into_pieces_without_seams(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    weights, images = elements(draw, 8, shape[1], 3, 3, bits=16), elements(draw, *shape)
    for method in LIMB_METHODS:
        for stride in (1, 2):
            prepared = PreparedConvolution(weights, (stride, stride), (1, 1), method=method)
            assert torch.equal(prepared(images), exact(weights, images, stride, 1)), (method, stride)


def test_small_weights_have_two_limbs_and_masks_four() -> None:
    draw = torch.Generator().manual_seed(0)
    cases = [(elements(draw, 4, 3, 3, 3, bits=bits), count) for bits, count in ((8, 1), (15, 2), (20, 3), (32, 4))]
    for value, count in ((127, 1), (128, 2), (-128, 1), (-129, 2), (32639, 2), (32640, 3), (-32896, 2), (-32897, 3)):
        cases.append((torch.full((1, 1, 1, 1), value, dtype=torch.int32), count))
    for weights, count in cases:
        prepared = PreparedConvolution(weights)
        assert prepared._prepared("bytes")[0].limbs == prepared._bytes == count


def test_results_are_channels_last() -> None:
    draw = torch.Generator().manual_seed(0)
    images = elements(draw, 2, 6, 9, 9)
    for groups, method in ((1, "bytes"), (1, "halves"), (1, "integers"), (2, "bytes"), (6, "taps")):
        weights = elements(draw, 12, 6 // groups, 3, 3)
        result = PreparedConvolution(weights, groups=groups, method=method)(images)  # type: ignore[arg-type]
        assert result.is_contiguous(memory_format=torch.channels_last), method


def test_a_kernel_that_saturates_is_found_and_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without_kernels: None
) -> None:
    def saturating(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        # What 8-bit kernels without VNNI do: pairs of products are added in 16 bits, which saturate.
        products = left.long().unsqueeze(2) * right.long().unsqueeze(0)
        if products.shape[1] % 2:
            products = functional.pad(products, (0, 0, 0, 1))
        pairs = (products[:, 0::2] + products[:, 1::2]).clamp(-(1 << 15), (1 << 15) - 1)
        return out.copy_(pairs.sum(dim=1))

    monkeypatch.setattr(torch, "_int_mm", saturating)
    with caplog.at_level("WARNING"):
        assert "bytes" not in limbs.usable()
    assert "bytes is not usable" in caplog.text
    draw = torch.Generator().manual_seed(0)
    weights, images = elements(draw, 4, 8, 3, 3), elements(draw, 1, 8, 6, 6)
    assert torch.equal(convolve(weights, images), exact(weights, images))
    assert "bytes" not in integer_linear.chosen_methods()


def test_a_kernel_that_is_wrong_for_one_shape_is_not_used_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without_kernels: None
) -> None:
    assert "bytes" in limbs.usable()
    monkeypatch.setattr(integer_linear, "usable", lambda: ("bytes",))
    right = torch._int_mm

    def wrong(left: torch.Tensor, right_factor: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return right(left, right_factor, out=out).add_(1)

    monkeypatch.setattr(torch, "_int_mm", wrong)
    monkeypatch.setattr(integer_linear, "_seconds", lambda run, method: {"bytes": 1.0, "integers": 2.0}[method])
    draw = torch.Generator().manual_seed(0)
    weights, images = elements(draw, 4, 8, 3, 3, bits=16), elements(draw, 1, 8, 6, 6)
    with caplog.at_level("WARNING"):
        assert torch.equal(convolve(weights, images), exact(weights, images))
    assert "bytes is wrong" in caplog.text


def test_a_large_layer_is_checked_by_its_ends_and_not_computed_whole_in_integers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without_kernels: None
) -> None:
    """The first image of a VGG of 224 pixels took minutes to check; and a large wrong result was not noticed at all."""
    draw = torch.Generator().manual_seed(0)
    images = elements(draw, 1, 64, 32, 32)
    layers = [
        (PreparedConvolution(elements(draw, 64, 64, 3, 3)), 0),
        (PreparedConvolution(elements(draw, 64, 64, 3, 3)), 1),
    ]
    assert images[0, 0].numel() * layers[0][0].weights.numel() > integer_linear._MANY_PRODUCTS
    whole, run = [], PreparedConvolution._run

    def recorded(self: PreparedConvolution, method: Method, activations: torch.Tensor) -> torch.Tensor:
        whole.append(method)
        result = run(self, method, activations)
        return result + wrong if method != "integers" else result

    monkeypatch.setattr(PreparedConvolution, "_run", recorded)
    for layer, wrong in layers:
        integer_linear._chosen.clear()
        whole.clear()
        with caplog.at_level("WARNING"):
            result = layer(images)
        assert torch.equal(result[:, ::63], layer._exact_ends(images))
        assert whole.count("integers") == wrong  # only where nothing else is left
        assert ("is wrong for" in caplog.text) == bool(wrong)


def test_the_limbs_that_are_fastest_on_this_processor_are_taken(
    monkeypatch: pytest.MonkeyPatch, without_kernels: None
) -> None:
    """Without 8-bit dot products bytes took fourteen times as long as halves, and were taken all the same."""
    for slow, first in (("bytes", "halves"), ("halves", "bytes")):
        limbs.usable.cache_clear()
        monkeypatch.setattr(limbs, "trial_seconds", {slow: 2.0, first: 1.0}.__getitem__)
        assert limbs.usable() == (first, slow)


def test_ends_are_computed_when_a_method_is_chosen_and_not_for_every_image(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    """They were: a check of two outputs in int64 took as long as the whole layer."""
    draw, computed = torch.Generator().manual_seed(0), []
    for kind in (PreparedConvolution, PreparedLinear):
        monkeypatch.setattr(
            kind, "_exact_ends", lambda self, of, do=kind._exact_ends: computed.append(1) or do(self, of)
        )
    convolution, matrix = PreparedConvolution(elements(draw, 4, 3, 3, 3)), PreparedLinear(elements(draw, 4, 3))
    for _ in range(3):
        convolution(elements(draw, 1, 3, 8, 8))
        matrix(elements(draw, 2, 3))
    assert len(computed) == 2


@pytest.mark.skipif(not COMPILED, reason=f"no compiled kernels here: {compiled.kernels().why_not}")
def test_compiled_kernels_are_chosen_where_they_are_fastest_and_limbs_that_are_hopeless_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    draw, tried = torch.Generator().manual_seed(0), []
    weights, images = elements(draw, 64, 64, 3, 3), elements(draw, 1, 64, 32, 32)
    run = PreparedConvolution._run
    monkeypatch.setattr(
        PreparedConvolution, "_run", lambda self, method, of: tried.append(method) or run(self, method, of)
    )
    for limbs_take, expected in ((1e9, {"compiled"}), (0.0, {"compiled", "bytes"})):
        _forget()
        tried.clear()
        monkeypatch.setattr(limbs, "trial_seconds", lambda method, taken=limbs_take: taken)
        assert limbs.usable()[0] == "bytes"  # the first of equals
        assert torch.equal(convolve(weights, images)[:, ::63], PreparedConvolution(weights)._exact_ends(images))
        assert set(tried) == expected
    _forget()
    monkeypatch.setattr(integer_linear, "_seconds", lambda run, method: {"compiled": 1.0}.get(method, 2.0))
    assert torch.equal(convolve(weights, images), exact(weights, images))
    assert integer_linear.chosen_methods() == ("compiled",)


def test_without_int_mm_the_exact_fallback_works(monkeypatch: pytest.MonkeyPatch, without_kernels: None) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    draw = torch.Generator().manual_seed(0)
    weights, images = elements(draw, 4, 8, 3, 3), elements(draw, 1, 8, 6, 6)
    assert torch.equal(convolve(weights, images), exact(weights, images))
    assert "bytes" not in limbs.usable()


def test_the_fastest_method_is_measured_once_per_shape(monkeypatch: pytest.MonkeyPatch, without_kernels: None) -> None:
    times = {"bytes": 3.0, "integers": 1.0}
    measured = []

    def seconds(run: object, method: Method) -> float:
        measured.append(method)
        return times[method]

    monkeypatch.setattr(integer_linear, "usable", lambda: ("bytes",))
    monkeypatch.setattr(integer_linear, "_seconds", seconds)
    draw = torch.Generator().manual_seed(0)
    prepared = PreparedConvolution(elements(draw, 4, 3, 3, 3, bits=16))
    prepared(elements(draw, 1, 3, 8, 8))
    assert integer_linear.chosen_methods() == ("integers",)
    count = len(measured)
    prepared(elements(draw, 1, 3, 8, 8))
    assert len(measured) == count
    prepared(elements(draw, 2, 3, 8, 8))
    assert len(measured) > count


def test_weights_are_not_printed_and_wrong_inputs_are_refused() -> None:
    weights = torch.full((2, 3, 1, 1), 123456789, dtype=torch.int32)
    assert "123456789" not in repr(PreparedConvolution(weights)) + repr(PreparedLinear(weights[:, :, 0, 0]))
    with pytest.raises(ValueError, match="int32"):
        PreparedConvolution(weights.long())
    with pytest.raises(ValueError, match="shape"):
        PreparedConvolution(weights)(torch.zeros(1, 4, 5, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="shape"):
        PreparedConvolution(torch.zeros(2, 3, 9, 9, dtype=torch.int32))(torch.zeros(1, 3, 5, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="groups"):
        PreparedConvolution(weights, groups=3)
    with pytest.raises(ValueError, match="shape"):
        PreparedLinear(weights[:, :, 0, 0])(torch.zeros(1, 4, dtype=torch.int32))
