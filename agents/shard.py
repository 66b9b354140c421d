"""One sandbox and the Episodes in it: starts them, drains their pipes, keeps their time, and says how each ended.

The supervisor in the room (`agents.inside`) is trusted; all that comes out of an Episode's own pipes is not, and is
only ever collected here as bounded bytes. Time is kept on the host, because only the host knows how long an Episode
waited for the model: `wall_s` bounds an Episode's own time, so that a slow or crowded model times nobody out.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from agents.episode import Cause
from agents.sandbox import Room, RunningSandbox, Sandbox

__all__ = ["Ending", "Job", "Shard"]

POLL_S = 0.5
START_PATIENCE_S = 60.0
RESULT_SLACK_BYTES = 64 * 1024
"""What an ending may add to `output_bytes`: a traceback as JSON."""
PRINTED_KEPT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Job:
    """An Episode to start. `payload` goes to its own process alone; `flood_kills` False drops excess output."""

    number: int
    payload: Mapping[str, JsonValue]
    flood_kills: bool = True


@dataclass(frozen=True)
class Ending:
    """How an Episode's processes ended. `result` and `printed` are the Scaffold's own: believe nothing in them."""

    number: int
    status: int = 0
    """As of `os.wait`."""
    stopped: Cause | None = None
    """Why the host or the supervisor killed it, if one did."""
    lost: str = ""
    """The reason, if the Episode was lost with its sandbox or never came to run."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_mb: float = 0.0
    result: bytes = b""
    printed: bytes = b""


@dataclass
class _Live:
    job: Job
    result_fd: int
    printed_fd: int
    sent: float
    began: float | None = None
    stopped: Cause | None = None
    killed: bool = False
    result: bytearray = field(default_factory=bytearray)
    printed: bytearray = field(default_factory=bytearray)


_running: set[Shard] = set()
_running_lock = threading.Lock()


def stop_all() -> None:
    """Stop every Shard of this process, from any thread: what a host does when it is told to end."""
    with _running_lock:
        shards = list(_running)
    for shard in shards:
        shard.stop()


