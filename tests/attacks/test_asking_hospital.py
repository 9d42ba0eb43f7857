"""A hospital that asks a model owner that stays up, and deviates: it takes no weights, exceeds no limit, leaves no batch unsigned.

Model owner and dealer are unmodified processes with the default of what they reveal; the deviating hospital is a process of its
own, with a certificate of the federation.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import parse_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import MpcFlError
from mpc_fl.inference.fast.diagnosis import calibrated
from mpc_fl.inference.fast.online.evaluation import HospitalEvaluation
from mpc_fl.inference.serving.client import ask_service, links_to_service
from mpc_fl.inference.serving.visits import Visit
from mpc_fl.learning.data.loading import load_images
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.links.links import Links
from tests.support.harness import SPAWN
from tests.support.served import HOSPITALS, Service, charges, configuration, make_service_directory

FEATURES = 64  # inputs of the last layer of a network for images of 8 x 8
COPIES = FEATURES + 1
WORD = 1 << 18  # what is added to one word of a copy: large beside the rounding of logits, small beside their range

pytestmark = pytest.mark.processes


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a model owner and a dealer in one directory; a second start is after the end of the first."""
    started: list[Service] = []
    config = configuration().with_values(data={"image_size": 8})
    make_service_directory(tmp_path, config)

    def start(inference: dict[str, Any] | None = None, **serving: Any) -> Service:
        serving = {"images_per_minute": 1000, "patience": 600.0, **serving}
        asked = config.with_values(inference=inference or {}, serving=serving)
        started.append(Service(tmp_path, asked, serving))
        return started[-1]

    yield start
    for item in started:
        for process in item.asking:
            process.kill()
        item.end(signal.SIGKILL)


# ---- programs that deviate ---------------------------------------------------------------------------------------------


def _words_changed(name_of_last: str) -> Callable[[HospitalEvaluation, str, np.ndarray], None]:
    """Add `WORD` to another word in each copy of the value that the last layer reads, and hand that over."""
    honest = HospitalEvaluation.hand_over

    def hand_over(self: HospitalEvaluation, name: str, share: np.ndarray) -> None:
        if name == name_of_last:
            for copy in range(1, len(share)):
                share[copy].reshape(-1)[copy - 1] += WORD
        honest(self, name, share)

    return hand_over


def _withholding(kind: str, stranger: Path) -> None:
    """Sign no receipt, a wrong one, or with another key than this hospital's."""
    honest = Links.send_object

    def send_object(self: Links, receiver: str, tag: str, value: dict[str, Any]) -> None:
        if tag == "receipt" and kind == "silent":
            return
        if tag == "receipt" and kind == "false signature":
            value = {"signature": value["signature"][:-2] + "00"}
        if tag == "terms" and kind == "foreign certificate":
            value = {"certificate": (stranger / "hospital-0.crt").read_text()}
        honest(self, receiver, tag, value)

    Links.send_object = send_object  # type: ignore[method-assign]


def _deviating(name: str, values: dict[str, Any], told: Any, kind: str, sessions: int = 1, barrier: Any = None) -> None:
    """Ask with `sessions` sessions at once; tell the answers, and the line of each session's error."""
    torch.set_num_threads(1)
    config = parse_config(values, name)
    out = config.site.out or Path()
    images = load_images(None, config, config.inference.limit)
    what, _, value = kind.partition(" of ")
    if what == "words":
        images.inputs[:] = images.inputs[:1].clone()
        HospitalEvaluation.hand_over = _words_changed(value)  # type: ignore[method-assign]
    elif kind == "logits":
        from mpc_fl.inference.serving.receipt_exchange import HospitalReceipts

        meet = HospitalReceipts.meet
        HospitalReceipts.meet = lambda self, wanted: (meet(self, None), "logits")[1]  # type: ignore[method-assign]
    else:
        _withholding(kind, out.parent / "stranger")
    answers, lines = list[Any](), list[str]()

    def ask() -> None:
        try:
            links = links_to_service(config, Visit(name))
            with links:
                found, refusal = ask_service(
                    config, images, links, OpeningRecord(out / "openings.jsonl", name), lambda *_unused: None
                )
            answers.extend(None if one.logits is None else one.logits.tolist() for one in found)
            lines.append(str(refusal or ""))
        except MpcFlError as error:
            lines.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(sessions)]
    if barrier is not None:
        barrier.wait(60)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    told.put((answers, lines))
    told.close()
    told.join_thread()
    os._exit(0)


