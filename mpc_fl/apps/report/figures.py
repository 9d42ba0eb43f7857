"""Figures of a run's report as images in the page: numbers in, no files and no global state.

Colours are those of Okabe and Ito (2008), which stay apart for colour-blind readers; lines also differ in dash and
marker. Text never goes through matplotlib's formula parser, because names of classes and hospitals are not trusted.
Backgrounds are transparent, so that the page decides about light and dark.
"""

from __future__ import annotations

import base64
import io
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from mpc_fl.apps.formats import UNITS
from mpc_fl.apps.scores import Scores
from mpc_fl.learning.models.evaluation import area_under_curve, roc_points

_MOST_LINES, _MOST_CLASSES, _MOST_CELLS, _MOST_BARS, _THUMBNAIL = 8, 8, 20, 8, 320

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B5B95", "#7F7F7F")
_INK, _FAINT = "black", "#c9ced6"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mpc-fl",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": "#c9ced6",
    "legend.frameon": False,
}
_styled = matplotlib.rc_context(_STYLE)


def svg_uri(figure: Figure) -> str:
    """The figure as a `data:` address of an SVG; equal figures give equal addresses."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's own fonts draw the text; a glyph that is missing here only makes the layout less exact.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png_uri(pixels: np.ndarray) -> str:
    """A uint8 image (channels, height, width) as a `data:` address of a PNG, made smaller when it is large."""
    picture = pixels.transpose(1, 2, 0)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shorten(name: str, length: int = 22) -> str:
    """A printable name on one line, cut with an ellipsis so that it cannot cover other parts of a figure."""
    clean = "".join(character if character.isprintable() else " " for character in name)
    clean = f" {clean}" if clean.startswith("_") else clean  # matplotlib leaves names with "_" out of legends
    return clean if len(clean) <= length else clean[: length - 1] + "…"


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _rounds(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _from_zero(axes: Any) -> None:
    axes.axhline(0, alpha=0)  # so that the margin at the top is a share of the whole height
    axes.set_ylim(bottom=0)


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _lines(axes: Any, rounds: Mapping[str, Sequence[int]], values: Mapping[str, Sequence[float]]) -> None:
    """One line per name; with many names all in grey, and their median."""
    many = len(values) > _MOST_LINES
    for index, (name, series) in enumerate(values.items()):
        style: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "linestyle": _DASHES[index % len(_DASHES)]}
        style |= {"marker": _MARKERS[index % len(_MARKERS)], "markerfacecolor": "none"}
        style["markersize"] = 9 - 1.5 * (index % 4)  # equal values stay visible inside each other
        if many:
            style = {"color": "#8d949d", "linewidth": 0.8}
        label = shorten(name) if not many else ("each hospital" if index == 0 else None)
        axes.plot(rounds[name], series, label=label, **style)
    if many:
        gathered: dict[int, list[float]] = {}
        for name, series in values.items():
            for step, value in zip(rounds[name], series, strict=True):
                if value == value:
                    gathered.setdefault(step, []).append(value)
        steps = sorted(gathered)
        middle = [statistics.median(gathered[step]) for step in steps]
        axes.plot(steps, middle, color=PALETTE[0], marker="o", label="median")


def _legend_below(figure: Figure, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


@_styled
def global_curve(rounds: Sequence[int], scores: Sequence[Scores], baseline: float) -> Figure:
    """Accuracy of the global model after each round with its interval, balanced accuracy, and the baseline."""
    low, high = [score.accuracy_low for score in scores], [score.accuracy_high for score in scores]
    accuracy, balanced = [score.accuracy for score in scores], [score.balanced_accuracy for score in scores]
    figure, (axes,) = _new(7.2, 3.3)
    axes.fill_between(rounds, low, high, color=PALETTE[0], alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(rounds, accuracy, color=PALETTE[0], marker="o", markersize=4, linewidth=2.2, label="accuracy")
    style = {"marker": "s", "markersize": 8, "markerfacecolor": "none", "linestyle": _DASHES[1], "linewidth": 1.2}
    axes.plot(rounds, balanced, color=PALETTE[1], label="balanced accuracy", **style)
    axes.axhline(baseline, color=_INK, linewidth=1, linestyle=_DASHES[2], label="baseline")
    axes.set_ylim(0, 1.02)
    _percent(axes.yaxis)
    _rounds(axes, "Global model, all hospitals' test records")
    _legend_below(figure, axes, 4)
    return figure


@_styled
def hospital_curves(
    rounds: Mapping[str, Sequence[int]], loss: Mapping[str, Sequence[float]], accuracy: Mapping[str, Sequence[float]]
) -> Figure:
    """Per hospital: training loss, and accuracy of the global model on its own test records."""
    figure, (left, right) = _new(7.2, 3.4, 2)
    _lines(left, rounds, loss)
    _from_zero(left)
    _rounds(left, "Training loss")
    _lines(right, rounds, accuracy)
    right.set_ylim(0, 1.02)
    _percent(right.yaxis)
    _rounds(right, "Accuracy on own test records")
    _legend_below(figure, left, 4)
    return figure


@_styled
def epsilon_curves(
    rounds: Mapping[str, Sequence[int]], epsilon: Mapping[str, Sequence[float]], targets: Sequence[float]
) -> Figure:
    """Privacy loss spent at each hospital after each round, below the target."""
    figure, (axes,) = _new(7.2, 3.2)
    _lines(axes, rounds, epsilon)
    for target in sorted(set(targets)):
        axes.axhline(target, color=_INK, linewidth=1.2, linestyle=_DASHES[1], label=f"target ε = {target:g}")
    _from_zero(axes)
    axes.set_ylabel("ε spent")
    _rounds(axes, "Privacy loss of each hospital's patients")
    _legend_below(figure, axes, 4)
    return figure


@_styled
def privacy_bounds(
    upper: Sequence[float], lower: Sequence[tuple[int, float]], of_final_model: tuple[int, float]
) -> Figure:
    """The accountant's epsilon after each round, where there is any, and lower bounds by round: all releases, the final model."""
    figure, (axes,) = _new(7.2, 3.2)
    if upper:
        rounds = range(1, len(upper) + 1)
        axes.plot(rounds, upper, color=PALETTE[0], marker="o", markersize=4, label="at most, by the accountant")
    style = {"linestyle": "none", "markersize": 9}
    axes.plot(*zip(*lower, strict=True), color=PALETTE[1], marker="^", label="at least, by all releases", **style)
    axes.plot(*of_final_model, color=PALETTE[2], marker="D", label="at least, by the final model", **style)
    _from_zero(axes)
    axes.set_ylabel("ε")
    _rounds(axes, "What patients may lose, and what was shown that they lose")
    _legend_below(figure, axes, 3)
    return figure