class Shard:
    """Runs Jobs in one sandbox.

    Args:
        sandbox: makes the room.
        room: what the room holds.
        concurrency: Jobs at a time.
        waited_s: seconds that a running Job has waited for the model (not counted against its wall clock).
        breach: looks at a running Job from outside and names the limit it passed, if any (such as a full folder).
    """

    def __init__(
        self,
        sandbox: Sandbox,
        room: Room,
        concurrency: int,
        waited_s: Callable[[int], float],
        breach: Callable[[int], Cause | None] = lambda _: None,
    ) -> None:
        self._sandbox = sandbox
        self._room = room
        self._concurrency = concurrency
        self._waited_s = waited_s
        self._breach = breach
        self._live: dict[int, _Live] = {}
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._wake_lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()

    def stop(self) -> None:
        """Make `run` kill everything and return soon. From any thread."""
        self._stopping.set()
        with self._wake_lock:
            if self._wake_writer >= 0:
                os.write(self._wake_writer, b"!")

    def run(self, jobs: Iterator[Job], on_ending: Callable[[Ending], None]) -> str:
        """Run all jobs, once; `on_ending` is called for each that was started. This thread starts the sandbox.

        Returns an empty string, or why the sandbox died before all was done. Leaves no process behind however it ends.
        """
        host_end, room_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        running: RunningSandbox | None = None
        complaint = ""
        finished = False
        with _running_lock:
            _running.add(self)
        try:
            running = self._sandbox.start(self._room, host_end, room_end)
            room_end.close()
            self._selector.register(host_end, selectors.EVENT_READ)
            self._selector.register(self._wake_reader, selectors.EVENT_READ)
            finished = self._pump(host_end, jobs, on_ending)
        finally:
            room_end.close()
            if running is not None:
                complaint = running.stop()
            host_end.close()
            reason = complaint or ("stopped by the host" if self._stopping.is_set() else "the sandbox died")
            for number in list(self._live):
                on_ending(self._finish(number, {"lost": reason}))
            self._selector.close()
            with _running_lock:
                _running.discard(self)
            with self._wake_lock:
                os.close(self._wake_reader)
                os.close(self._wake_writer)
                self._wake_writer = -1
        return "" if finished else reason

    def _pump(self, control: socket.socket, jobs: Iterator[Job], on_ending: Callable[[Ending], None]) -> bool:
        more = True
        while not self._stopping.is_set():
            while more and len(self._live) < self._concurrency:
                job = next(jobs, None)
                if job is None:
                    more = False
                elif not self._start(control, job):
                    return False
            if not self._live:
                return True
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is control:
                    message = _receive(control)
                    if message is None:
                        return False
                    if "ended" in message:
                        on_ending(self._finish(int(str(message["ended"])), message))
                    elif live := self._live.get(int(str(message["began"]))):
                        live.began = time.monotonic()
                elif key.data is not None:
                    self._drain(key.data, key.fd)
            self._keep_limits(control)
        return False

    def _start(self, control: socket.socket, job: Job) -> bool:
        payload = os.memfd_create("sia")
        result, result_writer = os.pipe()
        printed, printed_writer = os.pipe()
        try:
            with open(payload, "wb", closefd=False) as file:
                file.write(json.dumps(job.payload).encode())
            order = json.dumps({"start": job.number}).encode()
            socket.send_fds(control, [order], [payload, result_writer, printed_writer])
        except OSError:
            os.close(result)
            os.close(printed)
            return False
        finally:
            for fd in (payload, result_writer, printed_writer):
                os.close(fd)
        self._live[job.number] = _Live(job, result, printed, time.monotonic())
        for fd in (result, printed):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, job.number)
        return True

    def _drain(self, number: int, fd: int) -> bool:
        """Read what one pipe holds; False at its end or when it is empty."""
        live = self._live.get(number)
        if live is None:
            return False
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._forget(fd)
            return False
        into, bound = live.printed, self._room.limits.output_bytes
        if fd == live.result_fd:
            into, bound = live.result, bound + RESULT_SLACK_BYTES
        into += data
        if len(into) > bound:
            if live.job.flood_kills:
                live.stopped = live.stopped or Cause.OUTPUT_LIMIT
                del into[bound:]
            else:
                del into[bound // 2 : len(into) - bound // 2]  # the beginning and the end tell most
        return True

    def _forget(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def _keep_limits(self, control: socket.socket) -> None:
        now = time.monotonic()
        for number, live in self._live.items():
            if live.stopped is None and self._left_s(number, live, now) <= 0:
                live.stopped = Cause.TIMED_OUT
            if live.stopped is None and live.began is not None:
                live.stopped = self._breach(number)
            if live.stopped is not None and not live.killed:
                live.killed = True
                _send(control, {"kill": number})

    def _left_s(self, number: int, live: _Live, now: float) -> float:
        if live.began is None:
            return live.sent + START_PATIENCE_S + self._room.limits.wall_s - now
        own_s = now - live.began
        wall_s = self._room.limits.wall_s
        # The model's share is only asked for when it matters.
        return wall_s - own_s if own_s < wall_s else wall_s + self._waited_s(number) - own_s

    def _patience_s(self) -> float:
        now = time.monotonic()
        soonest = min(self._left_s(number, live, now) for number, live in self._live.items())
        return min(max(soonest, 0.01), POLL_S)

    def _finish(self, number: int, message: Mapping[str, JsonValue]) -> Ending:
        live = self._live[number]
        for fd in (live.result_fd, live.printed_fd):
            while self._drain(number, fd):
                if live.stopped is Cause.OUTPUT_LIMIT:
                    break
            self._forget(fd)
            os.close(fd)
        del self._live[number]
        # A job that was not begun in time has not run: the room's or the machine's fault, so no measurement.
        idle = "it was not begun in time" if live.began is None and live.stopped is Cause.TIMED_OUT else ""
        over = {"cpu": Cause.CPU_LIMIT, "memory": Cause.MEMORY_LIMIT}.get(str(message.get("over")))
        return Ending(
            number=number,
            status=int(str(message.get("status", 0))),
            stopped=live.stopped or over,
            lost=str(message.get("lost", "")) or idle,
            wall_s=_float(message.get("wall_s")) or time.monotonic() - (live.began or live.sent),
            cpu_s=_float(message.get("cpu_s")),
            memory_mb=_float(message.get("memory_mb")),
            result=bytes(live.result),
            printed=bytes(live.printed),
        )


def _receive(control: socket.socket) -> dict[str, JsonValue] | None:
    try:
        message = control.recv(4096)
    except OSError:
        return None
    return json.loads(message) if message else None


def _send(control: socket.socket, order: dict[str, JsonValue]) -> None:
    with contextlib.suppress(OSError):  # the sandbox is gone: the next read says so
        control.send(json.dumps(order).encode())


def _float(value: JsonValue) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
