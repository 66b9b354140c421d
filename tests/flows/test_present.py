"""The screens: what they say, at 80 columns, without colour, whatever text the agents left behind."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sqlmodel import col, select

from flows import words
from flows.artifacts import decision_log_markdown, result_table
from flows.present import print_episode, print_generation, print_result, print_runs, print_status
from flows.records import RunView
from flows.settings import SandboxKind
from flows.state import tables
from flows.views import episode_view, list_runs, run_view
from tests.flows.conftest import Story

TellRun = Callable[..., str]


def screen(show: Callable[[Console], None], width: int = 80) -> str:
    """What a terminal of that width without colour shows."""
    out = io.StringIO()
    show(Console(file=out, width=width, no_color=True, force_terminal=False))
    return out.getvalue()


def screens(story: Story, view: RunView, width: int = 80) -> dict[str, str]:
    """Every screen about a Run."""
    brief = view.generations[0].samples[0]
    return {
        "runs": screen(lambda c: print_runs(c, list_runs(story.db)), width),
        "status": screen(lambda c: print_status(c, view), width),
        "result": screen(lambda c: print_result(c, view), width),
        "episode": screen(lambda c: print_episode(c, episode_view(story.db, brief.id)), width),
        **{
            f"generation {g.number}": screen(lambda c, n=g.number: print_generation(c, view, n, story.places), width)
            for g in view.generations
        },
    }


def squeezed(text: str) -> str:
    """Folded lines joined again."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 140])
def test_every_screen_fits_and_holds_no_control_character(story: Story, tell_run: TellRun, width: int) -> None:
    for name, text in screens(story, run_view(story.db, tell_run()), width).items():
        assert max(len(line) for line in text.splitlines()) <= width, name
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text), name


def test_markup_of_an_agent_is_printed_not_obeyed(story: Story, tell_run: TellRun) -> None:
    text = screens(story, run_view(story.db, tell_run()))["generation 3"]
    assert "[bold]markup[/bold]" in squeezed(text)
    assert "\\x1b[31mred" in text


def test_the_result_says_scores_with_intervals_and_differences(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run())
    text = squeezed(screens(story, view)["result"])
    for arm in view.test:
        assert f"{words.percent(arm.mean)} {words.bounds(arm.low, arm.high)}" in text
    assert "W+H - H" in text
    assert "The winner with updated weights (W+H) against H:" in text
    assert "alpha 0.013" in text
    assert "MDD +21.0" in text
    assert "rejected" in text
    assert "no-such-task" in text


def test_an_unconfined_run_says_so_on_every_screen(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(sandbox=SandboxKind.NONE))
    for name, text in screens(story, view).items():
        assert "SANDBOX OFF" in text, name
    assert words.UNCONFINED in decision_log_markdown(view)
    assert "SANDBOX OFF" in words.sandbox_line(view.sandbox)


def test_a_confined_run_raises_no_alarm(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run())
    assert all("SANDBOX OFF" not in text for text in screens(story, view).values())


def test_a_generation_shows_its_diff_training_and_decision(story: Story, tell_run: TellRun) -> None:
    shown = screens(story, run_view(story.db, tell_run()))
    assert "-    reply = tools.chat(problem)" in shown["generation 2"]
    assert "+    reply = tools.complete(SHOTS + problem)" in shown["generation 2"]
    assert "Decision after it: harness" in shown["generation 2"]
    assert "2 harness candidates in a row were not accepted" in shown["generation 2"]
    assert "Drafts tried out on train problems" in shown["generation 2"]
    assert "+def solve(problem, tools):" in shown["generation 1"]
    assert "not on this machine" in shown["generation 3"]
    assert "groups of 4 alive" in shown["generation 3"]
    assert "only the weights changed" in shown["generation 4"]
    assert "Weight update: grpo, 3 of 3 iterations" in shown["generation 4"]
    assert "paired exact test" in shown["generation 4"]


