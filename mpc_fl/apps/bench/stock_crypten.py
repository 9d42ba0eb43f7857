"""Stock CrypTen for comparison, in benchmarks and tests: gloo on loopback without encryption, its trusted first party, its
own generators. Never used for patients' data.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed

from mpc_fl.sharing.crypten_parts import crypten

_DEADLINE = datetime.timedelta(seconds=600)


@contextmanager
def stock_crypten(rank: int, world_size: int, store: Path) -> Iterator[Any]:
    """CrypTen as its authors run it, for one party: `store` is a file all `world_size` processes can reach."""
    environment = {
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "RENDEZVOUS": f"file://{store}",
        "DISTRIBUTED_BACKEND": "gloo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    deadline = mock.patch.object(torch.distributed.distributed_c10d, "default_pg_timeout", _DEADLINE)
    with mock.patch.dict(os.environ, environment), deadline:
        crypten.init()
        try:
            yield crypten
        finally:
            crypten.uninit()
