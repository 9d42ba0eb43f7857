"""What the system or a library refuses is told as what ran out, and nothing else is."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from mpc_fl.errors import ExhaustedError, MpcFlError
from mpc_fl.exhaustion import exhaustion, system_error, unwritable


def refusal(number: int, path: str | None = "/site/model") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(errno.ENOSPC), "of /site/model failed: No space left on device: free some space"),
        (refusal(errno.EFBIG), "of /site/model failed: File too large: allow larger files"),
        (refusal(errno.EMFILE), "this machine ran out of files that a process may open: allow more"),
        (refusal(errno.ENOMEM, None), "this machine ran out of memory"),
        (refusal(errno.EAGAIN, None), "this machine ran out of processes or threads"),
        (MemoryError(), "this machine ran out of memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "the GPU ran out of memory: end other",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "the GPU ran out of memory"),
        (RuntimeError("can't start new thread"), "this machine ran out of processes or threads"),
        (ImportError("libtorch.so: cannot allocate memory in static TLS block"), "this machine ran out of memory"),
        (ImportError("libc10.so: failed to map segment from shared object"), "this machine ran out of memory"),
    ],
)
def test_what_ran_out_is_named(error: BaseException, words: str) -> None:
    found = exhaustion(error)
    assert isinstance(found, ExhaustedError) and words in str(found) and "\n" not in str(found)
    assert "/site" not in found.for_peers


def test_what_torch_says_when_it_gets_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "ran out of memory" in str(exhaustion(caught.value))


def test_what_is_no_exhaustion_is_none() -> None:
    assert exhaustion(RuntimeError("shape mismatch")) is None and exhaustion(ValueError("memory")) is None
    denied = system_error(refusal(errno.EACCES))
    assert type(denied) is MpcFlError and "Permission denied: check permissions" in str(denied)
    assert type(unwritable("x", refusal(errno.EACCES))) is MpcFlError
    assert str(unwritable("x", OSError())).startswith("cannot write x: OSError: check the path")
