"""Frames: what is sent arrives, and nothing malformed is taken."""

from __future__ import annotations

import contextlib
import struct

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.errors import ProtocolError
from mpc_fl.links.frames import CHUNK_BYTES, MAX_GREETING, FrameReader, Kind, encode_frame
from tests.support.views import LAYOUTS, in_row_order, views

DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float64]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.text(max_size=20), st.integers(0, 2**32))
def test_tensors_arrive_as_sent(dtype: torch.dtype, shape: list[int], tag: str, seed: int) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    reader = FrameReader()
    frames = [reader.feed(chunk) for chunk in encode_frame(Kind.TENSOR, tag, 0, tensor)]
    assert frames[-1] is not None and frames[-1].tag == tag
    assert isinstance(frames[-1].payload, torch.Tensor)
    assert frames[-1].payload.dtype == dtype and torch.equal(frames[-1].payload, tensor)


@settings(max_examples=300, deadline=None)
@given(views(DTYPES, overlapping=True))
def test_views_arrive_in_row_order(view: torch.Tensor) -> None:
    reader = FrameReader()
    frames = [reader.feed(chunk) for chunk in encode_frame(Kind.TENSOR, "view", 0, view)]
    assert frames[-1] is not None and isinstance(frames[-1].payload, torch.Tensor)
    assert frames[-1].payload.dtype == view.dtype and torch.equal(frames[-1].payload, in_row_order(view))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layout_arrives_as_it_is(name: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[name](torch.arange(24).reshape(4, 6).to(dtype))
    frame = FrameReader().feed(b"".join(encode_frame(Kind.TENSOR, "view", 0, view)))
    assert frame is not None and isinstance(frame.payload, torch.Tensor)
    assert frame.payload.shape == view.shape and torch.equal(frame.payload, view)


def test_parameters_and_negated_views_can_be_sent() -> None:
    for tensor in (torch.nn.Parameter(torch.ones(2, 3)).t(), torch.tensor([1 + 2j]).conj().imag):
        frame = FrameReader().feed(next(encode_frame(Kind.TENSOR, "x", 0, tensor)))
        assert frame is not None and isinstance(frame.payload, torch.Tensor)
        assert torch.equal(frame.payload, tensor.detach()) and not frame.payload.requires_grad


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_large_tensors_are_chunked(extra: int) -> None:
    tensor = torch.arange(2 * CHUNK_BYTES + extra, dtype=torch.uint8)
    chunks = list(encode_frame(Kind.TENSOR, "x", 0, tensor))
    assert len(chunks) == (3 if extra > 0 else 2)
    reader = FrameReader()
    frames = [reader.feed(chunk) for chunk in chunks]
    assert frames[:-1] == [None] * (len(chunks) - 1)
    assert torch.equal(frames[-1].payload, tensor)  # type: ignore[union-attr, arg-type]


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(data)


GOOD = next(encode_frame(Kind.TENSOR, "tag", 0, torch.arange(10)))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_crashes_or_changes_the_frame_unseen(position: int, flip: int) -> None:
    """A flip in header fields is refused; in tag or payload TLS guards it, the reader only must not crash."""
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    reader = FrameReader()
    try:
        frame = reader.feed(bytes(damaged))
    except ProtocolError:
        return
    if frame is None:
        assert reader.in_frame
    elif position < 24 and not 5 <= position <= 6:  # kind and dtype may turn into another valid one
        raise AssertionError(f"header byte {position} was changed unseen")


@given(st.integers(1, len(GOOD) - 1))
def test_a_truncated_frame_is_refused_or_incomplete(length: int) -> None:
    reader = FrameReader()
    with contextlib.suppress(ProtocolError):
        assert reader.feed(GOOD[:length]) is None and reader.in_frame


def test_replayed_and_skipped_frames_are_refused() -> None:
    reader = FrameReader()
    reader.feed(GOOD)
    with pytest.raises(ProtocolError, match="out of sequence"):
        reader.feed(GOOD)
    with pytest.raises(ProtocolError, match="out of sequence"):
        FrameReader().feed(next(encode_frame(Kind.TENSOR, "tag", 1, torch.arange(10))))


def test_oversized_frames_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(ProtocolError, match="larger than the limit"):
        FrameReader(max_payload=79).feed(GOOD)


def test_control_frames_hold_json_objects_only() -> None:
    reader = FrameReader()
    frame = reader.feed(next(encode_frame(Kind.OBJECT, "t", 0, {"a": [1, "b", None]})))
    assert frame is not None and frame.payload == {"a": [1, "b", None]}
    body = b"[1]"
    damaged = next(encode_frame(Kind.OBJECT, "t", 0, {}))[:-2]
    damaged = damaged.replace((2).to_bytes(8, "little"), len(body).to_bytes(8, "little")) + body
    with pytest.raises(ProtocolError, match="not a JSON object"):
        FrameReader().feed(damaged)


def header(kind: Kind, dtype: int, shape: tuple[int, ...], length: int) -> bytes:
    """A header of one's own making, without tag and payload."""
    head = struct.pack("<4sBBBBQHQ", b"MPCF", 1, kind, dtype, len(shape), 0, 0, length)
    return head + b"".join(size.to_bytes(8, "little") for size in shape)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.HELLO, Kind.WELCOME)])
def test_a_stranger_can_send_nothing_but_a_greeting(kind: Kind) -> None:
    """Also who holds a certificate is a stranger until its greeting was checked: it may be a revoked one."""
    payload = torch.arange(10) if kind in (Kind.TENSOR, Kind.RELAY) else {"name": "a"}
    (frame,) = encode_frame(kind, "", 0, payload)
    with pytest.raises(ProtocolError, match="not a greeting"):
        FrameReader(greetings_only=True).feed(frame)
    reader = FrameReader(greetings_only=True)
    reader.trust()
    assert reader.feed(frame) is not None


def test_a_greeting_has_the_size_of_one() -> None:
    (greeting,) = encode_frame(Kind.HELLO, "", 0, {"certificate": "x" * (MAX_GREETING - 100)})
    assert FrameReader(greetings_only=True).feed(greeting) is not None
    with pytest.raises(ProtocolError, match="not a greeting"):
        FrameReader(greetings_only=True).feed(header(Kind.HELLO, 255, (), MAX_GREETING + 1) + b"{")


def test_what_a_header_announces_takes_memory_as_it_arrives() -> None:
    announced, process = 2 << 30, psutil.Process()
    before = process.memory_info().rss
    reader = FrameReader()
    assert reader.feed(header(Kind.TENSOR, 4, (announced,), announced) + bytes(1000)) is None
    assert process.memory_info().rss - before < announced // 16


@pytest.mark.parametrize("shape", [(0, (1 << 64) - 1), ((1 << 64) - 1, 0), (0, 1 << 32, 1 << 32), (1 << 40, 0)])
def test_a_dimension_of_nothing_hides_no_larger_one(shape: tuple[int, ...]) -> None:
    """Such a shape once ended the thread that reads."""
    with pytest.raises(ProtocolError, match="larger than the limit"):
        FrameReader().feed(header(Kind.TENSOR, 4, shape, 0))
    assert FrameReader().feed(header(Kind.TENSOR, 4, (0, 1 << 20), 0)) is not None
