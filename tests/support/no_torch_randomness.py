"""Shows that no secret comes from a generator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoTorchRandomness(TorchDispatchMode):
    """While active, every operation that draws from a `torch.Generator` raises: no secret may come from one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise AssertionError(f"{func} drew from a torch.Generator")
        return func(*args, **(kwargs or {}))
