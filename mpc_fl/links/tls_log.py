"""Says in the party's log why a TLS hand-shake was refused: wrong authority, expired certificate, no TLS at all.

gRPC tells this nowhere but on the process's standard error, among lines nobody wants. While a party runs, its lines are
read from there: those about TLS are logged, its others dropped, everything else is passed on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading

from mpc_fl.links.places import Refusals

log = logging.getLogger(__name__)

_GRPC_LINE = re.compile(rb"^[IWEF]\d{4} \d\d:\d\d:\d\d|^WARNING: All log messages before absl")
_REFUSED = re.compile(rb"Handshake failed with error [^:]*:(.*)$")
_STANDARD_ERROR = 2


def log_refused_handshakes() -> None:
    """Begin, once per process and before gRPC is imported; Python's own `sys.stderr` keeps writing where it wrote."""
    if "grpc" in sys.modules or "GRPC_VERBOSITY" in os.environ:
        return  # too late, or somebody wants to read gRPC's lines themselves
    os.environ["GRPC_VERBOSITY"] = "INFO"
    original = os.dup(_STANDARD_ERROR)
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(original), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    reading, writing = os.pipe()
    os.dup2(writing, _STANDARD_ERROR)
    os.close(writing)
    threading.Thread(target=_read, args=(reading, original), daemon=True, name="grpc-log").start()


def _read(reading: int, original: int) -> None:
    refusals = Refusals(log)
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            refused = _REFUSED.search(line.strip()) if b"ssl_transport_security" in line else None
            if refused is not None:
                reason = refused.group(1).decode("ascii", "replace").rsplit(":", 2)
                said = f"refused a TLS hand-shake: {': '.join(part.strip() for part in reason[-2:])}"
                refusals.count(said, said)
            elif not _GRPC_LINE.match(line):
                with contextlib.suppress(
                    OSError
                ):  # nobody reads it, or it is full; gRPC would wait for whoever reads here
                    os.write(original, line)
