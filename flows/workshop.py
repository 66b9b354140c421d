"""The workshop: what one process needs to work on one Run, each part opened on first use.

Prefect tasks take plain ids and ask `workshop(run_id)` for the rest, so that the same task works in the process that
started the Run, in one that resumes it, and in a worker that retries it from the Prefect UI. A resumed Run whose
next steps are all on record never loads the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from agents.decision import FeedbackAgent, MetaAgent, ScaffoldDraft
from agents.gateway import Gateway
from agents.model import Engine
from agents.sandbox import BubblewrapSandbox, NoSandbox, Sandbox
from agents.scaffold import Scaffold, read_scaffold, store_scaffold
from agents.shard import stop_all
from flows.progress import Progress
from flows.settings import Places, RunSettings, SandboxKind
from flows.state.calls import SqlCallRecorder
from flows.state.database import Database
from flows.state.store import Store
from flows.watch import QuietProgress
from tasks.contract import Problem, Split, Task, TaskKind, TaskSpec
from tasks.loader import load_task

if TYPE_CHECKING:
    from training.trainer import Trainer

Part = TypeVar("Part")


class Stopped(Exception):
    """Raised when work is asked of a Run that is being stopped; it is not retried, and goes on when resumed."""


class Workshop:
    """Opened for one Run; `close` ends its threads and removes its socket."""

    def __init__(self, places: Places, database: Database, run_id: str, progress: Progress) -> None:
        self.places = places
        self.database = database
        self.run_id = run_id
        self.progress = progress
        self.store = Store(database, run_id)
        row = self.store.run()
        self.settings = RunSettings.model_validate(row.settings)
        self.task: Task = load_task(row.task, places.cache, progress.note)
        self.trainer: tuple[int, int, Trainer] | None = None
        """(generation, iterations done, trainer) of the WeightUpdate at hand."""
        self._lock = threading.RLock()
        self._parts: dict[str, object] = {}
        self._problems: dict[Split, dict[str, Problem]] = {}
        self._done, self._counted, self._reward = 0, 0, 0.0
        self._stopping = threading.Event()
        self._scaffolds: dict[str, Scaffold] = {}

    @property
    def spec(self) -> TaskSpec:
        """The task's specification."""
        return self.task.spec

    @property
    def folder(self) -> Path:
        """The Run's own folder."""
        return self.places.run_folder(self.run_id)

    def problem(self, split: Split, problem_id: str) -> Problem:
        """A problem by its id."""
        with self._lock:
            if split not in self._problems:
                self._problems[split] = {p.id: p for p in self.task.problems(split)}
        return self._problems[split][problem_id]

    @property
    def sandbox(self) -> Sandbox:
        """Where scaffold code runs; checked once to hold.

        Raises:
            SandboxUnavailable: bubblewrap does not work on this machine.
        """

        def make() -> Sandbox:
            kind = self.settings.sandbox
            sandbox: Sandbox = BubblewrapSandbox() if kind is SandboxKind.BUBBLEWRAP else NoSandbox()
            sandbox.preflight()
            return sandbox

        return self._part("sandbox", make)

    @property
    def engine(self) -> Engine:
        """The Task-Specific Agent's model."""

        def make() -> Engine:
            from training.engine import LocalEngine

            # A program may never ask a model, so its is converted when it does; who is sure to ask waits (and, where
            # there is none, is told so) before any work begins.
            later = self.spec.kind is TaskKind.PROGRAM
            return LocalEngine(
                (lambda: self.model_folder) if later else self.model_folder,
                self.adapter_path,
                deterministic=self.settings.deterministic,
                name=Path(self.settings.model or "local").name,
            )

        return self._part("engine", make)

    @property
    def model_folder(self) -> Path:
        """The base model's folder, converted on first use."""

        def make() -> Path:
            from training.base_model import ensure_base_model

            name = self.settings.model or ""
            return Path(name) if "/" in name else ensure_base_model(name, self.progress.note)

        return self._part("model", make)

    @property
    def gateway(self) -> Gateway:
        """The sandboxes' only way out, listening."""

        def make() -> Gateway:
            return Gateway(self.engine, SqlCallRecorder(self.database)).start()

        return self._part("gateway", make)

    @property
    def meta_agent(self) -> MetaAgent:
        """Writes the first Scaffold."""

        def make() -> MetaAgent:
            from agents.meta_agent import OfflineMetaAgent

            return OfflineMetaAgent()

        return self._part("meta", make)

    @property
    def feedback_agent(self) -> FeedbackAgent:
        """Decides from evidence."""

        def make() -> FeedbackAgent:
            from agents.feedback_agent import OfflineFeedbackAgent
            from agents.levers import LeverRules

            return OfflineFeedbackAgent(
                LeverRules(harness_patience=self.settings.harness_patience),
                self.settings.search,
                self.settings.weights.model_dump(),
            )

        return self._part("feedback", make)

    def begin_step(self, name: str, rollout_ids: Sequence[int]) -> None:
        """Tell the watcher of a step over some rollouts, those Episodes that are on record counted as done."""
        rollouts = [self.store.rollout(i) for i in rollout_ids]
        left = sum(len(self.store.unfinished_episodes(i)) for i in rollout_ids)
        total = sum(r.episodes for r in rollouts)
        with self._lock:
            self._done, self._counted, self._reward = total - left, 0, 0.0
        self.progress.step(name, total)

    def count_episode(self, reward: float) -> None:
        """One Episode of the step has ended. For the eye only: a mean of what the task's verifier says of the answers
        as they come, before a model-only task asks where they came from. The scores of record come later, from whole
        rollouts."""
        with self._lock:
            self._done += 1
            self._counted += 1
            self._reward += reward
            self.progress.advance(self._done, self._reward / self._counted)

    def adapter_path(self, adapter_id: str) -> Path:
        """Folder of an Adapter."""
        return self.places.adapters / adapter_id

    def scaffold(self, scaffold_id: str) -> Scaffold:
        """A stored Scaffold, checked once."""
        with self._lock:
            if scaffold_id not in self._scaffolds:
                self._scaffolds[scaffold_id] = read_scaffold(self.places.scaffolds / scaffold_id)
            return self._scaffolds[scaffold_id]

    def keep_scaffold(self, draft: ScaffoldDraft) -> str:
        """Store a draft's files and row; returns the Scaffold's id.

        Raises:
            ScaffoldError: the files are no Scaffold.
        """
        scaffold = store_scaffold(draft, self.places.scaffolds)
        self.store.save_scaffold(scaffold.id, self.spec.kind, draft.note)
        return scaffold.id

    def check(self) -> None:
        """To be called before work begins.

        Raises:
            Stopped: the person stopped the Run; nothing new is begun.
        """
        if self._stopping.is_set():
            raise Stopped("stopped")

    def stop(self) -> None:
        """Begin nothing new and end all sandboxes, so that threads which wait for them come back at once."""
        self._stopping.set()
        stop_all()

    def close(self) -> None:
        """End what was opened."""
        with self._lock:
            gateway, engine = self._parts.get("gateway"), cast("Engine | None", self._parts.get("engine"))
            self._parts.clear()
        # Without the lock, which a thread of theirs may be waiting for (the engine's, for the model's folder).
        if isinstance(gateway, Gateway):
            gateway.stop()
        if engine is not None:
            engine.close()

    def _part(self, name: str, make: Callable[[], Part]) -> Part:
        with self._lock:
            if name not in self._parts:
                self._parts[name] = make()
            return self._parts[name]  # type: ignore[return-value]


_open: dict[str, Workshop] = {}
_open_lock = threading.Lock()


def open_workshop(places: Places, database: Database, run_id: str, progress: Progress) -> Workshop:
    """Open the workshop of a Run for this process."""
    shop = Workshop(places, database, run_id, progress)
    with _open_lock:
        _open[run_id] = shop
    return shop


def workshop(run_id: str) -> Workshop:
    """This process's workshop of a Run, opened from the environment's places if need be."""
    with _open_lock:
        shop = _open.get(run_id)
    if shop is None:
        places = Places.from_environment()
        shop = open_workshop(places, Database.open(places.database_url), run_id, QuietProgress())
    return shop


def close_workshop(run_id: str) -> None:
    """Close and forget the workshop of a Run."""
    with _open_lock:
        shop = _open.pop(run_id, None)
    if shop is not None:
        shop.close()
