"""The weight lever: iterations of (roll out with the adapter so far, score, step, checkpoint), each committed once.

Order of writes in an iteration, so that a kill between any two loses nothing and repeats no recorded step: the rollout
and its scores; the checkpoint folder (atomic); the adapter folder (content-addressed); the step's row. A checkpoint
without a row is written over, from the same rollouts, to the same result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from agents.archive import Objective
from agents.decision import TrainSettings
from flows.keys import keyed_seed
from flows.state.calls import unpack_ids, unpack_logprobs
from flows.state.tables import GenerationRow, TrainingStepRow, WeightUpdateRow, WorkStatus
from flows.workshop import Workshop

if TYPE_CHECKING:
    from training.trainer import TrainEpisode, Trainer

KEPT_CHECKPOINTS = 2


def begin_update(shop: Workshop, row: GenerationRow) -> tuple[WeightUpdateRow, TrainSettings]:
    """Write a WeightUpdate's intent, or find it."""
    decision = shop.store.decision(row.number - 1)
    assert decision is not None, "a weight update follows from a decision"
    settings = TrainSettings.model_validate(decision.settings)
    assert row.parent is not None, "a weight update has a parent"
    parent = shop.store.generation(row.parent)
    assert parent is not None, "the parent is on record"
    update = shop.store.begin_weight_update(
        row.number, Objective(settings.objective), settings.model_dump(mode="json"), parent.adapter_id
    )
    return update, settings


def train_step(shop: Workshop, number: int, iteration: int, rollout_id: int) -> str:
    """Take the optimiser step of an iteration from its scored rollout; returns the Adapter's id after it."""
    row = shop.store.generation(number)
    assert row is not None, "a generation is begun before it is trained"
    update, settings = begin_update(shop, row)
    assert update.id is not None
    done = shop.store.training_steps(update.id)
    if len(done) >= iteration:
        return done[iteration - 1].adapter_id
    shop.check()
    from training.objectives import NothingToLearn

    began = time.monotonic()
    trainer = _trainer_at(shop, update, settings, iteration - 1)
    episodes = training_episodes(shop, rollout_id)
    report: JsonValue
    try:
        report = asdict(trainer.step(episodes))
    except NothingToLearn as error:
        report = {"iteration": iteration, "skipped": str(error)}
    folder = _checkpoint(shop, number, iteration)
    trainer.save(folder)
    parent_id = done[-1].adapter_id if done else update.start_adapter_id
    adapter_id = keep_adapter(shop, folder / "adapter", parent_id)
    wall_s = time.monotonic() - began
    shop.store.spend(number, f"train/gen-{number:02d}/step-{iteration:02d}", train_s=wall_s)
    shop.store.save_training_step(
        TrainingStepRow(
            weight_update_id=update.id,
            iteration=iteration,
            rollout_id=rollout_id,
            adapter_id=adapter_id,
            report=report,
            wall_s=wall_s,
        )
    )
    shop.trainer = (number, iteration, trainer)
    for old in range(1, iteration + 1 - KEPT_CHECKPOINTS):
        shutil.rmtree(_checkpoint(shop, number, old), ignore_errors=True)
    return adapter_id


def finish_update(shop: Workshop, number: int) -> None:
    """Close a WeightUpdate: its last Adapter is the candidate's, or the candidate failed if nothing was learned."""
    row = shop.store.generation(number)
    assert row is not None, "a generation is begun before it is trained"
    update, _ = begin_update(shop, row)
    assert update.id is not None
    steps = shop.store.training_steps(update.id)
    learned = [s for s in steps if isinstance(s.report, dict) and not s.report.get("skipped")]
    if learned:
        shop.store.finish_weight_update(update.id, WorkStatus.DONE, steps[-1].adapter_id)
        shop.store.complete_generation(number, adapter_id=steps[-1].adapter_id)
    else:
        note = "no iteration had a group whose rewards differ, so nothing was learned"
        shop.store.finish_weight_update(update.id, WorkStatus.FAILED, None)
        shop.store.complete_generation(number, status=WorkStatus.FAILED, note=note)
    shop.trainer = None
    # Only going on with the update needed the checkpoints; its adapters are kept elsewhere.
    shutil.rmtree(_checkpoint(shop, number, 0).parent, ignore_errors=True)


def training_episodes(shop: Workshop, rollout_id: int) -> list[TrainEpisode]:
    """A training rollout as the trainer takes it: exactly the tokens that were sampled, with their log-probabilities.

    Calls that no Problem was attributed to are left out; an Episode without calls stays, for its group's mean.
    """
    from training.trainer import TrainCall, TrainEpisode

    return [
        TrainEpisode(
            problem_id=episode.problem_id,
            sample=episode.sample,
            reward=reward,
            calls=tuple(
                TrainCall(unpack_ids(c.prompt_ids), unpack_ids(c.completion_ids), unpack_logprobs(c.logprobs))
                for c in calls
            ),
        )
        for episode, reward, calls in shop.store.training_calls(rollout_id)
    ]


def keep_adapter(shop: Workshop, folder: Path, parent_id: str | None) -> str:
    """Copy an adapter folder to its content address and record it; returns its id."""
    adapter_id = folder_digest(folder)
    target = shop.adapter_path(adapter_id)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{adapter_id}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder, temporary)
        temporary.rename(target)
    shop.store.save_adapter(adapter_id, shop.model_folder.name, parent_id)
    return adapter_id


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _trainer_at(shop: Workshop, update: WeightUpdateRow, settings: TrainSettings, iteration: int) -> Trainer:
    """The trainer after so many iterations: the one in memory if it stands there, else from start or checkpoint."""
    from training.trainer import Trainer

    if shop.trainer is not None and shop.trainer[:2] == (update.generation, iteration):
        trainer, shop.trainer = shop.trainer[2], None
        return trainer
    if iteration > 0:
        return Trainer.load(_checkpoint(shop, update.generation, iteration), shop.model_folder)
    seed = keyed_seed(shop.settings.seed, "trainer", update.generation)
    start = shop.adapter_path(update.start_adapter_id) if update.start_adapter_id else None
    return Trainer(shop.model_folder, settings, seed=seed, start_adapter=start)


def _checkpoint(shop: Workshop, generation: int, iteration: int) -> Path:
    return shop.folder / "checkpoints" / f"gen-{generation:02d}" / f"iter-{iteration:02d}"
