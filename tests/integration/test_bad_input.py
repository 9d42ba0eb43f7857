"""What users get wrong: each is one line that says what, where and what to do; no traceback, nothing half-written.

What can be refused before processes start is; the rest arises in a party, which the line then names.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from mpc_fl.apps.cli import main as cli
from mpc_fl.apps.cli.progress import PROGRESS_LINE
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import (
    ConfigError,
    DataError,
    HeadroomError,
    LinkError,
    ModelError,
    MpcFlError,
    PrivacyBudgetError,
    RunFailedError,
)
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import describe, save_model
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger

CLASSES = ("normal", "bacterial", "viral")
SETTINGS: dict[str, Any] = {
    "data": {"source": "images", "image_size": 8, "classes": list(CLASSES), "patient_pattern": r"(\w+)\.png"},
    "training": {"rounds": 1, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"delta": 0.01, "smallest_hospital": 12},
    "federation": {"hospitals": 2},
}


class Site:
    """A user's directory: a good configuration, good images, a good model, and an empty place for results."""

    def __init__(self, root: Path) -> None:
        self.root, self.config, self.data = root, root / "config.yaml", root / "data"
        self.model, self.results = root / "model.safetensors", root / "results"
        self.results.mkdir()
        self.config.write_text(yaml.safe_dump(SETTINGS))
        draw = np.random.default_rng(0)
        for split, count in (("train", 8), ("test", 4)):
            for name in CLASSES:
                folder = self.data / split / name
                folder.mkdir(parents=True)
                for patient in range(count):
                    pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{name}{split}{patient}.png")
        settings = self.settings
        save_model(self.model, build_model(settings, seed=3), settings)

    @property
    def settings(self) -> Config:
        return load_config(self.config)

    @property
    def out(self) -> Path:
        return self.results / "run"

    def images_of(self, split: str, name: str) -> list[Path]:
        return sorted((self.data / split / name).iterdir())

    def train(self, *more: object) -> list[object]:
        return ["train", self.config, "--data", self.data, "--out", self.out, *more]

    def check(self, *more: object) -> list[object]:
        return ["check", self.config, "--data", self.data, *more]

    def infer(self, *more: object) -> list[object]:
        images = self.data / "test"
        return ["infer", self.config, "--model", self.model, "--images", images, "--out", self.out, *more]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


Run = Callable[[list[object]], tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: exit status, and all that it and its parties wrote to both outputs."""

    def call(arguments: list[object]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpc-fl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said, complained = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said, complained

    return call


def assert_refused(run: Run, arguments: list[object], kind: type[MpcFlError], *words: object) -> None:
    """One line, the exit status of its kind, and no trace in the results' place; `check` may have counted the data before."""
    results = next((Path(str(b)).parent for a, b in zip(arguments, arguments[1:], strict=False) if a == "--out"), None)
    before = sorted(results.iterdir()) if results is not None and results.is_dir() else []
    status, said, complained = run(arguments)
    assert status == kind.exit_code, complained
    assert said == "" or (arguments[0] == "check" and said.startswith("Data: ") and "The run can work" not in said)
    assert complained.startswith("mpc-fl: ") and complained.endswith("\n") and complained.count("\n") == 1, complained
    assert "Traceback" not in complained
    assert complained.count(": ") >= 2, f"says not what to do: {complained}"
    for word in words:
        assert str(word) in complained
    assert (sorted(results.iterdir()) if results is not None and results.is_dir() else []) == before


# ---- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.round=3", "unknown key 'training.round': the nearest known name is 'training.rounds'"),
        ("trainign.rounds=3", "unknown key 'trainign': the nearest known name is 'training'"),
        ("training.rounds=0", "'training.rounds' is not valid"),
        ("training.rounds.more=1", "'rounds' is a value, not a section"),
        ("training.rounds", "is not of the form a.b=c"),
        ("training.rounds=[", "the value is not YAML"),
        ("data.classes=[normal]", "at least two different classes"),
        ("privacy.epsilon=.nan", "'privacy.epsilon' is not valid"),
    ],
)
def test_settings(site: Site, run: Run, setting: str, words: str) -> None:
    assert_refused(run, site.train("--set", setting), ConfigError, words)