def test_an_unknown_generation_is_answered_with_those_there_are(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(kept=2, tested=False))
    assert "has no generation 9; it has: 1, 2" in screen(lambda c: print_generation(c, view, 9, story.places))


def test_an_episode_shows_call_answer_and_score(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run())
    brief = next(b for b in view.generations[1].samples if b.reward)
    text = screen(lambda c: print_episode(c, episode_view(story.db, brief.id)))
    assert "user: What is 5 + 7?" in text
    assert "-> 12" in text
    assert "effective: as asked, seed 5" in text
    assert "answer: 12" in text
    assert "reward 1: exact match" in text


def test_what_a_training_rollout_forced_is_shown_beside_what_was_asked(story: Story, tell_run: TellRun) -> None:
    tell_run()
    with story.db.session() as session:
        forced = session.exec(
            select(tables.EpisodeRow.id)
            .join(tables.RolloutRow, col(tables.RolloutRow.id) == tables.EpisodeRow.rollout_id)
            .where(col(tables.RolloutRow.train_policy).is_(True))
        ).first()
    assert forced is not None
    text = screen(lambda c: print_episode(c, episode_view(story.db, forced)))
    assert "temperature 1 forced" in text
    assert 'asked:     {"temperature": 0.2' in text
    assert 'effective: {"temperature": 1.0' in text


def test_an_interrupted_run_says_how_to_go_on(story: Story, tell_run: TellRun) -> None:
    text = screens(story, run_view(story.db, tell_run(kept=2, tested=False)))["status"]
    assert "Go on with: sia resume chain-sum-1" in text
    assert "Incumbent: generation 2" in text


def test_no_runs_yet() -> None:
    assert "sia run chain-sum" in screen(lambda c: print_runs(c, []))


def test_published_baselines_stand_beside_the_result(story: Story) -> None:
    with story.db.session() as session:
        session.add(tables.RunRow(id="r", task="lawbench", task_digest="0", profile="offline", seed=0, settings={}))
    text = screen(lambda c: print_result(c, run_view(story.db, "r")))
    assert "70.1 %" in text
    assert "linear SVC" in text
    assert "not comparable" in squeezed(text)


def test_headline_when_the_gate_kept_h(story: Story, tell_run: TellRun) -> None:
    said = " ".join(words.headline(run_view(story.db, tell_run(keep_h=True))))
    assert "The gate kept H" in said
    assert "updated weights" not in said


def test_headline_before_the_test(story: Story, tell_run: TellRun) -> None:
    (said,) = words.headline(run_view(story.db, tell_run(kept=2, tested=False)))
    assert said == "The sealed test is not scored yet; the run is interrupted."


def test_the_result_table_has_arms_then_differences(story: Story, tell_run: TellRun) -> None:
    rows = result_table(run_view(story.db, tell_run()))
    assert [row["what"].partition(":")[0] for row in rows] == [
        "initial", "H", "W+H", "H - initial", "W+H - H", "W+H - initial",
    ]  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
    early = result_table(run_view(story.db, tell_run("early", kept=2, tested=False)))
    assert [row["what"] for row in early] == ["generation 1", "generation 2"]


def test_the_decision_log_has_reasons_and_verdicts_and_no_live_markup(story: Story, tell_run: TellRun) -> None:
    text = decision_log_markdown(run_view(story.db, tell_run()))
    assert "## Generation 4: weights (grpo)" in text
    assert "**Next: weights**, because" in text
    assert "minimum detectable +21.0: rejected" in text
    assert "\\<script\\>" in text
    assert "<script>" not in text


@given(st.text())
def test_visible_text_is_printable(text: str) -> None:
    assert all(c.isprintable() or c in "\n\t" for c in words.visible(text))
    assert words.visible(text, lines=False).isprintable()


@given(st.text(st.characters(categories=["L", "N", "P"])))
def test_visible_leaves_plain_text_alone(text: str) -> None:
    assert words.visible(text) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (75, "1 min 15 s"), (3599.7, "1 h 00 min"), (9000, "2 h 30 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text
