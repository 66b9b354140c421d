"""The report: self-contained, safe to open, readable, complete, and never half-written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sqlmodel import select

from flows import plots, report, words
from flows.records import RunView
from flows.report import render_report, write_report
from flows.settings import SandboxKind
from flows.state import tables
from flows.views import run_view
from tasks.contract import Baseline
from tests.flows.conftest import Story, open_story, tell

TellRun = Callable[..., str]
VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path"}


class Page(HTMLParser):
    """Tags, attributes, text and the balance of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> ends something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One finished Run, for all tests that only read it."""
    opened = open_story(tmp_path_factory.mktemp("report"))
    tell(opened, calls=False)
    yield opened
    opened.db.close()


@pytest.fixture(scope="module")
def view(told: Story) -> RunView:
    return run_view(told.db, "chain-sum-1")


@pytest.fixture(scope="module")
def html(told: Story, view: RunView) -> str:
    return render_report(view, told.places)


def test_the_page_is_whole_and_refers_to_nothing_outside(html: str) -> None:
    page = Page(html)
    assert page.open == [], "every tag is closed"
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for value in page.all("href"))
    assert page.all("src") == []
    assert not re.search(r"https?://|//cdn|@import", html)
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{identity}" for identity in page.all("id")}
    assert "default-src 'none'" in html


def test_ids_are_unique_over_all_charts(html: str) -> None:
    assert [i for i, n in Counter(Page(html).all("id")).items() if n > 1] == []


def test_hostile_text_is_shown_and_does_nothing(html: str) -> None:
    page = Page(html)
    assert '<script>alert("x")</script> [bold]markup[/bold] \\x1b[31mred \\u202edrow' in page.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_it_says_the_result_with_intervals(html: str, view: RunView) -> None:
    text = Page(html).text
    for sentence in words.headline(view):
        assert sentence in text
    for arm in view.test:
        assert f"{words.percent(arm.mean)} {words.bounds(arm.low, arm.high)}, n = {arm.n}" in text
    for verdict in view.verdicts:
        assert words.signed_bounds(verdict.low, verdict.high) in text
    for heading in ("The sealed test", "Generations", "The gate", "Rewards", "Decision log", "Spending"):
        assert f"<h2>{heading}</h2>" in html
    assert "2 harness candidates in a row were not accepted" in text
    assert "tools.complete(SHOTS + problem)" in text, "the scaffold's diff"
    assert '"learning_rate": 0.0001' in text, "the settings"
    assert words.sandbox_line(SandboxKind.BUBBLEWRAP) in text


def test_every_chart_has_its_content_in_words(html: str, view: RunView) -> None:
    page = Page(html)
    labels = page.all("aria-label")
    for chart in (
        plots.test_chart(view),
        plots.generations_chart(view),
        plots.histograms_chart(view),
        plots.probes_chart(view),
        plots.training_chart(view.weight_updates[0]),
    ):
        assert chart is not None
        assert chart.alt in labels
    assert page.tags["svg"] == page.tags["figure"] == page.tags["figcaption"] == 5
    assert page.all("role").count("img") == 5


def test_charts_take_the_colours_of_the_page(view: RunView) -> None:
    chart = plots.generations_chart(view)
    assert chart is not None
    assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'href="#\w+"|url\(#\w+\)', "", chart.svg))
    assert "var(--harness)" in chart.svg
    assert "var(--weights)" in chart.svg


def test_baselines_are_drawn_as_they_are_named(view: RunView) -> None:
    named = Baseline(name="$x_1$ <b>", score=70.1, source="a paper", comparable=False)
    chart = plots.test_chart(view.model_copy(update={"baselines": (named,)}))
    assert chart is not None
    assert "$x_1$ &lt;b&gt;" in chart.svg
    assert "<b>" not in chart.svg
    assert "$x_1$ <b> 70.1 %" in chart.alt


def test_an_unconfined_run_is_alarmed(story: Story, tell_run: TellRun) -> None:
    unconfined = run_view(story.db, tell_run(sandbox=SandboxKind.NONE, calls=False, n=4))
    page = Page(render_report(unconfined, story.places))
    assert page.text.count(words.UNCONFINED) == 2
    assert "alert" in page.all("role")


def test_the_same_run_gives_the_same_bytes(told: Story, view: RunView, html: str) -> None:
    assert render_report(view, told.places) == html


def test_a_run_with_nothing_done_has_a_report(story: Story) -> None:
    with story.db.session() as session:
        session.add(
            tables.RunRow(
                id="r", task="lawbench", task_digest="0", profile="offline", seed=0, settings={}, status="failed",
                error="the model <b>is gone</b>",
            )
        )  # fmt: skip
    page = Page(render_report(run_view(story.db, "r"), story.places))
    assert "sia resume r" in page.text
    assert "the model <b>is gone</b>" in page.text
    assert page.tags["svg"] == 0


def test_an_iteration_that_took_no_step_says_why(story: Story, tell_run: TellRun) -> None:
    tell_run(calls=False, n=4)
    with story.db.session() as session:
        asked = select(tables.TrainingStepRow).where(tables.TrainingStepRow.iteration == 3)
        step = session.exec(asked).first()
        assert step is not None
        step.report = {"iteration": 3, "skipped": "no group is alive"}
    view = run_view(story.db, "chain-sum-1")
    assert view.weight_updates[0].steps[2].skipped == "no group is alive"
    assert "Iteration 3 took no step: no group is alive" in Page(render_report(view, story.places)).text


def test_it_is_written_whole_or_not_at_all(story: Story, view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(view, story.places)
    assert path == story.places.run_folder(view.id) / "report.html"
    before = path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]

    def fail(*_: object) -> str:
        raise RuntimeError("killed while rendering")

    monkeypatch.setattr(report, "render_report", fail)
    with pytest.raises(RuntimeError):
        write_report(view, story.places)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_both_schemes() -> None:
    css = (Path(report.__file__).parent / report.TEMPLATE).read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{[^}]*\}", css)]
    assert len(schemes) == 2
    for scheme in schemes:
        pairs = [(name, "paper") for name in ("ink", "soft", "first", "harness", "weights")]
        pairs += [("ink", "raised"), ("soft", "raised"), ("good", "good-ground"), ("bad", "bad-ground")]
        for front, back in pairs:
            high, low = sorted((luminance(scheme[front]), luminance(scheme[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)
