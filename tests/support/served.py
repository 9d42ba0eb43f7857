"""A model owner and a dealer that stay up, as processes, and hospitals that ask them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.errors import MpcFlError
from mpc_fl.inference.fast.preprocessing.pool import Pool, open_pool
from mpc_fl.inference.serving.service_records import RECORDS_FILE, USAGE, open_records
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.roles import MODEL_OWNER
from tests.support.harness import SPAWN, free_ports

HOSPITALS = ["hospital-0", "hospital-1", "hospital-2"]

Trigger = tuple[str, int] | None  # the first frame of a tag that begins so makes the hospital send itself a signal


def served_party(name: str, values: dict[str, Any], told: Any) -> None:
    from mpc_fl.apps.runs.party_process import set_up_log
    from parties import dealer, model_owner

    torch.set_num_threads(1)
    program, config = model_owner if name == "model-owner" else dealer, parse_config(values, name)

    def observe(sender: str, frame: Any) -> None:
        if frame.tag.startswith("correction "):
            with ((config.site.out or Path()) / "corrections").open("a") as file:
                file.write(f"{sender}\n")

    set_up_log(config.site.log)
    program.run(config, 0, lambda phase, done, total: told.put((name, phase)), observe)


def asking_party(name: str, values: dict[str, Any], told: Any, barrier: Any, trigger: Trigger, before: Any) -> None:
    from mpc_fl.inference import hospital_program as hospital

    torch.set_num_threads(1)

    def notify(phase: str, done: int, total: int) -> None:
        if phase == "connect" and barrier is not None:
            barrier.wait(60)

    stopped = threading.Event()

    def observe(sender: str, frame: Any) -> None:
        if trigger is not None and frame.tag.startswith(trigger[0]) and not stopped.is_set():
            stopped.set()  # one that goes on is not stopped again
            before.put((name, "about to stop"))
            before.close()
            before.join_thread()
            os.kill(os.getpid(), trigger[1])

    config = parse_config(values, name)
    try:
        (hospital.fill_from_server if config.inference.fill else hospital.ask)(config, name, notify, observe)
        told.put((name, ""))
    except MpcFlError as error:
        told.put((name, str(error)))
    told.close()
    told.join_thread()
    os._exit(0)  # threads of a lost link must not keep the process


def charges(directory: Path) -> list[tuple[str, int]]:
    """Hospital and images of each batch that a model owner charged, also while it serves."""
    if not (directory / RECORDS_FILE).exists():
        return []
    with open_records(directory, MODEL_OWNER) as records:
        rows, found = ChainedRows(records, USAGE), list[tuple[str, int]]()
        with records.reading() as transaction:
            for row in rows.read(transaction):
                found.append((str(row.values[1]), int(row.values[2])))
    return found


class Service:
    """Model owner and dealer as processes, hospitals that ask them."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        serving: dict[str, Any],
        pools: Path | None = None,
        reveal: str | None = None,
    ) -> None:
        self.directory, self.told, self.pools = directory, SPAWN.Queue(), pools
        self.before = SPAWN.Queue()  # of what is told just before a signal
        ports = free_ports(2)
        addresses = {"model-owner": f"127.0.0.1:{ports[0]}", "dealer": f"127.0.0.1:{ports[1]}"}
        self.config = config.with_values(serving=serving, federation={"addresses": addresses})
        self.reveal, self.servers, self.asking = reveal, list[Any](), list[Any]()
        for name in addresses:
            self._begin_to_serve(name)
        self._await_serving(set(addresses))

    def _begin_to_serve(self, name: str) -> None:
        site = {"model": str(self.directory / "model.safetensors"), "out": str(self.directory / name)}
        site |= {"log": str(self.directory / name / "log")}
        site |= {} if self.pools is None else {"pool": str(self.pools / "served")}
        values = self.values(name, {} if self.reveal is None else {"reveal": self.reveal}, **site)
        self.servers.append(SPAWN.Process(target=served_party, args=(name, values, self.told), name=name))
        self.servers[-1].start()

    def _await_serving(self, awaited: set[str]) -> None:
        while awaited:
            name, phase = self.told.get(timeout=60)
            awaited -= {name} if phase == "serving" else set()

    def start_party(self, name: str) -> None:
        """Start one again that was ended; return when it serves."""
        self._begin_to_serve(name)
        self._await_serving({name})

    def end_party(self, name: str, number: int) -> None:
        """End one of the two with a signal."""
        (process,) = [process for process in self.servers if process.name == name]
        self.servers.remove(process)
        os.kill(process.pid, number)
        process.join(30)

    def values(self, name: str, inference: dict[str, Any] | None = None, **site: str) -> dict[str, Any]:
        site = {"identity": str(self.directory / name), "out": str(self.directory / name), **site}
        return self.config.with_values(site=site, inference=inference or {}).model_dump(mode="json")

    def begin(
        self, name: str, images: int, out: str, barrier: Any = None, trigger: Trigger = None, fill: int = 0
    ) -> Any:
        site = {} if self.pools is None else {"pool": str(self.pools / "asking")}
        values = self.values(name, {"limit": images or None, "fill": fill}, out=str(self.directory / out), **site)
        process = SPAWN.Process(
            target=asking_party, args=(name, values, self.told, barrier, trigger, self.before), name=name
        )
        process.start()
        self.asking.append(process)
        return process

    def ask(self, name: str, images: int, out: str) -> tuple[str, list[dict[str, Any]]]:
        """The line of the error, and results."""
        self.begin(name, images, out).join(60)
        return self.told.get(timeout=60)[1], self.results(out)

    def fill(self, name: str, batches: int) -> str:
        """The line of the error."""
        self.begin(name, 0, f"fill-{name}", fill=batches).join(60)
        return str(self.told.get(timeout=60)[1])

    def halves(self, name: str) -> list[Pool]:
        """Those of a hospital and of the model owner."""
        assert self.pools is not None
        paths = self.pools / "asking" / name / "model-owner", self.pools / "served" / "model-owner" / name
        return [open_pool(path, None) for path in paths]

    def left(self, name: str) -> list[int]:
        """Places of batches that both halves have; they agree on what was used."""
        mine, theirs = self.halves(name)
        assert (mine.numbers, mine.next) == (theirs.numbers, theirs.next)
        return mine.numbers

    def corrections(self) -> int:
        """Messages of the dealer to the model owner that carried corrections."""
        path = self.directory / "model-owner" / "corrections"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def results(self, out: str) -> list[dict[str, Any]]:
        path = self.directory / out / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def charged(self) -> list[str]:
        """Whose batches were charged, in their order."""
        return [hospital for hospital, _ in charges(self.directory / "model-owner")]

    def end(self, number: int) -> list[int | None]:
        for process in self.servers:
            if process.exitcode is None:
                os.kill(process.pid, number)
        for process in self.servers:
            process.join(30)
        return [process.exitcode for process in self.servers]


def configuration() -> Config:
    return Config().with_values(
        task="serve",
        data={"image_size": 16},
        inference={"engine": "fast"},
        runtime={"connect_timeout": 20.0, "silence_timeout": 600.0},
    )


def make_service_directory(directory: Path, config: Config) -> None:
    """Identities in NAME, and a model with first weights."""
    names = [*HOSPITALS, "model-owner", "dealer", "aggregator"]
    make_local_identities(names, {name: directory / name for name in names})
    model = build_model(config)
    calibrate_batchnorm(model, public_phantoms(32, config))
    save_model(directory / "model.safetensors", model.eval(), config, None)
