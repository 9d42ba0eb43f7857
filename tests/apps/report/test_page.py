"""The report: one self-contained file from whatever a run directory holds. All numbers here are made up by hand."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mpc_fl.apps.report import figures
from mpc_fl.apps.report.page import write_report
from mpc_fl.config.config import parse_config
from mpc_fl.errors import DataError, MpcFlError
from mpc_fl.federation.group_evaluation import GroupsOpened, plan_groups
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.federation.own_model import OWN_MODEL_FILE, OwnComparison
from mpc_fl.learning.models.evaluation import Evaluation, evaluate_locally

HOSTILE = "<script>alert('x')</script>\" onload=\"y $\\frac{ & _"
BANNER = "SYNTHETIC DATA: phantoms, not patients"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def evaluation(quality: float, classes: int) -> Evaluation:
    generator = torch.Generator().manual_seed(int(quality * 100))
    labels = torch.arange(classes * 40) % classes
    logits = torch.randn(len(labels), classes, generator=generator)
    logits[torch.arange(len(labels)), labels] += 3 * quality
    return evaluate_locally(torch.softmax(logits, dim=1), labels)


def write_traffic(run: Path, party: str, peers: list[str], phases: list[str]) -> None:
    def entry(number: int) -> dict[str, Any]:
        count = {"bytes_sent": 400_000 * number, "bytes_received": 300_000, "messages_sent": 7}
        return {**count, "messages_received": 7, "waits": 3, "seconds_waited": 0.25}

    spent = {"processor_seconds": 0.5, "gpu_seconds": None, "joules": 6.0}
    values = {
        p: {"seconds": 1.5 * n, **spent, "peers": {peer: entry(n) for peer in peers}} for n, p in enumerate(phases, 1)
    }
    rates = {"watts_per_core": 12.0, "watts_per_gpu": 200.0, "grid_intensity": 475.0}
    energy = {"measured": False, "processors_measured": False, **rates, "grams_co2": 0.25}
    write(run / "parties" / party / "traffic.json", {"phases": values, "energy": energy})
    write(run / "logs" / f"{party}.log", "started\n")


def opening(number: int, what: str, why: str, shape: list[int], to: str, among: list[str]) -> dict[str, Any]:
    values = {"number": number, "time": 1.0, "party": to, "what": what, "why": why}
    return {**values, "shape": shape, "to": [to], "among": among}


def training_run(
    directory: Path, classes: tuple[str, ...] = ("normal", "bacterial", "viral"), hospitals: int = 3, rounds: int = 4,
    synthetic: bool = True, private: bool = True,
) -> Path:  # fmt: skip
    """A run directory as `mpc-fl train` leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"hospital-{rank}" for rank in range(hospitals)]
    everyone = [*names, "aggregator"]
    config = parse_config({"data": {"classes": list(classes)}}, "test")
    write(directory / "config.yaml", config.to_yaml())
    states = [evaluation(k / rounds, len(classes)).to_json() for k in range(rounds + 1)]
    lines = [{"round": k, "evaluation": state, "seconds": 2.0 * k} for k, state in enumerate(states)]
    write_lines(directory / "metrics.jsonl", lines)
    openings = []
    for k in range(rounds + 1):
        if k:
            openings.append(
                opening(3 * k, "a sum over parties", f"round {k}: mean update", [1000], "aggregator", everyone)
            )
            why = f"round {k}: mean update (divisor)"
            openings.append(opening(3 * k + 1, "a sum over parties", why, [1], "aggregator", everyone))
        why = f"round {k}: evaluation counts"
        openings.append(opening(3 * k + 2, "a sum over parties", why, [309], "aggregator", everyone))
    write_lines(directory / "openings.jsonl", openings)
    privacy = []
    for rank, name in enumerate(names):
        metrics = [
            {
                "round": k,
                "loss": 1.1 - 0.15 * k + 0.05 * rank,
                "epsilon": 1.1 + 1.5 * k + 0.2 * rank if private else None,
                "clipped_fraction": 0.4 if private else None,
                "steps": 10,
                "own_accuracy": 0.3 + 0.12 * k - 0.03 * rank,
                "seconds": {"train": 2.0, "aggregate": 0.5, "evaluate": 0.25},
            }
            for k in range(1, rounds + 1)
        ]
        write_lines(directory / "parties" / name / "metrics.jsonl", metrics)
        entry = {"hospital": name, "epsilon": metrics[-1]["epsilon"], "delta": 1e-4, "target_epsilon": 8.0}
        noise = 1.1 if private else None
        privacy.append({**entry, "noise_multiplier": noise, "mechanism": "local" if private else "none"})
    work = [f"round {k} {part}" for k in range(1, rounds + 1) for part in ("training", "aggregation", "evaluation")]
    for name in everyone:
        parts = [phase for phase in work if name != "aggregator" or not phase.endswith("training")]
        write_traffic(directory, name, [peer for peer in everyone if peer != name], ["connect", "distribution", *parts])
    summary = {"kind": "train", "name": "fake", "synthetic": synthetic, "rounds": rounds, "parameters": 1234}
    summary |= {"hospitals": names, "seconds": 61.5, "command": "mpc-fl train --config <c.yaml>", "privacy": privacy}
    write(directory / "summary.json", {**summary, "versions": {"torch": "2.13.0"}, "final": states[-1]})
    return directory