def test_unusable_configuration_files(site: Site, run: Run) -> None:
    def train(config: Path) -> list[object]:
        return ["train", config, "--out", site.out]

    assert_refused(run, train(site.root / "nowhere.yaml"), ConfigError, "nowhere.yaml", "No such file")
    assert_refused(run, train(site.root), ConfigError, site.root, "Is a directory")
    site.config.write_bytes(b"\xff\xfe\x00")
    assert_refused(run, train(site.config), ConfigError, "not UTF-8 text")
    site.config.write_text("data: {source: phantoms\n")
    assert_refused(run, train(site.config), ConfigError, "line 2", "not valid YAML")
    site.config.write_text("- a list\n")
    assert_refused(run, train(site.config), ConfigError, "not a mapping")


# ---- data --------------------------------------------------------------------------------------------------------------


def test_missing_data(site: Site, run: Run) -> None:
    nowhere = site.root / "nowhere"
    command = ["train", site.config, "--out", site.out]
    assert_refused(run, command, DataError, "data.source 'images' needs a path: pass --data")
    assert_refused(run, [*command, "--data", nowhere], DataError, f"data folder {nowhere / 'train'} does not exist")
    assert_refused(run, ["check", site.config, "--data", nowhere], DataError, nowhere)
    assert_refused(run, ["estimate", site.config, "--data", nowhere], DataError, nowhere)
    shutil.rmtree(site.data / "test")
    assert_refused(run, site.train(), DataError, site.data / "test", "--data DIR")


def test_missing_empty_and_surplus_classes(site: Site, run: Run) -> None:
    viral = site.data / "test" / "viral"
    for image in viral.iterdir():
        image.unlink()
    assert_refused(run, site.train(), DataError, f"class folder {viral} has no images", "drop the class")
    (viral / "notes.txt").touch()
    assert_refused(run, site.train(), DataError, f"class folder {viral} has no images")
    shutil.rmtree(viral)
    assert_refused(run, site.train(), DataError, f"class folder {viral} does not exist", "data.classes")
    fewer = ["--set", "data.classes=[normal, bacterial]"]
    assert_refused(run, site.train(*fewer), DataError, "wrong number of classes", "'viral'", "2 classes are configured")


def test_a_hospital_without_data(site: Site, run: Run) -> None:
    more = ["--set", "federation.hospitals=13"]
    assert_refused(run, site.train(*more), DataError, "has no train patients", "use fewer hospitals")
    assert_refused(run, site.check(*more), DataError, "has no train patients")


def test_images_of_a_wrong_size_and_unreadable_ones(site: Site, run: Run) -> None:
    for image in site.images_of("train", "bacterial"):
        Image.new("L", (9, 8)).save(image)
    first = site.images_of("train", "bacterial")[0]
    assert_refused(run, site.train(), DataError, f"image {first} is 9x8, expected 8x8", "data.wrong_size=resize")
    for image in site.images_of("train", "bacterial"):
        image.write_bytes(b"no image")
    words = ("no image of class 'bacterial' can be read", first)
    assert_refused(run, site.train(), DataError, *words)


def test_images_to_diagnose(site: Site, run: Run) -> None:
    """The hospital's own mistakes, told before the model owner is bothered."""
    other = site.root / "other.png"
    command = ["infer", site.config, "--model", site.model, "--out", site.out]
    assert_refused(run, command, DataError, "no images were given", "--images")
    assert_refused(run, [*command, "--images", other], DataError, f"image path {other} does not exist")
    other.write_bytes(b"no image")
    assert_refused(run, [*command, "--images", other], DataError, "no image can be read", other)
    Image.new("L", (16, 16)).save(other)
    assert_refused(run, [*command, "--images", other], DataError, f"image {other} is 16x16, expected 8x8")
    assert_refused(run, [*command, "--images", site.results], DataError, "holds no file of the kinds DICOM, PNG")


