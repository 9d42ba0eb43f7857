"""What every party of a served session needs to connect: the check that a configuration can be served, and its links.

All three parties use it: a hospital dials the model owner and the dealer, the model owner dials the dealer, and who stays up
is dialled at one address (`front`).
"""

from __future__ import annotations

from mpc_fl.config.config import Config
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ConfigError
from mpc_fl.inference.serving.front import StandingParty
from mpc_fl.inference.serving.visits import service_digest
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import routes
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import DEALER, MODEL_OWNER

REFUSED = "refused"  # tag of the model owner's word that it ends a session, and why


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
    peers = routes(identity.name, [hospital, DEALER, MODEL_OWNER], addresses)
    timeouts = Timeouts(config.runtime.connect_timeout, deadline, silence=config.runtime.silence_timeout)
    return NetworkLinks(identity, agreement, Reach(None, peers), timeouts, observer=observer)


def identity_of(config: Config, name: str) -> Identity:
    """The identity of this party. Raises `ConfigError` when the configuration names no directory, `IdentityError`."""
    if config.site.identity is None:
        raise ConfigError("site.identity is not set", "say with --identity where this party's key and certificate lie")
    return load_identity(config.site.identity, name, config.federation.chosen_names)


def listening_address(config: Config, name: str) -> str:
    """Where a party that stays up listens, 'host:port'. Raises `ConfigError` when the configuration does not say."""
    listen = config.site.listen or config.federation.addresses.get(name)
    if listen is None:
        raise ConfigError(f"federation.addresses has no entry for {name}", "give host:port for every party that serves")
    return listen


def standing_party(config: Config, name: str) -> StandingParty:
    """A party that stays up, as the configuration places it. Raises `ConfigError`, `IdentityError`."""
    return StandingParty(identity_of(config, name), listening_address(config, name), service_digest(config))
