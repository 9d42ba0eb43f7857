"""No secret comes from torch's generators: stock CrypTen's masks can be predicted, ours cannot, and none comes twice.

Two parties and a dealer start twice, with the same seeds set everywhere a program can set one. In each start they run
the same scenes on stock CrypTen and on `CrypTenRuntime`. Uniform 64-bit values of two independent draws coincide with
probability 2^-64, so that one match among the 10^6 pairs compared at most has probability below 10^-12.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import random
import warnings
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpc_fl.apps.bench.stock_crypten import stock_crypten
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from tests.support.harness import run_parties
from tests.support.no_torch_randomness import NoTorchRandomness

WORLD = ["party-0", "party-1"]
KNOWN, HIDDEN = 312, 1000
SEED = 20250101

# ---- predicting Mersenne Twister -----------------------------------------------------------------------------------


def _undo_shift(value: int, shift: int, mask: int, left: bool) -> int:
    """The x with value = x ^ ((x << shift or x >> shift) & mask): every pass gets `shift` more bits right."""
    result = value
    for _ in range(32 // shift):
        result = value ^ ((result << shift if left else result >> shift) & mask)
    return result & 0xFFFFFFFF


def _untemper(output: int) -> int:
    """The state word behind an output of MT19937 (Matsumoto and Nishimura, ACM TOMACS 1998, section 2.1)."""
    word = _undo_shift(output, 18, 0xFFFFFFFF, left=False)
    word = _undo_shift(word, 15, 0xEFC60000, left=True)
    word = _undo_shift(word, 7, 0x9D2C5680, left=True)
    return _undo_shift(word, 11, 0xFFFFFFFF, left=False)


def _temper(word: int) -> int:
    word ^= word >> 11
    word ^= (word << 7) & 0x9D2C5680
    word ^= (word << 15) & 0xEFC60000
    return word ^ (word >> 18)


def _following_outputs(outputs: Iterable[int], count: int) -> list[int]:
    """The next outputs of MT19937 after 624 consecutive ones, which determine its state."""
    state = deque((_untemper(output) for output in outputs), maxlen=624)
    following = []
    for _ in range(count):
        joined = (state[0] & 0x80000000) | (state[1] & 0x7FFFFFFF)
        state.append(state[397] ^ (joined >> 1) ^ (0x9908B0DF if joined & 1 else 0))
        following.append(_temper(state[-1]))
    return following


def predict_ring_elements(observed: np.ndarray, count: int) -> np.ndarray:
    """The `count` ring elements that stock CrypTen draws after the last 312 of `observed` (int64).

    `torch.randint(-2^63, 2^63 - 1)` on the CPU joins two outputs, the high word first, takes the remainder by 2^64 - 1
    and subtracts 2^63.
    """
    words = [(int(element) + 2**63) for element in observed[-KNOWN:]]
    halves = [half for word in words for half in (word >> 32, word & 0xFFFFFFFF)]
    following = _following_outputs(halves, 2 * count)
    joined = [(high << 32 | low) % (2**64 - 1) for high, low in zip(following[::2], following[1::2], strict=True)]
    return np.array([word - 2**63 for word in joined], dtype=np.int64)


def test_stock_generator_is_predicted_and_ours_is_not() -> None:
    from mpc_fl.sharing.crypten_parts import crypten

    stock = crypten.common.rng.generate_random_ring_element(
        (KNOWN + HIDDEN,), generator=torch.Generator().manual_seed(SEED)
    ).numpy()
    assert (predict_ring_elements(stock[:KNOWN], HIDDEN) == stock[KNOWN:]).all()
    ours = Seed.from_system().stream("masks").ring_elements((KNOWN + HIDDEN,)).numpy()
    assert len(np.intersect1d(predict_ring_elements(ours[:KNOWN], HIDDEN), ours[KNOWN:])) == 0


def test_stock_seed_has_32_bits() -> None:
    """The 64-bit seeds CrypTen exchanges are cut to 2^32 possibilities, few enough to try them all."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 2**32))
    assert torch.equal(*(torch.randint(2**62, (8,), generator=generator) for generator in (first, second)))


# ---- two parties, two starts ---------------------------------------------------------------------------------------


