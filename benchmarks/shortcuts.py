"""What one hospital alone learns of a mark in a corner, and what the federation does; whether the site can be told from a film.

    python benchmarks/shortcuts.py [--times N] [--mechanisms none local distributed] [--set a.b=c] [--json]
    python benchmarks/shortcuts.py --config configs/chest_xray_small.yaml --data DIR --mechanisms none --set ...

Without --data: phantoms, with a mark that goes with the diagnosis of 95 % of the patients of hospital-0 and of half of all patients
elsewhere, whatever their diagnosis. The run, one hospital alone and the probe of sites are trained in one process
by the code that hospitals and aggregator call; then their films are changed (`mpc_fl/evidence/shortcuts_perturbed.py`). Once more
without a mark and with films that look alike, the probe must be at chance and no shortcut be found. Exit status 1 where the
federation does not lose less than the marked hospital alone, or what is not there is found.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.auditing.shortcut_audit import leave_sites_out, probe_sites, study
from mpc_fl.apps.auditing.shortcut_configs import run_again_config
from mpc_fl.apps.auditing.shortcut_runs import (
    JudgingModel,
    SiteFilms,
    films_of_sites,
    together,
    train_again,
    train_alone,
)
from mpc_fl.apps.shortcut_summary import CORNERS
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.evidence.shortcuts_tested import Estimate, accuracy_and_area

REPOSITORY = Path(__file__).resolve().parent.parent
MARKED = ("data.phantoms.shortcut.site=0", "data.phantoms.shortcut.style=0.5")
# Half of the demo's phantoms; without noise its rate would diverge.
SMALL = ("data.phantoms.train_patients=1200", "data.image_size=16", "training.batch_size=100", "training.rounds=12")
WITHOUT_NOISE = ("privacy.mechanism=none", "training.gradient_clipping=1", "training.learning_rate=0.05")


def configuration(options: argparse.Namespace, mechanism: str, marked: bool, seed: int) -> Config:
    """That of one run."""
    phantoms = () if options.data else (*SMALL, *(MARKED if marked else ()))
    noise = WITHOUT_NOISE if mechanism == "none" else (f"privacy.mechanism={mechanism}",)
    data = () if options.data is None else (f"site.data={options.data.resolve()}",)
    return load_config(options.config, [*phantoms, *noise, *data, f"seed={seed}", *options.set])


def told_of(model: JudgingModel, sites: list[SiteFilms]) -> dict[str, Any]:
    """Accuracy on the test films of these sites, and what each change does to it."""
    films = together([site.test for site in sites])
    before, changes = study(model, films, torch.cat([site.lungs for site in sites]))
    accuracy, area = accuracy_and_area(before, 0)
    return {
        "records": len(films),
        "accuracy": asdict(accuracy),
        "area": asdict(area),
        "changes": [{**asdict(change), "finding": change.finding} for change in changes],
    }


def measure(options: argparse.Namespace, mechanism: str, marked: bool, seed: int) -> dict[str, Any]:
    """One run: its own model, that of hospital-0 alone, and a probe."""
    began, config = time.monotonic(), configuration(options, mechanism, marked, seed)
    sites = films_of_sites(config, ["train", "test"])
    found: dict[str, Any] = {"mechanism": mechanism, "marked": marked, "seed": seed}
    model = train_again(run_again_config, config, [site.parts for site in sites], lambda *_: None).model
    found["federation"] = told_of(model, sites)
    if marked or options.data:
        found["federation on hospital-0"] = told_of(model, sites[:1])
        alone = {
            site.name: train_alone(config, site, lambda *_: None) for site in (sites if options.left_out else sites[:1])
        }
        found["hospital-0 alone"] = told_of(alone[sites[0].name], sites[:1])
        if options.left_out:
            found["left out"] = [asdict(of) for of in leave_sites_out(config, sites, model, alone, lambda *_: None)]
    found["probe"] = asdict(probe_sites(config, sites, lambda *_: None))
    return found | {"seconds": round(time.monotonic() - began, 1)}


def corners_of(told: dict[str, Any]) -> float:
    """Points of accuracy that are lost with the corners of another diagnosis, beyond their seams."""
    (lost,) = (change["beyond_seams"]["value"] for change in told["changes"] if change["name"] == CORNERS)
    return -100 * float(lost)


def as_it_should(found: dict[str, Any]) -> bool:
    """Whether the marked hospital alone learned the mark, the federation less, and the probe found what there was."""
    if not found["marked"]:
        blamed = [change["name"] for change in found["federation"]["changes"] if change["finding"] == "shortcut"]
        return not (found["probe"]["told"] or blamed)
    own, common = corners_of(found["hospital-0 alone"]), corners_of(found["federation on hospital-0"])
    return own > 5 and common < own and bool(found["probe"]["told"])


def main() -> None:
    """Measure all runs and print a few lines for each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "demo.yaml")
    parser.add_argument("--data", type=Path, help="films instead of phantoms: DIR with {train,test}/<class>/")
    parser.add_argument("--mechanisms", nargs="+", choices=["none", "local", "distributed"], default=["none", "local"])
    parser.add_argument("--times", type=int, default=2, help="runs with other phantoms of each")
    parser.add_argument("--left-out", action="store_true", help="also train without each site, and at each alone")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for mechanism in options.mechanisms:
        for seed in range(1, options.times + 1):
            for marked in (True,) if options.data else (True, False):
                results.append(measure(options, mechanism, marked, seed))
                if not options.json:
                    _say(results[-1])
    holds = bool(options.data) or all(map(as_it_should, results))
    print(json.dumps(results, indent=2) if options.json else f"found what was there, and nothing else: {holds}")
    raise SystemExit(0 if holds else 1)


def _say(found: dict[str, Any]) -> None:
    what = "marked" if found["marked"] else "neither mark nor style"
    print(f"{found['mechanism']}, {what}, seed {found['seed']} ({found['seconds']} s)", flush=True)
    for name in ("federation", "federation on hospital-0", "hospital-0 alone"):
        if name in found:
            told = found[name]
            print(
                f"  {name}: accuracy {_share(told['accuracy'])}, AUC {told['area']['value']:.3f}, {told['records']} films"
            )
            for change in told["changes"]:
                moved, mark = (
                    change["accuracy_change"],
                    "" if change["finding"] == "none" else change["finding"].upper(),
                )
                print(
                    f"    {change['name']:16} {100 * moved['value']:+6.1f} points ({100 * moved['low']:+.1f} to "
                    f"{100 * moved['high']:+.1f})  AUC {change['area']['value']:.3f}  log odds "
                    f"{change['log_odds_change']['value']:+.2f}  p {change['p_holm']:.2g}{_beyond(change)} {mark}"
                )
    for site in found.get("left out", []):
        without = "n/a" if site["without"] is None else _share(site["without"])
        print(
            f"  {site['site']}: run {_share(site['federation'])}, without it {without}, its own {_share(site['own'])}, its own "
            f"elsewhere {_share(site['own_elsewhere'])}"
        )
    probe = found["probe"]
    blind = 100 * max(probe["chance"], probe["by_diagnosis"])
    print(
        f"  probe: {_share(probe['accuracy'])} of sites, without films {blind:.1f} %, told {probe['told']}", flush=True
    )


def _beyond(change: dict[str, Any]) -> str:
    beyond = change["beyond_seams"]
    if beyond is None:
        return ""
    return f"  beyond seams {100 * beyond['value']:+.1f} ({100 * beyond['low']:+.1f} to {100 * beyond['high']:+.1f})"


def _share(of: dict[str, float]) -> str:
    found = Estimate(**of)
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


if __name__ == "__main__":
    main()