@_styled
def accuracy_changes(
    names: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], title: str
) -> Figure:
    """How much accuracy each named change costs: value and interval (low, high), one mark of each series in every row."""
    figure, (axes,) = _new(7.2, 1.3 + (0.2 + 0.16 * len(series)) * len(names))
    for index, (name, values) in enumerate(series.items()):
        rows = [row + 0.2 * (index - (len(series) - 1) / 2) for row in range(len(names))]
        middle, low, high = np.array(values).T
        reach = np.maximum([middle - low, high - middle], 0)
        style = {"color": PALETTE[index % len(PALETTE)], "fmt": _MARKERS[index % len(_MARKERS)], "capsize": 2}
        axes.errorbar(middle, rows, xerr=reach, label=shorten(name, 40), markersize=5, **style)
    axes.axvline(0, color=_INK, linewidth=1, linestyle=_DASHES[2])
    axes.set_yticks(range(len(names)), list(names))
    axes.set(title=title, xlabel="change of accuracy")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    _percent(axes.xaxis)
    _legend_below(figure, axes, 2)
    return figure


@_styled
def accuracy_by_epsilon(
    epsilons: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float] | None]], title: str
) -> Figure:
    """At each epsilon, by its name, accuracy and interval (value, low, high) of each way of training; None: it was not tried."""
    figure, (axes,) = _new(7.2, 3.6)
    for index, (name, values) in enumerate(series.items()):
        there = [(place, value) for place, value in enumerate(values) if value is not None]
        if not there:
            continue
        places = [place + 0.12 * (index - (len(series) - 1) / 2) for place, _ in there]
        middle, low, high = np.array([value for _, value in there]).T
        style = {"color": PALETTE[index % len(PALETTE)], "linestyle": _DASHES[index % len(_DASHES)], "capsize": 2}
        style |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "label": shorten(name, 40)}
        axes.errorbar(places, middle, yerr=np.maximum([middle - low, high - middle], 0), **style)
    axes.set_xticks(range(len(epsilons)), list(epsilons))
    axes.set(title=title, xlabel="ε")
    _percent(axes.yaxis)
    _legend_below(figure, axes, 3)
    return figure


