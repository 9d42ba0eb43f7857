"""What tests of the fork server let it run in place of a party, and import."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from mpc_fl.apps.runs.memory import peak_memory


def party_process(pipe: Connection) -> NoReturn:
    """Do what the configuration asks for, say what came of it, and end when told."""
    told = json.loads(pipe.recv_bytes())
    pipe.send_bytes(json.dumps(_DOING[told["values"]["do"]]()).encode())
    pipe.recv_bytes()
    os._exit(7)


def _draw() -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from mpc_fl.crypto.stream_cipher import Seed

    return {
        "seed": Seed.from_system().reveal_for_transport().hex(),
        "exchange": X25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
        "identity": hex(ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers().x),
        "system": os.urandom(8).hex(),
        "python": random.random(),
    }


def _describe() -> dict[str, Any]:
    import gc

    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": sys.path,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "defaults": [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGCHLD)],
        "descriptors": sorted(int(path.name) for path in Path("/proc/self/fd").iterdir()),
        "modules": sorted(sys.modules),
        "collecting": gc.isenabled(),
    }


def _be_deaf() -> str:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return "deaf"


def _raise() -> None:
    raise KeyError("as a test asks")


_DOING = {"draw": _draw, "describe": _describe, "be deaf": _be_deaf, "measure": peak_memory, "raise": _raise}