def _start(
    served: Service, name: str, kind: str, images: int, told: Any, sessions: int = 1, barrier: Any = None
) -> Any:
    values = served.values(name, {"limit": images}, out=str(served.directory / f"{name}-{kind}"))
    process = SPAWN.Process(target=_deviating, args=(name, values, told, kind, sessions, barrier))
    process.start()
    served.asking.append(process)
    return process


def _deviate(served: Service, name: str, kind: str, images: int, **more: Any) -> tuple[list[Any], list[str]]:
    told = SPAWN.Queue()
    _start(served, name, kind, images, told, **more)
    found: tuple[list[Any], list[str]] = told.get(timeout=120)
    return found


def _images_charged(served: Service) -> list[tuple[str, int]]:
    return charges(served.directory / "model-owner")


def _openings(served: Service) -> int:
    path = served.directory / "model-owner" / "openings.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _receipts(directory: Path) -> list[dict[str, Any]]:
    path = directory / "receipts.jsonl"
    return [json.loads(line)["receipt"] for line in path.read_text().splitlines()] if path.exists() else []


def _verify(directory: Path, *copies: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from mpc_fl.apps.cli.main import main; main()", "ledger", "verify", directory]
    more = [word for copy in copies for word in ("--copy", copy)]
    return subprocess.run([*map(str, [*program, *more])], capture_output=True, text=True, timeout=100)


# ---- what the answers tell ---------------------------------------------------------------------------------------------


def test_copies_of_one_image_with_one_word_changed_in_each_give_no_weight(service: Callable[..., Service]) -> None:
    served = service({"batch_size": COPIES})
    model = calibrated(served.config, load_model(served.directory / "model.safetensors", served.config), None)
    last = model.network.linear_layers[-1]
    weights = model.weights.inside_protocol().weights[last.output]  # (classes, FEATURES)
    answers, lines = _deviate(served, "hospital-0", f"words of {last.inputs[0]}", COPIES)
    assert lines == [""] and len(answers) == COPIES
    assert sum(images for _, images in _images_charged(served)) == COPIES  # each copy counts
    if answers[0] is not None:
        # The weights follow exactly: the difference of a copy's logits to those of the first, in steps of the last truncation.
        logits = torch.tensor(answers) / model.network.values[model.network.output].scale
        found = (logits[1:] - logits[0]).T * (1 << last.shift) / WORD
        assert tuple(found.shape) == tuple(weights.shape)
        exact = float((found.round() == weights).float().mean())
        pytest.fail(f"the hospital has {exact:.1%} of the last layer's {weights.numel()} weights exactly")
    assert [receipt["reveal"] for receipt in _receipts(served.directory / "model-owner")] == ["label"] * 2


def test_who_asks_for_logits_is_refused_with_one_line(service: Callable[..., Service]) -> None:
    served = service()
    told = SPAWN.Queue()
    values = served.values("hospital-1", {"limit": 1, "reveal": "logits"}, out=str(served.directory / "configured"))
    process = SPAWN.Process(target=_deviating, args=("hospital-1", values, told, "none"))
    process.start()
    answers, lines = told.get(timeout=60)
    assert not answers and lines == [
        "model-owner reveals the label alone, and inference.reveal=logits asks for something else: leave inference.reveal "
        "out, or set it to label"
    ]
    # One that was told, and asks for logits all the same.
    answers, lines = _deviate(served, "hospital-0", "logits", 1)
    assert not answers and lines == [
        "this model owner reveals label, and the hospital asked for logits: set inference.reveal=label"
    ]
    assert not _images_charged(served) and not _openings(served)


# ---- limits ------------------------------------------------------------------------------------------------------------


def test_several_sessions_at_once_exceed_no_limit(service: Callable[..., Service]) -> None:
    served = service(images_per_day=3, turns=4)
    answers, lines = _deviate(served, "hospital-0", "none", 2, sessions=5)
    more, refused = _deviate(served, "hospital-0", "none", 4)
    assert any("goes on already" in line for line in lines)
    assert len(answers) + len(more) == sum(images for _, images in _images_charged(served)) == 3
    assert "hospital-0 may ask about 3 images in 24 hours: come back at 20" in refused[0]


def test_several_hospitals_do_not_exceed_the_limit_of_all(service: Callable[..., Service]) -> None:
    served, told, barrier = service(images_per_day=2, turns=4), SPAWN.Queue(), SPAWN.Barrier(3)
    for name in HOSPITALS:
        _start(served, name, "none", 2, told, barrier=barrier)
    ends = [told.get(timeout=120) for _ in HOSPITALS]
    assert sum(len(answers) for answers, _ in ends) == sum(images for _, images in _images_charged(served)) == 4
    lines = [line for _, (line,) in ends if line]
    wanted = "all hospitals together may ask about 4 images in 24 hours: come back at 20"
    assert lines and all(line.startswith(wanted) for line in lines)
    # Nor after a restart.
    served.end(signal.SIGKILL)
    served = service(images_per_day=2, turns=4)
    for name in HOSPITALS:
        answers, lines = _deviate(served, name, "none", 1)
        assert not answers and "may ask about" in lines[0]
    assert sum(images for _, images in _images_charged(served)) == 4


# ---- receipts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["silent", "false signature", "foreign certificate"])
def test_who_does_not_sign_is_served_no_further(service: Callable[..., Service], kind: str) -> None:
    served = service(turns=1)
    make_local_identities(["hospital-0"], {"hospital-0": served.directory / "stranger"})
    answers, (line,) = _deviate(served, "hospital-0", kind, 2)
    assert not answers and not _openings(served) and not _receipts(served.directory / "model-owner")
    wanted = "hospital-0 did not sign receipt 1 of this session, so it is served no further"
    assert ("the certificate of hospital-0 is not signed by this" if kind == "foreign certificate" else wanted) in line
    # Its turn has ended, and what it began stays charged.
    assert _images_charged(served) == [("hospital-0", 1)] * (kind != "foreign certificate")
    line, results = served.ask("hospital-1", 1, "honest")
    assert (line, len(results)) == ("", 1)


def test_a_session_that_is_cut_off_is_on_receipts_and_an_edited_one_is_found(service: Callable[..., Service]) -> None:
    served = service()
    killed = served.begin("hospital-0", 4, "killed", trigger=("masked 1", signal.SIGKILL))
    assert served.before.get(timeout=60) == ("hospital-0", "about to stop")
    killed.join(30)
    line, results = served.ask("hospital-1", 2, "honest")
    assert (line, len(results)) == ("", 2)
    owner, mine = served.directory / "model-owner", served.directory / "killed"
    assert [(of["images"], of["openings"], of["closing"]) for of in _receipts(mine)] == [(1, 0, False), (2, 1, False)]
    assert _receipts(owner)[:2] == _receipts(mine)
    assert [(of["images"], of["openings"], of["closing"]) for of in _receipts(owner)[2:]] == [
        (1, 0, False),
        (2, 1, False),
        (2, 2, True),
    ]
    honest = [served.directory / name / "receipts.jsonl" for name in ("killed", "honest", "dealer")]
    done = _verify(owner, *honest)
    assert done.returncode == 0 and "verify: 4 images in 2 sessions" in done.stdout, done.stdout + done.stderr
    assert (owner / "receipts.jsonl").stat().st_mode & 0o777 == 0o600

    lines = (owner / "receipts.jsonl").read_bytes().splitlines(keepends=True)
    edits = {
        "line 2: the signature of": [lines[0], lines[1].replace(b'"images":2', b'"images":1'), *lines[2:]],
        "line 3: does not follow": [*lines[:2], *lines[3:]],
        "lacks receipts of hospital-1": lines[:2],
        "is damaged": [*lines[:4], lines[4].replace(b'"closing":true', b'"closing":1')],
    }
    for wanted, edited in edits.items():
        (owner / "receipts.jsonl").write_bytes(b"".join(edited))
        done = _verify(owner, *honest)
        assert done.returncode == 1 and wanted in done.stdout, (wanted, done.stdout, done.stderr)
        assert "do NOT verify" in done.stdout