# ---- headroom, privacy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (["aggregation.update_bound=1e13"], HeadroomError, "needs 67.2 bits and the ring has 63"),
        (["aggregation.count_bound=3"], HeadroomError, "hospital-0 has more patients than aggregation.count_bound"),
        (["privacy.smallest_hospital=null"], ConfigError, "privacy.smallest_hospital is not set"),
        (["privacy.smallest_hospital=13"], PrivacyBudgetError, "hospital-0 has fewer patients than privacy.smallest"),
        (["privacy.smallest_hospital=2"], PrivacyBudgetError, "hospital-0 has more patients than privacy.largest"),
        (["aggregation.weighted=true"], ConfigError, "would open the exact number of patients"),
        (["privacy.delta=0.1"], PrivacyBudgetError, "hospital-0: delta 0.1 is not below 1/12"),
        (
            ["privacy.epsilon=1e-3", "privacy.delta=1e-6"],
            PrivacyBudgetError,
            "hospital-0: no noise is large enough for the privacy budget: epsilon 0.000",
        ),
        (["privacy.noise_multiplier=0.3"], PrivacyBudgetError, "hospital-0: 2 steps with noise multiplier 0.3 would"),
        (
            ["model.architecture=resnet19"],
            ModelError,
            "unknown model.architecture 'resnet19': the nearest known name is",
        ),
        (["model.architecture=resnet18"], ModelError, "takes 3 channels, the data have 1: set data.channels=3"),
    ],
)
def test_what_cannot_work(site: Site, run: Run, settings: list[str], kind: type[MpcFlError], words: str) -> None:
    """`check` says so, and `train` says the same before it starts anything."""
    more = [part for setting in settings for part in ("--set", setting)]
    assert_refused(run, site.train(*more), kind, words)
    assert_refused(run, site.check(*more), kind, words)


def test_check_tells_machines_what_is_wrong(site: Site, run: Run) -> None:
    status, said, complained = run(site.check("--json", "--set", "aggregation.count_bound=3"))
    answer = json.loads(said)
    assert status == HeadroomError.exit_code and complained.count("\n") == 1
    assert answer.pop("data")["unreadable"] == 0
    assert answer == {"ok": False, "error": answer["error"], "fix": "raise aggregation.count_bound"}
    assert answer["error"] in complained
    status, said, _ = run(site.check("--json", "--set", "no.such=key"))
    assert status == ConfigError.exit_code and json.loads(said)["ok"] is False


# ---- models ------------------------------------------------------------------------------------------------------------


def _truncate(site: Site) -> None:
    site.model.write_bytes(site.model.read_bytes()[:-100])


def _pickle(site: Site) -> None:
    site.model.write_bytes(pickle.dumps({"0.weight": [1.0]}))


def _zip(site: Site) -> None:
    with zipfile.ZipFile(site.model, "w") as archive:
        archive.writestr("0.weight", b"x" * 100)


def _enormous_header(site: Site) -> None:
    site.model.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Site], None]:
    def edit(site: Site) -> None:
        tensors = load_file(site.model)
        change(tensors)
        save_file(tensors, site.model, {"mpc-fl": json.dumps(describe(site.settings))})

    return edit


def _of(**changes: Any) -> Callable[[Site], None]:
    def save(site: Site) -> None:
        values = {name: {**SETTINGS.get(name, {}), **change} for name, change in changes.items()}
        other = site.settings.with_values(**values)
        save_model(site.model, build_model(other, seed=3), other)

    return save


def _foreign(site: Site) -> None:
    save_file({"weight": torch.zeros(3)}, site.model, {"format": "pt"})