def set_every_seed() -> None:
    """Fix all the generators a program can reach."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def known_and_hidden() -> tuple[torch.Tensor, torch.Tensor]:
    """What party 1 knows and what party 0 hides; the test knows both."""
    values = torch.linspace(-4, 4, KNOWN + HIDDEN)
    return values[:KNOWN], values[KNOWN:]


def square_both(crypten: Any) -> dict[str, np.ndarray]:
    """Party 1 squares its own input, then party 0 its own. Returns the masked values both parties see, int64.

    Beaver's square opens x - r; who knows x learns the dealer's r, and from enough of them the next r.
    """
    shared = crypten.mpc.primitives.ArithmeticSharedTensor
    opened: list[np.ndarray] = []
    original = shared.reveal

    def observed(tensor: Any, dst: int | None = None) -> Any:
        opened.append(original(tensor, dst).numpy().copy())
        return torch.from_numpy(opened[-1])

    known, hidden = known_and_hidden()
    own, other = crypten.cryptensor(known, src=1), crypten.cryptensor(hidden, src=0)
    shared.reveal = observed
    try:
        own.square()
        other.square()
    finally:
        shared.reveal = original
    return {"known": opened[0], "hidden": opened[1], "share": other.share.numpy().copy()}


def drawn_secrets(runtime: Any, crypten: Any) -> dict[str, np.ndarray]:
    """One of every kind of secret randomness this party draws."""
    from mpc_fl.learning.training.noised_optimizer import gaussian_noise

    shape = (HIDDEN,)
    shared = crypten.cryptensor(torch.ones(HIDDEN), src=0)
    return {
        "share": shared.share.numpy(),
        "binary share": shared.to(crypten.mpc.binary).share.numpy(),
        "zero-share": runtime.zero_share(shape).numpy(),
        "binary zero-share": runtime.zero_share(shape, exclusive_or=True).numpy(),
        "ring elements": crypten.common.rng.generate_random_ring_element(shape).numpy(),
        "bits": crypten.common.rng.generate_kbit_random_tensor(shape).numpy(),
        "random secret": crypten.mpc.primitives.ArithmeticSharedTensor.PRSS(shape).share.numpy(),
        "dp noise": gaussian_noise(Seed.from_system().stream("dp noise", 0), shape).numpy().view(np.int64),
    }


def record_keys() -> list[bytes]:
    """From here on, a digest of the key of every stream this process opens. A stream is its key: counters start at zero."""
    from mpc_fl.crypto.stream_cipher import Stream

    digests: list[bytes] = []
    original = Stream.__init__

    def recorded(stream: Stream, key: bytes) -> None:
        digests.append(hashlib.sha256(key).digest())
        original(stream, key)

    Stream.__init__ = recorded  # type: ignore[method-assign]
    return digests


def scenes(links: Any, directory: str) -> dict[str, Any]:
    """One party of one start."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer

    keys = record_keys()
    if links.name == "dealer":
        Dealer(links, WORLD).serve()
        return {"keys": keys}
    rank = WORLD.index(links.name)
    results: dict[str, Any] = {}
    with stock_crypten(rank, len(WORLD), Path(directory) / "gloo"):
        results["unseeded stock"] = square_both(crypten)
        set_every_seed()
        crypten.cfg.debug.debug_mode = True
        crypten.manual_seed(SEED + rank, SEED, SEED)
        crypten.cfg.debug.debug_mode = False
        results["stock"] = square_both(crypten)
    with CrypTenRuntime(links, WORLD, "dealer", 16) as runtime:
        runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        set_every_seed()
        with NoTorchRandomness():
            results["ours"] = square_both(crypten)
            results["drawn"] = drawn_secrets(runtime, crypten)
            results["drawn again"] = drawn_secrets(runtime, crypten)  # a retry: the same program once more
            shared = crypten.cryptensor(torch.ones(HIDDEN), src=0)
            results["random"] = crypten.rand(HIDDEN).get_plain_text().numpy()
            results["secret dropout"] = shared.dropout(0.5).get_plain_text().numpy()
        shared.requires_grad = True  # in training, CrypTen's dropout masks are public
        results["public dropout"] = shared.dropout(0.5).get_plain_text().numpy()
    results["second runtime"] = "drew the same masks again"
    try:
        CrypTenRuntime(links, WORLD, "dealer", 16)
    except SecrecyError:
        results["second runtime"] = "refused"
    return {**results, "keys": keys}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of all parties, of a start and of a restart."""
    directories = [tmp_path_factory.mktemp("start") for _ in range(2)]
    return [run_parties(scenes, [*WORLD, "dealer"], directory, str(directory)) for directory in directories]


def attack(seen: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What party 1 predicts as the masks of party 0's input, and what they were (int64)."""
    known, hidden = ((value * 2**16).long().numpy() for value in known_and_hidden())
    with np.errstate(over="ignore"):
        return predict_ring_elements(known - seen["known"], HIDDEN), hidden - seen["hidden"]


