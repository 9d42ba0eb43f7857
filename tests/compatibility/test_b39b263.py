"""Files that users had at commit b39b263 still work: run directories, models, pools, certificates, ledgers.

`make.py` says how they were made. Whatever a test changes, it changes in a copy.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from typer.testing import CliRunner

from mpc_fl.apps.cli import ledger as ledger_commands
from mpc_fl.apps.runs import local_runs
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.authority_directory import AuthorityDirectory, describe
from mpc_fl.crypto.certificates import verify_certificate
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import IdentityError, PrivacyBudgetError, RefusedError
from mpc_fl.inference.serving.quota import Quota, UsageLedger
from mpc_fl.inference.serving.service_records import open_records
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.privacy.accounting import PrivacyBudget, epsilon_of
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import MODEL_OWNER

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHIVE = Path(__file__).parent / "b39b263" / "files.tar.xz"
PASSPHRASE = b"a passphrase of no secrecy"
HOSPITALS = [f"hospital-{rank}" for rank in range(3)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, unpacked; nobody writes there."""
    directory = tmp_path_factory.mktemp("b39b263")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="tar")  # modes stay: keys are 0600
    return directory


@pytest.fixture
def copy(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files, tmp_path / "files"))


def verified(run_dir: Path) -> dict[str, Any]:
    result = CliRunner().invoke(ledger_commands.app, ["verify", str(run_dir), "--json"])
    found: dict[str, Any] = json.loads(result.output)
    assert result.exit_code == (0 if found["ok"] else 1)
    return found


