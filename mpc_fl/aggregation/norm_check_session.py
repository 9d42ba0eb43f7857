"""The check of a round's updates: a CrypTen world made for it of those whose summands came, and a dealer's session.

CrypTen is imported when a check runs: who plans a sum, or makes one without a check, does without.

For every checked sum the aggregator tells the dealer who takes part; parties and dealer make fresh seeds under a scope of
their own (`Links.scoped`), so that whatever is left over of a check that lost a party is never taken for a part of the next.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpc_fl.aggregation.norm_bound import gradient_norm_bound, in_grid_units, update_norm_bound
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.config.config import Config
from mpc_fl.crypto.ring import MeanHeadroom
from mpc_fl.errors import SAME_VERSION, MpcFlError, ProtocolError
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR, DEALER
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.dealer import Dealer
from mpc_fl.sharing.opening import SecretDomain

if TYPE_CHECKING:
    from mpc_fl.aggregation.norm_check import NormCheck
    from mpc_fl.sharing.crypten_runtime import CrypTenDomain

log = logging.getLogger(__name__)

_CHECK = "check"


@dataclass(frozen=True)
class RoundCheck:
    """`NormCheck` of vectors of `parameters` elements in a world of its own for each sum (`rules.Check`)."""

    test: NormTest
    parameters: int
    fraction_bits: int
    ahead_bytes: int

    def at_opener(self, domain: SecretDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        """See `NormCheck.at_opener`; the dealer is told first."""
        world, scope = [*closed.present, closed.plan.opener], f"check {closed.plan.name}"
        domain.links.send_object(DEALER, _CHECK, {"world": world, "scope": scope})
        with self._begun(domain, world, scope) as (check, inner):
            return check.at_opener(inner, closed, say_check)

    def at_hospital(self, domain: SecretDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        """See `NormCheck.at_hospital`."""
        hospitals = word.get("hospitals")
        if not isinstance(hospitals, list) or not set(hospitals) <= set(masks.plan.hospitals):
            raise ProtocolError(f"{masks.plan.opener} began a check without hospitals", SAME_VERSION)
        if masks.me in hospitals:
            world = [*hospitals, masks.plan.opener]
            with self._begun(domain, world, f"check {masks.plan.name}") as (check, inner):
                check.at_hospital(inner, masks, word)

    @contextlib.contextmanager
    def _begun(
        self, domain: SecretDomain, world: Sequence[str], scope: str
    ) -> Iterator[tuple[NormCheck, CrypTenDomain]]:
        """The check and the secret domain of its world, with seeds of its own, and the same record of openings."""
        from mpc_fl.aggregation.norm_check import NormCheck
        from mpc_fl.sharing.crypten_runtime import CrypTenRuntime

        links = domain.links.scoped(scope)
        try:
            with CrypTenRuntime(links, list(world), DEALER, self.fraction_bits, self.ahead_bytes) as runtime:
                yield NormCheck(self.test, self.parameters), runtime.domain(domain.record)
        finally:
            links.end_scope()


def check_of(
    config: Config, headroom: MeanHeadroom, mechanism: DistributedGaussian | None, parameters: int, weight_total: int
) -> RoundCheck | None:
    """The check that the configuration asks for, from public values: alike at all parties.

    A weight is at most `aggregation.count_bound` over the public `weight_total`: what bounds a hospital's influence is
    the norm of its weighted update. Raises `ConfigError` where nothing public bounds an update.
    """
    if not config.aggregation.norm_check:
        return None
    if mechanism is not None:
        test = NormTest(gradient_norm_bound(mechanism, config.aggregation.norm_bound), mechanism.ring_bits)
    else:
        counts = config.aggregation.count_bound if config.aggregation.weighted else 1
        bound, bits = update_norm_bound(config, parameters), config.aggregation.fraction_bits
        largest_weight = min(1.0, counts / weight_total)
        grid = in_grid_units(bound, bits, parameters, largest_weight)
        test = NormTest(grid, 32 if headroom.ring_bits == 32 else 64)
    ahead = config.runtime.dealer_ahead_bytes
    return RoundCheck(test, parameters, config.aggregation.fraction_bits, ahead)


def serve_checks(links: Links, ahead_bytes: int) -> None:
    """At the dealer: a session for every check, until the aggregator says that no more come.

    Sessions run beside each other: one that lost a party must not hold up the next.
    """
    while True:
        word = links.receive_object(AGGREGATOR, _CHECK)
        if word.get("end") is True:
            return
        world, scope = word.get("world"), word.get("scope")
        if not isinstance(world, list) or not isinstance(scope, str) or not set(world) <= set(links.peers):
            raise ProtocolError(f"{AGGREGATOR} asked for a check without parties", SAME_VERSION)
        threading.Thread(target=_serve, args=(links.scoped(scope), world, ahead_bytes), daemon=True).start()


def _serve(links: Links, world: list[str], ahead_bytes: int) -> None:
    try:
        Dealer(links, world, ahead_bytes).serve()
    except MpcFlError as error:
        log.warning("a check ended without all its parties: %s", error)
    finally:
        links.end_scope()


def end_checks(links: Links, config: Config) -> None:
    """At the aggregator: the dealer is needed no more."""
    if config.aggregation.norm_check:
        links.send_object(DEALER, _CHECK, {"end": True})