@_styled
def membership_curve(curve: Sequence[tuple[float, float]]) -> Figure:
    """Members recognised against mistakes, on scales of powers of ten; points at zero are left out."""
    shown = [(false, true) for false, true in curve if false > 0 and true > 0]
    figure, (axes,) = _new(4.6, 3.7)
    axes.plot([1e-4, 1], [1e-4, 1], color=_INK, linewidth=1, linestyle=_DASHES[2], label="chance")
    axes.plot(*zip(*shown, strict=True), color=PALETTE[0], label="attack") if shown else None
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1.2), aspect="equal")
    axes.set(xlabel="False positive rate", ylabel="True positive rate", title="Membership")
    _legend_below(figure, axes, 2)
    return figure


@_styled
def extraction_curves(curves: Mapping[str, Sequence[tuple[int, float]]], least: float) -> Figure:
    """By what a student was told: agreement with the model against queries, a scale of powers of ten, with the least line."""
    figure, (axes,) = _new(4.6, 3.4)
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), color=PALETTE[index], marker=_MARKERS[index], label=shorten(name))
    axes.axhline(least, color=_INK, linewidth=1, linestyle=_DASHES[2], label="always one class")
    axes.set(xscale="log", xlabel="Queries", ylabel="Agreement", title="Extraction", ylim=(None, 1.0))
    _percent(axes.yaxis)
    _legend_below(figure, axes, 3)
    return figure


@_styled
def roc_curves(names: Sequence[str], scores: Sequence[Sequence[Sequence[int]]]) -> Figure:
    """One curve per class (one versus rest) from histograms (classes, 2, bins); the first eight classes."""
    figure, (axes,) = _new(7.2, 3.7)
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=_DASHES[2], label="chance")
    for index, (name, (negative, positive)) in enumerate(zip(names, scores, strict=True)):
        area = area_under_curve(negative, positive)
        if area is None or index >= _MOST_CLASSES:
            continue
        style = {"color": PALETTE[index % len(PALETTE)], "linestyle": _DASHES[index % len(_DASHES)]}
        axes.plot(*roc_points(negative, positive), label=f"{shorten(name)}: AUC {area:.3f}", **style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="False positive rate", ylabel="True positive rate", title="One class versus the rest")
    axes.set_anchor("E")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", handlelength=3)
    return figure


@_styled
def reliability_diagram(bins: Sequence[tuple[int, float | None, float | None]]) -> Figure:
    """Share that is right against mean confidence (records, confidence, share right per bin), and records per bin below."""
    figure = Figure(figsize=(4.6, 4.7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(bins)
    centres = [(index + 0.5) * width for index in range(len(bins))]
    upper.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=_DASHES[2], label="perfect calibration")
    shares = [0.0 if right is None else right for _, _, right in bins]
    upper.bar(centres, shares, 0.94 * width, color=PALETTE[0], alpha=0.35, label="share right")
    points = [(mean, right) for _, mean, right in bins if mean is not None and right is not None]
    style = {"color": PALETTE[1], "linestyle": "none", "marker": "D", "markerfacecolor": "none", "markeredgewidth": 1.6}
    upper.plot([x for x, _ in points], [y for _, y in points], label="at mean confidence", **style)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="Share right", title="Calibration")
    _percent(upper.yaxis)
    lower.bar(centres, [count for count, _, _ in bins], 0.94 * width, color=PALETTE[7])
    lower.set(xlabel="Probability of the predicted class", ylabel="Records")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _from_zero(lower)
    _percent(lower.xaxis)
    _legend_below(figure, upper, 2)
    return figure


