"""Rolling out: a Scaffold meets Problems in a sandbox, and each attempt becomes an EpisodeResult.

    with Gateway(engine, recorder) as gateway:
        roll_out(scaffold, specs, policy=policy, limits=limits, sandbox=BubblewrapSandbox(), gateway=gateway,
                 on_result=print)

`roll_out` runs one shard of a `solve` Scaffold in one sandbox; `run_program` runs a `program` Scaffold once. Who scores
sees only what comes back here.

Causes are decided on the host, from what the host and the supervisor saw: a Scaffold can pretend any cause that counts
as its own failure, but neither of the two that are repeated. An Episode whose model call failed is ENGINE_FAILED
whatever it answered. SANDBOX_LOST means that the sandbox ended under the Episode, or the kernel killed it although it
was far below its memory limit. A Scaffold can neither signal nor see the supervisor, so it should not be able to bring
this about; one that exhausts the machine's memory together with its neighbours, or gets out through the kernel, could,
and cannot be told from a fault: whoever repeats lost Episodes should bound the repeats.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from agents.calls import CallPolicy
from agents.episode import Cause, EpisodeResult, EpisodeSpec
from agents.gateway import CallTotals, Gateway
from agents.sandbox import Room, Sandbox
from agents.scaffold import Scaffold
from agents.shard import Ending, Job, Shard
from tasks.contract import EpisodeLimits

__all__ = ["ProgramResult", "roll_out", "run_program"]

T = TypeVar("T")

WAKE_S = 1.0
"""Who waits for a sandbox looks up this often: Python raises what a thread is sent (a time-out of Prefect's) only
between two of its own steps, never inside one long wait."""
DETAIL_CHARS = 4000
PRINTED_EVENT_CHARS = 2000
WORK_FOLDER_FILES = 10_000
WORK_FOLDER_DEPTH = 32
WORK_FOLDER_FACTOR = 4
"""A program's working folder may hold this many times `file_mb` in all (one file: `file_mb`)."""


@dataclass(frozen=True)
class ProgramResult:
    """What came of a `program` run. The working folder holds plain files and folders only, when this is returned."""

    cause: Cause
    wall_s: float
    log: str
    """Beginning and end of what it printed."""
    detail: str
    removed: tuple[str, ...]
    """What was deleted from the working folder: links, sockets, devices, and folders nested too deep."""
    calls: CallTotals


@dataclass(frozen=True)
class _Verdict:
    cause: Cause
    detail: str = ""
    answer: JsonValue = None
    events: tuple[JsonValue, ...] = ()


def roll_out(
    scaffold: Scaffold,
    episodes: Sequence[EpisodeSpec],
    *,
    policy: CallPolicy,
    limits: EpisodeLimits,
    sandbox: Sandbox,
    gateway: Gateway,
    on_result: Callable[[EpisodeResult], None],
    concurrency: int = 64,
) -> None:
    """Run one shard of Episodes in one sandbox, up to `concurrency` at a time.

    `on_result` is called in the caller's thread, once for each Episode, as each ends; when it raises (or Ctrl-C comes)
    the sandbox is killed with all that runs in it, then the exception goes on.

    Args:
        policy: what the gateway imposes on the model calls.
        limits: of each Episode; `wall_s` does not count time spent waiting for the model.
    """
    unreported = dict(enumerate(episodes))
    tokens: dict[int, str] = {}
    results: queue.SimpleQueue[EpisodeResult | BaseException | None] = queue.SimpleQueue()

    def jobs() -> Iterator[Job]:
        for number, spec in enumerate(episodes):
            token = tokens[number] = gateway.open(spec.episode_id, spec.problem.id, spec.seed, policy)
            problem = {**spec.problem.fields, "id": spec.problem.id, "prompt": spec.problem.prompt}
            yield Job(number, {"kind": "solve", "token": token, "seed": spec.seed, "problem": problem})

    def on_ending(ending: Ending) -> None:
        totals = gateway.close_episode(tokens.pop(ending.number))
        verdict = _judge(ending, totals, limits, sandbox.isolated, _read_answer(ending, limits))
        episode_id = unreported.pop(ending.number).episode_id
        results.put(
            EpisodeResult(episode_id, verdict.cause, verdict.answer, ending.wall_s, verdict.events, verdict.detail)
        )

    shard = Shard(
        sandbox,
        Room(scaffold.path, gateway.socket_path, limits),
        concurrency,
        waited_s=lambda number: gateway.totals(tokens[number]).waited_s,
    )

    def main() -> None:
        try:
            reason = shard.run(jobs(), on_ending)
            for spec in unreported.values():
                results.put(EpisodeResult(spec.episode_id, Cause.SANDBOX_LOST, None, 0.0, detail=reason))
        except BaseException as error:
            results.put(error)
        finally:
            for token in tokens.values():
                gateway.close_episode(token)
            results.put(None)

    # The sandbox dies with the thread that started it, so that one does nothing else.
    thread = threading.Thread(target=main, name="sia-shard")
    thread.start()
    try:
        while (result := _next(results)) is not None:
            if isinstance(result, BaseException):
                raise result
            on_result(result)
    finally:
        shard.stop()
        thread.join()


def run_program(
    scaffold: Scaffold,
    dataset_dir: Path,
    working_dir: Path,
    *,
    policy: CallPolicy,
    limits: EpisodeLimits,
    sandbox: Sandbox,
    gateway: Gateway,
    episode_id: int,
    seed: int,
) -> ProgramResult:
    """Run `agent.py --dataset_dir /input --working_dir /work` once, and leave its files in `working_dir`.

    Both folders are handed over: as root, the input is made readable for the sandbox's user and the working folder is
    given to it. What the program prints beyond `output_bytes` is dropped from the middle; that alone ends nothing. The
    working folder may hold at most `WORK_FOLDER_FACTOR * file_mb` and `WORK_FOLDER_FILES` files (looked at about twice
    a second, so a fast writer gets somewhat past it before it is killed).

    Returns:
        FINISHED if the program exited with status 0, else why not. Whether it answered is for the task to read.
    """
    working_dir.mkdir(parents=True, exist_ok=True)
    token = gateway.open(episode_id, None, seed, policy)
    endings: list[Ending] = []
    failures: list[BaseException] = []
    shard = Shard(
        sandbox,
        Room(scaffold.path, gateway.socket_path, limits, dataset_dir, working_dir),
        concurrency=1,
        waited_s=lambda _: gateway.totals(token).waited_s,
        breach=lambda _: _folder_breach(working_dir, limits),
    )
    reasons: list[str] = []

    def main() -> None:
        try:
            job = Job(0, {"kind": "program", "token": token, "seed": seed}, flood_kills=False)
            reasons.append(shard.run(iter([job]), endings.append))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=main, name="sia-program")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(WAKE_S)
    finally:
        shard.stop()
        thread.join()
        totals = gateway.close_episode(token)
        removed = _sweep(working_dir)
    if failures:
        raise failures[0]
    ending = endings[0] if endings else Ending(0, lost=reasons[0])
    exited_well = os.WIFEXITED(ending.status) and os.WEXITSTATUS(ending.status) == 0
    log = ending.printed.decode("utf-8", "replace").replace("\0", "")
    own = _Verdict(Cause.FINISHED) if exited_well else _Verdict(Cause.CRASHED, log[-DETAIL_CHARS:])
    if "MemoryError" in log[-DETAIL_CHARS:] and not exited_well:
        own = _Verdict(Cause.MEMORY_LIMIT, log[-DETAIL_CHARS:])
    verdict = _judge(ending, totals, limits, sandbox.isolated, own)
    return ProgramResult(verdict.cause, ending.wall_s, log, verdict.detail, removed, totals)


