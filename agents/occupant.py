"""The process of one Episode inside a sandbox: furnishes its room, gives up every right, then runs the Scaffold.

Trusted up to the moment when the Scaffold's code is imported (`solve`) or executed (`program`). Everything that
protects the rest is therefore set up before: namespaces by `enter_namespaces` in the process that forks this one,
private folders, own /proc and loopback by `_furnish`, resource limits by `_set_limits`. Used by `agents.inside` only.

Memory is bounded by `memory_mb` for the processes together, and by `file_mb` for each of `/tmp`, `/work`, `/dev/shm`.
With `isolated` false (`--sandbox none`) there are no namespaces: sessions, limits and kills only, and no guarantee.

Standard library only. What is imported here is there already when a Scaffold imports it: forked children share it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math  # noqa: F401
import os
import random
import re  # noqa: F401
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypedDict

PORT = 8000
"""Where the gateway answers on an Episode's own loopback."""
DETAIL_CHARS = 4000
REPLY_BYTES = 16 * 2**20
CPU_GRACE_S = 2
"""The supervisor's watch ends an Episode at `cpu_s`; the kernel's own limit stands behind it, for each process."""
NOFILE = 256
NICENESS = 5
"""A Scaffold that spins must not starve the supervisor, nor the model where that runs on the same processors."""
RELAY_CONNECTIONS = 32
TMP_INODES = 20_000

NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, ipc, user, pid, net
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
MS_NOSUID_NODEV, MS_NOEXEC = 2 | 4, 8
SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8914, 0x41

_libc = ctypes.CDLL(None, use_errno=True)


class Config(TypedDict):
    """What the host tells the supervisor: the paths as they are in here, and the limits of each Episode.

    `home` is where this program is imported from, and `site` what is added for Scaffolds.
    """

    control: int
    isolated: bool
    scaffold: str
    input: str
    work: str
    gateway: str
    home: str
    python: str
    site: list[str]
    cpu_s: int
    memory_mb: int
    file_mb: int
    processes: int


def prctl(option: int, value: int) -> int:
    """0, or not 0 and the reason in errno."""
    return int(_libc.prctl(option, value, 0, 0, 0))


def check(outcome: int, what: str) -> None:
    """Raise OSError if a C function says that it failed."""
    if outcome != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


# --- What a Scaffold sees ---------------------------------------------------------------------------------------------


class CallLimitReached(Exception):
    """The Episode has made as many model calls as it may."""


class CallRefused(ValueError):
    """The model cannot answer this request: its message says why."""


class ModelUnavailable(Exception):
    """The model failed to answer; the Episode will be repeated whatever happens now."""


class Tools:
    """What `solve(problem, tools)` gets. Thread-safe: each call has a connection of its own."""

    def __init__(self, gateway: str, token: str, send: Callable[[dict[str, object]], None]) -> None:
        self._gateway = gateway
        self._token = token
        self._send = send

    def chat(self, messages: object, **sampling: object) -> str:
        """Answer to chat messages (or one string). Sampling: temperature, top_p, max_tokens, stop."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        reply = self._post("chat/completions", {"model": "sia", "messages": messages, **sampling})
        return str(reply["choices"][0]["message"]["content"])

    def complete(self, prompt: str, **sampling: object) -> str:
        """Continuation of a raw prompt."""
        reply = self._post("completions", {"model": "sia", "prompt": prompt, **sampling})
        return str(reply["choices"][0]["text"])

    def log(self, event: object) -> None:
        """Put a JSON value into the Episode's trajectory."""
        try:
            json.dumps(event, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            event = repr(event)[:DETAIL_CHARS]
        self._send({"log": event})

    def _post(self, route: str, body: dict[str, object]) -> Any:
        data = json.dumps(body).encode()
        head = (
            f"POST /e/{self._token}/v1/{route} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._gateway)
            connection.sendall(head.encode() + data)
            reply = bytearray()
            while chunk := connection.recv(65536):
                reply += chunk
                if len(reply) > REPLY_BYTES:
                    raise CallRefused("the model's reply is too large")
        header, _, content = bytes(reply).partition(b"\r\n\r\n")
        status = int(header.split(None, 2)[1]) if header else 503
        answer = json.loads(content) if content else {}
        if status == 200:
            return answer
        message = str(answer.get("error", {}).get("message", f"HTTP {status}"))
        if status == 429:
            raise CallLimitReached(f"call_limit: {message}")
        raise (ModelUnavailable if status >= 500 else CallRefused)(message)


# --- The room of one Episode ------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Leave for new namespaces in which this user is itself and nobody else exists."""
    uid, gid = os.getuid(), os.getgid()
    check(_libc.unshare(NEW_NAMESPACES), "new namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _furnish(config: Config, own_work: bool) -> None:
    """As the first process of the new namespaces: private folders, own /proc, loopback; then give up every right."""
    size = f"size={config['file_mb']}m,nr_inodes={TMP_INODES},mode=1777"
    folders = ["/tmp", "/dev/shm", *(["/work"] if own_work else [])]
    for folder in folders:
        outcome = _libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, size.encode())
        check(outcome, f"mount {folder}")
    check(_libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID_NODEV | MS_NOEXEC, None), "mount /proc")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP_RUNNING))
    for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
        with open(f"/proc/sys/user/max_{kind}_namespaces", "w") as file:
            file.write("0")
    check(prctl(PR_SET_NO_NEW_PRIVS, 1), "no new privileges")
    for capability in range(64):
        if prctl(PR_CAPBSET_DROP, capability):
            break  # past the last capability that this kernel knows
    check(_libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)), "drop capabilities")


