"""Pooling Runs: what counts, what is refused, and that the figures are the verifiers' own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows.cli import app
from flows.pooling import Pool, PoolingError, pool_runs, print_pool
from flows.records import KILLED, RunView
from flows.state.store import Store
from flows.state.tables import RunRow, RunStatus
from flows.views import run_view
from tests.flows.conftest import Story
from verifiers.statistics import pooled_difference

TellRun = Callable[..., str]
SEEDS = (3, 4, 5)


@pytest.fixture
def told(tell_run: TellRun) -> list[str]:
    return [tell_run(f"seed-{seed}", seed=seed, calls=False) for seed in SEEDS]


def pooled(story: Story, *names: str) -> Pool:
    return pool_runs(story.db, names, lambda run: run_view(story.db, run))


def rewards(story: Story, run: str, arm: str) -> dict[str, float]:
    store = Store(story.db, run)
    found = run_view(story.db, run).arm(arm)
    assert found is not None
    return {problem: reward for (problem, _), reward in store.rewards(found.rollout_id).items()}


def test_the_pooled_figures_are_the_verifiers_own(story: Story, told: list[str]) -> None:
    found = pooled(story, *told)
    assert [(c.left, c.right) for c in found.differences] == [("winner", "harness_only"), ("harness_only", "initial")]
    for contrast in found.differences:
        expected = pooled_difference(
            [(rewards(story, run, contrast.left), rewards(story, run, contrast.right)) for run in told]
        )
        one = contrast.by_problem
        assert (one.n, one.mean, one.low, one.high) == pytest.approx(expected.by_problem)
        assert (one.n, one.unit) == (80, "problems")
        assert expected.by_seed is not None
        one = contrast.by_seed
        assert (one.n, one.mean, one.low, one.high) == pytest.approx(expected.by_seed)
        assert (one.n, one.unit) == (3, "seeds")
        assert [o.mean for o in contrast.per_seed] == pytest.approx([i.mean for i in expected.per_seed])
    for run, name in zip(found.runs, told, strict=True):
        view = run_view(story.db, name)
        assert run.arms == {arm.arm: arm for arm in view.test}
        assert run.difference in view.test_differences


def test_where_the_winner_is_h_its_difference_is_0_for_every_problem(story: Story, tell_run: TellRun) -> None:
    names = [tell_run("a", seed=3, calls=False), tell_run("b", seed=4, calls=False, keep_h=True)]
    found = pooled(story, *names)
    alone = run_view(story.db, "a").test_differences
    weights = next(d for d in alone if d.right == "harness_only" and d.left == "winner")
    assert found.runs[1].difference.same
    assert found.differences[0].per_seed[1].mean == 0.0
    assert found.differences[0].by_problem.mean == pytest.approx(weights.mean / 2)
    assert "0 (W+H is H)" in screen(found)
    assert "same candidate" in screen(found)


def screen(found: Pool, width: int = 80) -> str:
    out = io.StringIO()
    print_pool(Console(file=out, width=width, no_color=True, force_terminal=False), found)
    return out.getvalue()


def test_the_screen_names_each_interval_and_fits(story: Story, told: list[str]) -> None:
    text = screen(pooled(story, *told), 100)
    for words in ("over problems", "between seeds", "seed 4 alone", "80 problems", "3 seeds", "Student t", *told):
        assert words in text
    for width in (80, 100):
        assert max(map(len, screen(pooled(story, *told), width).splitlines())) <= width


def test_what_cannot_be_pooled_is_refused_in_one_line(story: Story, tell_run: TellRun, told: list[str]) -> None:
    tell_run("half", seed=9, tested=False, calls=False)
    tell_run("other", seed=10, task="another-task", calls=False)
    tell_run("moved", seed=11, digest="1" * 64, calls=False)
    tell_run("again", seed=3, calls=False)
    tell_run("short", seed=12, n=10, calls=False)
    with story.db.session() as session:
        session.add(RunRow(id="eval-1", task="no-such-task", task_digest="0" * 64, profile="eval", seed=0, settings={}))
    cases = {
        ("seed-3",): "sia show",
        ("seed-3", "seed-3"): "named twice",
        ("seed-3", "half"): "sia resume half",
        ("seed-3", "other"): "another-task",
        ("seed-3", "moved"): "changed between",
        ("seed-3", "again"): "same seed 3",
        ("seed-3", "short"): "different problems",
        ("seed-3", "eval-1"): "is an evaluation",
    }
    for names, fix in cases.items():
        with pytest.raises(PoolingError, match=fix) as told_off:
            pooled(story, *names)
        assert "\n" not in str(told_off.value)
    for status, fix in ((RunStatus.RUNNING, "sia status seed-4"), (KILLED, "sia resume seed-4")):

        def view_of(run: str, status: str = status) -> RunView:
            return run_view(story.db, run).model_copy(update={"status": status} if run == "seed-4" else {})

        with pytest.raises(PoolingError, match=fix):
            pool_runs(story.db, ["seed-3", "seed-4"], view_of)


def test_unequal_settings_are_named(story: Story, tell_run: TellRun, told: list[str]) -> None:
    assert pooled(story, *told).unequal_settings == ()
    tell_run("longer", seed=12, kept=4, calls=False)
    found = pooled(story, "seed-3", "longer")
    assert found.unequal_settings == ("generations",)
    assert "more than the seed: generations" in screen(found)


def test_the_command(story: Story, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIA_HOME", str(story.places.home))
    monkeypatch.setenv("SIA_DATABASE_URL", story.places.database_url)
    runner = CliRunner()
    shown = runner.invoke(app, ["pool", *told])
    assert shown.exit_code == 0
    assert "over problems" in shown.stdout
    document = json.loads(runner.invoke(app, ["pool", *told, "--json"]).stdout)
    assert [run["seed"] for run in document["runs"]] == list(SEEDS)
    assert document["differences"][0]["by_problem"]["n"] == 80
    refused = runner.invoke(app, ["pool", told[0]])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
