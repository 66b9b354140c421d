"""The trusted program inside a sandbox: starts each Episode in a room of its own and reports how it ended.

    python -s -P -S -c "..." '<config as JSON>'          (started by agents.sandbox, never by hand)

It talks to the host over one inherited SOCK_SEQPACKET socket. The host sends `{"start": n}` with three file descriptors
(a file with the Episode's payload, a pipe for its result, a pipe for what it prints) or `{"kill": n}`; this program
answers `{"began": n}` and `{"ended": n, ...}`. The payload is read, and the result written, by the Episode's own
process (`agents.occupant`): this program never holds a problem, a token or an answer, so an Episode that searches the
memory it was forked with finds none of its neighbours'. When the host closes the socket, everything here dies.

Each Episode gets, in a child that is forked twice (once to enter new namespaces, once to be the first process there):
its own user, process, mount, IPC and network namespace; empty `/tmp`, `/work` and `/dev/shm` of bounded size; no
capability and no right to make further namespaces; resource limits. So it can neither see nor signal a neighbour or
this program, nor leave anything to the Episodes after it, and when its first process dies, all of its processes do.
Processor time and memory of an Episode's whole process tree are watched besides, since limits bind single processes.

Standard library only, and every import is paid for at each start.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from agents.occupant import Config, check, enter_namespaces, prctl, run_episode

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WATCH_S = 0.25
SET_UP_TIMEOUT_S = 20.0
PR_SET_CHILD_SUBREAPER = 36


def _process_trees() -> tuple[dict[int, list[int]], dict[int, tuple[int, int]]]:
    """Children of each process, and (clock ticks with reaped children, resident pages) of each."""
    children: dict[int, list[int]] = {}
    usage: dict[int, tuple[int, int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # gone meanwhile
        children.setdefault(int(fields[1]), []).append(int(name))
        usage[int(name)] = (sum(int(field) for field in fields[11:15]), int(fields[21]))
    return children, usage


def _tree(root: int, children: dict[int, list[int]]) -> list[int]:
    found = [root]
    for pid in found:  # grows while it is walked: breadth first
        found += children.get(pid, [])
    return found


def _private_pages(pids: list[int]) -> int:
    """Resident pages that are not shared with files: shared libraries would count once a process otherwise."""
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                fields = file.read().split()
            pages += int(fields[1]) - int(fields[2])
        except (OSError, IndexError):
            continue
    return pages


class Supervisor:
    """Starts, watches, kills and reaps Episodes as the host says. One thread; nothing of an Episode is kept."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._control = socket.socket(fileno=config["control"])
        os.set_inheritable(self._control.fileno(), False)
        self._episodes: dict[int, tuple[int, float]] = {}
        """First process of the Episode -> (its number, when it began)."""
        self._over: dict[int, str] = {}
        self._wake, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Episodes' first processes are grandchildren: whoever reaps must be their next living ancestor.
        check(prctl(PR_SET_CHILD_SUBREAPER, 1), "become subreaper")

    def run(self) -> None:
        """Serve until the host closes the socket; then leave no process behind."""
        watched, control = time.monotonic(), self._control.fileno()
        gc.collect()
        gc.freeze()
        try:
            while True:
                patience_s = WATCH_S if self._episodes else None
                ready, _, _ = select.select([control, self._wake], [], [], patience_s)
                if self._wake in ready:
                    while _read_some(self._wake):
                        pass
                if control in ready and not self._obey():
                    return
                self._reap()
                if self._episodes and time.monotonic() - watched > WATCH_S:
                    self._watch()
                    watched = time.monotonic()
        finally:
            for pid in list(self._episodes):
                self._kill(pid)
            if not self._config["isolated"]:
                # Orphans that left their session came to us; without a process namespace nothing else ends them.
                for orphan in _tree(os.getpid(), _process_trees()[0])[1:]:
                    self._kill(orphan)

    def _obey(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, 4096, 3)
        if not message:
            return False
        order = json.loads(message)
        if "start" in order:
            self._start(order["start"], fds)
        for pid, (number, _) in list(self._episodes.items()):
            if number == order.get("kill"):
                self._kill(pid)
        return True

    def _start(self, number: int, fds: list[int]) -> None:
        began = time.monotonic()
        reader, writer = os.pipe()
        try:
            launcher = os.fork()
        except OSError as error:
            for fd in (*fds, reader, writer):
                os.close(fd)
            self._report({"ended": number, "lost": f"cannot fork: {error}"})
            return
        if launcher == 0:
            self._launch(fds, writer)
        for fd in (*fds, writer):
            os.close(fd)
        notes = b""
        # Only trusted code holds the other end, for milliseconds; the bound is for a kernel that hangs.
        while select.select([reader], [], [], SET_UP_TIMEOUT_S)[0] and (chunk := os.read(reader, 4096)):
            notes += chunk
        os.close(reader)
        pid, problem = 0, "it ended before it was set up"
        for note in notes.decode("utf-8", "replace").split(";"):
            if note[:1] == "P":
                pid = int(note[1:])
            elif note[:1] == "R":
                problem = ""
            elif note[:1] == "E":
                problem = note[1:]
        if problem:
            if pid:
                self._kill(pid)
            self._report({"ended": number, "lost": problem})
        else:
            self._episodes[pid] = (number, began)
            self._report({"began": number})

    def _launch(self, fds: list[int], writer: int) -> NoReturn:
        """The process between: enters the namespaces, forks their first process, tells its number and goes."""
        supervisor = os.getppid()
        try:
            if self._config["isolated"]:
                enter_namespaces()
            first = os.fork()
            if first == 0:
                run_episode(self._config, fds, writer, supervisor)
            os.write(writer, f"P{first};".encode())
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"E{type(error).__name__}: {error};".encode())
            os._exit(1)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._episodes:
                continue  # a launcher, or an orphan that was adopted
            number, began = self._episodes.pop(pid)
            if not self._config["isolated"]:
                self._kill(pid)  # what is left of its session
            self._report(
                {
                    "ended": number,
                    "status": status,
                    "over": self._over.pop(pid, ""),
                    "wall_s": time.monotonic() - began,
                    "cpu_s": used.ru_utime + used.ru_stime,
                    "memory_mb": used.ru_maxrss / 1024,
                }
            )

    def _watch(self) -> None:
        children, usage = _process_trees()
        for pid in self._episodes:
            tree = _tree(pid, children)
            ticks = sum(usage[p][0] for p in tree if p in usage)
            pages = sum(usage[p][1] for p in tree if p in usage)
            allowed_pages = self._config["memory_mb"] * 2**20 // PAGE_BYTES
            if ticks > self._config["cpu_s"] * CLOCK_TICKS:
                self._over.setdefault(pid, "cpu")
            elif pages > allowed_pages and _private_pages(tree) > allowed_pages:
                self._over.setdefault(pid, "memory")
            if pid in self._over:
                self._kill(pid)

    def _kill(self, pid: int) -> None:
        victims = [pid]
        if not self._config["isolated"]:
            victims = _tree(pid, _process_trees()[0])
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        for victim in victims:
            with contextlib.suppress(OSError):
                os.kill(victim, signal.SIGKILL)

    def _report(self, ending: dict[str, object]) -> None:
        self._control.send(json.dumps(ending).encode())


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


def main() -> None:
    """Entry point; the configuration is the last argument."""
    Supervisor(json.loads(sys.argv[-1])).run()