def _set_limits(config: Config) -> None:
    memory, file = config["memory_mb"] * 2**20, config["file_mb"] * 2**20
    limits = {
        resource.RLIMIT_CPU: config["cpu_s"] + CPU_GRACE_S,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: NOFILE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 65536,
        resource.RLIMIT_MSGQUEUE: 65536,
    }
    if config["isolated"]:
        # Bare, this would count all processes of the user and deny the Episode its first fork.
        limits[resource.RLIMIT_NPROC] = config["processes"]
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (bound, bound))


def _relay(listener: socket.socket, gateway: str) -> None:
    """Carry loopback connections to the gateway's socket, so that SDKs that know only TCP can reach it."""
    free = threading.BoundedSemaphore(RELAY_CONNECTIONS)

    def carry(near: socket.socket) -> None:
        try:
            with near, socket.socket(socket.AF_UNIX) as far:
                far.connect(gateway)
                other = {near: far, far: near}
                while True:
                    for ready in select.select([near, far], [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        other[ready].sendall(data)
        except OSError:
            return
        finally:
            free.release()

    while True:
        free.acquire()
        try:
            near, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=carry, args=(near,), daemon=True).start()


def _environment(config: Config, token: str, port: int, *, program: bool) -> dict[str, str]:
    # Many Episodes share the processors, so each of a `solve` Scaffold's gets one thread; a program runs alone.
    return {
        "PATH": f"{os.path.dirname(config['python'])}:/usr/bin:/bin",
        **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        "HOME": config["work"],
        "TMPDIR": "/tmp" if config["isolated"] else config["work"],
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        **({} if program else {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
        "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/e/{token}/v1",
        "OPENAI_API_KEY": token,
    }


def _solve(config: Config, payload: dict[str, Any], result_fd: int) -> None:
    """Import the Scaffold afresh, ask it, and write events and one ending to the result pipe."""
    lock = threading.Lock()

    def send(frame: dict[str, object]) -> None:
        data = json.dumps(frame, allow_nan=False).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(result_fd, data) :]

    sys.path[:] = [config["scaffold"], *(path for path in sys.path if path != config["home"]), *config["site"]]
    sys.dont_write_bytecode = True
    random.seed(payload["seed"])
    try:
        import agent  # type: ignore[import-not-found]  # the Scaffold's own file

        answer = agent.solve(payload["problem"], Tools(config["gateway"], payload["token"], send))
        sys.stdout.flush()
        if answer is None:
            send({"none": True})
        else:
            try:
                send({"answer": answer})
            except (TypeError, ValueError, RecursionError, OverflowError) as error:
                send({"bad": f"{type(answer).__name__}: {error}"[:DETAIL_CHARS]})
    except MemoryError:
        os.write(result_fd, b'{"memory": true}\n')
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        send({"error": text[-DETAIL_CHARS:]})


def _probe(result_fd: int) -> None:
    """Tell the host what can be seen from in here (its preflight judges)."""
    with open("/proc/net/dev") as file:
        networks = sorted(line.split(":")[0].strip() for line in file if ":" in line)
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    pids = sum(name.isdigit() for name in os.listdir("/proc"))
    seen = {
        "networks": networks,
        "processes": pids,
        "root": sorted(os.listdir("/")),
        "etc": sorted(os.listdir("/etc")),
        "capabilities": status["CapEff"].strip(),
        "no_new_privs": status["NoNewPrivs"].strip(),
    }
    os.write(result_fd, json.dumps({"answer": seen}).encode() + b"\n")


def run_episode(config: Config, fds: list[int], ready_fd: int, supervisor: int) -> NoReturn:
    """The first process of an Episode: from trusted set-up to the Scaffold's code."""
    signal.set_wakeup_fd(-1)
    for which in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(which, signal.SIG_DFL)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (*fds, ready_fd)]
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    for source, target in zip((high[2], high[2], high[1], high[0], high[3]), (1, 2, 3, 4, 5), strict=True):
        os.dup2(source, target, inheritable=target < 3)
    os.closerange(6, 4096)
    result_fd, payload_fd, ready_fd = 3, 4, 5
    try:
        with open(payload_fd, "rb") as file:
            file.seek(0)
            payload = json.load(file)
        kind = payload["kind"]
        os.setsid()
        if config["isolated"]:
            _furnish(config, own_work=kind != "program")
        else:
            # The launcher between has to be gone first, or its end would be taken for the supervisor's.
            while os.getppid() != supervisor:
                time.sleep(0.0005)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        listener = socket.create_server(("127.0.0.1", PORT if config["isolated"] else 0), backlog=16)
        port = listener.getsockname()[1]
        environment = _environment(config, payload["token"], port, program=kind == "program")
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(config["work"])
        if kind == "program" and os.fork() == 0:
            # The program's process will be replaced, so its relay is a process beside it (and dies with it).
            os.dup2(0, 1)
            os.dup2(0, 2)
            os.close(result_fd)
            os.close(ready_fd)
            _relay(listener, config["gateway"])
            os._exit(0)
        _set_limits(config)
        os.nice(NICENESS)
    except BaseException as error:
        os.write(ready_fd, f"E{type(error).__name__}: {error};".encode())
        os._exit(1)
    os.write(ready_fd, b"R;")
    os.close(ready_fd)
    if kind == "program":
        argv = [config["python"], os.path.join(config["scaffold"], "agent.py"), "--dataset_dir", config["input"]]
        os.execve(argv[0], [*argv, "--working_dir", config["work"]], environment)
    if kind == "probe":
        _probe(result_fd)
    else:
        threading.stack_size(256 * 1024)
        threading.Thread(target=_relay, args=(listener, config["gateway"]), daemon=True).start()
        threading.stack_size(0)
        _solve(config, payload, result_fd)
    try:
        sys.stdout.flush()
    finally:
        os._exit(0)
