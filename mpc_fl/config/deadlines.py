"""How long the parties of a training run wait for each other: all of it computed here, from the configuration alone.

Training is a star: hospitals wait for the aggregator, and the aggregator for hospitals. So the deadlines nest: the aggregator's
are those of hospitals' work, and a hospital's are longer than the aggregator can be silent while it waits for others. Who is late
is then always given up by whoever waits for it, and never mistaken for somebody that waits itself. docs/protocols/links.md has
the table. Other tasks have no such chains: their parties wait for `runtime.receive_timeout`.

Without an aggregator (`peer_deadlines_of`) all wait for all, and each step of a sum ends for all at about the same time. What
nests is a change of the view: who proposes under the next one waits until the last of the others has found out, too, that this
one comes to nothing.

Below all of these are those of links. What a relay does not bring goes another way after `another_relay`, half of
`runtime.silence_timeout`; a relay that stops is lost after the whole of it, and a peer that is heard through no relay two signs
of life later. Among peers an answer may take longer than that (`relays`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mpc_fl.config.config import Config, connect_seconds
from mpc_fl.roles import is_hospital

# That the aggregator takes from all, one after the other: five of a norm check, confirmations, keys, a loss.
_ANSWERS_OF_A_SUM = 8
_ANSWERS_OF_A_BEGINNING = 6  # certificates, blocks, their signatures, what was open, its blocks and signatures
_SUMS_BESIDE_STEPS = 3  # of features, patients and evaluation
_SUMS_OF_GROUPS = 2
# Among peers, one after the other: transcript, five until V is fixed, seven steps until keys leave, keys, and a block.
_ANSWERS_OF_A_PEER_SUM = 16
_ANSWERS_OF_A_PEER_CHECK = 11  # what all heard of slices, and the steps of a norm check


@dataclass(frozen=True)
class Deadlines:
    """Seconds.

    `connect`: any party, until all links are made. `keys`: a hospital, until its links are those of a plan. `answer`: the
    aggregator, until hospitals have answered what takes no work, and any party, until a peer takes what is sent.
    `summand`: the aggregator, until hospitals are ready with a summand. `announcement`: the aggregator, until hospitals have their
    links, or have given up those that are missing, and have read their data. `word`: a hospital, until the
    aggregator's next word in a round that it takes part in. `plan`: a hospital, until a plan that it takes part in.
    """

    connect: float
    keys: float
    answer: float
    summand: float
    announcement: float
    word: float
    plan: float

    def receive(self, name: str) -> float:
        """What the party of this name waits for a message where nothing else is said."""
        return self.word if is_hospital(name) else self.answer


@dataclass(frozen=True)
class PeerDeadlines:
    """Seconds, without an aggregator.

    `connect`: until all links are made. `answer`: until a peer has done what takes no work, or takes what is sent. `summand`:
    until hospitals are ready with a summand. `beginning`: who proposes first, until the others have read their data. `presence`:
    who proposes, until the others are there for this view, whatever became of the one before. `beyond`: the others, until its
    proposal, longer than that.
    """

    connect: float
    answer: float
    summand: float
    beginning: float
    presence: float
    beyond: float


def another_relay(config: Config) -> float:
    """Seconds without progress after which what is sent through a relay goes another way."""
    return config.runtime.silence_timeout / 2


def peer_deadlines_of(config: Config) -> PeerDeadlines:
    """The deadlines of a training run without an aggregator, of the same settings as those of one with it."""
    connect, answer = connect_seconds(config), config.runtime.receive_timeout
    summand = config.federation.round_timeout or answer
    answers = _ANSWERS_OF_A_PEER_SUM + (_ANSWERS_OF_A_PEER_CHECK if config.aggregation.norm_check else 0)
    presence = summand + answers * answer
    return PeerDeadlines(connect, answer, summand, connect + summand, presence, 2 * answer)


def deadlines_of(config: Config) -> Deadlines:
    """The deadlines of a training run.

    `runtime.connect_timeout`, `runtime.receive_timeout` and `federation.round_timeout` give the aggregator's. Summands come
    two at a time, each within an answer's time, so hospitals that stop in the middle hold up others for half as many answers.
    """
    connect, answer = connect_seconds(config), config.runtime.receive_timeout
    hospitals, may_be_lost = config.federation.hospitals, config.federation.hospitals - config.federation.quorum_size
    summand = config.federation.round_timeout or answer
    intake = summand + answer * ((hospitals + 1) // 2)
    word = intake + 2 * answer  # one for what it sends to somebody that takes nothing, one to be on the safe side
    # A hospital that joins waits for the end of a round, which begins anew or goes on with fewer after each loss.
    times, steps = 1 + may_be_lost, config.training.local_steps if config.privacy.mechanism == "distributed" else 1
    sums = steps + _SUMS_BESIDE_STEPS + (_SUMS_OF_GROUPS if config.evaluation.groups.attributes else 0)
    of_sums = sums * (times * intake + _ANSWERS_OF_A_SUM * answer)
    a_round = of_sums + (_ANSWERS_OF_A_BEGINNING + times) * answer
    announcement = connect + summand
    return Deadlines(
        connect=connect,
        keys=min(connect, answer / 2),
        answer=answer,
        summand=summand,
        announcement=announcement,
        word=word,
        plan=max(a_round, connect + announcement) + 2 * answer,
    )