CORRUPT, NOT_FINITE = "is corrupt or no safetensors file", "holds NaN or infinite weights in '0.weight'"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda site: site.model.unlink(), "does not exist", id="missing"),
        pytest.param(lambda site: site.model.write_bytes(b""), CORRUPT, id="empty"),
        pytest.param(lambda site: site.model.write_bytes(b"garbage" * 99), CORRUPT, id="garbage"),
        pytest.param(_truncate, CORRUPT, id="truncated"),
        pytest.param(_pickle, CORRUPT, id="pickle"),
        pytest.param(_zip, CORRUPT, id="zip"),
        pytest.param(_enormous_header, CORRUPT, id="enormous header"),
        pytest.param(lambda site: (site.model.unlink(), site.model.mkdir()), "Is a directory", id="directory"),
        pytest.param(_foreign, "does not describe an mpc-fl model", id="foreign"),
        pytest.param(_edit(lambda tensors: tensors["0.weight"].fill_(torch.nan)), NOT_FINITE, id="NaN"),
        pytest.param(_edit(lambda tensors: tensors["0.weight"].fill_(torch.inf)), NOT_FINITE, id="infinite"),
        pytest.param(
            _edit(lambda tensors: tensors["1.running_var"].neg_()), "layer '1' has a weight that is not finite",
            id="negative variance",
        ),
        pytest.param(_edit(lambda tensors: tensors.pop("9.bias")), "do not fit the architecture", id="tensor missing"),
        pytest.param(_of(model={"architecture": "mlp"}), 'has architecture "mlp"', id="another architecture"),
        pytest.param(_of(data={"image_size": 16}), "has input shape [1, 16, 16]", id="another image size"),
        pytest.param(_of(data={"classes": ["a", "b"]}), 'has 2 classes ["a", "b"], the configuration 3', id="classes"),
    ],
)  # fmt: skip
def test_model_files(site: Site, run: Run, spoil: Callable[[Site], object], words: str) -> None:
    spoil(site)
    assert_refused(run, site.infer(), ModelError, words)


# ---- where results go --------------------------------------------------------------------------------------------------


def test_results_are_never_overwritten(site: Site, run: Run) -> None:
    for command in (site.train, site.infer):
        site.out.mkdir()
        (site.out / "kept").touch()
        assert_refused(run, command(), ConfigError, f"{site.out} exists already", "--out")
        assert [path.name for path in site.out.iterdir()] == ["kept"]
        shutil.rmtree(site.out)
        site.out.touch()
        assert_refused(run, command(), ConfigError, f"{site.out} exists already")
        site.out.unlink()
        site.out.symlink_to(site.root / "nowhere")
        assert_refused(run, command(), ConfigError, f"{site.out} exists already")
        site.out.unlink()
        partial = site.results / "run.partial"
        partial.mkdir()
        assert_refused(run, command(), ConfigError, f"{partial} exists: another run is using it")
        partial.rmdir()


def test_impossible_places(site: Site, run: Run) -> None:
    def train(out: object) -> list[object]:
        return ["train", site.config, "--data", site.data, "--out", out]

    assert_refused(run, train(site.config / "run"), ConfigError, "cannot create", "Not a directory")
    assert_refused(run, train(site.results / ("x" * 300)), ConfigError, "cannot create", "File name too long")
    assert_refused(run, train("."), ConfigError, "exists already")
    assert_refused(run, train("/"), ConfigError, "exists already")


