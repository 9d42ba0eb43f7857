"""Gradient inversion on what leaves a hospital: the plaintext update, the noised one, the masked words, and the opened sum.

Hospitals of one phantom each, 32 x 32, take one step with one image, which is as easy as it gets for whoever attacks; then
`evidence.inversion` looks for the image. Training, clipping, noise, encoding and masks are the code of every run, called as in
`repeated_views`. The network is the small one, at its first weights, which all parties know.

- **plaintext**: the update of a hospital without noise, as if there were no masks.
- **noised**: the same with noise of each hospital's own, with the noise multiplier of the audited run.
- **masked**: the words that really leave, read as if they were an update.
- **sum**: what is opened without noise, over as many hospitals as the audited run has, compared with the image of each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpc_fl.apps.auditing.audited_config import in_one_process
from mpc_fl.apps.auditing.repeated_views import WatchedGroup, watched_rounds
from mpc_fl.apps.views_summary import Inversion
from mpc_fl.config.config import Config, parse_config
from mpc_fl.evidence.inversion import Search, inverted
from mpc_fl.evidence.similarity import probability_at_chance, similarities
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.phantoms import make_phantoms, public_phantoms
from mpc_fl.learning.data.tables import Part

PLAINTEXT, NOISED, MASKED, SUM = "plaintext", "noised", "masked", "sum"
_SIZE, _CLASSES, _OTHERS, _PUBLIC = 32, 3, 40, 200
_AT_LEAST_ONE_STEP = 1e6  # a budget of epsilon that lets one step through, whatever its noise
_EXPOSED = 1  # patients of a hospital


@dataclass(frozen=True)
class Attack:
    """Gradient inversion of so many images, in a run of so many hospitals whose noise has this multiplier."""

    images: int
    hospitals: int
    noise_multiplier: float
    search: Search


@dataclass(frozen=True, repr=False)
class InversionsFound:
    """Scores of each view, and pictures uint8 (n, 32, 32) by view, the images themselves among them as `image`."""

    inversions: list[Inversion]
    pictures: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Exposed:
    """Phantoms, float32 (n, 1, 32, 32), and their classes, int64 (n,): first those looked for, then others to compare with."""

    images: torch.Tensor
    labels: torch.Tensor


class OneImageEach(WatchedGroup):
    """Hospitals of one patient with one image each."""

    def __init__(self, config: Config, exposed: Exposed) -> None:
        super().__init__(config)
        self._exposed = exposed

    def read(self, rank: int, part: Part) -> Dataset:
        """The image of this hospital, in training and tests alike."""
        image, label = self._exposed.images[rank : rank + 1], self._exposed.labels[rank : rank + 1]
        return Dataset(image, label, torch.zeros(1, dtype=torch.int64), ("phantom",))


def _config_of(attack: Attack, noised: bool, out: Path) -> Config:
    privacy = (
        {
            "mechanism": "local",
            "noise_multiplier": attack.noise_multiplier,
            "smallest_hospital": _EXPOSED,
            "largest_hospital": _EXPOSED,
            "epsilon": _AT_LEAST_ONE_STEP,
            "spare_rounds": 0,
        }
        if noised
        else {"mechanism": "none"}
    )
    values = {
        "name": "inversion",
        "data": {
            "source": "phantoms",
            "image_size": _SIZE,
            "classes": [f"class {number}" for number in range(_CLASSES)],
        },
        "model": {"architecture": "small_cnn"},
        "training": {"rounds": 1, "local_steps": 1, "batch_size": _EXPOSED, "per_sample_gradients": "vmap"},
        "privacy": privacy,
        "federation": {"hospitals": attack.images},
    }
    return parse_config(values, "inversion").with_values(task="simulate", **in_one_process(out))


def _summands(attack: Attack, noised: bool, exposed: Exposed) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoded updates and masked words of all hospitals' one step, as numbers, float64 (images, P) each."""
    with tempfile.TemporaryDirectory(prefix="mpc-fl-audit-") as directory:
        config = _config_of(attack, noised, Path(directory))
        run = watched_rounds(config, OneImageEach(config, exposed), Path(directory), lambda: None)
    rows = [run.sums[0][rank] for rank in range(attack.images)]
    return torch.stack([row.plain.double() for row in rows]), torch.stack([row.masked.double() for row in rows])


def _exposed(attack: Attack) -> Exposed:
    """One phantom of each patient."""
    count = attack.images + _OTHERS
    drawn = make_phantoms(count, _CLASSES, _SIZE, attack.search.seed, "test")
    firsts = [int((drawn.patients == patient).argmax()) for patient in range(count)]
    return Exposed(torch.from_numpy(drawn.images[firsts])[:, None], torch.from_numpy(drawn.labels[firsts]))


def invert_updates(attack: Attack, told: Callable[[int, int], None]) -> InversionsFound:
    """Attack all four views. `told(step, steps)` follows. Raises what a run would raise."""
    exposed, together = _exposed(attack), min(attack.hospitals, attack.images)
    plain, masked = _summands(attack, False, exposed)
    noised, _ = _summands(attack, True, exposed)
    seen = {PLAINTEXT: plain, NOISED: noised, MASKED: masked, SUM: plain[:together].sum(0, keepdim=True)}
    with tempfile.TemporaryDirectory(prefix="mpc-fl-audit-") as directory:
        config = _config_of(attack, False, Path(directory))
    done = 0

    def step_done() -> None:
        nonlocal done
        done += 1
        told(done, attack.search.steps)

    all_seen = -torch.cat(list(seen.values()))  # an update goes against its gradient
    found = inverted(initial_model(config), all_seen, (1, _SIZE, _SIZE), attack.search, step_done)
    by_view = dict(zip(seen, found.split([len(rows) for rows in seen.values()]), strict=True))
    common = public_phantoms(_PUBLIC, config).mean(0)
    pictures = {view: _pixels(rows) for view, rows in by_view.items()}
    pictures["image"] = _pixels(exposed.images[: attack.images])
    by_view[SUM] = by_view[SUM].expand(together, -1, -1, -1)
    inversions = [_scored(view, similarities(rows, exposed.images, common)) for view, rows in by_view.items()]
    return InversionsFound(inversions, pictures)


def _scored(view: str, of_pairs: torch.Tensor) -> Inversion:
    own = of_pairs.diagonal()
    others = (of_pairs.sum(1) - own) / (of_pairs.shape[1] - 1)
    return Inversion(view, own.tolist(), others.tolist(), probability_at_chance(of_pairs))


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return (255 * images[:, 0]).round().to(torch.uint8)