@_styled
def group_shares(
    classes: Sequence[str], groups: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]]
) -> Figure:
    """A panel per class: for each group (its name, and a share with its interval per class) a mark on a line from low to high."""
    figure, panels = _new(7.2, 1.2 + 0.27 * len(groups), len(classes))
    for index, (name, axes) in enumerate(zip(classes, panels, strict=True)):
        for row, (_, spans) in enumerate(groups):
            span = spans[index]
            if span is not None:
                axes.plot(span[1:], (row, row), color=PALETTE[index], linewidth=1.6)
                axes.plot(span[0], row, color=PALETTE[index], marker=_MARKERS[index], markersize=5)
        axes.set(xlim=(0, 1), ylim=(len(groups) - 0.5, -0.5), title=shorten(name, 16))
        axes.set_yticks(
            range(len(groups)), [shorten(name, 30) for name, _ in groups] if not index else [""] * len(groups)
        )
        _percent(axes.xaxis)
    figure.supxlabel("Sensitivity", fontsize=9.5)
    return figure


@_styled
def confusion_matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure | None:
    """Counts and row percentages, rows are true classes; `None` when there are too many classes to read."""
    classes = len(names)
    if classes > _MOST_CELLS:
        return None
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = 2.2 + 0.75 * max(classes, 3)
    figure, (axes,) = _new(min(7.2, side), min(7.2, side - 0.5))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9.5 if classes <= 7 else 6
    for row in range(classes):
        for column in range(classes):
            label = f"{counts[row][column]}\n{100 * shares[row][column]:.0f} %"
            colour = "white" if shares[row][column] > 0.55 else _INK
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=size)
    short = [shorten(name, 16) for name in names]
    turned = sum(map(len, short)) > 7 * classes or classes > 7
    axes.set_xticks(range(classes), short, rotation=40 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks(range(classes), short)
    axes.set(xlabel="Predicted class", ylabel="True class", title="Confusion matrix")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


@_styled
def phase_bars(seconds: Mapping[str, Mapping[str, float]], sent: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars per party: seconds and bytes sent, by phase (party name -> phase -> value)."""
    parties = list(seconds)
    longest = sorted(seconds.values(), key=len, reverse=True)  # their order is the order of work
    phases = list(dict.fromkeys(phase for values in longest for phase in values))
    largest = max((sum(values.values()) for values in sent.values()), default=0.0)
    factor, unit = next(((f, u) for f, u in UNITS if largest >= f), (1.0, "bytes"))
    figure, (left, right) = _new(7.2, 1.5 + 0.34 * len(parties), 2)
    for axes, values, scale in ((left, seconds, 1.0), (right, sent, factor)):
        reached = [0.0] * len(parties)
        for index, phase in enumerate(phases):
            widths = [values[party].get(phase, 0.0) / scale for party in parties]
            style = {"color": PALETTE[index % len(PALETTE)], "hatch": "" if index < len(PALETTE) else "///"}
            axes.barh(range(len(parties)), widths, 0.62, reached, label=shorten(phase), **style)
            reached = [start + width for start, width in zip(reached, widths, strict=True)]
        axes.set_yticks(range(len(parties)), [shorten(party) for party in parties])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    left.set(title="Time", xlabel="seconds")
    right.set(title="Sent", xlabel=unit)
    right.tick_params(labelleft=False, left=False)
    _legend_below(figure, left, 4)
    return figure


@_styled
def probability_bars(names: Sequence[str], encrypted: Sequence[float], plaintext: Sequence[float] | None) -> Figure:
    """Class probabilities of one image, most likely first when there are many classes; plaintext as open diamonds."""
    order = list(range(len(encrypted)))
    if len(order) > _MOST_BARS:
        order = sorted(order, key=lambda index: -encrypted[index])[:_MOST_BARS]
    figure, (axes,) = _new(4.0, (0.75 if plaintext is None else 1.0) + 0.3 * len(order))
    rows = range(len(order))
    axes.barh(rows, [encrypted[index] for index in order], 0.6, color=PALETTE[0], label="encrypted")
    if plaintext is not None:
        style = {"color": PALETTE[1], "markerfacecolor": "none", "markeredgewidth": 1.6}
        values = [plaintext[index] for index in order]
        axes.plot(values, rows, "D", label="plaintext", clip_on=False, **style)
        _legend_below(figure, axes, 2)
    for row, index in enumerate(order):
        label = f"{100 * encrypted[index]:.1f} %"
        # Right of the axes, so that it meets neither bar nor diamond.
        axes.text(1.04, row, label, va="center", ha="left", transform=axes.get_yaxis_transform())
    axes.set_yticks(rows, [shorten(names[index], 18) for index in order])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    _percent(axes.xaxis)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure
