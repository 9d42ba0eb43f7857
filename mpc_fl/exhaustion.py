"""What ran out on this machine, in one line: space on a disk, files that a process may open, memory. Pure.

Any program can be told that by the system at any moment, so it is no defect of one. Libraries say it in their own words.
"""

from __future__ import annotations

import errno
import os

from mpc_fl.errors import ExhaustedError, MpcFlError

_AGAIN = "then try again (training: with --resume)"
_OF_DISKS = {
    errno.ENOSPC: f"free some space there, {_AGAIN}",
    errno.EDQUOT: f"free some space of your quota, {_AGAIN}",
    errno.EFBIG: f"allow larger files (ulimit -f), {_AGAIN}",
}
_OF_PROCESSES = {
    errno.EMFILE: ("files that a process may open", f"allow more (ulimit -n), {_AGAIN}"),
    errno.ENFILE: ("files that this machine may open", f"end other programs, {_AGAIN}"),
    errno.ENOMEM: ("memory", f"end other programs or use a larger machine, {_AGAIN}"),
    errno.EAGAIN: ("processes or threads", f"allow more (ulimit -u), {_AGAIN}"),
}
_MEMORY_WORDS = ("allocate memory", "not enough memory", "bad_alloc", "failed to map segment", "out of memory")
_GPU_WORDS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_OF_GPU = f"end other programs on it, set training.per_sample_gradients=loop or site.device=cpu, {_AGAIN}"
_THREAD_WORDS = ("can't start new thread", "Resource temporarily unavailable")


def unwritable(path: os.PathLike[str] | str, error: OSError) -> MpcFlError:
    """The error for a file that cannot be written."""
    what = f"cannot write {path}: {_reason(error)}"
    if error.errno in _OF_DISKS:
        return ExhaustedError(what, f"check the path and the free space: {_OF_DISKS[error.errno]}")
    if error.errno in _OF_PROCESSES:
        return ExhaustedError(what, _OF_PROCESSES[error.errno][1])
    return MpcFlError(what, "check the path and the free space")


def system_error(error: OSError) -> MpcFlError:
    """The error for whatever the system refuses, where nobody has said more about it."""
    if error.errno in _OF_PROCESSES and error.errno != errno.EAGAIN:
        return _exhausted(*_OF_PROCESSES[error.errno])
    where = f" of {error.filename}" if error.filename else ""
    what = f"input or output{where} failed: {_reason(error)}"
    if error.errno in _OF_DISKS:
        return ExhaustedError(what, _OF_DISKS[error.errno])
    if error.errno == errno.EAGAIN:
        return _exhausted(*_OF_PROCESSES[error.errno])
    return MpcFlError(what, "check permissions and free space")


def exhaustion(error: BaseException) -> MpcFlError | None:
    """What the system refused, if that is what an error says, of whatever library; None for all other errors."""
    if isinstance(error, MemoryError):
        return _exhausted(*_OF_PROCESSES[errno.ENOMEM])
    if isinstance(error, OSError):
        return system_error(error)
    if isinstance(error, (RuntimeError, ImportError)):
        said = str(error)
        if any(word in said for word in _GPU_WORDS):
            return ExhaustedError("the GPU ran out of memory", _OF_GPU)
        if any(word in said for word in _MEMORY_WORDS):
            return _exhausted(*_OF_PROCESSES[errno.ENOMEM])
        if any(word in said for word in _THREAD_WORDS):
            return _exhausted(*_OF_PROCESSES[errno.EAGAIN])
    return None


def _exhausted(what: str, fix: str) -> ExhaustedError:
    return ExhaustedError(f"this machine ran out of {what}", fix)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
