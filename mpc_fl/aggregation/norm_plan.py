"""The check of norms that a configuration asks for, from public values: alike at all parties."""

from __future__ import annotations

from mpc_fl.aggregation.norm_bound import gradient_norm_bound, in_grid_units, update_norm_bound
from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.config.config import Config
from mpc_fl.crypto.ring import MeanHeadroom
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian


def check_of(
    config: Config, headroom: MeanHeadroom, mechanism: DistributedGaussian | None, parameters: int, weight_total: int
) -> NormCheck | None:
    """The check of a run's updates or gradients, of `parameters` elements; `None` if it asks for none.

    A weight is at most `aggregation.count_bound` over the public `weight_total`: what bounds a hospital's influence is
    the norm of its weighted update. Raises `ConfigError` where nothing public bounds an update, or a configured bound
    would make the check tell of patients, `HeadroomError` for a bound that cannot be checked.
    """
    if not config.aggregation.norm_check:
        return None
    if mechanism is not None:
        bound = gradient_norm_bound(mechanism, config.aggregation.norm_bound)
        return NormCheck(NormTest.of_sketches(bound, mechanism.ring_bits), parameters)
    counts = config.aggregation.count_bound if config.aggregation.weighted else 1
    bound, bits = update_norm_bound(config, parameters), config.aggregation.fraction_bits
    grid = in_grid_units(bound, bits, parameters, min(1.0, counts / weight_total))
    return NormCheck(NormTest(grid, 32 if headroom.ring_bits == 32 else 64), parameters)