def test_a_port_in_use(site: Site, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        more = ["--set", f"runtime.first_port={port - 1}"]
        words = (f"port {port} for hospital-1 is in use", "set runtime.first_port")
        assert_refused(run, site.train(*more), LinkError, *words)


def test_reports_of_what_is_no_run(site: Site, run: Run) -> None:
    assert_refused(run, ["report", site.results], MpcFlError, "is not a finished run", "give the --out")
    assert_refused(run, ["report", site.root / "nowhere"], MpcFlError, "is not a finished run")
    (site.results / "summary.json").write_text("{")
    assert_refused(run, ["report", site.results], DataError, "summary.json cannot be read")
    assert [path.name for path in site.results.iterdir()] == ["summary.json"]


def test_party_commands(site: Site, run: Run) -> None:
    def party(*more: object) -> list[object]:
        return ["party", *more, "--config", site.config, "--set", f"site.log={site.root / 'log'}"]

    assert_refused(run, party("hospitall"), ConfigError, "there is no party 'hospitall' in this task: the parties are")
    assert_refused(run, party("hospital"), ConfigError, "--rank")
    assert_refused(run, party("hospital", "--rank", "0"), ConfigError, "site.out is not set", "--out")
    status, _, complained = run(party("hospital", "--rank", "0", "--data", site.data, "--out", site.results))
    assert status == ConfigError.exit_code
    assert complained.splitlines()[-1].startswith(
        "mpc-fl: federation.addresses has no entry for hospital-0: give host:port"
    )


def test_an_unforeseen_error_of_a_party_quotes_no_data(site: Site, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an exception says could be a value; only its type and place are told and logged."""
    from mpc_fl.apps.runs import party_process

    def fail(*_: object) -> NoReturn:
        raise KeyError("patient 4711")

    monkeypatch.setattr(party_process, "importlib", type("Broken", (), {"import_module": staticmethod(fail)}))
    log = site.root / "log"
    arguments = ["party", "hospital", "--rank", "0", "--config", site.config, "--set", f"site.log={log}"]
    status, said, complained = run([*arguments, "--data", site.data, "--out", site.results])
    complained = complained.removeprefix(
        complained[: complained.find("mpc-fl: ")]
    )  # what looks wrong about the patients
    assert status == 1
    assert re.fullmatch(
        r"mpc-fl: unexpected KeyError at test_bad_input\.py:\d+ \(a defect; see the log\)\n", complained
    )
    assert "KeyError" in log.read_text() and "4711" not in log.read_text()


# ---- permissions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site in a place where a user without privileges may be; the super-user, to whom nothing is forbidden, becomes one."""
    root = Path(tempfile.mkdtemp(prefix="mpc-fl-"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(root))  # the super-user's own may not even be asked for
    try:
        root.chmod(0o755)
        site = Site(root)
        privileged = os.geteuid() == 0
        if privileged:
            for path in [root, *root.rglob("*")]:
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        try:
            yield site
        finally:
            if privileged:
                os.seteuid(0)
    finally:
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(root)


def test_forbidden_places(shared_site: Site, run: Run) -> None:
    site = shared_site
    run(site.infer("--set", "inference.limit=0"))  # imports what a command needs while it still may
    denied = "Permission denied"
    site.results.chmod(0o500)
    assert_refused(run, site.train(), ConfigError, f"cannot create {site.out}", denied, "choose another --out")
    assert_refused(run, site.infer(), ConfigError, f"cannot create {site.out}", denied)
    site.results.chmod(0)
    status, _, complained = run(site.train())
    assert status == ConfigError.exit_code and complained.count("\n") == 1 and denied in complained
    site.results.chmod(0o700)
    assert list(site.results.iterdir()) == []


def test_unreadable_files(shared_site: Site, run: Run) -> None:
    site = shared_site
    denied = "Permission denied"
    site.model.chmod(0)
    assert_refused(run, site.infer(), ModelError, f"cannot read model file {site.model}: {denied}")
    site.model.chmod(0o600)
    image = site.images_of("test", "viral")[0]
    image.chmod(0)
    arguments = ["infer", site.config, "--model", site.model, "--out", site.out, "--images", image]
    assert_refused(run, arguments, DataError, "no image can be read", image)
    folder = site.data / "train" / "viral"
    folder.chmod(0)
    assert_refused(run, site.train(), DataError, folder, denied)
    folder.chmod(0o700)
    site.data.chmod(0)  # its folders cannot even be asked for
    status, _, complained = run(site.train())
    assert status != 0 and complained.count("\n") == 1 and str(site.data) in complained and denied in complained
    site.data.chmod(0o700)
    site.config.chmod(0)
    assert_refused(run, site.train(), ConfigError, f"cannot read configuration {site.config}: {denied}")


# ---- what arises within a party ----------------------------------------------------------------------------------------


def assert_failed(run: Run, site: Site, arguments: list[object], pattern: str) -> None:
    """One line that names the party, and of the run only the logs are left."""
    status, said, complained = run(arguments)
    lines = complained.splitlines()
    assert status == RunFailedError.exit_code and said == ""
    assert re.fullmatch(f"mpc-fl: {pattern}", lines[-1]), complained
    assert "Traceback" not in complained
    assert all(PROGRESS_LINE.fullmatch(line) for line in lines[:-1]), "before it only progress"
    (failed,) = site.results.iterdir()
    kept = {path.name for path in failed.iterdir()}
    ledgers = {f"hospital-{rank}-privacy.sqlite3{end}" for rank in range(2) for end in ("", "-journal")}
    assert failed.name == "run.failed" and {"config.yaml", "logs"} <= kept
    assert kept <= {"config.yaml", "logs", "federation.crt", "parties", "session", *ledgers}
    # After the evaluation before round 1 there is what it takes to go on; no model, no results.
    assert not [path for path in failed.rglob("*") if path.name in ("model.safetensors", "report.html", "summary.json")]
    logs = {path.stem: path.read_text() for path in (failed / "logs").iterdir()}
    assert sorted(logs) == ["aggregator", "hospital-0", "hospital-1"]
    assert not [log for log in logs.values() if "Traceback" in log]
    shutil.rmtree(failed)


@pytest.mark.processes
def test_nan_in_an_update(site: Site, run: Run) -> None:
    more = [
        "--set",
        "privacy.mechanism=none",
        "--set",
        "training.learning_rate=1e38",
        "--set",
        "training.local_steps=3",
    ]
    pattern = r"hospital-([01]) failed: training diverged in round 1: lower training\.learning_rate.*"
    assert_failed(run, site, site.train(*more), pattern)


@pytest.mark.slow
@pytest.mark.processes
def test_an_update_beyond_the_headroom(site: Site, run: Run) -> None:
    more = ["--set", "aggregation.update_bound=1e-5"]
    pattern = (
        r"hospital-([01]) failed: update of hospital-\1 exceeds the headroom: a coordinate is larger than 1e-05: "
        r"raise aggregation\.update_bound or lower the learning rate"
    )
    assert_failed(run, site, site.train(*more), pattern)


@pytest.mark.processes
def test_a_privacy_budget_spent_by_earlier_runs(site: Site, run: Run) -> None:
    """Only hospital-1 has spent it; the ledger is untouched by the run that was refused."""
    ledger = PrivacyLedger(site.root / "ledgers" / "hospital-1-privacy.sqlite3", "hospital-1")
    ledger.charge(SubsampledGaussian(0.5, 1.0, 50), run="earlier", round_number=1)
    assert_refused(
        run,
        site.train("--ledger", ledger.path.parent),
        PrivacyBudgetError,
        "hospital-1: privacy budget already spent: epsilon",
    )
    assert len(ledger.records()) == 1


@pytest.mark.processes
def test_no_epsilon_is_certified_for_patients_whose_data_a_run_released_without_noise(site: Site, run: Run) -> None:
    """Both runs keep their ledgers in one folder. On the old code the first left none, the second said epsilon 8."""
    ledgers = site.root / "ledgers"
    status, said, complained = run(site.train("--ledger", ledgers, "--set", "privacy.mechanism=none"))
    assert status == 0, complained
    assert said.count("NO differential privacy (privacy.mechanism: none)") == 2
    names = ("hospital-0", "hospital-1")
    kept = [PrivacyLedger(ledgers / f"{name}-privacy.sqlite3", name) for name in names]
    before = [ledger.records() for ledger in kept]
    assert [[record["mechanism"] for record in records] for records in before] == [["none"], ["none"]]
    assert [ledger.epsilon(0.01) for ledger in kept] == [math.inf, math.inf]
    again = ["train", site.config, "--data", site.data, "--out", site.results / "again", "--ledger", ledgers]
    status, _, complained = run(again)
    pattern = (
        r"hospital-[01]: run \S.* released data of these patients without noise on \S+, so no epsilon "
        r"can be certified for them any more: begin another privacy ledger for other patients"
    )
    assert status != 0 and re.search(pattern, complained), complained
    assert [ledger.records() for ledger in kept] == before
