"""Which party a process is: by word or by the launcher's conventions, and the examples that rely on it."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.apps.runs.placement import party_of, site_of
from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLES = REPOSITORY / "examples"
NAMES = ["hospital-0", "hospital-1", "hospital-2", "aggregator"]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environment", "party"),
    [
        (TORCHRUN, "aggregator"),
        (SLURM, "hospital-1"),
        (KUBERNETES, "hospital-2"),
        (TORCHRUN | SLURM, "aggregator"),
        (SLURM | KUBERNETES, "hospital-1"),
        ({"RANK": "", **SLURM}, "hospital-1"),
    ],
)
def test_the_environment_places_a_process_the_innermost_launcher_first(environment: dict[str, str], party: str) -> None:
    assert party_of(Config(), None, None, environment) == party


@given(hospitals=st.integers(2, 64), task=st.sampled_from(["train", "infer"]))
def test_every_rank_is_one_party_and_every_party_one_rank(hospitals: int, task: str) -> None:
    config = Config().with_values(federation={"hospitals": hospitals}, task=task)
    names = party_names(config)
    for rank in range(len(names)):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(len(names))}
        assert party_of(config, None, None, environment) == party_of(config, None, rank, {}) == names[rank]
        assert party_of(config, names[rank], None, {}) == names[rank]


@pytest.mark.parametrize(
    ("role", "rank", "party"),
    [
        ("hospital", 2, "hospital-2"),
        ("hospital-2", None, "hospital-2"),
        ("hospital-2", 2, "hospital-2"),
        ("aggregator", None, "aggregator"),
        ("aggregator", 3, "aggregator"),
        (None, 0, "hospital-0"),
    ],
)
def test_what_is_said_wins_over_the_environment(role: str | None, rank: int | None, party: str) -> None:
    for environment in ({}, TORCHRUN, SLURM, KUBERNETES, {"RANK": "x", "WORLD_SIZE": "9"}):
        assert party_of(Config(), role, rank, environment) == party


def test_a_diagnosis_has_one_hospital_which_needs_no_rank() -> None:
    config = Config().with_values(task="infer")
    assert party_of(config, "hospital", None, {}) == "hospital-0"
    assert party_of(config, None, None, {"JOB_COMPLETION_INDEX": "2"}) == "dealer"


@pytest.mark.parametrize(
    ("role", "rank", "environment", "message"),
    [
        (None, None, {}, "nothing says which party"),
        (None, None, {"RANK": "0", "WORLD_SIZE": "5"}, "WORLD_SIZE is 5, the configuration has 4 parties"),
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, "SLURM_NTASKS is 3, the configuration has 4 parties"),
        (None, None, {"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, the 4 parties have ranks 0 to 3"),
        (None, None, {"JOB_COMPLETION_INDEX": "7"}, "JOB_COMPLETION_INDEX is 7, the 4 parties"),
        (None, None, {"RANK": "-1", "WORLD_SIZE": "4"}, "RANK is '-1', not a number"),
        (None, None, {"RANK": "1"}, "WORLD_SIZE is '', not a number"),
        (None, 4, {}, "--rank is 4"),
        ("hospital", None, TORCHRUN, "3 hospitals: say which with --rank 0 to 2"),
        ("hospital", 3, {}, "no party 'hospital-3'"),
        ("hospital-1", 2, {}, "hospital-1 has rank 1, not 2"),
        ("aggregator", 0, {}, "aggregator has rank 3, not 0"),
        ("dealer", None, {}, "no party 'dealer' in this task"),
        ("hospital-", None, {}, "no party 'hospital-'"),
    ],
)
def test_contradictions_are_named(
    role: str | None, rank: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        party_of(Config(), role, rank, environment)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_paths_of_a_site_name_the_party() -> None:
    given_paths = {"out": "/run/{party}", "identity": "/keys/{party}/{party}", "data": "/data"}
    config = Config().with_values(site=given_paths, name="{party}")
    placed = site_of(config, "hospital-1")
    assert placed.site.out == Path("/run/hospital-1") and placed.site.identity == Path("/keys/hospital-1/hospital-1")
    assert placed.site.data == Path("/data") and placed.site.model is None
    assert placed.digest() == config.digest() and placed.name == "{party}"


# --- the examples -----------------------------------------------------------------------------------------------------


def test_the_kubernetes_manifest_is_consistent() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    service, shared, job = documents
    assert [document["kind"] for document in documents] == ["Service", "ConfigMap", "Job"]
    config = parse_config(yaml.safe_load(shared["data"]["federation.yaml"]), "federation.yaml")
    names, spec = party_names(config), job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}

    # One pod per party, found under its stable name and port.
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == len(names)
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    host, port = f"{job['metadata']['name']}-{{}}.{pod['subdomain']}", service["spec"]["ports"][0]["port"]
    assert config.federation.addresses == {name: f"{host.format(k)}:{port}" for k, name in enumerate(names)}
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert (
        container["ports"][0]["containerPort"] == port
        and f"--set site.listen=0.0.0.0:{port}" in container["command"][2]
    )

    # Each container mounts the directory of its own index, with its own identity alone.
    assert mounts["identities"]["subPathExpr"] == "$(JOB_COMPLETION_INDEX)"
    files: dict[str, set[str]] = {}
    for source in volumes["identities"]["projected"]["sources"]:
        for item in source["secret"]["items"]:
            index, file = item["path"].split("/")
            assert source["secret"]["name"] == f"identity-{names[int(index)]}" and item["key"] == file
            files.setdefault(index, set()).add(file)
    for index, name in enumerate(names):
        assert files[str(index)] == {f"{name}.key", f"{name}.crt", "federation.crt", "federation.crl"}
        assert party_of(config, None, None, {"JOB_COMPLETION_INDEX": str(index)}) == name
    assert mounts.keys() == volumes.keys()
    assert volumes["federation"]["configMap"]["name"] == shared["metadata"]["name"]


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_slurm_script_starts_one_party_per_task(tmp_path: Path) -> None:
    """With the scheduler's two commands replaced: what it is asked to run is a usable federation."""
    executable(tmp_path / "scontrol", 'test "$*" = "show hostnames node[1-3]" && printf "node1\\nnode2\\nnode3\\n"')
    executable(tmp_path / "srun", 'printf "%s\\0" "$@" > "$SLURM_SUBMIT_DIR/asked"')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_NTASKS": "3",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = ["bash", EXAMPLES / "slurm.sbatch", REPOSITORY / "configs" / "demo.yaml", "/identities", "/a data folder"]
    subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    asked = (tmp_path / "asked").read_text().split("\0")[:-1]
    start = asked.index("party")
    assert asked[start - 1] == f"{tmp_path}/.venv/bin/mpc-fl"
    options = list(zip(asked[start + 1 :: 2], asked[start + 2 :: 2], strict=True))
    config = load_config(Path(dict(options)["--config"]), [value for option, value in options if option == "--set"])
    assert config.federation.addresses == {
        "hospital-0": "node1:47100",
        "hospital-1": "node2:47100",
        "aggregator": "node3:47100",
    }
    assert config.federation.session.startswith("slurm-7-")
    assert config.site.listen == "0.0.0.0:47100" and config.site.training_processes == 2
    assert dict(options)["--identity"] == "/identities/{party}" and dict(options)["--data"] == "/a data folder/{party}"
    assert (tmp_path / "runs" / "slurm-7").stat().st_mode & 0o077 == 0
    assert party_of(config, None, None, {"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}) == "aggregator"


def free_port_range(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        held: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for item in held:
                item.close()
    raise AssertionError("no free ports")


@pytest.mark.processes
@pytest.mark.slow
def test_a_federation_under_torchrun(tmp_path: Path) -> None:
    """examples/torchrun.sh for two hospitals: every process finds out which party it is, and they train one model."""
    environment = {
        **os.environ,
        "BIN": str(Path(sys.executable).parent),
        "HOSPITALS": "2",
        "FIRST_PORT": str(free_port_range(3)),
    }
    done = subprocess.run(
        ["bash", EXAMPLES / "torchrun.sh", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = load_config(tmp_path / "federation.yaml")
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in party_names(config)}
    assert len(models) == 1
    lines = [json.loads(line) for line in (tmp_path / "aggregator" / "metrics.jsonl").read_text().splitlines()]
    rounds: list[Any] = [line["round"] for line in lines]
    assert rounds == [0, 1, 2]
