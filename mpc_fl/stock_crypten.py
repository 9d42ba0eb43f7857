"""Stock CrypTen for comparison: gloo on loopback, its trusted first party, its own generators. Never used by mpc_fl."""

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
from torch.utils._python_dispatch import TorchDispatchMode

_DEADLINE = datetime.timedelta(seconds=60)


@contextmanager
def stock_crypten(rank: int, world_size: int, store: Path) -> Iterator[Any]:
    """CrypTen as its authors run it, for one party: `store` is a file all `world_size` processes can reach."""
    from mpc_fl.crypten_runtime import crypten  # unmodified while no CrypTenRuntime is active

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


class NoTorchRandomness(TorchDispatchMode):
    """While active, every operation that draws from a `torch.Generator` raises: no secret may come from one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise AssertionError(f"{func} drew from a torch.Generator")
        return func(*args, **(kwargs or {}))
