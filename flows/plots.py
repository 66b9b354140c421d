"""The report's charts: SVG to stand inside a page, coloured by the page's own light or dark scheme.

Each function returns a `Chart`: markup without any outside reference, and its content in words for who does not see it.
Levers differ by shape as well as colour, and what the gate rejected is hollow, so that nothing hangs on colour alone.
Matplotlib draws (no display, no pyplot state); its placeholder colours become CSS variables afterwards.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from agents.archive import Lever
from flows import words
from flows.records import HISTOGRAM_BINS, GenerationView, RunView, WeightUpdateView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
WIDTH_IN = 4.9
"""Drawn narrow, so that its lettering stays readable when a phone shows the whole width."""

INK, SOFT, LINE, PAPER, FIRST, HARNESS, WEIGHTS = (f"#00010{i}" for i in range(1, 8))
_VARIABLES: Mapping[str, str] = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    PAPER: "--paper",
    FIRST: "--first",
    HARNESS: "--harness",
    WEIGHTS: "--weights",
}
_LEVER_COLOURS: Mapping[str, str] = {Lever.FIRST: FIRST, Lever.HARNESS: HARNESS, Lever.WEIGHTS: WEIGHTS}
_LEVER_SHAPES: Mapping[str, str] = {Lever.FIRST: "o", Lever.HARNESS: "s", Lever.WEIGHTS: "^"}
_ARM_COLOURS: Mapping[str, str] = {"initial": FIRST, "harness_only": HARNESS, "winner": WEIGHTS}
_ARM_SHAPES: Mapping[str, str] = {"initial": "o", "harness_only": "s", "winner": "^"}

_STYLE: Mapping[str, object] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.facecolor": "none",
}


class Chart(NamedTuple):
    """`svg` to be put into a page as it is; `alt` says in words what it shows."""

    svg: str
    alt: str


def test_chart(view: RunView) -> Chart | None:
    """The arms of the sealed test with their intervals, baselines below them; None before the test is scored."""
    if not view.test:
        return None
    rows = len(view.test) + len(view.baselines)
    with _style():
        figure = _figure(0.75 + 0.36 * rows)
        axes = figure.add_subplot()
        for y, arm in enumerate(view.test):
            colour = _ARM_COLOURS[arm.arm]
            _interval(axes, 100 * arm.mean, y, 100 * arm.low, 100 * arm.high, colour)
            axes.plot(100 * arm.mean, y, _ARM_SHAPES[arm.arm], color=colour, markersize=8)
        for y, baseline in enumerate(view.baselines, len(view.test)):
            fill = SOFT if baseline.comparable else PAPER
            axes.plot(baseline.score, y, "D", color=SOFT, markerfacecolor=fill, markersize=6, clip_on=False)
            _label(axes, words.percent_points(baseline.score), baseline.score, y)
        names = [words.ARM_NAMES[arm.arm] for arm in view.test]
        names += [words.visible(baseline.name, lines=False) for baseline in view.baselines]
        axes.set_yticks(range(rows), names, color=INK, parse_math=False)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _percent_axis(axes, [arm.high for arm in view.test] + [b.score / 100 for b in view.baselines], "x")
        axes.set_xlabel(f"{view.metric} on the sealed test, %")
        described = [f"{words.ARM_NAMES[arm.arm]} {words.score(arm)}" for arm in view.test]
        described += [f"{baseline.name} {words.percent_points(baseline.score)} %" for baseline in view.baselines]
        return _chart(figure, "test", "Score on the sealed test: " + "; ".join(described) + ".")


def generations_chart(view: RunView) -> Chart | None:
    """Dev score by Generation with intervals, marked by lever and verdict; None before one is measured."""
    measured = [g for g in view.generations if g.dev is not None]
    if not measured:
        return None
    with _style():
        figure = _figure(3.2, width=max(WIDTH_IN, 0.32 * len(view.generations)))
        axes = figure.add_subplot()
        kept = [g for g in measured if g.accepted]
        axes.step(
            [g.number for g in kept] + [view.generations[-1].number],
            [100 * _dev(g) for g in [*kept, *kept[-1:]]] if kept else [float("nan")],
            where="post",
            color=LINE,
            linewidth=2,
            zorder=1,
        )
        for generation in measured:
            dev = generation.dev
            assert dev is not None, "filtered above"
            colour = _LEVER_COLOURS.get(generation.lever, FIRST)
            axes.vlines(generation.number, 100 * dev.low, 100 * dev.high, color=colour, linewidth=1.6)
            axes.plot(
                generation.number,
                100 * dev.mean,
                _LEVER_SHAPES.get(generation.lever, "o"),
                color=colour,
                markerfacecolor=colour if generation.accepted else PAPER,
                markeredgewidth=1.6,
                markersize=8,
            )
        axes.set_xticks([g.number for g in view.generations])
        axes.set_xlim(0.5, view.generations[-1].number + 0.5)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("generation")
        axes.set_ylabel(f"{view.metric} on dev, %")
        _percent_axis(axes, [g.dev.high for g in measured if g.dev], "y")
        _lever_legend(axes, measured)
        described = [
            f"generation {g.number}, {words.lever(g)}, {words.accepted(g)}: {words.dev_score(g)}" for g in measured
        ]
        return _chart(figure, "generations", "Dev score by generation. " + "; ".join(described) + ".")


def training_chart(update: WeightUpdateView) -> Chart | None:
    """Mean reward and groups alive by iteration of one WeightUpdate; None before its first iteration."""
    if not update.steps:
        return None
    iterations = [step.iteration for step in update.steps]
    rewards = [_or_gap(step.mean_reward) * 100 for step in update.steps]
    alive = [_or_gap(step.groups_alive) for step in update.steps]
    with _style():
        figure = _figure(3.3)
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        above.plot(iterations, rewards, "-^", color=WEIGHTS, markersize=6)
        above.set_ylabel("mean reward, %")
        _percent_axis(above, [reward / 100 for reward in rewards if reward == reward], "y")
        below.bar(iterations, alive, color=WEIGHTS, width=0.55)
        below.set_ylabel("groups alive")
        groups = max((step.groups or 0 for step in update.steps), default=0)
        below.set_ylim(0, max(groups, 1))
        below.set_xlabel("iteration")
        below.xaxis.get_major_locator().set_params(integer=True)
        below.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        for axes in (above, below):
            axes.grid(axis="x", visible=False)
        described = [
            f"iteration {step.iteration}: "
            + ("not reported" if step.mean_reward is None else words.percent(step.mean_reward))
            + ("" if step.groups_alive is None else f", {step.groups_alive} of {step.groups or '?'} groups alive")
            for step in update.steps
        ]
        alt = f"Mean training reward, weight update of generation {update.generation}. " + "; ".join(described) + "."
        return _chart(figure, f"training-{update.generation}", alt)


def histograms_chart(view: RunView) -> Chart | None:
    """How the rewards of each Generation's dev problems spread; None before one is measured."""
    shown = [g for g in view.generations if g.dev is not None]
    panels = [(f"gen {g.number}", g.histogram, _LEVER_COLOURS.get(g.lever, FIRST)) for g in shown]
    alt = "Dev problems by reward. " + "; ".join(f"generation {g.number}: {_spread(g.histogram)}" for g in shown)
    return _histograms(panels, "rewards", "reward of a dev problem", alt)


