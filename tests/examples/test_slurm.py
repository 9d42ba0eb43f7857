"""examples/slurm.sbatch starts one party per task, with the scheduler's two commands replaced."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from mpc_fl.apps.runs.placement import party_of
from mpc_fl.config.loading import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


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
