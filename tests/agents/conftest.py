"""A small laboratory: a real sandbox and a real gateway, with a model that can only add."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agents.calls import CallKey, CallPolicy
from agents.decision import ScaffoldDraft
from agents.episode import EpisodeResult, EpisodeSpec
from agents.gateway import Gateway
from agents.model import Completion, EngineError, ModelRequest, RequestError, Sampling
from agents.rollout import roll_out
from agents.sandbox import BubblewrapSandbox, Sandbox
from agents.scaffold import Scaffold, store_scaffold
from tasks.contract import EpisodeLimits, Problem


class AddingEngine:
    """Answers `a+b`. On command it fails (FAIL n: n times), refuses (REFUSE) or takes its time (SLOW seconds)."""

    name = "adding-machine"
    trainable = False

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []
        self._failures: dict[str, int] = {}
        self._lock = threading.Lock()

    def submit(self, request: ModelRequest) -> Future[Completion]:
        future: Future[Completion] = Future()
        text = request.messages[-1].content if request.messages else request.prompt or ""
        with self._lock:
            self.requests.append(request)
            fails = re.search(r"FAIL (\d+)", text)
            if fails and self._failures.setdefault(text, 0) < int(fails[1]):
                self._failures[text] += 1
                future.set_exception(EngineError("the adding machine jammed"))
                return future
        if "REFUSE" in text:
            future.set_exception(RequestError("too long for an adding machine"))
            return future
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        answer = Completion(str(sum(numbers)), tuple(range(len(text))), (7, 8), (-0.5, -0.25), "stop")
        if slow := re.search(r"SLOW ([\d.]+)", text):
            threading.Timer(float(slow[1]), future.set_result, [answer]).start()
        else:
            future.set_result(answer)
        return future

    def close(self) -> None:
        pass


@dataclass
class MemoryRecorder:
    """Keeps the record in dictionaries, and the order of what happened in `story`."""

    finished: dict[CallKey, Completion] = field(default_factory=dict)
    begun: list[tuple[CallKey, Sampling, ModelRequest]] = field(default_factory=list)
    story: list[tuple[str, CallKey]] = field(default_factory=list)
    delay_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def recorded(self, key: CallKey) -> Completion | None:
        with self.lock:
            return self.finished.get(key)

    def begin(self, key: CallKey, asked: Sampling, request: ModelRequest) -> Completion | None:
        with self.lock:
            if key in self.finished:
                return self.finished[key]
            self.begun.append((key, asked, request))
            self.story.append(("begin", key))
        return None

    def finish(self, key: CallKey, completion: Completion, wall_s: float) -> Completion:
        assert wall_s >= 0
        time.sleep(self.delay_s)
        with self.lock:
            self.story.append(("finish", key))
            return self.finished.setdefault(key, completion)

    def failed(self, key: CallKey, reason: str) -> None:
        assert reason
        with self.lock:
            self.story.append(("failed", key))


@dataclass
class Lab:
    """Runs Scaffolds. `run` returns results by problem id."""

    folder: Path
    engine: AddingEngine
    recorder: MemoryRecorder
    gateway: Gateway

    def scaffold(self, source: str) -> Scaffold:
        return store_scaffold(ScaffoldDraft(files={"agent.py": source}, note="test"), self.folder / "scaffolds")

    def run(
        self,
        source: str,
        problems: Sequence[Problem],
        *,
        limits: EpisodeLimits | None = None,
        sandbox: Sandbox | None = None,
        concurrency: int = 64,
        train: bool = False,
        max_calls: int = 16,
        on_result: Callable[[EpisodeResult], None] = lambda _: None,
    ) -> dict[str, EpisodeResult]:
        results: dict[str, EpisodeResult] = {}
        specs = [EpisodeSpec(1000 + i, problem, 0, 31 * i) for i, problem in enumerate(problems)]
        names = {spec.episode_id: spec.problem.id for spec in specs}

        def keep(result: EpisodeResult) -> None:
            assert names[result.episode_id] not in results, "one result for each Episode"
            results[names[result.episode_id]] = result
            on_result(result)

        roll_out(
            self.scaffold(source),
            specs,
            policy=CallPolicy(adapter=None, train=train, max_calls=max_calls, max_tokens_per_call=50),
            limits=limits or EpisodeLimits(wall_s=10, cpu_s=10),
            sandbox=sandbox or BubblewrapSandbox(),
            gateway=self.gateway,
            on_result=keep,
            concurrency=concurrency,
        )
        return results


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    engine, recorder = AddingEngine(), MemoryRecorder()
    with Gateway(engine, recorder) as gateway:
        yield Lab(tmp_path_factory.mktemp("lab"), engine, recorder, gateway)


def child_processes() -> list[str]:
    """Command lines of all living processes below this one."""
    import psutil

    mine = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            mine.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # ended meanwhile
    return mine


@pytest.fixture
def no_orphans() -> Iterator[None]:
    """After the test no process of a sandbox is left, neither ours nor adopted by somebody else."""
    import psutil

    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [line for line in child_processes() if "from agents.inside" in line]
        for process in psutil.process_iter(["cmdline", "ppid"]):
            line = " ".join(process.info["cmdline"] or [])
            if process.info["ppid"] == 1 and "from agents.inside import main" in line:
                left.append(line)
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)
