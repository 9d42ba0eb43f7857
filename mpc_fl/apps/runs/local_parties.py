"""Where the parties of a run on one machine are: addresses, identities, a directory and a configuration for each.

Each party gets what a site would have: its own key, and the files of its own role alone.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Any

from mpc_fl.config.config import Config, party_names
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import ConfigError, LinkError
from mpc_fl.files import write_text
from mpc_fl.roles import HOSPITAL_ROLE, MODEL_OWNER, role_of

SESSION_FILE = "session"  # of a run that has not ended
_OWN_FILES = {"data": HOSPITAL_ROLE, "images": HOSPITAL_ROLE, "privacy_ledger": HOSPITAL_ROLE, "model": MODEL_OWNER,
              "reveal_ledger": MODEL_OWNER, "authority": MODEL_OWNER}  # fmt: skip


def local_addresses(names: list[str], first_port: int | None) -> dict[str, str]:
    """Loopback addresses: consecutive ports from `first_port`, or ports the system has free.

    Raises `LinkError` naming the port when a configured one is in use.
    """
    addresses: dict[str, str] = {}
    held: list[socket.socket] = []
    try:
        for index, name in enumerate(names):
            port = 0 if first_port is None else first_port + index
            listener = socket.socket()
            held.append(listener)
            if first_port is not None:  # connections of the run before, closed but remembered, are no obstacle
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                raise LinkError(
                    f"port {port} for {name} is in use", "set runtime.first_port to another number, or to null"
                ) from None
            addresses[name] = f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for listener in held:
            listener.close()
    return addresses


def _session(run_dir: Path) -> str:
    """A fresh name for a run, or the one that it has when it goes on."""
    path = run_dir / SESSION_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(16))
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path} is damaged", "restore it, or start the run anew in another directory") from None


def _feature_cache_of(config: Config, name: str) -> dict[str, str]:
    """A hospital's own folder of the cache, with a key that outlives the run; nobody else's."""
    cache = config.site.feature_cache
    if cache == "memory" or role_of(name) != HOSPITAL_ROLE:
        return {"feature_cache": "memory"}
    from mpc_fl.learning.models.feature_cache import make_simulation_key  # torch: only where there is one

    make_simulation_key(cache / name)
    return {"feature_cache": str(cache / name)}


def place_parties(config: Config, run_dir: Path) -> dict[str, Config]:
    """One configuration per party of a local run: fresh session, addresses, identities, a directory of its own."""
    if config.site.data_of == "hospital":
        raise ConfigError(
            "site.data_of hospital is for a hospital by itself; here all read one folder",
            "leave it null, and set data.partition.method to none if each shall take the whole folder",
        )
    names = party_names(config)
    reachable = [name for name in names if name not in config.federation.dial_out_only]
    federation = {
        "session": _session(run_dir),
        "addresses": config.federation.addresses or local_addresses(reachable, config.runtime.first_port),
    }
    missing = set(reachable) - set(federation["addresses"])
    if missing:
        raise ConfigError(f"federation.addresses lacks {sorted(missing)[0]}", "name all parties or none")
    directories = {name: run_dir / "parties" / name for name in names}
    if not all((directories[name] / "identity").is_dir() for name in names):
        own = {name: directories[name] / "identity" for name in names}
        make_local_identities(names, own, chosen=config.federation.chosen_names)
    placed = {}
    for name in names:
        site: dict[str, Any] = {
            "out": str(directories[name]),
            "identity": str(directories[name] / "identity"),
            "data_of": "federation",
            "log": str(run_dir / "logs" / f"{name}.log"),
        }
        role = role_of(name)
        # A party is told only of the files of its own role.
        for key, owner in _OWN_FILES.items():
            if role != owner:
                site[key] = None
        site |= _feature_cache_of(config, name)
        placed[name] = config.with_values(federation=federation, site=site)
        directories[name].mkdir(parents=True, exist_ok=True)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return placed
