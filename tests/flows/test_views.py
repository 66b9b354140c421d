"""Figures read from the tables: fixed denominators, nothing from unfinished work, pairing, few queries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from flows.measured import histogram
from flows.records import HISTOGRAM_BINS
from flows.settings import SandboxKind
from flows.spending import PHASES
from flows.state import tables
from flows.state.tables import GenerationRow, RunRow, RunStatus, ScaffoldRow, WeightUpdateRow, WorkStatus
from flows.views import UnknownRun, episode_view, list_runs, run_view
from tests.flows.conftest import TRIED, Story, coins
from verifiers.statistics import estimate, paired_difference

TellRun = Callable[..., str]
RUN = "chain-sum-1"


def begin(story: Story, task: str = "no-such-task", **columns: object) -> None:
    """An empty Run with one Scaffold."""
    with story.db.session() as session:
        row = {"id": "r", "task": task, "task_digest": "0", "profile": "offline", "seed": 0, "settings": {}}
        session.add(RunRow(**{**row, **columns}))  # type: ignore[arg-type]
        session.add(ScaffoldRow(id="s", kind="solve", note=""))


def test_a_run_reads_as_it_was_told(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run())
    assert [g.number for g in view.generations] == [1, 2, 3, 4, 5]
    assert [g.accepted for g in view.generations] == [True, True, False, True, False]
    assert [g.parent for g in view.generations] == [None, 1, 2, 2, 4]
    assert view.incumbent == 4
    assert view.generations[3].objective == "grpo"
    assert view.sandbox is SandboxKind.BUBBLEWRAP
    assert view.created_at.tzinfo is not None
    assert [v.generation for v in view.verdicts] == [2, 3, 4, 5]
    assert view.decisions[2].lever == "weights"
    assert len(view.decisions[0].reasons) == 2
    assert view.open_work == ()


def test_dev_blocks_are_shared_and_pooled_by_problem(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(n=40))
    second = view.generations[1]
    assert [b.slot for b in second.blocks] == ["dev/01", "dev/02", "dev/03"]
    assert second.dev is not None
    assert second.dev.n == 120
    blocks = [b.estimate for b in second.blocks]
    assert second.dev.mean == pytest.approx(sum(b.mean for b in blocks if b) / 3)
    assert sum(second.histogram) == 120
    assert sum(second.causes.values()) == 120
    assert [e.reward for e in second.samples] == [0, 0, 0, 1, 1, 1]


def test_a_problem_asked_in_two_blocks_counts_once(story: Story) -> None:
    begin(story)
    with story.db.session() as session:
        session.add(GenerationRow(run_id="r", number=1, lever="first", scaffold_id="s", status=WorkStatus.DONE))
        story.rollout(session, "r", "dev/00", "dev", "s", "", 1, [[1.0], [0.0]], prefix="same")
        story.rollout(session, "r", "dev/01", "dev", "s", "", 1, [[0.0], [0.0]], prefix="same")
    dev = run_view(story.db, "r").generations[0].dev
    assert dev is not None
    assert (dev.n, dev.mean) == (2, 0.25)


def test_samples_of_a_problem_are_averaged_first(story: Story) -> None:
    begin(story)
    with story.db.session() as session:
        story.rollout(session, "r", "eval/dev", "dev", "s", "", 0, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    (found,) = run_view(story.db, "r").evaluations
    assert found.estimate is not None
    assert (found.estimate.n, found.estimate.mean) == (3, 0.5)
    assert found.episodes == 6


def test_an_unscored_or_absent_episode_counts_zero_once_the_rollout_is_done(story: Story) -> None:
    begin(story)
    with story.db.session() as session:
        made = [[1.0], [None], [1.0]]
        rollout = story.rollout(session, "r", "test", "test", "s", "", 1, made, missing=1)
        session.add(tables.TestReadRow(run_id="r", arm="winner", generation=1, rollout_id=rollout))
    arm = run_view(story.db, "r").arm("winner")
    assert arm is not None
    assert (arm.n, arm.mean) == (4, 0.5)
    expected = estimate([1.0, 0.0, 1.0, 0.0])
    assert (arm.low, arm.high) == (expected.low, expected.high)
    assert arm.method == "Wilson"


def test_an_unfinished_rollout_is_open_work_and_no_figure(story: Story) -> None:
    begin(story, status=RunStatus.INTERRUPTED)
    with story.db.session() as session:
        session.add(GenerationRow(run_id="r", number=1, lever="first", scaffold_id="s", status=WorkStatus.DONE))
        half = [[1.0], [1.0], [None], [None]]
        story.rollout(session, "r", "dev/00", "dev", "s", "", 1, half, status=WorkStatus.INTENDED)
        rollout = story.rollout(session, "r", "test", "test", "s", "", 1, half, status=WorkStatus.INTENDED)
        session.add(tables.TestReadRow(run_id="r", arm="initial", generation=1, rollout_id=rollout))
    view = run_view(story.db, "r")
    assert view.test == ()
    assert view.generations[0].dev is None
    assert view.generations[0].blocks[0].estimate is None
    assert [(w.what, w.done, w.total, w.accuracy) for w in view.open_work] == [
        ("rollout dev/00 of scaffold s, episodes", 2, 4, 1.0),
        ("rollout test of scaffold s, episodes", 2, 4, 1.0),
    ]


def test_a_candidate_in_training_does_not_pass_for_its_parent(story: Story, tell_run: TellRun) -> None:
    tell_run(tested=False)
    with story.db.session() as session:
        session.add(
            GenerationRow(run_id=RUN, number=6, parent=2, lever="weights", scaffold_id="h" * 64, objective="grpo")
        )
        settings = {"iterations": 10}
        session.add(WeightUpdateRow(run_id=RUN, generation=6, objective="grpo", settings=settings))
    view = run_view(story.db, RUN)
    assert view.generations[5].blocks == ()
    assert view.generations[5].dev is None
    assert [(w.what, w.done, w.total) for w in view.open_work] == [
        ("generation 6 (weights)", 0, None),
        ("weight update of generation 6 (grpo), iterations", 0, 10),
    ]


def test_differences_are_paired_by_problem(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(n=40))
    made = {arm: [r for (r,) in coins(77 + g, 160, TRIED[g - 1][4])] for arm, g in (("H", 2), ("W+H", 4))}
    expected = paired_difference(made["W+H"], made["H"])
    found = next(d for d in view.test_differences if (d.left, d.right) == ("winner", "harness_only"))
    assert (found.n, found.mean, found.low, found.high) == tuple(expected)
    assert not found.same
    assert found.beyond_noise == (expected.low > 0 or expected.high < 0)
    assert [(d.left, d.right) for d in view.test_differences] == [
        ("harness_only", "initial"),
        ("winner", "harness_only"),
        ("winner", "initial"),
    ]


def test_arms_may_share_a_rollout(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(keep_h=True))
    winner, h = view.arm("winner"), view.arm("harness_only")
    assert winner is not None
    assert h is not None
    assert winner.rollout_id == h.rollout_id
    assert winner.words.endswith("H itself")
    found = view.test_differences[1]
    assert (found.same, found.mean, found.beyond_noise) == (True, 0.0, False)


def test_weight_updates_probes_and_trials(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run())
    (update,) = view.weight_updates
    assert (update.generation, update.objective, update.iterations) == (4, "grpo", 3)
    assert [s.mean_reward for s in update.steps] == pytest.approx([0.3, 0.4, 0.5])
    first = update.steps[0]
    assert (first.groups_alive, first.groups, first.loss, first.kl) == (6, 8, None, 0.01)
    probe = view.generations[2].probe
    assert probe is not None
    assert (probe.groups, probe.samples, sum(probe.histogram)) == (8, 4, 8)
    assert 0 < probe.alive <= 8
    (trial,) = view.generations[1].trials
    assert trial.estimate is not None
    assert trial.estimate.n == 12
    assert trial.note.startswith("self-consistency")


def test_spending_sums_calls_and_booked_steps(story: Story, tell_run: TellRun) -> None:
    spent = run_view(story.db, tell_run(n=10)).spending
    assert [p.phase for p in spent.phases] == [PHASES[p] for p in ("dev", "trial", "probe", "train", "test")]
    assert spent.episodes == 9 * 10 + 12 + 32 + 3 * 32 + 3 * 40
    assert spent.calls == spent.episodes
    assert (spent.prompt_tokens, spent.completion_tokens) == (40 * spent.calls, 3 * spent.calls)
    assert (spent.train_s, spent.sandbox_s, spent.wall_s, spent.resent) == (45.0, 30.0, 754.2, 0)
    assert spent.by_generation == {1: {"episode_s": 30.0}, 4: {"train_s": 45.0}}


def test_the_number_of_queries_does_not_grow_with_the_run(story: Story, tell_run: TellRun) -> None:
    counts = []
    for run_id, n in (("few", 4), ("many", 30)):
        tell_run(run_id, n=n)
        asked: list[str] = []

        def note(_c: object, _k: object, statement: str, *_: object, asked: list[str] = asked) -> None:
            asked.append(statement)

        event.listen(story.db.engine, "before_cursor_execute", note)
        run_view(story.db, run_id)
        event.remove(story.db.engine, "before_cursor_execute", note)
        counts.append(len(asked))
    assert counts[0] == counts[1] <= 14


def test_the_task_lends_title_and_baselines(story: Story) -> None:
    begin(story, task="lawbench")
    view = run_view(story.db, "r")
    assert view.title.startswith("LawBench")
    assert view.metric == "accuracy"
    assert {b.name for b in view.baselines} >= {"SIA-H", "linear SVC"}
    assert view.sandbox is SandboxKind.NONE, "settings that name no sandbox are not taken for a safe one"


def test_list_runs(story: Story, tell_run: TellRun) -> None:
    assert list_runs(story.db) == []
    tell_run("one", n=10)
    tell_run("two", n=10, tested=False, kept=3, sandbox=SandboxKind.NONE)
    two, one = list_runs(story.db)
    assert (one.id, one.generations, one.accepted, one.status) == ("one", 5, 3, "finished")
    winner = run_view(story.db, "one").arm("winner")
    assert winner is not None
    assert one.winner == pytest.approx(winner.mean)
    assert (two.id, two.generations, two.accepted, two.winner) == ("two", 3, 2, None)
    assert two.sandbox is SandboxKind.NONE


def test_unknown_names_say_what_there_is(story: Story, tell_run: TellRun) -> None:
    with pytest.raises(UnknownRun, match="there is none yet"):
        run_view(story.db, "nope")
    tell_run(n=4)
    with pytest.raises(UnknownRun, match=f"no run 'nope'; there are: {RUN}"):
        run_view(story.db, "nope")
    with pytest.raises(UnknownRun, match="no episode 999999"):
        episode_view(story.db, 999_999)


def test_an_episode_is_a_whole_trajectory(story: Story, tell_run: TellRun) -> None:
    view = run_view(story.db, tell_run(n=6))
    right = next(brief for brief in view.generations[1].samples if brief.reward)
    episode = episode_view(story.db, right.id)
    assert (episode.run_id, episode.problem_id, episode.reward) == (RUN, right.problem_id, 1.0)
    assert episode.answer == 12
    assert episode.adapter_id is None
    (call,) = episode.calls
    assert call.messages == (("user", "What is 5 + 7?"),)
    assert (call.text, call.prompt_tokens, call.completion_tokens) == ("12", 40, 3)
    assert call.effective == {**call.asked, "seed": 5}  # type: ignore[dict-item]


@given(st.lists(st.floats(0, 1), max_size=50))
def test_a_histogram_loses_no_reward(rewards: list[float]) -> None:
    counts = histogram(rewards)
    assert len(counts) == HISTOGRAM_BINS
    assert sum(counts) == len(rewards)


def test_bins_of_a_histogram() -> None:
    assert histogram([0.0, 0.05, 0.1, 0.3, 0.95, 1.0]) == (2, 1, 0, 1, 0, 0, 0, 0, 0, 2)