def inference_run(
    directory: Path, images: int = 3, name: str = "scan-{}.png", reference: bool = True, channels: int = 1,
    classes: tuple[str, ...] = ("normal", "bacterial", "viral"), synthetic: bool = True,
) -> Path:  # fmt: skip
    """A run directory as `mpc-fl infer` leaves it."""
    hospital = directory / "parties" / "hospital-0"
    hospital.mkdir(parents=True)
    settings = parse_config({}, "test").model_dump(mode="json")
    settings["data"]["classes"] = list(classes)  # of a run that others made: with names that no configuration may have
    write(directory / "config.yaml", yaml.safe_dump(settings))
    logits = torch.randn(images, len(classes), generator=torch.Generator().manual_seed(5)) * 2
    chances = torch.softmax(logits, dim=1).tolist()
    results = [
        {
            "index": i,
            "name": name.format(i),
            "label": i % len(classes) if i else -1,
            "predicted": int(logits[i].argmax()),
            "probabilities": chances[i],
            "logits": logits[i].tolist(),
            "seconds": 3.25,
        }
        for i in range(images)
    ]
    write_lines(hospital / "results.jsonl", results)
    ramp = torch.arange(channels * 32 * 32).reshape(1, channels, 32, 32) % 251
    save_file({"images": ramp.repeat(images, 1, 1, 1).to(torch.uint8)}, hospital / "images.safetensors")
    among = ["hospital-0", "model-owner"]
    why = "diagnosis for the hospital that asked"
    lines = [opening(i + 1, "logits", why, [1, len(classes)], "hospital-0", among) for i in range(images)]
    write_lines(hospital / "openings.jsonl", lines)
    write_traffic(directory, "hospital-0", among[1:], ["connect", "sharing weights", "image 1", "image 2"])
    write_traffic(directory, "model-owner", among[:1], ["connect", "sharing weights", "batch 1", "batch 2"])
    write_traffic(directory, "dealer", among, ["connect", "correlated randomness"])
    comparison = None
    if reference:
        comparison = {"largest_logit_difference": 0.0125, "classes_agree": True, "plaintext_seconds_per_image": 0.002}
        write(directory / "plaintext_reference.json", {"logits": (logits + 0.0125).tolist(), "seconds": 0.002})
    summary = {"kind": "infer", "name": "fake", "synthetic": synthetic, "images": images, "seconds": 12.0}
    summary |= {"seconds_per_image": 3.25, "classes": list(classes), "command": "mpc-fl infer", "versions": {}}
    write(directory / "summary.json", {**summary, "comparison": comparison, "results": results})
    return directory


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def assert_self_contained(text: str) -> None:
    assert "http://" not in text and "https://" not in text
    assert all(source.startswith("data:image/") for source in re.findall(r"""src\s*=\s*["']?([^"'>\s]*)""", text))
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b|@import|url\(", text, re.IGNORECASE)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert "default-src 'none'" in text


TRAINING = ["Result", "Training curves", "Results by class", "Privacy"]
INFERENCE = ["Result", "Each image", "All images"]
BOTH = ["What was opened", "Time, bytes and energy", "Configuration"]


def test_training_report_has_every_section_and_stands_alone(tmp_path: Path) -> None:
    text = page(training_run(tmp_path / "run"))
    assert_self_contained(text)
    assert headings(text) == TRAINING + BOTH
    assert [f"#s{i}" for i in range(7)] == re.findall(r'href="([^"]*)"', text)
    assert "Not shown" not in text
    pictures = re.findall(r'<img class="plot" src="data:image/svg\+xml;base64,[^"]+" alt="([^"]+)">', text)
    assert len(pictures) == text.count("<img") == text.count("<figcaption>") == 7
    assert BANNER in text
    assert "at a real site each hospital sees only its own line" in " ".join(text.split())
    assert "only values that left the secret domain" in text


def test_training_report_states_the_numbers_on_file(tmp_path: Path) -> None:
    text = page(training_run(tmp_path / "run"))
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert f"95 % interval {100 * final['accuracy_low']:.1f} % to {100 * final['accuracy_high']:.1f} %" in text
    assert "<dt>Baseline</dt><dd>33.3 %<small>accuracy of always naming the largest class" in text
    assert "<dd>7.5<small>per patient, at delta = 0.0001" in text  # 1.1 + 1.5 * 4 + 0.2 * 2 at hospital-2
    assert "All 13 openings" in text
    assert "<td>each round: evaluation counts</td><td>aggregator</td>" in text
    assert '<td class="n">309</td><td class="n">5</td><td class="n">1,545</td>' in text
    assert "<td>estimated</td>" in text and '<td class="n">none</td>' in text and '<td class="n">0.25 g</td>' in text
    # Three peers; training is phase 3, 6, 9 and 12 of the traffic of a hospital.
    assert "<td>hospital-0</td><td>training</td>" in text and '<td class="n">45.00</td><td class="n">3.00</td>' in text
    assert "mpc-fl train --config &lt;c.yaml&gt;" in text and "torch 2.13.0" in text


@pytest.mark.parametrize("reference", [True, False])
def test_inference_report_has_every_section_and_stands_alone(tmp_path: Path, reference: bool) -> None:
    path = write_report(inference_run(tmp_path / "run", reference=reference))
    text = path.read_text(encoding="utf-8")
    assert_self_contained(text)
    assert headings(text) == INFERENCE + BOTH
    assert "Not shown" not in text
    assert "Not a medical device; for research" in text
    assert text.count('class="scan"') == text.count('<figure class="card">') == 3
    assert ("largest logit difference to plaintext 0.0125" in text) == reference
    assert ("; plaintext: normal" in text) == reference
    assert "scan-0.png: predicted viral, true class unknown" in text or "true class unknown" in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_at_most_24_images_are_drawn_and_all_are_listed(tmp_path: Path) -> None:
    text = page(inference_run(tmp_path / "run", images=26, channels=3, classes=("a", "b")))
    assert text.count('class="scan"') == 24 and "24 of 26 images" in text
    assert "<td>scan-25.png</td>" in text


@pytest.mark.usefixtures("undrawn")
def test_banner_only_for_synthetic_data(tmp_path: Path) -> None:
    assert BANNER not in page(training_run(tmp_path / "train", synthetic=False))
    assert BANNER not in page(inference_run(tmp_path / "infer", synthetic=False, images=1))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    classes = (HOSTILE, "日本 \ud800", "\x00\n_hidden")
    run = training_run(tmp_path / "train", rounds=1)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"classes": [HOSTILE, "$x^$", "_hidden"]}}))
    (run / "parties" / "hospital-0").rename(run / "parties" / "hospital-<b>&")
    (run / "logs" / "<i>.log").write_text("")
    pages = [page(run), page(inference_run(tmp_path / "infer", name="{}" + HOSTILE.replace("{", ""), classes=classes))]
    for text in pages:
        assert_self_contained(text)
        assert "Not shown" not in text
        assert "&lt;script&gt;" in text
        assert '" onload' not in text
        for picture in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
            assert b"<script" not in base64.b64decode(picture)
    assert "hospital-&lt;b&gt;&amp;" in pages[0] and "&lt;i&gt;.log" in pages[0]


