"""Sections about where a run takes place: deadlines and threads, who takes part under which address, and this machine.

`SiteSection` alone differs from party to party; it enters no digest and never leaves the machine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpc_fl.chosen_names import ChosenNames
from mpc_fl.config.section import Count, Positive, Section, Whole
from mpc_fl.errors import IdentityError
from mpc_fl.roles import AGGREGATOR, Coordinator, hospital_names

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,32})?\]")


def is_address(text: str) -> bool:
    """Whether a text is host:port: a name, or an IP address, of version 6 in brackets.

    Nothing else is dialled: no "unix:..." for a socket on this machine, no "dns://..." for whom to ask for names.
    """
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    return is_port and _HOST.fullmatch(host) is not None


MOST_HOSPITALS = 64  # of parties that have links with each other
MOST_SIMULATED = 1000  # their names have three digits


class RuntimeSection(Section):
    """Deadlines in seconds, threads per party, bytes of corrections that a dealer may send ahead of need, and whether messages are
    recorded for an audit (docs/evidence.md), which all parties must agree on.

    In training all other deadlines follow from `connect_timeout`, `receive_timeout` (an answer that takes no work) and
    `federation.round_timeout`: hospitals wait longer for the aggregator than it waits for them.
    """

    connect_timeout: Positive = Field(
        default=60.0, description="seconds until all parties have to be there; many hospitals are given longer"
    )
    receive_timeout: Positive = Field(
        default=600.0, description="seconds until an answer that takes no work has to come; in diagnosis any message"
    )
    silence_timeout: Annotated[float, Field(ge=10, allow_inf_nan=False)] = Field(
        default=20.0,
        description="seconds without any sign of life after which another party is lost: stopped, or cut off",
    )
    threads: Count = Field(default=1, description="threads of each party")
    first_port: Annotated[int, Field(ge=1, le=65000)] | None = Field(
        default=None, description="first port of parties on this machine; null: free ones"
    )
    restarts: Whole = Field(
        default=0, description="times that a run on this machine starts a lost hospital again, below a full quorum"
    )
    dealer_ahead_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] = Field(
        default=256 << 20, description="bytes of corrections that a dealer may send ahead of need"
    )
    record_messages: bool = Field(
        default=False,
        description="each party keeps what it receives in its own directory, for mpc-fl audit views; phantoms alone",
    )
    recorded_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 50)] = Field(
        default=256 << 20, description="bytes of messages that each party keeps with record_messages"
    )


class FederationSection(Section):
    """Who takes part. `addresses` maps party names to host:port; empty lets the launcher choose on this machine.

    Without a `coordinator` (none) there are hospitals only, which propose rounds in turn and open sums together.

    Those of them that are no `founders` need no entry in `addresses`: each says its own (`site.address`), signed, when it joins.

    Parties in `dial_out_only` (behind a firewall) have no address; two of them reach each other through `relay`: the
    aggregator, without one any hospital that has an address, unless named otherwise. It passes sealed chunks and can read
    none. Of several the next takes over when one is lost.
    """

    hospitals: Annotated[int, Field(ge=2, le=MOST_SIMULATED)] = Field(
        default=3, description="number of hospitals that train; more than 64 in a simulation alone"
    )
    coordinator: Coordinator = Field(
        default=AGGREGATOR,
        description="who leads training and opens its sums: the aggregator, or all hospitals in turn",
    )
    quorum: Annotated[int, Field(ge=2, le=MOST_SIMULATED)] | None = Field(
        default=None, description="fewest hospitals a sum is opened over; null: all, and losing one ends the run"
    )
    founders: Annotated[int, Field(ge=2, le=64)] | None = Field(
        default=None,
        description="without a coordinator: of hospitals the first so many begin the run, the others may join while it runs; null: "
        "all begin it",
    )
    admission: Literal["all", "quorum"] | tuple[str, ...] = Field(
        default="all",
        description="who must agree to a hospital that joins later: all hospitals of the round, or a quorum of them; or the names "
        "of those that may",
    )
    round_timeout: Positive | None = Field(
        default=None, description="seconds until a hospital is ready with its update; null: runtime.receive_timeout"
    )
    smallest_site: Count = Field(
        default=1, description="fewest training patients with which a hospital may take part; it refuses itself"
    )
    evaluate_incomplete: bool = Field(
        default=False,
        description="also open evaluation counts while hospitals are absent: the difference to the others shows theirs",
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        description="that sites chose (hospital-0: charite), shown in reports and logs; certificates must bind them",
    )
    session: str = Field(default="", description="sets two runs of one configuration apart")
    addresses: dict[str, str] = Field(
        default_factory=dict,
        description="host:port of each party by its name; empty: all on this machine, at ports that are free",
    )
    dial_out_only: tuple[str, ...] = Field(
        default=(), description="parties behind a firewall: they dial, and have no address"
    )
    relay: str | tuple[str, ...] | None = Field(
        default=None,
        description="through which parties two of dial_out_only reach each other; null: the aggregator, or among peers all "
        "founders with an address",
    )

    @model_validator(mode="after")
    def _check(self) -> FederationSection:
        if self.quorum is not None and self.quorum > self.hospitals:
            raise ValueError(f"a quorum of {self.quorum} cannot be reached by {self.hospitals} hospitals")
        for name in self.dial_out_only:
            if name in self.addresses:
                raise ValueError(f"{name} is in dial_out_only and has an address; give it only one of them")
            if name in (self.named_relays or (AGGREGATOR,)):
                raise ValueError(f"{name} is a relay, so others must be able to dial it")
        if self.relay is not None and len(set(self.named_relays)) != max(1, len(self.named_relays)):
            raise ValueError("relay names a party twice, or none; leave it null for what is there by default")
        for name, address in self.addresses.items():
            if not is_address(address):
                raise ValueError(f"the address of {name} must be host:port")
        try:
            ChosenNames.of(self.names)
        except IdentityError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def named_relays(self) -> tuple[str, ...]:
        """The parties that `relay` names."""
        return (self.relay,) if isinstance(self.relay, str) else self.relay or ()

    @property
    def founding(self) -> list[str]:
        """Names of the hospitals that begin a run."""
        return hospital_names(self.hospitals if self.founders is None else self.founders)

    @property
    def chosen_names(self) -> ChosenNames:
        """What parties are called where people read of them."""
        return ChosenNames.of(self.names)

    @property
    def quorum_size(self) -> int:
        """Fewest hospitals a sum is opened over."""
        return self.hospitals if self.quorum is None else self.quorum


class CostsSection(Section):
    """By what this party tells the energy of a run, and CO2, from what it counted (docs/costs.md); all parties need not agree.

    What the machine measures of its processors stands before `watts_per_core`. The defaults are of any machine and the whole world.
    """

    watts_per_core: Positive = Field(
        default=12.0,
        description="watts of a busy core, where the machine's counters cannot be read; default: Green Algorithms, any processor",
    )
    watts_per_gpu: Positive = Field(
        default=200.0, description="watts of a busy GPU; default: Green Algorithms, any GPU"
    )
    grid_intensity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=475.0,
        description="grams of CO2 equivalent per kWh of the grid here; the default is the world's mean of 2018 (IEA)",
    )


class SiteSection(Section):
    """What only this machine knows. Not part of the digest, never sent.

    `resume` goes on from the last checkpoint in `out`: after a restart of all parties, or of this hospital alone.

    A hospital computes gradients, features and evaluation on `device`, gradients in `precision`; all else stays on the CPU.
    `listen` is the host:port this party serves where that differs from its address in the federation (0.0.0.0:47100).
    `patient_key` is the file of the key that identifiers of patients are hashed with; null: one of this user, made when needed.
    `weights` is the file of a feature extractor's weights, or a folder of such files; null: where `mpc-fl model` keeps them.
    `training_processes` share out each step of a hospital's local training, each with `runtime.threads` threads. `pool` is
    where correlations made ahead lie, a directory of its own for each party below. `reveal_ledger` and `authority` are those of
    the run that trained `model`, by default beside it.

    `feature_cache` is a directory in which a hospital that trains keeps features of its images (`data.features`), or what the
    trained layers read of them (`training.trainable: head` or `last:N`), from one run to the next, sealed with its own key;
    `memory` computes them in every run. In a simulation each hospital has a folder of its own below it.
    `allow_packages` are installed packages, by name, whose code a configuration may run here: networks and loaders of others. It
    is given on the command line alone, so that no file allows itself. So is `record_patients`.
    """

    listen: str | None = Field(
        default=None, description="host:port that this party serves, where that is not its address; null: its address"
    )
    address: str | None = Field(
        default=None,
        description="host:port at which others reach this hospital, where it joins later and federation.addresses does not say it",
    )
    resume: bool = Field(default=False, description="go on from the last checkpoint in site.out")
    training_processes: Count = Field(
        default=1, description="processes that share out each step of a hospital's training, on the CPU"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = Field(
        default="cpu",
        description="where a hospital computes gradients, features and evaluation: auto (a GPU if there is one), cpu, cuda, cuda:N",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="numbers of products in gradients; clipping and noise are in float32 and float64 always",
    )
    watch: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        default=(), description="where this party draws curves of its own metrics while it trains"
    )
    mlflow_uri: Annotated[str, Field(pattern=r"^(https?://|file:///)[^@\s]+$")] | None = Field(
        default=None, description="MLflow server of this site, or file:///FOLDER; null: a folder beside the metrics"
    )
    reached_through: tuple[str, ...] = Field(
        default=(),
        description="relays through which a hospital is reached that joins later and can only dial out; it announces them",
    )
    leave_after: Count | None = Field(
        default=None,
        description="round after which this hospital says that it leaves, and ends; only where federation.coordinator is none",
    )
    train_alone: bool = Field(
        default=False,
        description="after a run, also train on this hospital's patients alone and compare both models here; nothing of it leaves",
    )
    allow_packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)], ...] = Field(
        default=(),
        description="installed packages whose networks and loaders a configuration may run here; on the command line alone",
    )
    record_patients: bool = Field(
        default=False,
        description="runtime.record_messages may record messages about real patients here; on the command line alone",
    )
    data: Path | None = Field(default=None, description="folder, .npz or .csv of this site")
    data_of: Literal["hospital", "federation"] | None = Field(
        default=None,
        description="whose records data holds: this hospital's, or those of all; null: this one's for mpc-fl party",
    )
    rules: Path | None = Field(
        default=None,
        description="file of what this site allows (docs/site-rules.md); a run that breaks a rule is refused here",
    )
    patient_key: Path | None = Field(
        default=None,
        description="file of the key that patients' identifiers are hashed with; null: one of this user, made when needed",
    )
    images: Path | None = Field(default=None, description="images to diagnose")
    model: Path | None = Field(default=None, description="the model owner's model.safetensors")
    weights: Path | None = Field(
        default=None,
        description="file of a feature extractor's weights, or a folder of such; null: where fetched ones are kept",
    )
    out: Path | None = Field(default=None, description="directory where this party writes")
    log: Path | None = Field(default=None, description="file that this party logs to; null: standard error")
    identity: Path | None = Field(default=None, description="directory with certificate and key of this party")
    privacy_ledger: Path | None = Field(
        default=None, description="directory in which what patients have spent is kept over runs; null: of the run"
    )
    pool: Path | None = Field(
        default=None,
        description="directory of correlations made ahead, with one for each party below; null: none are kept",
    )
    reveal_ledger: Path | None = Field(
        default=None, description="reveal ledger of the run that trained site.model; null: beside the model"
    )
    authority: Path | None = Field(
        default=None, description="certificate of the federation that trained site.model; null: beside its ledger"
    )
    feature_cache: Literal["memory"] | Path = Field(
        default="memory",
        description="directory where features of images are kept over runs, encrypted; memory: computed in every run",
    )
    costs: CostsSection = CostsSection()

    @model_validator(mode="after")
    def _check(self) -> SiteSection:
        for name, value in self:
            if isinstance(value, Path) and "\0" in str(value):
                raise ValueError(f"{name} is no path: it holds a zero byte")
        if self.address is not None and not is_address(self.address):
            raise ValueError("address must be host:port")
        if self.address is not None and self.reached_through:
            raise ValueError("a hospital with an address is reached there; leave reached_through or address out")
        if self.mlflow_uri is not None and "mlflow" not in self.watch:
            raise ValueError("mlflow_uri is used by watch: [mlflow] alone; name mlflow there, or leave mlflow_uri null")
        if len(set(self.watch)) != len(self.watch):
            raise ValueError("watch names one of them twice")
        if self.training_processes > 1 and (self.device, self.precision) != ("cpu", "float32"):
            raise ValueError(
                "training_processes share out work on the CPU in float32; leave device and precision, or set 1"
            )
        return self