def probes_chart(view: RunView) -> Chart | None:
    """How many of a problem's samples at temperature 1 were right, for each probe; None without a probe."""
    shown = [(g.number, g.probe) for g in view.generations if g.probe is not None]
    panels = [(f"after gen {number}", probe.histogram, WEIGHTS) for number, probe in shown]
    alt = "Train problems by mean reward at temperature 1. " + "; ".join(
        f"after generation {number}: {probe.alive} of {probe.groups} groups alive, {_spread(probe.histogram)}"
        for number, probe in shown
    )
    return _histograms(panels, "probes", "mean reward of a problem's samples", alt)


def _histograms(panels: Sequence[tuple[str, Sequence[int], str]], name: str, label: str, alt: str) -> Chart | None:
    if not panels:
        return None
    rows = -(-len(panels) // _COLUMNS)
    with _style():
        figure = _figure(0.55 + 1.25 * rows)
        grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for index, (axes, (title, counts, colour)) in enumerate(zip(grid.flat, panels, strict=False)):
            left = [bin_ / HISTOGRAM_BINS for bin_ in range(HISTOGRAM_BINS)]
            shares = [100 * count / max(sum(counts), 1) for count in counts]
            axes.bar(left, shares, width=0.88 / HISTOGRAM_BINS, align="edge", color=colour)
            axes.set_title(title, loc="left", color=INK, pad=3)
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            axes.tick_params(labelbottom=index + _COLUMNS >= len(panels))
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(0, 100)
            axes.grid(axis="x", visible=False)
            axes.set_yticks([0, 50, 100])
        figure.supylabel("% of problems", fontsize=11, color=SOFT)
        figure.supxlabel(label, fontsize=11, color=SOFT)
        return _chart(figure, name, alt + ".")


def _spread(counts: Sequence[int]) -> str:
    """ "48 in 0 to 0.1, 72 in 0.9 to 1": the bins that are not empty."""
    return ", ".join(
        f"{count} in {index / HISTOGRAM_BINS:g} to {(index + 1) / HISTOGRAM_BINS:g}"
        for index, count in enumerate(counts)
        if count
    )


def _dev(generation: GenerationView) -> float:
    assert generation.dev is not None, "only measured generations are drawn"
    return generation.dev.mean


def _or_gap(value: float | None) -> float:
    """Matplotlib leaves a gap at nan."""
    return float("nan") if value is None else float(value)


def _interval(axes: Axes, mean: float, y: float, low: float, high: float, colour: str) -> None:
    axes.hlines(y, low, high, color=colour, linewidth=2)
    _label(axes, f"{mean:.1f}", high, y)


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    """A figure to the right of a mark."""
    axes.annotate(text, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=INK)


def _percent_axis(axes: Axes, tops: Sequence[float], which: str) -> None:
    """From 0, which a share is measured from, to a little above the highest value."""
    top = min(105.0, 112 * max([*tops, 0.1]))
    (axes.set_xlim if which == "x" else axes.set_ylim)(0, top)


def _lever_legend(axes: Axes, shown: Sequence[GenerationView]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], marker=_LEVER_SHAPES[lever], color=_LEVER_COLOURS[lever], linestyle="", label=words.LEVERS[lever]
        )
        for lever in _LEVER_COLOURS
        if any(generation.lever == lever for generation in shown)
    ]
    if any(not generation.accepted for generation in shown):
        handles.append(
            Line2D([], [], marker="s", color=SOFT, markerfacecolor=PAPER, linestyle="", label="hollow: not accepted")
        )
    axes.legend(
        handles=handles,
        ncols=len(handles) if len(handles) < 4 else 2,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        columnspacing=1.0,
        handletextpad=0.1,
        borderaxespad=0.1,
    )


def _style() -> AbstractContextManager[None]:
    """Matplotlib's settings for one drawing, put back afterwards."""
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(dict(_STYLE))
    return context


def _figure(height: float, width: float = WIDTH_IN) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _chart(figure: Figure, name: str, alt: str) -> Chart:
    """Render, then leave only what a page needs: no prologue, no metadata, no width but the page's."""
    import matplotlib

    buffer = io.StringIO()
    # Ids are made from the salt: they are the same for the same data, and different from those of the next chart.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"font-family: [^;\"]*;?", "", drawn)  # the page's own
    drawn = drawn.replace("xlink:href=", "href=")
    # The clip paths' ids are salted, the groups' ids are not ("axes_1" in every chart).
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', drawn)
    assert box is not None, "matplotlib's SVG has a viewBox"
    width_px = figure.get_figwidth() * 96 * 1.25
    opening = (
        f'<svg viewBox="{box.group(1)}" role="img" aria-label="{html.escape(alt)}" style="max-width: {width_px:.0f}px">'
    )
    return Chart(opening + drawn[drawn.index(">", box.end()) + 1 :], alt)
