"""How long an honest update can be, from public values: what a hospital that follows the protocol does not exceed.

Who is beyond the bound says so, and that is one bit about what it sends. What the bit costs depends on the noise in it.

Local noise (`dp_sgd`): exceeded with probability below 1e-4. The bit is a function of the update with all its noise, and of
public numbers, so it is covered by what the update was charged. With momentum and the proximal term of FedProx the update of
a round is linear in its steps' gradients:
update = -sum over t of a_t g_t, g_t = (sum of m_t gradients clipped to C, plus z C times a standard normal vector) / b, where
the weights a_t are the response of the optimizer to one gradient (`step_weights`), and m_t is the number of patients in
step t, a sum of independent indicators of expectation e.
  signal: |.| <= (C / b) sum of |a_t| m_t, and by Bernstein's inequality this sum is at most
          e sum |a_t| + sqrt(2 L e sum a_t^2) + L max |a_t| / 3 but for probability exp(-L)
  noise:  normal with standard deviation (z C / b) sqrt(sum a_t^2) per coordinate; its norm is at most sqrt(P) + sqrt(2 L)
          of these but for probability exp(-L) (Laurent and Massart, Annals of Statistics 2000, lemma 1)
with L = log(20000) for each. b is the configured batch size, and the expectation of m_t is at most that of the largest
hospital there may be: the public sampling rate times its patients. Whatever model and data are, the bound holds; the noise
alone of a large model is usually most of it, and then it is tight.

Distributed noise (`distributed_gaussian`), one step, in grid units. A summand s + g holds only its hospital's part g of the noise,
so a bit that depends on s would have to be charged as a release with noise z / sqrt(n - t): more than the whole step. So the
bound is one that no data exceed, and it bounds the *sketch*, which is what is compared: the bit of an honest hospital is
constant but for a probability of 2 * 2^-128, which `distributed_gaussian.step_total_variation` charges. With L = 128 log 2,
b blocks of the sketch (so at most b coordinates share a bucket), and V linear, |V(s + g)| <= |V(s)| + |V(g)|:
  signal: |s| <= m B for the m = `patients_bound` patients that a step can have. |V(s)|^2 <= b |s|^2 by Cauchy and Schwarz for
          whatever seed, and at most (1 + 2 sqrt(L) + 2 L) |s|^2 but for probability exp(-L) over its signs: buckets are
          independent and sub-Gaussian with variances that add up to |s|^2 (Hsu, Kakade, Zhang 2012, theorem 2.1)
  noise:  coordinates of variance v are sub-Gaussian (Canonne, Kamath, Steinke 2020), and so are buckets, with variances that
          add up to v P and are at most v b: |V(g)|^2 <= v (P + 2 sqrt(b P L) + 2 b L) but for probability exp(-L),
          whatever the seed is, as long as it does not depend on g (the same theorem)
The price is a looser bound: a hospital may send a sum some 1.5 to 5 times as long as one that is likely.

No noise: nothing is claimed of patients, and nothing bounds an update but what is configured.
"""

from __future__ import annotations

import math

from mpc_fl.aggregation.sketch import BUCKETS
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.privacy.distributed_gaussian import REFUSAL_BITS, DistributedGaussian
from mpc_fl.learning.training.sampling import sampling_rate

_LOG = math.log(2e4)  # of 1 / (half of 1e-4)
_NEVER = REFUSAL_BITS * math.log(2)  # of 1 / (what an honest hospital with distributed noise may fail with)
_ROUNDING = 1.001  # float32 parameters, integer noise


def step_weights(steps: int, learning_rate: float, momentum: float, proximal: float = 0.0) -> list[float]:
    """a_1 .. a_steps: what a gradient in step t is multiplied by in the update, up to sign."""
    moved, velocity, response = 0.0, 0.0, []
    for step in range(steps):
        velocity = momentum * velocity + (1.0 if step == 0 else 0.0) - proximal * moved
        moved += learning_rate * velocity
        response.append(moved)
    return response[::-1]


def _patients(expected: float, weights: list[float]) -> float:
    """A bound on the sum of |a_t| m_t."""
    squares = sum(weight * weight for weight in weights)
    largest = max(abs(weight) for weight in weights)
    return expected * sum(map(abs, weights)) + math.sqrt(2 * _LOG * expected * squares) + _LOG * largest / 3


def _noise(deviation: float, parameters: int) -> float:
    return deviation * (math.sqrt(parameters) + math.sqrt(2 * _LOG))


def update_norm_bound(config: Config, parameters: int) -> float:
    """The bound for the update of a round with mechanism `local` or `none`, in the units of parameters.

    `aggregation.norm_bound` if it is set. Raises `ConfigError` where nothing public bounds an update: without noise and
    clipping, with a noise multiplier that each hospital calibrates to what is left of its budget, or with no public
    bounds on hospitals' patients.
    """
    settings, training = config.privacy, config.training
    if config.aggregation.norm_bound is not None:
        return config.aggregation.norm_bound
    if settings.mechanism != "local":
        raise ConfigError("nothing bounds an update without clipping", "set aggregation.norm_bound")
    if settings.noise_multiplier is None:
        raise ConfigError(
            "a norm check needs a noise multiplier that all know",
            "set privacy.noise_multiplier or aggregation.norm_bound",
        )
    sizes, divisor = public_sizes(config), training.batch_size
    most = sampling_rate(config, sizes.smallest) * sizes.largest
    weights = step_weights(training.local_steps, training.learning_rate, training.momentum, training.proximal)
    deviation = settings.noise_multiplier * math.sqrt(sum(weight * weight for weight in weights))
    in_clipping_norms = (_patients(most, weights) + _noise(deviation, parameters)) / divisor
    return _ROUNDING * settings.clipping_norm * in_clipping_norms


def gradient_norm_bound(mechanism: DistributedGaussian, configured: float | None = None) -> float:
    """The bound for the *sketch* of one hospital's summand in a step with distributed noise, in grid units.

    `configured` is `aggregation.norm_bound`, in units of gradients. Raises `ConfigError` when it is so small that an honest
    hospital might exceed it: whether it does would tell of its patients.
    """
    blocks = -(-mechanism.parameters // (BUCKETS // 2))
    spread = min(float(blocks), 1 + 2 * math.sqrt(_NEVER) + 2 * _NEVER)
    signal = math.sqrt(spread) * mechanism.patients_bound * mechanism.sensitivity
    squares = mechanism.parameters + 2 * math.sqrt(blocks * mechanism.parameters * _NEVER) + 2 * blocks * _NEVER
    bound = _ROUNDING * (signal + math.sqrt(mechanism.noise_share.variance * squares))
    if configured is None:
        return bound
    if configured * mechanism.scale < bound:
        raise ConfigError(
            f"aggregation.norm_bound is below {bound / mechanism.scale:.4g}, so with distributed noise the check of norms could "
            "tell of patients",
            "set it to null, or higher",
        )
    return configured * mechanism.scale


def in_grid_units(bound: float, fraction_bits: int, parameters: int, largest_weight: float = 1.0) -> float:
    """The bound of an encoded summand round(weight * update * 2^f), for weights up to `largest_weight`."""
    return bound * largest_weight * 2.0**fraction_bits + math.sqrt(parameters) / 2
