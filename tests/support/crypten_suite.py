"""CrypTen's own tests, which its wheel brings, on this project's runtime: each as one party runs it.

They install themselves as the package `test`, where the standard library has one of that name, so they are loaded by their
path. Their own way of starting processes (`MultiProcessTestCase`) is left out: the parties are ours, with real links and a
dealer. Every test sees fresh configuration of CrypTen and torch's generators in step, as its authors' processes have them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest, mock

import torch


def load(module: str) -> Any:
    """The module of CrypTen's tests of this name, such as `test_mpc`. Raises `ImportError` where it is not installed."""
    from mpc_fl.sharing.crypten_parts import crypten

    folder = Path(crypten.__file__).parents[1] / "test"
    if getattr(sys.modules.get("test"), "__path__", None) != [str(folder)]:
        for name in [name for name in sys.modules if name == "test" or name.startswith("test.")]:
            del sys.modules[name]
        spec = importlib.util.spec_from_file_location(
            "test", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["test"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["test"])
    return importlib.import_module(f"test.{module}")


def _open_with(domain: Any) -> Any:
    def get_plain_text(shared: Any, dst: int | None = None) -> Any:
        return domain.open_for_crypten(SimpleNamespace(_tensor=shared), dst, True)

    return get_plain_text


def names_of(module: str, test_case: str, left_out: Collection[str]) -> list[str]:
    """The tests of a class, in order."""
    return [
        name
        for name in sorted(dir(getattr(load(module), test_case)))
        if name.startswith("test") and name not in left_out
    ]


def run_tests(
    links: Any, directory: str, world: Sequence[str], module: str, test_case: str, names: Sequence[str]
) -> dict[str, str]:
    """One party, or the dealer: these tests of a class in turn, to the first that fails. What came of each, by its name.

    "passed", "skipped" or "failed", with why: a party that fails ends, and with it the world.
    """
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer

    if links.name == "dealer":
        Dealer(links, list(world)).serve()
        return {}
    kind = getattr(load(module), test_case)
    outcomes: dict[str, str] = {}
    with CrypTenRuntime(links, list(world), "dealer", 16) as runtime, contextlib.ExitStack() as opened:
        domain = runtime.domain(OpeningRecord(Path(directory) / f"openings-{links.name}.jsonl", links.name))
        # The primitives do not open themselves on this runtime; their tests do so through the one way out.
        for primitive in (crypten.mpc.primitives.ArithmeticSharedTensor, crypten.mpc.primitives.BinarySharedTensor):
            opened.enter_context(mock.patch.object(primitive, "get_plain_text", _open_with(domain)))
        configured = copy.deepcopy(crypten.cfg.config)
        for name in names:
            crypten.cfg.set_config(copy.deepcopy(configured))
            torch.manual_seed(1)
            case = kind(name)
            case.rank, case.world_size = runtime.rank, len(world)
            # `get_random_linear` gives all parties the same weights only where it finds a process group.
            with mock.patch.object(torch.distributed, "is_initialized", lambda: True):
                try:
                    case.setUp()
                    getattr(case, name)()
                    outcomes[name] = "passed"
                except SkipTest as skipped:
                    outcomes[name] = f"skipped: {skipped}"
                except Exception:  # noqa: BLE001 - an outcome like others, reported by the caller
                    outcomes[name] = f"failed: {traceback.format_exc(limit=-6)}"
                    return outcomes
    return outcomes
