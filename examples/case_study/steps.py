"""What the study runs: each step one command of the product, its settings, what it leaves, and how long it takes on two cores.

Settings of rows and runs are those of the configurations in `configs/` and of `benchmarks/chest_xray_table.py`, so that figures
compare with docs/chest_xray_table.md. The order is by worth: when time runs out the costliest comparisons are what is lacking.
Minutes are those of idle cores; where they were measured is in README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from case_study import films
from case_study.films import Sizes

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
HEAD, SCATTERING, SMALL = "chest_xray.yaml", "chest_xray_scattering.yaml", "chest_xray_small.yaml"
PEERS, FOUNDERS, QUORUM = 5, 4, 3
# All test films, so that figures compare with those of others; the public films come in many sizes.
_FILMS: dict[str, Any] = {"data.shared_patients": "keep", "data.wrong_size": "resize"}
_DIRICHLET: dict[str, Any] = {"data.partition.method": "dirichlet", "data.partition.alpha": 0.5}
_QUICK_HEAD = {"data.normalise": "none"}  # a few hundred phantoms are too few for the noise of their mean
_NORMALISE_NOISE = 2.7 * 8  # over epsilon: a tenth of the budget
_WITHOUT_PRIVACY = {"privacy.mechanism": "none", "training.gradient_clipping": 1.0, "training.learning_rate": 0.02}


@dataclass(frozen=True)
class Study:
    """On which films, where to, and whether only to try: `quick` takes few rounds, and scattering in place of a public network,
    whose weights not every machine has. `synthetic`: the films are phantoms."""

    data: Path
    out: Path
    quick: bool = False
    synthetic: bool = False

    @property
    def head(self) -> str:
        """What stands before the trained linear layer, as the table names it."""
        return "scattering" if self.quick else "lite0"

    @property
    def head_config(self) -> str:
        """The configuration of the linear layer on public features."""
        return SCATTERING if self.quick else HEAD

    def run(self, name: str) -> Path:
        """Where the run of a step lies."""
        return self.out / "runs" / name


@dataclass(frozen=True)
class Step:
    """One command. Its first word is `mpc-fl`, or a program of this repository by its path in it.

    `result` is there when it has come to its end, below which nothing of an earlier one may be when it begins (`owns`); `statuses`
    are the exit statuses with which it has: an audit that found something has come to its end, too. `needs` are steps before it.
    """

    name: str
    about: str
    command: tuple[str, ...]
    result: Path
    minutes: float
    needs: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (0,)


def _set(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(word for key, value in values.items() for word in ("--set", f"{key}={value}"))


def _train(study: Study, name: str, config: str, settings: tuple[str, ...]) -> tuple[tuple[str, ...], Path]:
    out = study.run(name)
    command = ("mpc-fl", "train", str(CONFIGS / config), "--data", str(study.data), "--out", str(out), *settings)
    return command, out / "summary.json"


def _common(study: Study, sizes: Sizes) -> dict[str, Any]:
    smallest, largest = sizes.public
    return {
        **_FILMS,
        "privacy.smallest_hospital": smallest,
        "privacy.largest_hospital": max(largest, 2 * smallest),
        "runtime.receive_timeout": 1800,
        "runtime.connect_timeout": 600,
    }


def head_settings(study: Study, sizes: Sizes, mechanism: str, epsilon: float | None) -> tuple[str, ...]:
    """Of a linear layer on public features: full batches of the smallest hospital, as in the table."""
    rounds, steps, last = (2, 2, 2) if study.quick else (12, 5, 30)
    values: dict[str, Any] = {
        **_common(study, sizes),
        "privacy.mechanism": mechanism,
        "training.batch_size": sizes.public[0],
        "training.average_last": last,
        "training.rounds": rounds,
        "training.local_steps": steps,
        "site.feature_cache": study.out / "cache" / "features",
    }
    if mechanism != "distributed":  # a step a round, so that steps are those of the run that opens each
        values |= {"training.strategy": "fedsgd", "training.rounds": rounds * steps, "training.local_steps": 1}
    if epsilon is None:
        values |= {"training.learning_rate": 5}
    else:
        noise = round(_NORMALISE_NOISE / epsilon, 3)
        values |= {"privacy.epsilon": epsilon, "data.normalise_noise_multiplier": noise}
        values |= {"training.learning_rate": 15} if epsilon <= 1 and not study.quick else {}
    if study.quick:
        values |= _QUICK_HEAD
    return _set(values)


def small_settings(study: Study, sizes: Sizes, mechanism: str, epsilon: float | None) -> tuple[str, ...]:
    """Of the network that is trained from nothing, with the sixth of its work that the table takes."""
    rounds, batch = (2, 32) if study.quick else (10, min(sizes.public[0], 256))
    values: dict[str, Any] = {**_common(study, sizes), "training.rounds": rounds, "training.augmentation.copies": 1}
    if epsilon is None:
        steps = {"training.local_steps": 2 if study.quick else 10, "training.batch_size": min(batch, 128)}
        return _set({**values, **_WITHOUT_PRIVACY, **steps, "training.ema_decay": 0.5})
    values |= {"privacy.mechanism": mechanism, "privacy.epsilon": epsilon, "privacy.delta": 1e-5}
    values |= {"training.local_steps": 2 if study.quick else 5, "training.batch_size": batch}
    return _set({**values, "training.learning_rate": 0.5, "training.ema_decay": 0.9})


def _table(study: Study, name: str, features: str, epsilons: tuple[str, ...], minutes: float) -> Step:
    few: dict[str, Any] = {"training.rounds": 2, "training.local_steps": 2} if study.quick else {}
    if features != "small" and study.quick:
        few |= {"training.average_last": 2, "data.normalise": "none"}
    result = study.run(name) / "table.json"
    command = (
        "benchmarks/chest_xray_table.py",
        *("--data", str(study.data), "--cache", str(study.out / "cache" / "records"), "--features", features),
        *("--epsilons", *(("inf", "8") if study.quick else epsilons)),
        *("--seeds", *(("0", "1") if study.quick else ("0", "1", "2"))),
        *_set({**_FILMS, **few}),
        *("--json", str(result)),
    )
    return Step(name, f"accuracy against epsilon, {features}: central, alone, federated", command, result, minutes)


def _diagnosis(study: Study, name: str, config: str, run: str, pictures: Path) -> Step:
    model, out = study.run(run) / "model.safetensors", study.run(name)
    command = ("mpc-fl", "infer", str(CONFIGS / config), "--model", str(model), "--images", str(pictures))
    settings: dict[str, Any] = {**_FILMS, "inference.engine": "fast", "inference.plaintext_reference": "true"}
    if study.quick and config == study.head_config:
        settings |= _QUICK_HEAD
    more = ("--out", str(out), *_set(settings))
    about = f"encrypted diagnosis with the model of {run}, beside the same in the clear"
    return Step(name, about, (*command, *more), out / "summary.json", 2, (run,))


def _audits(study: Study) -> list[Step]:
    found = list[Step]()
    canaries, shadows = ("400", "4") if study.quick else ("4000", "8")
    for run, minutes in (("small-none", 7.0), ("small-distributed", 10.0)):
        name = run.replace("small", "membership")
        out = study.run(name)
        at_once = ("--at-once", "100") if study.quick else ()
        command = ("mpc-fl", "audit", "privacy", str(study.run(run)), "--out", str(out), "--canaries", canaries)
        about = f"lower bound on epsilon, and membership inference, of {run}"
        words = (*command, "--shadows", shadows, *at_once)
        found.append(Step(name, about, words, out / "audit.json", minutes, (run,), (0, 1)))
    return found


def _views(study: Study) -> list[Step]:
    seen, out = study.run("seen"), study.run("views")
    few = {"data.phantoms.train_patients": 300, "data.phantoms.test_patients": 60, "training.batch_size": 30}
    few |= {"training.rounds": 2, "training.local_steps": 2, "data.image_size": 16}
    train = ("mpc-fl", "train", str(CONFIGS / "demo.yaml"), "--out", str(seen))
    settings = _set({"runtime.record_messages": "true", **(few if study.quick else {})})
    limits = ("2", "20", "50") if study.quick else ("8", "300", "800")
    options = tuple(word for pair in zip(("--images", "--steps", "--queries"), limits, strict=True) for word in pair)
    audit = ("mpc-fl", "audit", "views", str(seen), "--out", str(out), *options)
    about = "what each party saw: uniformity, gradient inversion, a copy of the model by queries"
    return [
        Step("seen", "a run on phantoms of which all messages are recorded", (*train, *settings), seen / "summary.json", 2),
        Step("views", about, audit, out / "views.json", 5, ("seen",), (0, 1)),
    ]  # fmt: skip


def _peers(study: Study, sites: Path, sizes: Sizes) -> Step:
    out = study.run("peers")
    values: dict[str, Any] = {**_common(study, sizes), **_WITHOUT_PRIVACY, "training.augmentation.copies": 1}
    values |= {"training.batch_size": 32 if study.quick else 128, "training.local_steps": 1 if study.quick else 6}
    values |= {"training.rounds": 12 if study.quick else 16, "training.ema_decay": 0.5}
    values |= {"federation.hospitals": PEERS, "federation.founders": FOUNDERS, "federation.quorum": QUORUM}
    command = (
        "examples/case_study/peers.py",
        *("--config", str(CONFIGS / SMALL), "--sites", str(sites), "--out", str(out)),
        *("--join-after", "0" if study.quick else "1", "--leave-after", "10"),
        *_set(values),
    )
    about = "hospitals alone, without an aggregator: one joins while they train, another leaves"
    return Step("peers", about, command, out / "membership.json", 5)


def plan(study: Study) -> list[Step]:
    """All steps in order. Makes the folders of films that they take. Raises what reading the films raises."""
    config = CONFIGS / study.head_config
    equal = films.sizes(config, study.data, _FILMS)
    unequal = films.sizes(config, study.data, _FILMS | _DIRICHLET)
    of_peers = films.sizes(config, study.data, _FILMS | {"federation.hospitals": PEERS})
    pictures = films.choose(study.data, study.out / "films" / "diagnosed", 2 if study.quick else 20)
    sites = films.divide(study.data, study.out / "films" / "sites", PEERS)

    def trained(
        name: str, about: str, minutes: float, settings: tuple[str, ...], config: str = study.head_config
    ) -> Step:
        return Step(name, about, *_train(study, name, config, settings), minutes)

    alone, other = _set({"site.train_alone": "true"}), _set(_DIRICHLET)
    check = ("mpc-fl", "check", str(config), "--data", str(study.data), "--json")
    sized = _set({**_FILMS, "privacy.smallest_hospital": equal.public[0], "training.batch_size": equal.public[0]})
    shortcuts = (
        "mpc-fl",
        "audit",
        "shortcuts",
        str(study.run("small-distributed")),
        "--out",
        str(study.run("shortcuts")),
    )
    return [
        Step("check", "what the films are", (*check, *sized), study.out / "steps" / "check.stdout", 1),
        _table(study, "head-table", study.head, ("inf", "8", "4", "1"), 8),
        trained("head-sums", "secure sums without noise", 6, head_settings(study, equal, "none", None) + alone),
        trained("head-local", "local noise, epsilon 8", 2, head_settings(study, equal, "local", 8)),
        trained("head-distributed", "distributed noise, epsilon 8", 2, head_settings(study, equal, "distributed", 8)),
        trained("head-distributed-1", "distributed noise, epsilon 1", 2, head_settings(study, equal, "distributed", 1)),
        _diagnosis(study, "diagnosis-head", study.head_config, "head-distributed", pictures),
        trained("small-none", "a network from nothing, without noise", 3, small_settings(study, equal, "none", None), SMALL),
        trained(
            "small-distributed", "a network from nothing, epsilon 8", 5,
            small_settings(study, equal, "distributed", 8), SMALL,
        ),
        _diagnosis(study, "diagnosis-small", SMALL, "small-distributed", pictures),
        *_audits(study),
        *_views(study),
        _peers(study, sites, of_peers),
        trained("unequal-sums", "unequal sites, without noise", 6, head_settings(study, unequal, "none", None) + alone + other),
        trained(
            "unequal-distributed", "unequal sites, distributed noise, epsilon 8", 2,
            head_settings(study, unequal, "distributed", 8) + other,
        ),
        Step(
            "shortcuts", "whether diagnoses survive masked lungs, borders, corners, another contrast",
            (*shortcuts, "--no-probe", "--no-left-out"), study.run("shortcuts") / "shortcuts.json", 2, ("small-distributed",),
        ),
        _table(study, "small-table", "small", ("inf", "8", "1"), 27),
        *([] if study.head == "scattering" else [_table(study, "scattering-table", "scattering", ("inf", "8", "1"), 6)]),
    ]  # fmt: skip