def _next(results: queue.SimpleQueue[T]) -> T:
    while True:
        try:
            return results.get(timeout=WAKE_S)
        except queue.Empty:
            continue


def _judge(ending: Ending, totals: CallTotals, limits: EpisodeLimits, isolated: bool, own: _Verdict) -> _Verdict:
    """The cause of an ending; `own` is what the Scaffold says of itself, which counts last."""
    events = own.events
    if totals.failures:
        return _Verdict(Cause.ENGINE_FAILED, f"{totals.failures} model calls failed", events=events)
    if ending.lost:
        return _Verdict(Cause.SANDBOX_LOST, ending.lost[:DETAIL_CHARS], events=events)
    if ending.stopped is not None:
        return _Verdict(ending.stopped, _limit_text(ending.stopped, limits), events=events)
    if os.WIFSIGNALED(ending.status):
        cause = _signal_cause(ending, limits, isolated)
        name = signal.Signals(os.WTERMSIG(ending.status)).name
        return _Verdict(cause, f"killed by {name}; {_limit_text(cause, limits)}".rstrip("; "), events=events)
    if own.cause is Cause.CRASHED and totals.refused and "call_limit" in own.detail:
        return _Verdict(Cause.CALL_LIMIT, own.detail, events=events)
    return own


def _signal_cause(ending: Ending, limits: EpisodeLimits, isolated: bool) -> Cause:
    which = os.WTERMSIG(ending.status)
    if which == signal.SIGXCPU or (which == signal.SIGKILL and ending.cpu_s >= 0.5 * limits.cpu_s):
        return Cause.CPU_LIMIT
    if which == signal.SIGXFSZ:
        return Cause.OUTPUT_LIMIT
    if which != signal.SIGKILL or not isolated:
        return Cause.CRASHED  # bare processes can kill themselves
    # The first process of a namespace cannot be killed from inside it, and we did not: the kernel ran out of memory.
    return Cause.MEMORY_LIMIT if ending.memory_mb >= 0.5 * limits.memory_mb else Cause.SANDBOX_LOST


