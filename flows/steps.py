"""The five steps of a Generation as Prefect tasks: what may be retried alone, with its time-out and its name in the UI.

Tasks take plain ids and look the rest up (`flows.workshop`), and every one is idempotent on the state, so a Retry from
the Prefect UI, a resumed run and a scheduled one all go on where the state stands. Nothing is cached by Prefect: SQL is
the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from agents.sandbox import SandboxUnavailable
from agents.scaffold import ScaffoldError
from flows.work import choices, rollouts, weights
from flows.workshop import Stopped, workshop
from tasks.contract import TaskError


def worth_retrying(_task: object, _run: object, state: State[object]) -> bool:
    """Faults may pass; a person's Ctrl-C, a broken task or a broken Scaffold do not."""
    try:
        state.result()
    except (Stopped, TaskError, ScaffoldError, SandboxUnavailable):
        return False
    except Exception:
        return True
    return False


QUICK_S = 300
LONG_S = 3600
P = ParamSpec("P")
R = TypeVar("R")


def step(name: str, timeout_s: float) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A Prefect task with what all steps share: two retries of a fault, the label as its run's name, no cache."""
    return task(
        name=name,
        task_run_name="{label}",
        retries=2,
        retry_delay_seconds=1,
        retry_condition_fn=worth_retrying,
        timeout_seconds=timeout_s,
        cache_policy=NO_CACHE,
    )


@step("scaffold synthesis", QUICK_S)
def synthesise_scaffold(run_id: str, number: int, label: str) -> None:
    """The Meta-Agent writes the first Scaffold."""
    choices.synthesise(workshop(run_id), number)


@step("sandboxed rollout", LONG_S)
def roll_out_shard(run_id: str, rollout_id: int, shard: int, label: str) -> None:
    """One sandbox's worth of Episodes."""
    rollouts.run_shard(workshop(run_id), rollout_id, shard)


@step("verifier scoring", QUICK_S)
def score_rollout(run_id: str, rollout_id: int, label: str) -> None:
    """The verifier's word on every Episode, from the recorded answers alone."""
    rollouts.score_rollout(workshop(run_id), rollout_id)


@step("feedback decision", LONG_S)
def decide(run_id: str, after: int, probe_rollout: int | None, label: str) -> str:
    """The Feedback-Agent reads the evidence and pulls a lever; returns which."""
    return choices.decide(workshop(run_id), after, probe_rollout).lever


@step("conditional training", LONG_S)
def train_step(run_id: str, number: int, iteration: int, rollout_id: int, label: str) -> str:
    """One committed step of a WeightUpdate; returns the Adapter's id after it."""
    return weights.train_step(workshop(run_id), number, iteration, rollout_id)