def mpc_fl(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "mpc_fl", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- ledgers -----------------------------------------------------------------------------------------------------------


def test_the_reveal_ledger_verifies_at_all_its_holders(files: Path) -> None:
    found = verified(files / "run")
    assert found["ok"] and found["findings"] == [] and len(found["copies"]) == 4
    assert found["version"] == 1 and found["quorum"] is None and "is of version 1" in found["notes"][0]
    assert found["openings"] == len(lines(files / "run" / "openings.jsonl")) == 6
    kinds = [block["kind"] for block in lines(files / "run" / "reveal_ledger.jsonl")]
    assert kinds[0] == "start" and kinds[-1] == "end" and found["blocks"] == len(kinds)


def test_a_byte_that_is_changed_in_it_is_found(files: Path, tmp_path: Path) -> None:
    content = (files / "run" / "reveal_ledger.jsonl").read_bytes()
    for place in range(40, len(content), len(content) // 20):
        run = tmp_path / f"at-{place}"
        run.mkdir()
        shutil.copy(files / "run" / "federation.crt", run)
        (run / "reveal_ledger.jsonl").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = verified(run)
        assert not found["ok"] and found["findings"][0]["block"] is not None


def test_the_ledger_of_an_interrupted_run_lacks_only_its_end(copy: Path) -> None:
    run = copy / "interrupted.failed"
    shutil.copy(run / "parties" / "aggregator" / "identity" / "federation.crt", run)
    findings = verified(run)["findings"]
    assert ["the end of the run is missing" in finding["what"] for finding in findings] == [True]


@pytest.mark.parametrize("name", HOSPITALS)
def test_the_privacy_ledger_is_read_and_charged_further(name: str, copy: Path) -> None:
    ledger = PrivacyLedger(copy / "run" / "parties" / name / f"{name}-privacy.json", name)
    spent, delta = ledger.spent(), 1e-3
    before, recorded = epsilon_of(spent, delta, "rdp"), lines(copy / "run" / "parties" / name / "metrics.jsonl")[-1]
    assert len(spent) == 2 and before == pytest.approx(recorded["epsilon"], abs=1e-6)
    ledger.charge(spent[0], run="another run", round_number=1)
    after = epsilon_of(ledger.spent(), delta, "rdp")
    assert ledger.spent() == [*spent, spent[0]] and after > before
    with pytest.raises(PrivacyBudgetError, match="would raise epsilon"):
        ledger.charge(spent[0], run="a third run", round_number=1, budget=PrivacyBudget(after, delta, "rdp"))


def test_what_a_hospital_asked_still_counts(copy: Path) -> None:
    charged = lines(copy / "service" / "usage.jsonl")
    assert [(line["hospital"], line["images"]) for line in charged] == [("hospital-0", 1)] * 4
    last = charged[-1]["time"]
    for _ in range(2):  # taken over once
        with open_records(copy / "service", MODEL_OWNER) as records:
            ledger = UsageLedger(records, [Quota(5, 86400, "24 hours")], lambda: last + 1)
            ledger.require("hospital-0", 1)
            with pytest.raises(RefusedError, match="may ask about 5 images in 24 hours"):
                ledger.require("hospital-0", 2)
            ledger.require("hospital-1", 5)
    [kept] = (copy / "service").glob("usage.jsonl*-*")
    assert lines(kept) == charged


# ---- run directories and the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "words"), [("run", "test records"), ("diagnosis", "synthetic-phantom-test-0")])
def test_a_report_is_written_again(run: str, words: str, copy: Path) -> None:
    path = local_runs.report(copy / run)
    text = path.read_text()
    assert path == copy / run / "report.html" and "SYNTHETIC" in text and words in text
    assert "Not shown" not in text


def configuration(run: Path, *overrides: str) -> Config:
    return load_config(run / "config.yaml", list(overrides))


def test_the_model_gives_the_logits_that_it_gave(files: Path) -> None:
    recorded = json.loads((files / "logits.json").read_text())
    model = load_model(files / "run" / "model.safetensors", configuration(files / "run"))
    logits = predict(model, torch.tensor(recorded["images"]))
    assert torch.allclose(logits, torch.tensor(recorded["logits"], dtype=logits.dtype), atol=1e-5)


@pytest.mark.processes
def test_an_interrupted_run_is_not_gone_on_with_and_keeps_what_it_has(copy: Path) -> None:
    """Its checkpoints and its ledger are of version 1, and no block of version 2 can follow one of version 1."""
    out, kept = copy / "interrupted", copy / "interrupted.failed"
    before = [(kept / "parties" / name / "reveal_ledger.jsonl").read_bytes() for name in HOSPITALS]
    command = [sys.executable, "-m", "mpc_fl", "train", str(kept / "config.yaml"), "--out", str(out), "--resume"]
    # Its quorum of 2 protects against no more, and exact counts are opened without a mechanism alone: both are refused since.
    command += ["--set", "privacy.colluders=0", "--set", "aggregation.weighted=null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY)
    assert done.returncode != 0 and not out.exists()
    assert "of another version" in done.stderr or "of version 1, which cannot be continued" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert [(kept / "parties" / name / "reveal_ledger.jsonl").read_bytes() for name in HOSPITALS] == before


# ---- certificates ------------------------------------------------------------------------------------------------------


def test_a_certificate_is_still_believed_and_a_revoked_one_is_not(copy: Path) -> None:
    sites = copy / "authority" / "sites"
    identity = load_identity(sites / "hospital-0", "hospital-0")
    certificate = verify_certificate((sites / "hospital-1" / "hospital-1.crt").read_bytes(), "hospital-1", identity)
    assert certificate.not_valid_after_utc.year > 2100
    shutil.copy(copy / "authority" / "federation.crl", sites / "hospital-0")  # as `pki revoke` tells the administrator
    identity = load_identity(sites / "hospital-0", "hospital-0")
    with pytest.raises(IdentityError, match="revoked"):
        verify_certificate((sites / "hospital-1" / "hospital-1.crt").read_bytes(), "hospital-1", identity)


def test_the_authority_opens_and_issues_renews_and_revokes(copy: Path) -> None:
    directory = copy / "authority"
    states = [(item["name"], item["state"]) for item in describe(directory)["certificates"]]
    assert states == [("hospital-0", "live"), ("hospital-1", "revoked")]
    with pytest.raises(IdentityError, match="does not open"):
        AuthorityDirectory.open_(directory, Private("passphrase", b"another passphrase"))
    authority = AuthorityDirectory.open_(directory, Private("passphrase", PASSPHRASE))
    authority.issue("aggregator", copy / "new")
    assert load_identity(copy / "new", "aggregator").name == "aggregator"
    authority.renew("hospital-0", directory / "sites" / "hospital-0")
    renewed = load_identity(directory / "sites" / "hospital-0", "hospital-0")
    old = x509.load_pem_x509_certificate((copy / "new" / "federation.crt").read_bytes())
    assert x509.load_pem_x509_certificate(renewed.authority) == old
    authority.revoke("aggregator")
    states = [(item["name"], item["state"]) for item in describe(directory)["certificates"]]
    assert [state for name, state in states if name == "aggregator"] == ["revoked"]


# ---- the pool ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.processes
def test_a_diagnosis_is_made_from_the_pool(copy: Path) -> None:
    """Without a dealer: both halves must open, agree on a batch, and give the logits of the model in the clear."""
    settings = ["inference.engine=fast", "inference.dealer=false", "inference.limit=1", f"site.pool={copy / 'pool'}"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = ["infer", copy / "run" / "config.yaml", "--model", copy / "run" / "model.safetensors"]
    try:
        summary = mpc_fl(*command, "--out", copy / "from-the-pool", *overrides)
    except AssertionError as error:
        if "is for another model" not in str(error):
            raise
        # b39b263 itself refuses its pool there: integers of weights are rounded with the help of floating-point sums.
        pytest.skip("this processor's sums round a weight otherwise than the one that made the pool")
    assert summary["comparison"]["classes_agree"] and summary["comparison"]["largest_logit_difference"] < 0.01
    status = mpc_fl("dealer", "status", "--pool", copy / "pool")
    assert {(half["party"], half["used"], half["left"]) for half in status["pools"]} == {
        ("hospital-0", 1, 1), ("model-owner", 1, 1)}  # fmt: skip
