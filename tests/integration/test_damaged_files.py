"""Every kind of file that this project reads, damaged at random: it can be used, or is refused in one line of an `MpcFlError`.

Each test makes a good file, changes bytes in it, cuts it off, repeats a part or puts something hostile there, and reads it as the
program does. Formats that have tests of their own kind: databases (`tests/database`), reports (`tests/apps/report`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpc_fl.apps.rows import HospitalRound
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.ledger_audit import read_ledger
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.record_audit import RecordCopy, verify_records
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.authority_directory import RECORD_FILE, AuthorityDirectory, describe
from mpc_fl.crypto.certificates import REVOCATION_FILE, ROOT_FILE
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import MpcFlError
from mpc_fl.files import append_json_line, read_json_lines
from mpc_fl.inference.fast.preprocessing.pool import KEYS, Terms, create_pool, open_pool
from mpc_fl.inference.serving.service_records import EARLIER_USAGE, open_records
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.data.tables import read_csv, read_medmnist
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.learning.privacy.ledger_rows import SECOND_FORMAT, checksum
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.audit.test_reveal_ledger import authority, genuine, identity
from tests.audit.test_reveal_ledger import begun as begun_ledger
from tests.audit.test_reveal_ledger import record as record_opening

HOSTILE = [
    b"", b"\0", b"\xff\xfe\x00", b"[" * 2000, b"{" * 2000, b'{"a":' * 400 + b"1" + b"}" * 400, b"9" * 5000, b"-" + b"9" * 200,
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"{}", b"[]", b'""', b"true", b'"\\ud800"', b"\n", b"a: &a [*a]",
    b"\xe2\x80\xa8", b'{"a": 1, "a": 2}', b"!!int x", b"2001-99-99", b".inf", b"-1", b"1.5",
]  # fmt: skip
CONFIG = parse_config(
    {"data": {"image_size": 8, "classes": ["a", "b"]}, "model": {"architecture": "mlp", "hidden": [2]}}, "test"
)
TABLE = parse_config(
    {"data": {"source": "csv", "classes": ["a", "b"], "table": {"features": 2, "patient_column": "who"}}}, "test"
)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few changes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 1, 2, 8, 50, 1000])))
        put = draw(st.sampled_from(HOSTILE) | st.binary(min_size=1, max_size=2) | st.just(content[start:end] * 2))
        content = draw(st.sampled_from([content[:start] + put + content[end:], content[:start], put]))
    return content


def values_damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The same file of JSON lines with a value, anywhere in it, exchanged for a hostile one."""
    words = content.replace(b"[", b" [ ").replace(b"{", b" { ").replace(b",", b" , ").replace(b":", b" : ").split(b" ")

    def exchanged(place: int, put: bytes) -> bytes:
        return b"".join([*words[:place], put, *words[place + 1 :]])

    return st.builds(exchanged, st.integers(0, len(words) - 1), st.sampled_from(HOSTILE))


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    try:
        yield
    except MpcFlError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000 and "defect" not in str(error)


Case = tuple[Path, Callable[[], object]]


def configuration(root: Path) -> Case:
    path = root / "config.yaml"
    path.write_text(Path("configs/demo.yaml").read_text())

    def read() -> object:
        config = load_config(path)
        assert (
            yaml.safe_load(config.to_yaml())
            and config.digest()
            and Config.model_validate(config.model_dump()) == config
        )
        return config

    return path, read


def metrics(root: Path) -> Case:
    path, line = root / "metrics.jsonl", HospitalRound(round=1, loss=0.5, epsilon=1.5, own_accuracy=0.25)
    for number in (1, 2):
        append_json_line(path, {**dataclasses.asdict(line), "round": number})
    return path, lambda: [typed(HospitalRound, found, "metrics.jsonl") for found in read_json_lines(path)]


def model(root: Path) -> Case:
    path = root / "model.safetensors"
    save_model(path, build_model(CONFIG, seed=1), CONFIG)
    return path, lambda: load_model(path, CONFIG)


def ledger(root: Path) -> Case:
    path = root / LEDGER_FILE
    path.write_bytes(genuine())
    return path, lambda: RevealLedger(root, identity("hospital-0"))


def openings(root: Path) -> Case:
    record_opening(begun_ledger(root), "round 1")
    path, own_reading = root / OPENINGS_FILE, read_ledger((root / LEDGER_FILE).read_bytes(), authority().certificate)

    def read() -> object:
        own = RevealLedger(root, identity("hospital-0"))
        findings, notes = verify_records([RecordCopy("here", None, path.read_bytes())], own_reading)
        assert all("\n" not in line for line in [*(finding.line for finding in findings), *notes])
        return own

    return path, read


