"""A party's place in a run: its name, its links to the others, and what it leaves behind at its site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpc_fl.config.config import (
    Config,
    connect_seconds,
    greeting_seconds,
    may_lose_hospitals,
    party_names,
    relays_of,
)
from mpc_fl.config.deadlines import another_relay, deadlines_of
from mpc_fl.config.deployment import CostsSection
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ConfigError
from mpc_fl.files import write_json
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import routes
from mpc_fl.links.settings import Reach, Timeouts, Tolerance, Unread
from mpc_fl.links.traffic import TrafficCounter
from mpc_fl.metering import grams_of, joules_of
from mpc_fl.roles import is_hospital


def site_directory(config: Config) -> Path:
    """Where this party writes. Raises `ConfigError` when `site.out` is not set."""
    if config.site.out is None:
        raise ConfigError("site.out is not set", "say with --out where this party may write")
    return config.site.out


def connect(config: Config, name: str, observer: Observer | None = None, code: str = "") -> Links:
    """Links of the party `name` to all other parties of the task; enter them to connect.

    `observer` sees every frame received, for tests of what each party learns. `code` says which code of others the party runs,
    where all must run the same. Raises `ConfigError` for a missing
    address or identity directory, `IdentityError` for an unusable identity.
    """
    names = party_names(config)
    if name not in names:
        raise ConfigError(f"there is no party '{name}' in this task", f"the parties are {', '.join(names)}")
    federation = config.federation
    addresses = {party: address for party, address in federation.addresses.items() if party in names}
    announced = [party for party in joining_later(config) if party not in (*addresses, *federation.dial_out_only)]
    missing = [party for party in names if party not in (*addresses, *federation.dial_out_only, *announced)]
    if missing:
        raise ConfigError(
            f"federation.addresses has no entry for {missing[0]}",
            "give host:port for every party that is not in federation.dial_out_only",
        )
    if config.site.identity is None:
        raise ConfigError("site.identity is not set", "say with --identity where this party's key and certificate lie")
    if not federation.session:
        raise ConfigError("federation.session is empty", "give all parties one fresh name for this run")
    relays = relays_of(config)
    if name in announced:
        _require_reachable(config, name, relays)
        if config.site.address is None:
            announced.remove(name)
    own_address = config.site.address if name in announced else addresses.get(name)
    listen = None if own_address is None else config.site.listen or own_address
    return NetworkLinks(
        load_identity(config.site.identity, name, federation.chosen_names),
        Agreement(federation.session, config.digest(), config.task, code),
        Reach(listen, routes(name, names, addresses, relays, announced), relays),
        timeouts_of(config, name),
        tolerance_of(config),
        observer,
    )


def _require_reachable(config: Config, name: str, relays: Sequence[str]) -> None:
    """A hospital that joins later says how it is reached. Raises `ConfigError`."""
    if config.site.address is None and not config.site.reached_through:
        raise ConfigError(
            f"{name} is no founder, and neither federation.addresses nor site.address says where it is reached",
            "give its host:port in site.address: it tells the others when it joins; or, where it can only dial out, relays in "
            "site.reached_through",
        )
    for relay in config.site.reached_through:
        if relay not in relays:
            raise ConfigError(
                f"site.reached_through names {relay[:60]}, which is no relay of this run",
                f"the relays are {', '.join(relays) or 'none: set federation.relay'}",
            )


def timeouts_of(config: Config, name: str) -> Timeouts:
    """How long the party `name` waits: in training as the deadlines of the whole run say."""
    connect, receive = connect_seconds(config), config.runtime.receive_timeout
    if config.task == "train" and not config.among_peers:
        receive = deadlines_of(config).receive(name)
    silence, at_first = config.runtime.silence_timeout, greeting_seconds(config)
    return Timeouts(
        connect,
        receive,
        untold=connect,
        silence=silence,
        silence_at_first=at_first,
        another_relay=another_relay(config),
    )


def tolerance_of(config: Config) -> Tolerance:
    """Whom a party may lose, also before all have been connected: hospitals of a training run, down to its quorum."""
    unread = Unread.with_dealer_ahead(config.runtime.dealer_ahead_bytes)
    if not may_lose_hospitals(config):
        return Tolerance(unread=unread)
    later = frozenset(joining_later(config))
    if config.site.reached_through:  # those that use relays, too, learn of this hospital from others
        later |= frozenset(config.federation.dial_out_only)
    return Tolerance(frozenset(filter(is_hospital, party_names(config))), True, unread, later)


def joining_later(config: Config) -> list[str]:
    """Hospitals of a run among peers that need not be there when it begins."""
    founders = config.federation.founding
    return [name for name in party_names(config) if config.among_peers and is_hospital(name) and name not in founders]


def write_traffic(links: Links, directory: Path, rates: CostsSection) -> None:
    """Write what this party spent by phase and its traffic with each peer, once the links are closed, in its own directory.

    It stays there: seconds and joules of a hospital tell how many patients it has.
    """
    write_costs(links.counter, directory, rates)


def write_costs(counter: TrafficCounter, directory: Path, rates: CostsSection) -> None:
    """The same of a counter whose last phase has ended, also of who has no links: traffic.json."""
    spent = counter.spent
    measured = all(of.processor_joules is not None for of in spent.values())
    gpu = any(of.gpu_seconds for of in spent.values())
    joules = {phase: joules_of(of, measured, rates.watts_per_core, rates.watts_per_gpu) for phase, of in spent.items()}
    phases = {
        phase: {
            "seconds": round(of.seconds, 4),
            "processor_seconds": round(of.processor_seconds, 4),
            "gpu_seconds": round(of.gpu_seconds, 4) if gpu else None,
            "joules": round(joules[phase], 4),
            "peers": {peer: asdict(count) for peer, count in counter.by_phase.get(phase, {}).items()},
        }
        for phase, of in spent.items()
    }
    energy = {
        "measured": measured and not gpu,
        "processors_measured": measured,
        **rates.model_dump(mode="json"),
        "grams_co2": float(f"{grams_of(sum(joules.values()), rates.grid_intensity):.4g}"),
    }
    write_json(directory / "traffic.json", {"phases": phases, "energy": energy})
