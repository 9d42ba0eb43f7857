"""service_links"""

from __future__ import annotations

from mpc_fl.config.config import Config
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ConfigError
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Observer
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import routes
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import DEALER, MODEL_OWNER

_REFUSED = "refused"


def require_servable(config: Config) -> None:
    """Raise `ConfigError` unless the configuration can be served: the engine `fast`, on images."""
    if config.inference.engine != "fast":
        raise ConfigError("only the engine fast can be served", "set inference.engine=fast")


def session_links(
    identity: Identity,
    config: Config,
    hospital: str,
    agreement: Agreement,
    deadline: float,
    observer: Observer | None = None,
) -> NetworkLinks:
    """This party's links in a session of `hospital`: the hospital dials both others, the model owner the dealer.

    Nothing is listened on: at model owner and dealer `ServiceFront` hands in who dials. Raises `ConfigError`.
    """
    addresses = {name: config.federation.addresses.get(name, "") for name in (DEALER, MODEL_OWNER)}
    for name, address in addresses.items():
        if not address and identity.name != name:
            raise ConfigError(f"federation.addresses has no entry for {name}", "give its host:port")
    peers = routes(identity.name, [hospital, DEALER, MODEL_OWNER], addresses, None)
    timeouts = Timeouts(config.runtime.connect_timeout, deadline)
    return NetworkLinks(identity, agreement, Reach(None, peers), timeouts, observer=observer)


def _identity(config: Config, name: str) -> Identity:
    if config.site.identity is None:
        raise ConfigError("site.identity is not set", "say with --identity where this party's key and certificate lie")
    return load_identity(config.site.identity, name)


def _listen(config: Config, name: str) -> str:
    listen = config.site.listen or config.federation.addresses.get(name)
    if listen is None:
        raise ConfigError(f"federation.addresses has no entry for {name}", "give host:port for every party that serves")
    return listen