def in_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many values two draws share, wherever they stand."""
    return len(np.intersect1d(one, other))


@pytest.mark.processes
def test_a_party_unmasks_another_on_stock_crypten_and_not_on_ours(starts: list[dict[str, Any]]) -> None:
    predicted, masks = attack(starts[0]["party-1"]["unseeded stock"])
    assert (predicted == masks).all()
    predicted, masks = attack(starts[0]["party-1"]["ours"])
    assert in_common(predicted, masks) == 0


@pytest.mark.processes
@pytest.mark.parametrize("party", WORLD)
def test_no_seed_has_influence_on_a_secret(party: str, starts: list[dict[str, Any]]) -> None:
    first, second = (start[party] for start in starts)
    for name in ("known", "hidden", "share"):
        assert (first["stock"][name] == second["stock"][name]).all(), "the control: stock CrypTen repeats itself"
        assert in_common(first["ours"][name], second["ours"][name]) == 0
    for name in first["drawn"]:
        assert in_common(first["drawn"][name], second["drawn"][name]) == 0, name
    assert (first["random"] == second["random"]).mean() < 0.1  # values of 16 bits
    for name in ("secret dropout", "public dropout"):
        assert (first[name] != second[name]).mean() > 0.3  # 500 of 1000 expected, 12 standard deviations


@pytest.mark.processes
def test_nothing_is_drawn_twice_in_a_run_after_a_retry_or_a_restart(starts: list[dict[str, Any]]) -> None:
    for party in WORLD:
        for name, values in starts[0][party]["drawn"].items():
            assert in_common(values, starts[0][party]["drawn again"][name]) == 0, name
    for party in (*WORLD, "dealer"):
        first, second = (start[party]["keys"] for start in starts)
        assert len(first) > 20
        assert len(set(first)) == len(first)
        assert not set(first) & set(second)


@pytest.mark.processes
def test_the_links_of_a_run_give_its_secrets_once(starts: list[dict[str, Any]]) -> None:
    assert [starts[0][party]["second runtime"] for party in WORLD] == ["refused", "refused"]


@pytest.mark.processes
@pytest.mark.parametrize("name", ["secret dropout", "public dropout"])
def test_dropout_works_and_opens_alike(name: str, starts: list[dict[str, Any]]) -> None:
    first, second = (starts[0][party][name] for party in WORLD)
    assert (first == second).all()
    assert set(np.unique(first)) == {0.0, 2.0}


# ---- labels, forks, CrypTen's sources ------------------------------------------------------------------------------


def test_a_failed_round_cannot_be_repeated_with_the_same_noise() -> None:
    seed = Seed.from_system()
    seed.stream("dp noise", 3, 0, 0)
    with pytest.raises(SecrecyError, match="used twice"):
        seed.stream("dp noise", 3, 0, 0)
    seed.stream("dp noise", 4, 0, 0)


def test_a_forked_process_cannot_draw_its_parents_values() -> None:
    seed = Seed.from_system()
    stream = seed.stream("before")
    refusals = 0
    child = os.fork()
    if child == 0:  # only this child leaves through os._exit
        for draw in (lambda: seed.stream("after"), lambda: seed.derive("after"), lambda: stream.words(1, np.int64)):
            try:
                draw()
            except SecrecyError:
                refusals += 1
        os._exit(refusals)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert seed.stream("after").words(1, np.int64).shape == (1,)


DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "multinomial"}
DRAWING_METHODS = {"random_", "normal_", "uniform_", "bernoulli", "bernoulli_", "exponential_", "log_normal_"}
SOURCES = {"generators", "Generator", "urandom", "generate_random_ring_element", "generate_kbit_random_tensor"}
LAYERS = {"Linear", "Conv1d", "Conv2d", "BatchNorm1d"}

REVIEWED = {
    # replaced by `CrypTenRuntime`: every name below that module, at every place that imported it
    "common/rng.py": {"generate_random_ring_element", "generate_kbit_random_tensor"},
    "mpc/primitives/arithmetic.py": {"ArithmeticSharedTensor.PRZS", "ArithmeticSharedTensor.PRSS"},
    "mpc/primitives/binary.py": {"BinarySharedTensor.PRZS", "BinarySharedTensor.rand"},
    # never reached: the provider is replaced, CrypTen is not initialised, its generators are not there
    "mpc/provider/tfp_provider.py": {
        "TrustedFirstParty.generate_additive_triple",
        "TrustedFirstParty.square",
        "TrustedFirstParty.generate_binary_triple",
        "TrustedFirstParty.wrap_rng",
        "TrustedFirstParty.B2A_rng",
    },
    "mpc/provider/ttp_provider.py": {
        "TrustedThirdParty.generate_additive_triple",
        "TrustedThirdParty.square",
        "TrustedThirdParty.generate_binary_triple",
        "TrustedThirdParty.wrap_rng",
        "TrustedThirdParty.B2A_rng",
        "TTPClient.__TTPClient._setup_generators",
        "TTPServer._setup_generators",
        "TTPServer._get_generators",
        "TTPServer._get_additive_PRSS",
        "TTPServer._get_binary_PRSS",
        "TTPServer.wraps",
    },
    "__init__.py": {"", "_setup_prng", "_sync_seeds"},
    # public by CrypTen's design: dropout masks in training, from one generator all parties seed alike
    "gradients.py": {"AutogradDropout.forward", "AutogradFeatureDropout.forward"},
    # not a secret of the protocol: a network's first weights, and names of files
    "nn/module.py": {"Linear.__init__", "Conv1d.__init__", "Conv2d.__init__", "_BatchNorm.__init__"},
    "nn/init.py": {""},
    # refused by the runtime: DPSplit draws its noise and label flips from torch's generator
    "nn/privacy/dp_split.py": {"DPSplitModel._process_targets", "DPSplitModel._generate_noise_from_src"},
}


def _sources_of_randomness(tree: ast.AST, scope: tuple[str, ...] = ()) -> set[str]:
    """Qualified names of the functions in a module that draw, hold a generator, or call CrypTen's drawing functions."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        inner = (*scope, node.name) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else scope
        owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        built = isinstance(tree, ast.Call) and tree.func is node and owner == "torch.nn" and name in LAYERS
        torch_draw = (owner == "torch" and name in DRAWS) or (owner == "torch.nn" and name == "init") or built
        method = name in DRAWING_METHODS and owner not in ("crypten", "")
        if torch_draw or method or name in SOURCES or owner in ("random", "np.random", "numpy.random"):
            found.add(".".join(inner))
        found |= _sources_of_randomness(node, inner)
    return found


