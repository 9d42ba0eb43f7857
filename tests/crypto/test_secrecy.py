"""A secret cannot be shown, compared, copied or pickled by accident."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.errors import SecrecyError

ATTEMPTS: list[Callable[[Any], object]] = [
    bool, repr, str, len, iter, float, int, pickle.dumps, copy.copy, copy.deepcopy, list, hash,
    "{}".format, lambda s: s == s, lambda s: s != 1, lambda s: s < s, lambda s: s[0], lambda s: f"{s:>5}",
    lambda s: {s: 1}, lambda s: torch.tensor(s),
]  # fmt: skip


@pytest.mark.parametrize("kind", [Private, Shared])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_every_way_to_look_raises(kind: type, attempt: Callable[[Any], object]) -> None:
    secret = kind("the update", 1234567)
    with pytest.raises((SecrecyError, TypeError, RuntimeError)) as caught:
        attempt(secret)
    assert "1234567" not in str(caught.value)


def test_logging_a_secret_shows_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    value = int("7654321"[::-1])  # a log handler may quote the source line of the call
    with contextlib.suppress(SecrecyError):
        logging.getLogger("test").warning("value %s", Private("the update", value))
    output = capsys.readouterr()
    assert "1234567" not in caplog.text + output.err + output.out


def test_label_and_protocol_access() -> None:
    secret = Private("the update", 5)
    assert secret.label == "the update" and secret.inside_protocol() == 5
