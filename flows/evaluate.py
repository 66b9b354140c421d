"""`sia eval`: roll out and score one Scaffold, with or without an Adapter, and nothing else.

It is a Run of one Generation without decisions, recorded and shown like any other; it needs no Prefect.
"""

from __future__ import annotations

import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from agents.archive import Lever
from agents.scaffold import Scaffold, read_draft, read_scaffold
from flows.control import EVAL_PROFILE, RunProblem, owned, start_run
from flows.progress import Progress
from flows.settings import Places, RunSettings
from flows.state.database import Database
from flows.state.rollout_rows import RolloutPlan
from flows.state.store import Store
from flows.state.tables import RunStatus
from flows.work.rollouts import plan_rollout, run_all
from flows.work.weights import keep_adapter
from flows.workshop import Workshop, close_workshop, open_workshop
from tasks.contract import Split
from verifiers.statistics import estimate


class Evaluation(BaseModel):
    """What one Scaffold scores on a split: mean reward over `n` problems with its 95 % interval."""

    model_config = ConfigDict(frozen=True)
    run_id: str
    rollout_id: int
    task: str
    split: Split
    n: int
    mean: float
    low: float
    high: float
    causes: dict[str, int]
    sandbox: str

    def text(self) -> str:
        """One line for a person."""
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.causes.items()))
        loud = "" if self.sandbox != "none" else "  (NO SANDBOX)"
        return (
            f"{self.task} {self.split}: {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"(95 %, n = {self.n}; {causes}){loud}"
        )


def evaluate_scaffold(
    places: Places,
    task: str,
    scaffold: Path,
    adapter: Path | None,
    split: Split,
    settings: RunSettings,
    problems: int | None,
    progress: Progress,
) -> Evaluation:
    """Roll out one Scaffold on the first `problems` problems of a split (all if None) and score it.

    Raises:
        ScaffoldError: the folder is no Scaffold.
        RunProblem: the Scaffold does not fit the task, or there is no such adapter folder.
        TaskError: the task cannot be loaded.
    """
    given = read_scaffold(scaffold)
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise RunProblem(f"{adapter} is no adapter folder: it has no adapter_config.json")
    run_id = start_run(places, task, settings.model_copy(update={"profile": EVAL_PROFILE, "generations": 1}), None)
    database = Database.open(places.database_url)
    store = Store(database, run_id)
    try:
        with owned(places, store.run()):
            store.set_status(RunStatus.RUNNING, owner=socket.gethostname())
            shop = open_workshop(places, database, run_id, progress)
            if given.kind is not shop.spec.kind:
                raise RunProblem(f"'{task}' asks for a '{shop.spec.kind}' scaffold, this is a '{given.kind}' one")
            result = _evaluate(shop, given, adapter, split, problems)
            store.set_status(RunStatus.FINISHED)
            return result
    except KeyboardInterrupt:
        store.set_status(RunStatus.INTERRUPTED)
        raise
    except BaseException as error:
        store.set_status(RunStatus.FAILED, error=str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    finally:
        close_workshop(run_id)
        database.close()


def _evaluate(shop: Workshop, given: Scaffold, adapter: Path | None, split: Split, problems: int | None) -> Evaluation:
    draft = read_draft(given.path)
    scaffold_id = shop.keep_scaffold(draft.model_copy(update={"note": f"given: {draft.note}"}))
    adapter_id = keep_adapter(shop, adapter, None) if adapter is not None else None
    shop.store.begin_generation(1, Lever.FIRST, None)
    shop.store.complete_generation(1, scaffold_id=scaffold_id, adapter_id=adapter_id, accepted=True)
    items = [(p.id, 0) for p in shop.task.asked(split)[:problems]]
    rollout_id = plan_rollout(
        shop, RolloutPlan(f"eval/{split}", scaffold_id, adapter_id, generation=1, split=split, items=items)
    )
    if split is Split.TEST:
        shop.store.record_test_read("eval", 1, rollout_id)
    shop.begin_step(f"roll out eval/{split}", [rollout_id])
    run_all(shop, [rollout_id])
    found = estimate(list(shop.store.rewards(rollout_id).values()))
    return Evaluation(
        run_id=shop.run_id,
        rollout_id=rollout_id,
        task=shop.spec.name,
        split=split,
        n=found.n,
        mean=found.mean,
        low=found.low,
        high=found.high,
        causes={str(cause): count for cause, count in shop.store.causes(rollout_id).items()},
        sandbox=shop.settings.sandbox,
    )