def test_every_source_of_randomness_in_crypten_was_reviewed() -> None:
    """Fails when another version of CrypTen draws somewhere else: look at it, then extend the runtime and this list."""
    location = importlib.util.find_spec("crypten")
    assert location is not None and location.origin is not None
    package = Path(location.origin).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CrypTen's docstrings have invalid escapes
        trees = {str(path.relative_to(package)): ast.parse(path.read_text()) for path in package.rglob("*.py")}
    found = {name: functions for name, tree in trees.items() if (functions := _sources_of_randomness(tree))}
    found.pop("communicator/distributed_communicator.py")  # the name of a temporary file
    assert found == REVIEWED


def test_the_guard_sees_a_draw_from_torch() -> None:
    from mpc_fl.sharing.crypten_parts import crypten

    with NoTorchRandomness():
        torch.ones(3) + 1
        for draw in (
            lambda: crypten.common.rng.generate_random_ring_element((3,), generator=torch.Generator()),
            lambda: torch.rand(3),
            lambda: torch.empty(3).normal_(),
        ):
            with pytest.raises(AssertionError, match="drew from"):
                draw()


def what_is_refused(links: Any) -> list[str]:
    """Parts of CrypTen that draw secrets from torch's generator, called inside the runtime."""
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime

    refused = []
    runtime = CrypTenRuntime(links, ["party-0", "party-1"], None, 16)
    with crypten.cfg.temp_override({"mpc.protocol": "replicated"}):
        try:
            runtime.__enter__()
        except SecrecyError as error:
            refused.append(str(error))
    with runtime:
        for call in (lambda: crypten.manual_seed(1, 2, 3), lambda: crypten.nn.privacy.DPSplitModel()):
            try:
                call()
            except SecrecyError as error:
                refused.append(str(error))
    return refused


def test_what_crypten_draws_from_torch_is_refused(tmp_path: Path) -> None:
    results = run_parties(what_is_refused, ["party-0", "party-1"], tmp_path)
    for refused in results.values():
        assert "replicated" in refused[0] and ["torch.Generator" in text for text in refused] == [False, True, True]


def test_the_benchmark_prints_both_sources_and_their_ratio() -> None:
    from mpc_fl.apps.bench.randomness import SIZES
    from mpc_fl.apps.cli.bench import app

    runner = CliRunner()
    result = runner.invoke(app, ["randomness", "--json", "--seconds", "0.01"])
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)["results"]
    assert [entry["elements"] for entry in entries] == list(SIZES)
    for entry in entries:
        speed = {way: entry[way]["gigabytes_per_second"] for way in ("draw", "add", "randint", "random_")}
        assert min(speed.values()) > 0
        assert entry["ratio"] == speed["draw"] / speed["randint"]
    assert "torch.randint" in runner.invoke(app, ["randomness", "--seconds", "0.01"]).output
