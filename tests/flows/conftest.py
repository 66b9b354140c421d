"""A Run told row by row, for all that reads one: H accepted, a draft rejected, GRPO accepted, sealed test scored.

No loop runs here: the rows are what `flows.state.tables` says they are, with rewards from fixed seeds.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from sqlmodel import Session

from flows.settings import Places, RunSettings, SandboxKind, WeightSettings
from flows.state.database import Database
from flows.state.tables import (
    AdapterRow,
    DecisionRow,
    EpisodeRow,
    GateVerdictRow,
    GenerationRow,
    ModelCallRow,
    RolloutRow,
    RunRow,
    RunStatus,
    ScaffoldRow,
    ScoreRow,
    SpendingRow,
    TestReadRow,
    TrainingStepRow,
    WeightUpdateRow,
    WorkStatus,
)

HOSTILE = '<script>alert("x")</script> [bold]markup[/bold] \x1b[31mred \u202edrow'
"""What an agent might write into a note, an answer or a log to confuse whoever reads it."""


@dataclass
class Story:
    """A database with Runs in it, and the folders beside it."""

    db: Database
    places: Places
    rollouts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """(slot, scaffold, adapter) -> rollout id."""

    def rollout(
        self,
        session: Session,
        run_id: str,
        slot: str,
        split: str,
        scaffold: str,
        adapter: str,
        generation: int,
        groups: Sequence[Sequence[float | None]],
        *,
        status: str = WorkStatus.DONE,
        prefix: str | None = None,
        calls: bool = True,
        missing: int = 0,
    ) -> int:
        """Write a Rollout; `groups[p][s]` is the reward of a sample, None for an Episode without a Score."""
        row = RolloutRow(
            run_id=run_id,
            slot=slot,
            scaffold_id=scaffold,
            adapter_key=adapter,
            generation=generation,
            split=split,
            episodes=sum(len(group) for group in groups) + missing,
            status=status,
            train_policy=slot.startswith(("train/", "probe/")),
        )
        session.add(row)
        session.flush()
        assert row.id is not None
        self.rollouts[slot, scaffold, adapter] = row.id
        made = [
            (self._episode(row.id, f"{prefix or slot}:{number:03d}", sample, reward), reward)
            for number, group in enumerate(groups)
            for sample, reward in enumerate(group)
        ]
        session.add_all(episode for episode, _ in made)
        session.flush()
        for episode, reward in made:
            assert episode.id is not None
            if reward is not None:
                session.add(ScoreRow(episode_id=episode.id, reward=reward, reason="exact match"))
            if calls:
                session.add(self._call(episode.id, episode.problem_id, row.train_policy))
        session.flush()
        return row.id

    def _episode(self, rollout_id: int, problem: str, sample: int, reward: float | None) -> EpisodeRow:
        done = reward is not None
        return EpisodeRow(
            rollout_id=rollout_id,
            problem_id=problem,
            sample=sample,
            shard=0,
            seed=7,
            status=WorkStatus.DONE if done else WorkStatus.INTENDED,
            cause=("finished" if reward else "no_answer") if done else None,
            answer=12 if reward else None,
            wall_s=0.5,
        )

    def _call(self, episode_id: int, problem: str, train_policy: bool) -> ModelCallRow:
        sampling = {"temperature": 0.2, "top_p": 1.0, "max_tokens": 16, "stop": []}
        return ModelCallRow(
            episode_id=episode_id,
            problem_id=problem,
            digest=f"d{episode_id}",
            occurrence=0,
            status=WorkStatus.DONE,
            asked=sampling,
            effective={**sampling, "temperature": 1.0 if train_policy else 0.2, "seed": 5},
            request={"messages": [{"role": "user", "content": "What is 5 + 7?"}], "prompt": None},
            text="12",
            finish_reason="stop",
            prompt_tokens=40,
            completion_tokens=3,
            wall_s=0.2,
        )


def coins(seed: int, n: int, p: float) -> list[list[float]]:
    """n problems, one sample each, each right with probability p."""
    rng = random.Random(seed)
    return [[float(rng.random() < p)] for _ in range(n)]


def groups(seed: int, n: int, samples: int, p: float) -> list[list[float]]:
    """n problems with samples each, each problem with a chance of its own around p."""
    rng = random.Random(seed)
    chances = [rng.betavariate(2 * p, 2 * (1 - p)) for _ in range(n)]
    return [[float(rng.random() < chance) for _ in range(samples)] for chance in chances]


TRIED = (
    ("first", "s" * 64, "", "plain chat, last number in the answer", 0.12, True),
    ("harness", "h" * 64, "", "six plain shots, assistant prefill, greedy", 0.36, True),
    ("harness", "k" * 64, "", f"self-consistency over 5 samples {HOSTILE}", 0.34, False),
    ("weights", "h" * 64, "a" * 64, "grpo, 10 iterations of 32 x 8", 0.54, True),
    ("harness", "m" * 64, "a" * 64, "eight shots instead of six", 0.52, False),
)
"""(lever, scaffold, adapter, note, chance of being right, accepted) of Generations 1 to 5."""


def tell(
    story: Story,
    run_id: str = "chain-sum-1",
    *,
    sandbox: SandboxKind = SandboxKind.BUBBLEWRAP,
    n: int = 20,
    kept: int = len(TRIED),
    tested: bool = True,
    keep_h: bool = False,
    calls: bool = True,
    seed: int = 3,
    task: str = "no-such-task",
    digest: str = "0" * 64,
) -> str:
    """Write a Run of `kept` Generations with blocks of n problems; returns its name. Test rewards vary by seed."""
    settings = RunSettings(
        generations=kept, sandbox=sandbox, weights=WeightSettings(iterations=3, problems=8, samples=4)
    )
    with story.db.session() as session:
        session.add(
            RunRow(
                id=run_id,
                task=task,
                task_digest=digest,
                profile="offline",
                seed=seed,
                settings=settings.model_dump(mode="json"),
                status=RunStatus.FINISHED if tested else RunStatus.INTERRUPTED,
                active_s=754.2,
            )
        )
        for _, scaffold, adapter, note, _, _ in TRIED:
            if session.get(ScaffoldRow, scaffold) is None:
                session.add(ScaffoldRow(id=scaffold, kind="solve", note=note))
            if adapter and session.get(AdapterRow, adapter) is None:
                session.add(AdapterRow(id=adapter, base_model="smollm2-135m-instruct"))
        session.flush()
        incumbent = 0
        for number, (lever, scaffold, adapter, note, _, accepted) in enumerate(TRIED[:kept], 1):
            keep = accepted and not (keep_h and lever == "weights")
            session.add(
                GenerationRow(
                    run_id=run_id,
                    number=number,
                    parent=incumbent or None,
                    lever=lever,
                    status=WorkStatus.DONE,
                    scaffold_id=scaffold,
                    adapter_id=adapter or None,
                    objective="grpo" if lever == "weights" else None,
                    accepted=keep,
                    note=note,
                )
            )
            for number_, slot in [(number, f"dev/{number - 1:02d}")] + ([(incumbent, "")] if incumbent else []):
                _, s, a, _, p, _ = TRIED[number_ - 1]
                story.rollout(
                    session, run_id, slot or f"dev/{number - 1:02d}", "dev", s, a, number,
                    coins(100 * number + number_, n, p), calls=calls,
                )  # fmt: skip
            if incumbent:
                session.add(
                    GateVerdictRow(
                        run_id=run_id, gate=number - 1, generation=number, incumbent=incumbent,
                        slot=f"dev/{number - 1:02d}", accepted=keep, n=n, difference=0.24 if keep else -0.02,
                        low=0.05 if keep else -0.2, high=0.4 if keep else 0.15, p_value=0.004 if keep else 0.61,
                        alpha=0.0125, minimum_detectable=0.21, text="paired exact test on fresh dev problems",
                    )
                )  # fmt: skip
            if lever == "weights":
                _train(story, session, run_id, number, scaffold, adapter)
            incumbent = number if keep else incumbent
            if number < kept:
                _decide(session, run_id, number)
        probed = groups(9, 8, 4, 0.4)
        story.rollout(session, run_id, "probe/gen-03", "train", "h" * 64, "", 3, probed, calls=calls)
        story.rollout(session, run_id, "trial/gen-02", "train", "k" * 64, "", 2, coins(5, 12, 0.3), calls=calls)
        if tested:
            arms = {"initial": 1, "harness_only": 2, "winner": incumbent}
            for arm, number in arms.items():
                _, s, a, _, p, _ = TRIED[number - 1]
                rollout = story.rollouts.get(("test", s, a)) if arm == "winner" and number == 2 else None
                if rollout is None:
                    made = coins(77 + number + 1000 * (seed - 3), 4 * n, p)
                    rollout = story.rollout(session, run_id, "test", "test", s, a, number, made, calls=calls)
                session.add(TestReadRow(run_id=run_id, arm=arm, generation=number, rollout_id=rollout))
        session.add(SpendingRow(run_id=run_id, generation=4, step="train/gen-04", kind="train_s", amount=45.0))
        session.add(SpendingRow(run_id=run_id, generation=1, step="dev/00", kind="episode_s", amount=30.0))
    return run_id


def _train(story: Story, session: Session, run_id: str, number: int, scaffold: str, adapter: str) -> None:
    update = WeightUpdateRow(
        run_id=run_id,
        generation=number,
        objective="grpo",
        settings={"objective": "grpo", "iterations": 3, "problems": 8, "samples": 4},
        adapter_id=adapter,
        status=WorkStatus.DONE,
    )
    session.add(update)
    session.flush()
    assert update.id is not None
    for iteration in (1, 2, 3):
        made = groups(50 + iteration, 8, 4, 0.2 + 0.1 * iteration)
        rollout = story.rollout(
            session, run_id, f"train/gen-{number:02d}/iter-{iteration:02d}", "train", scaffold, "", number, made
        )
        session.add(
            TrainingStepRow(
                weight_update_id=update.id,
                iteration=iteration,
                rollout_id=rollout,
                adapter_id=adapter,
                report={
                    "mean_reward": 0.2 + 0.1 * iteration,
                    "groups": 8,
                    "groups_alive": 7 - iteration,
                    "kl": 0.01,
                    "entropy": 0.9,
                },
                wall_s=15.0,
            )
        )


def _decide(session: Session, run_id: str, after: int) -> None:
    lever = TRIED[after][0]
    session.add(
        DecisionRow(
            run_id=run_id,
            after_generation=after,
            lever=lever,
            reasons=["2 harness candidates in a row were not accepted", f"22 of 32 groups are alive {HOSTILE}"],
            settings={"objective": "grpo", "iterations": 3} if lever == "weights" else None,
            evidence={"incumbent": after},
        )
    )


@cache
def _migrated() -> Path:
    """A database that is migrated once, to be copied: migrating takes longer than most tests."""
    path = Path(tempfile.mkdtemp(prefix="sia-test-")) / "sia.db"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    Database.open(f"sqlite:///{path}").close()
    return path


def open_story(folder: Path) -> Story:
    """An empty, migrated SQLite database with the places of a user's home, and the files of two Scaffolds."""
    shutil.copy(_migrated(), folder / "sia.db")
    url = f"sqlite:///{folder / 'sia.db'}"
    places = Places(home=folder / "home", cache=folder / "cache", database_url=url)
    for scaffold, line in (("s", "reply = tools.chat(problem)"), ("h", "reply = tools.complete(SHOTS + problem)")):
        files = places.scaffolds / (scaffold * 64)
        files.mkdir(parents=True)
        (files / "agent.py").write_text(
            f"# a scaffold\ndef solve(problem, tools):\n    {line}\n    return last_number(reply)  # <b>&\n"
        )
    return Story(Database.open(url), places)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    """A story of the test's own; see `open_story`."""
    opened = open_story(tmp_path)
    yield opened
    opened.db.close()


@pytest.fixture
def tell_run(story: Story) -> Callable[..., str]:
    """Writes a Run into the story's database; see `tell`."""

    def write(run_id: str = "chain-sum-1", **how: object) -> str:
        return tell(story, run_id, **how)  # type: ignore[arg-type]

    return write