def party_file(name: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        fed, site = root / "fed", root / "site"
        made = AuthorityDirectory.create(fed, "ward")
        made.issue("hospital-0", site)
        made.issue("hospital-1", root / "other")
        made.revoke("hospital-1")
        made.renew("hospital-0", site)
        return site / name, lambda: load_identity(site, "hospital-0")

    return make


def issued(root: Path) -> Case:
    party_file(ROOT_FILE)(root)
    return root / "fed" / RECORD_FILE, lambda: json.dumps(describe(root / "fed"))


def earlier_privacy(root: Path) -> Case:
    path = root / "privacy.json"
    event = {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 3, "total_variation": 0.0}
    records = [{"time": "2026", "run": "r", "round": 1, "released": True, **event}]
    content = {"format": SECOND_FORMAT, "hospital": "hospital-0", "records": records}
    path.write_text(json.dumps({**content, "sha256": checksum("hospital-0", records)}))

    def read() -> object:
        (root / "privacy.sqlite3").unlink(missing_ok=True)
        return PrivacyLedger(root / "privacy.sqlite3", "hospital-0").epsilon(0.01, "rdp")

    return path, read


def earlier_usage(root: Path) -> Case:
    path = root / EARLIER_USAGE
    append_json_line(path, {"time": 1.5, "hospital": "hospital-0", "images": 3})

    def read() -> object:
        for database in root.glob("*.sqlite3"):
            database.unlink()
        open_records(root, "model-owner").close()
        return None

    return path, read


def pool_keys(root: Path) -> Case:
    terms = Terms("p", "hospital-0", "model-owner", "5" * 64, 1, "label")
    with create_pool(root / "pool", terms, Seed.from_system(), np.zeros(3, np.uint8)):
        pass

    def read() -> object:
        with open_pool(root / "pool", None) as pool:
            return pool.next, pool.numbers, pool.model()

    return root / "pool" / KEYS, read


def csv(root: Path) -> Case:
    path = root / "patients.csv"
    path.write_text("who,x,y,label\n" + "".join(f"p{n},{n / 3},{-n},{'ab'[n % 2]}\n" for n in range(12)))

    def read() -> object:
        found = read_csv(path, TABLE, "train")
        assert np.isfinite(found.inputs).all()
        return found

    return path, read


def npz(root: Path) -> Case:
    path = root / "images.npz"
    arrays: dict[str, Any] = {
        "train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.array([[0], [1], [0], [1]], np.uint8),
    }  # fmt: skip
    np.savez(path, **arrays)
    return path, lambda: read_medmnist(path, CONFIG, "train")


def picture(kind: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        path = root / f"image.{kind}"
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
        return path, lambda: read_image(path, ImageForm(1, 8, "resize"))

    return make


KINDS: dict[str, Callable[[Path], Case]] = {
    "configuration": configuration, "metrics": metrics, "model": model, "reveal ledger": ledger, "openings": openings,
    "authority's certificate": party_file(ROOT_FILE), "certificate": party_file("hospital-0.crt"),
    "key": party_file("hospital-0.key"), "revocation list": party_file(REVOCATION_FILE), "record of certificates": issued,
    "keys of a pool": pool_keys,
    "earlier privacy ledger": earlier_privacy, "earlier usage": earlier_usage, "csv": csv, "npz": npz, "png": picture("png"),
    "jpeg": picture("jpg"),
}  # fmt: skip
_SLOW = {"model": 30, "reveal ledger": 30, "earlier privacy ledger": 30, "earlier usage": 30}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_damaged_file_is_used_as_it_is_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path, read = KINDS[kind](tmp_path)
    read()
    good, mode = path.read_bytes(), path.stat().st_mode

    @settings(
        max_examples=_SLOW.get(kind, 100),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(damage(good) | values_damaged(good))
    def check(content: bytes) -> None:
        if path.exists():
            path.unlink()
        path.write_bytes(content)
        path.chmod(mode)
        with in_one_line():
            read()

    check()
    for content in HOSTILE:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        with in_one_line():
            read()
    path.unlink()
    path.mkdir(mode=0o700)  # a directory where a file is expected
    with pytest.raises(MpcFlError):
        read()
    path.rmdir()