def _limit_text(cause: Cause, limits: EpisodeLimits) -> str:
    texts = {
        Cause.TIMED_OUT: f"more than {limits.wall_s:g} s besides waiting for the model",
        Cause.CPU_LIMIT: f"more than {limits.cpu_s} s of processor time",
        Cause.MEMORY_LIMIT: f"more than {limits.memory_mb} MB of memory",
        Cause.OUTPUT_LIMIT: f"more than {limits.output_bytes} bytes said, or {limits.file_mb} MB written",
    }
    return texts.get(cause, "")


def _read_answer(ending: Ending, limits: EpisodeLimits) -> _Verdict:
    """What a `solve` Episode's process says: its events and the first ending it wrote. Every byte is distrusted."""
    events: list[JsonValue] = []
    end: dict[str, JsonValue] | None = None
    garbled = False
    for line in ending.result.split(b"\n"):
        frame = _frame(line) if line else {}
        if frame is None:
            garbled = True
        elif "log" in frame:
            events.append(frame["log"])
        elif frame and end is None:
            end = frame
    printed = ending.printed.decode("utf-8", "replace").replace("\0", "")
    if printed:
        events.append({"printed": printed[:PRINTED_EVENT_CHARS]})
    said = tuple(events)
    if end is None:
        code = f"status {os.WEXITSTATUS(ending.status)}" if os.WIFEXITED(ending.status) else "a signal"
        cause = Cause.BAD_ANSWER if garbled else Cause.CRASHED
        text = "what it returned is no JSON" if garbled else f"it exited with {code} before answering"
        return _Verdict(cause, f"{text}\n{printed[-1000:]}".strip(), events=said)
    if "error" in end:
        return _Verdict(Cause.CRASHED, str(end["error"])[-DETAIL_CHARS:], events=said)
    if "memory" in end:
        return _Verdict(Cause.MEMORY_LIMIT, _limit_text(Cause.MEMORY_LIMIT, limits), events=said)
    if len(ending.result) > limits.output_bytes:
        return _Verdict(Cause.OUTPUT_LIMIT, _limit_text(Cause.OUTPUT_LIMIT, limits), events=said)
    if "bad" in end:
        return _Verdict(Cause.BAD_ANSWER, str(end["bad"])[:DETAIL_CHARS], events=said)
    answer = end.get("answer")
    if answer is None:
        return _Verdict(Cause.NO_ANSWER, events=said)
    return _Verdict(Cause.FINISHED, answer=answer, events=said)


def _frame(line: bytes) -> dict[str, JsonValue] | None:
    """One line as a JSON object that every store can hold (finite numbers, whole Unicode, no NUL), else None."""
    try:
        frame = json.loads(line)
        text = json.dumps(frame, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        return None
    return frame if isinstance(frame, dict) and "\\u0000" not in text else None


def _entries(folder: Path) -> Iterator[tuple[Path, int, os.stat_result]]:
    """All below a folder as (path, depth, lstat), parents first and before they are read; what vanishes is skipped.

    Not `os.walk`, which a folder nested a thousand deep would break.
    """
    waiting = [(folder, 0)]
    while waiting:
        parent, depth = waiting.pop()
        try:
            names = os.listdir(parent)
        except OSError:
            continue
        for name in names:
            path = parent / name
            try:
                status = path.lstat()
            except OSError:
                continue
            yield path, depth + 1, status
            if stat.S_ISDIR(status.st_mode) and depth + 1 < WORK_FOLDER_DEPTH:
                waiting.append((path, depth + 1))


def _folder_breach(folder: Path, limits: EpisodeLimits) -> Cause | None:
    total_bytes = 0
    for entries, (_, depth, status) in enumerate(_entries(folder), start=1):
        total_bytes += status.st_blocks * 512
        over_bytes = total_bytes > WORK_FOLDER_FACTOR * limits.file_mb * 2**20
        if entries > WORK_FOLDER_FILES or depth >= WORK_FOLDER_DEPTH or over_bytes:
            return Cause.OUTPUT_LIMIT
    return None


def _sweep(folder: Path) -> tuple[str, ...]:
    """Delete all that is no plain file or folder, so that whoever reads the folder reads what is in it."""
    removed: list[str] = []
    for path, depth, status in _entries(folder):
        if stat.S_ISDIR(status.st_mode) and depth < WORK_FOLDER_DEPTH:
            os.chmod(path, 0o755)
        elif stat.S_ISREG(status.st_mode):
            os.chmod(path, 0o644)
        else:
            # rm, since Python's own removal of a folder recurses as deep as the folder does
            subprocess.run(["rm", "-rf", "--", str(path)], check=False)
            removed.append(path.relative_to(folder).as_posix())
    return tuple(sorted(removed))
