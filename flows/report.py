"""The report: one self-contained HTML file that says what a Run found, and how far it is to be believed.

    path = write_report(run_view(db, "chain-sum-1"), places)      # <home>/runs/chain-sum-1/report.html

Guarantees: no script, no outside reference (a content security policy in the file forbids both), everything that
agents, models or tasks wrote is escaped, and a reader never finds a half-written file. The same Run
gives the same bytes.
Does not guarantee: that the scaffolds' files are at hand; where they are not, the diff says so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows import plots, words
from flows.present import cause_words
from flows.records import DecisionView, GenerationView, RunView, VerdictView, WeightUpdateView
from flows.scaffold_diff import scaffold_diff
from flows.settings import Places, SandboxKind

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = "report.html.jinja"
DIFF_LINES = 1500
"""Longer diffs are cut in the report; `sia show RUN --generation N` prints them whole."""


class DiffLine(NamedTuple):
    """A line of a diff with the CSS class that tells what it is."""

    kind: str
    text: str


class Chapter(NamedTuple):
    """All that the report says about one Generation."""

    generation: GenerationView
    verdict: VerdictView | None
    decision: DecisionView | None
    update: WeightUpdateView | None
    training: plots.Chart | None
    diff: Sequence[DiffLine]


def write_report(view: RunView, places: Places) -> Path:
    """Write (or write anew) a Run's report and return its path."""
    folder = places.run_folder(view.id)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    temporary = folder / f".report.{os.getpid()}.html"
    try:
        temporary.write_text(render_report(view, places), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render_report(view: RunView, places: Places) -> str:
    """The report's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["together"] = _together
    environment.filters["pretty"] = _pretty
    return environment.get_template(TEMPLATE).render(
        view=view,
        words=words,
        cause_words=cause_words,
        unconfined=view.sandbox is SandboxKind.NONE,
        headline=words.headline(view),
        test_chart=plots.test_chart(view),
        generations_chart=plots.generations_chart(view),
        histograms_chart=plots.histograms_chart(view),
        probes_chart=plots.probes_chart(view),
        chapters=[_chapter(view, generation, places) for generation in view.generations],
    )


def _chapter(view: RunView, generation: GenerationView, places: Places) -> Chapter:
    number = generation.number
    update = next((u for u in view.weight_updates if u.generation == number), None)
    lines = scaffold_diff(view, generation, places.scaffolds)
    diff = [DiffLine(_kind(line), line) for line in lines[:DIFF_LINES]]
    if len(lines) > DIFF_LINES:
        diff.append(DiffLine("hunk", f"... and {len(lines) - DIFF_LINES} lines more"))
    return Chapter(
        generation=generation,
        verdict=view.verdict_on(number),
        decision=next((d for d in view.decisions if d.after_generation == number), None),
        update=update,
        training=None if update is None else plots.training_chart(update),
        diff=diff,
    )


def _kind(line: str) -> str:
    if line.startswith(("+++", "---", "@@")):
        return "hunk"
    return {"+": "added", "-": "removed"}.get(line[:1], "same")


def _finalize(value: object) -> object:
    """Text loses what could reorder or hide it before it is escaped; markup that we made stays."""
    from markupsafe import Markup

    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _together(text: str) -> Markup:
    """Escaped text in which a number stays on one line with its percent sign, and an interval in one piece."""
    from markupsafe import Markup, escape

    safe = str(escape(words.visible(text)))
    safe = re.sub(r"(\d) %", "\\1&nbsp;%", safe)
    return Markup(re.sub(r"\[([^\[\], ]+), ([^\[\], ]+)\]", "[\\1,&nbsp;\\2]", safe))


def _pretty(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