def test_parties_are_called_what_their_sites_chose_in_text_and_figures(tmp_path: Path) -> None:
    """But in the configuration; and only by what can be a name: the summary is not trusted."""
    run = training_run(tmp_path / "train", rounds=2)
    summary = json.loads((run / "summary.json").read_text())
    said = {"hospital-0": "charite", "hospital-1": HOSTILE, "aggregator": "rki"}
    (run / "summary.json").write_text(json.dumps({**summary, "names": said}))
    (run / "config.yaml").write_text(yaml.safe_dump({"federation": {"names": {"hospital-0": "charite"}}}))
    text = page(run)
    assert_self_contained(text)
    assert (
        "<td>charite (hospital-0)</td>" in text and "<td>hospital-1</td>" in text and "<td>hospital-0</td>" not in text
    )
    assert "<td>rki (aggregator)</td>" in text and "rki (aggregator))" not in text
    assert "hospital-0: charite" in text and "<script>" not in text
    drawn = [base64.b64decode(picture) for picture in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    assert sum(b"charite" in picture for picture in drawn) >= 3 and not any(
        b"hospital-0" in picture for picture in drawn
    )


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out but not drawn, which takes most of the time of a report."""
    monkeypatch.setattr(figures, "svg_uri", lambda _: "data:image/svg+xml;base64,")


TRAINING_FILES = [
    "config.yaml",
    "metrics.jsonl",
    "openings.jsonl",
    "parties",
    "logs",
    "parties/hospital-1/metrics.jsonl",
]
INFERENCE_FILES = [
    "config.yaml",
    "plaintext_reference.json",
    "parties/dealer/traffic.json",
    "parties/hospital-0/results.jsonl",
    "parties/hospital-0/openings.jsonl",
    "parties/hospital-0/images.safetensors",
]


@pytest.mark.parametrize("name", TRAINING_FILES)
@pytest.mark.usefixtures("undrawn")
def test_training_report_without_one_file(tmp_path: Path, name: str) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    os.rename(run / name, tmp_path / "away")
    text = page(run)
    assert headings(text) == TRAINING + BOTH
    assert ("Not shown" in text) == (name != "logs")


@pytest.mark.parametrize("name", INFERENCE_FILES)
@pytest.mark.parametrize("content", [None, b"\xff\xfe{[", b'"text"\n'])
@pytest.mark.usefixtures("undrawn")
def test_inference_report_without_one_file_or_with_a_broken_one(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    run = inference_run(tmp_path / "run", images=1)
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    text = page(run)
    assert headings(text) == INFERENCE + BOTH
    assert name != "plaintext_reference.json" or content or text.count('class="scan"') == text.count("Not shown") == 1
    assert "Not shown" in text or (name, content) == ("config.yaml", b'"text"\n')


def test_only_a_summary_is_enough(tmp_path: Path) -> None:
    for kind, sections in (("train", TRAINING), ("infer", INFERENCE)):
        write(tmp_path / kind / "summary.json", {"kind": kind})
        text = page(tmp_path / kind)
        assert headings(text) == sections + BOTH
        assert text.count("Not shown") >= len(sections)


@pytest.mark.usefixtures("undrawn")
def test_it_is_said_which_round_was_chosen_by_what_and_how_it_was_calibrated(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    noised = {**summary["final"], "noise": 6.9, "records": 121, "accuracy": 0.8125, "balanced_accuracy": 0.75}
    summary |= {"validation": noised, "evaluated_round": 5, "chosen": {"round": 2, "figures": {"1": 0.5, "2": 0.8125}}}
    summary |= {"calibration": {"temperature": 2.0, "offsets": [0.0, -0.5, 0.0]}}
    write(run / "summary.json", summary)
    page = write_report(run).read_text()
    assert "Chosen round" in page and "of 2 validated ones, of 4" in page and "121 counted" in page
    assert "81.2" in page and "noise of 6.9 patients" in page
    assert "temperature of 2" in page and "-0.5" in page
    assert "no evaluation was opened after the last one" not in page
    summary |= {"chosen": None, "calibration": None}
    write(run / "summary.json", summary)
    assert "nothing of this run was chosen by them" in write_report(run).read_text()


def test_run_without_differential_privacy_says_so(tmp_path: Path) -> None:
    text = page(training_run(tmp_path / "run", private=False, rounds=1))
    assert "No differential privacy" in text and "<dd>none<small>no differential privacy" in text


@pytest.mark.usefixtures("undrawn")
def test_fixed_sampling_seed_is_warned_about(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", rounds=1)
    assert "sampling order came from a fixed seed" not in page(run)
    write(run / "config.yaml", parse_config({"training": {"sampling_seed": 3}}, "test").to_yaml())
    assert "sampling order came from a fixed seed" in page(run)


def test_many_hospitals_and_classes_still_draw(tmp_path: Path) -> None:
    classes = tuple(f"finding number {index}" for index in range(21))
    text = page(training_run(tmp_path / "run", classes=classes, hospitals=10, rounds=2))
    assert "too many classes" in text and text.count("Not shown") == 1
    assert text.index("<td>hospital-2</td>") < text.index("<td>hospital-9</td>")


@pytest.mark.parametrize("content", [None, "", "[]", '"train"', '{"kind": "x"}', '{"kind": []}', "{"])
def test_what_is_not_a_run_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match="is not a finished run") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.fix
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_nothing_half_written_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = inference_run(tmp_path / "run", images=1)
    write(run / "report.html", "the old one")
    before = sorted(run.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MpcFlError, match="No space left"):
        write_report(run)
    assert sorted(run.iterdir()) == before
    assert (run / "report.html").read_text() == "the old one"


def test_same_files_give_the_same_report(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    assert page(run) == page(run)


def test_area_under_curve_by_hand() -> None:
    # Scores in 4 bins. Pairs (own, other): own bins 3, 3, 1; others 0, 1, 2: wins 3 + 3 + 1, one tie, of 9.
    assert figures.area_under_curve([1, 1, 1, 0], [0, 1, 0, 2]) == pytest.approx(7.5 / 9)
    assert figures.area_under_curve([2, 0], [0, 5]) == 1.0
    assert figures.area_under_curve([0, 5], [2, 0]) == 0.0
    assert figures.area_under_curve([3, 0], [4, 0]) == 0.5
    assert figures.area_under_curve([0, 0], [1, 2]) is None
    assert figures.area_under_curve([1, 2], [0, 0]) is None


def test_roc_points_by_hand() -> None:
    assert figures.roc_points([1, 1, 0, 0], [0, 1, 0, 1]) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])


def test_area_agrees_with_all_pairs_within_its_stated_bound() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 2
    logits = torch.randn(400, 2, generator=generator) + torch.nn.functional.one_hot(labels)
    chances = torch.softmax(logits, dim=1)
    negative, positive = evaluate_locally(chances, labels).scores[1].tolist()
    ties = sum(a * b for a, b in zip(negative, positive, strict=True)) / (200 * 200)
    own, other = chances[labels == 1, 1], chances[labels == 0, 1]
    exact = float((own[:, None] > other[None, :]).double().mean())
    area = figures.area_under_curve(negative, positive)
    assert area is not None and 0.7 < exact < 0.95 and abs(area - exact) <= ties / 2 + 1e-12


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_summary_costs_the_sections_that_need_it_and_says_what_is_wrong(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    summary = json.loads((run / "summary.json").read_text())
    write(run / "summary.json", {**summary, "rounds": "one"})
    text = page(run)
    assert headings(text) == TRAINING + BOTH
    assert "Not shown: summary.json: &#x27;rounds&#x27; is not a whole number" in text
    assert "All 4 openings" in text


def groups_of(
    noise: float | None, attribute: str = "sex", names: tuple[str, str] = ("female", "male")
) -> dict[str, Any]:
    """What metrics and summary say of two groups, of which the first fares worse."""
    config = parse_config(
        {"evaluation": {"groups": {"sex": ["female", "male"]}, "noise_multiplier": noise}, "data": {"image_size": 8}},
        "test",
    )
    plan = plan_groups(config)
    assert plan is not None
    of = [evaluation(0.2, 3), evaluation(0.9, 3)]
    counts: list[Any] = of if noise is None else [NoisedEvaluation(each.confusion.double(), 1.0) for each in of]
    found = GroupsOpened(plan, plan.cells[:2], tuple(counts)).to_json()
    for number, shown in enumerate(found["shown"]):
        shown |= {"attribute": attribute, "group": names[number]}
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("noise", [None, 4.0])
def test_groups_have_a_section_with_a_picture_gaps_and_what_is_withheld(tmp_path: Path, noise: float | None) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    summary = json.loads((run / "summary.json").read_text())
    write(run / "summary.json", {**summary, "groups": groups_of(noise)})
    page = write_report(run).read_text()
    assert "Groups of patients" in page and "Sensitivity by group" in page and "Withheld: sex: unknown" in page
    assert "Gaps that are more than chance" in page and ("Fisher" in page) == (noise is None)
    assert ("not opened" in page) == (noise is not None)


def test_names_of_groups_are_not_trusted(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    summary = json.loads((run / "summary.json").read_text())
    found = groups_of(None, HOSTILE, (HOSTILE, "b" * 300))
    write(run / "summary.json", {**summary, "groups": {**found, "withheld": {HOSTILE: [HOSTILE]}}})
    page = write_report(run).read_text()
    assert "<script>" not in page and "Groups of patients" in page
    write(run / "summary.json", {**summary, "groups": {"fewest": 20, "withheld": {"sex": ["female"]}}})
    assert "none is shown" in write_report(run).read_text()


@pytest.mark.usefixtures("undrawn")
def test_own_models_stand_where_hospitals_have_trained_alone(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", rounds=1, hospitals=2)
    page = write_report(run).read_text()
    assert "Own models" not in page and "Groups of patients" not in page
    found = OwnComparison(evaluation(0.9, 3), evaluation(0.4, 3), 31, 5).to_json()
    write(run / "parties" / "hospital-1" / OWN_MODEL_FILE, found)
    page = write_report(run).read_text()
    assert "Own models" in page and "31 / 5" in page and "McNemar" in page
    write(run / "parties" / "hospital-1" / OWN_MODEL_FILE, {**found, "alone": HOSTILE})
    page = write_report(run).read_text()
    assert "own_model.json: &#x27;alone&#x27; is not a JSON object" in page and "<script>" not in page
