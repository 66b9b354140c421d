"""One sandbox full of attackers and honest neighbours: each attack has its cause, and no neighbour notices.

All Episodes of this module run at the same time in one room, so that whatever an attack breaks, it breaks for somebody.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.episode import CAUSES, Cause, EpisodeResult
from tasks.contract import EpisodeLimits, Problem

LIMITS = EpisodeLimits(wall_s=6, cpu_s=2, memory_mb=400, output_bytes=20_000, max_calls=3, processes=16, file_mb=8)

AGENT = r"""
import ctypes, json, os, signal, socket, sys, time
from pathlib import Path


def solve(problem, tools):
    return globals()[problem["attack"]](problem, tools)


def attempt(action, *arguments):
    try:
        return repr(action(*arguments))[:200]
    except BaseException as error:
        return "denied " + type(error).__name__


def honest(problem, tools):
    time.sleep(problem["pause_s"])
    return tools.chat(problem["prompt"])


def network(problem, tools):
    return [
        attempt(socket.create_connection, ("192.0.2.1", 80), 1),
        attempt(socket.create_connection, ("127.0.0.1", problem["host_port"]), 1),
        attempt(socket.getaddrinfo, "example.org", 80),
    ]


def host_files(problem, tools):
    return {path: attempt(lambda p: os.listdir(p) if os.path.isdir(p) else open(p).read(), path)
            for path in problem["paths"]}


def environment(problem, tools):
    found = dict(os.environ)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found["/proc/" + pid] = open("/proc/%s/environ" % pid).read().split("\0")
        except OSError:
            pass
    return found


def who(problem, tools):
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    return {"pids": pids, "uid": os.getuid(), "fds": sorted(os.listdir("/proc/self/fd"))}


def writes(problem, tools):
    places = ["/scaffold", "/usr", "/etc", "/run", "/", "/dev", "/proc/sys/kernel", sys.base_prefix, "/input"]
    return {place: attempt(lambda: open(place + "/mark", "w").write("x")) for place in places}


def privileges(problem, tools):
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "user namespace": libc.unshare(0x10000000),
        "network namespace": libc.unshare(0x40000000),
        "mount": libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None),
        "unmount": libc.umount2(b"/tmp", 2),
        "setuid": libc.setuid(0),
        "chroot": libc.chroot(b"/tmp"),
        "raise cpu": attempt(lambda: __import__("resource").setrlimit(0, (900, 900))),
    }


def search_memory(problem, tools):
    needle = ("SEC" + "RET-").encode()
    found = set()
    for line in open("/proc/self/maps"):
        span, rights = line.split()[:2]
        if "r" not in rights or "[v" in line:
            continue
        low, high = (int(end, 16) for end in span.split("-"))
        try:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(low)
                data = memory.read(min(high - low, 2**26))
        except (OSError, ValueError, OverflowError):
            continue
        at = data.find(needle)
        while at >= 0:
            if data[at + 7 : at + 15].isdigit():
                found.add(data[at : at + 15].decode())
            at = data.find(needle, at + 1)
    return sorted(found)


def leave_things(problem, tools):
    for folder in ("/tmp", "/work", "/dev/shm"):
        Path(folder, "left").write_text("x")
    for address in (("127.0.0.1", 9999), "\0left"):
        server = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
        server.bind(address)
        server.listen()
        server.set_inheritable(True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    return "left"


def find_things(problem, tools):
    time.sleep(1.5)
    def connect(address):
        with socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX) as client:
            client.connect(address)
            return "connected"
    files = [f for folder in ("/tmp", "/work", "/dev/shm") for f in os.listdir(folder)]
    return [files, attempt(connect, ("127.0.0.1", 9999)), attempt(connect, "\0left")]


def count_forks(problem, tools):
    for made in range(1000):
        try:
            if os.fork() == 0:
                time.sleep(600)
        except OSError:
            return made
    return 1000


def fork_bomb(problem, tools):
    while True:
        try:
            os.fork()
        except OSError:
            pass


def many_hogs(problem, tools):
    for _ in range(8):
        if os.fork() == 0:
            hoard = bytearray(os.urandom(4096)) * (100 * 256)
            time.sleep(600)
    time.sleep(600)


def one_hog(problem, tools):
    hoard = []
    while True:
        hoard.append(bytearray(2**24))


def cpu_loop(problem, tools):
    while True:
        pass


def cpu_loop_catching(problem, tools):
    for which in range(1, 32):
        try:
            signal.signal(which, signal.SIG_IGN)
        except OSError:
            pass
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


def cpu_in_children(problem, tools):
    for _ in range(6):
        if os.fork() == 0:
            cpu_loop(problem, tools)
    time.sleep(600)


def sleeper(problem, tools):
    time.sleep(600)


def flood(problem, tools):
    while True:
        print("x" * 1000)


def flood_raw(problem, tools):
    while True:
        os.write(2, b"y" * 65536)


def flood_log(problem, tools):
    while True:
        tools.log({"z": "z" * 1000})


def flood_result(problem, tools):
    while True:
        os.write(3, b"w" * 65536)


def large_answer(problem, tools):
    return "a" * 50_000


def large_file(problem, tools):
    with open("/work/large", "wb") as file:
        while True:
            file.write(bytes(2**20))


def many_files(problem, tools):
    written = 0
    try:
        for number in range(100):
            Path("/tmp/%d" % number).write_bytes(bytes(2**20))
            written += 1
    except OSError:
        pass
    return written


def leaves(problem, tools):
    os._exit(0)


def exits(problem, tools):
    sys.exit("goodbye")


def raises(problem, tools):
    raise KeyError("who am I")


def recursion(problem, tools):
    return recursion(problem, tools)


def crash(problem, tools):
    ctypes.string_at(0)


def nothing(problem, tools):
    return None


def nan(problem, tools):
    return {"deep": [1.0, float("nan")]}


def infinite(problem, tools):
    os.write(3, b'{"answer": 1e999}\n')
    os._exit(0)


def half_surrogate(problem, tools):
    return "\ud800"


def byte_string(problem, tools):
    return b"bytes"


def an_object(problem, tools):
    return object()


def deep_list(problem, tools):
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def deep_text(problem, tools):
    os.write(3, b'{"answer": ' + b"[" * 15000 + b"]" * 4)
    os._exit(0)


def forge_protocol(problem, tools):
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in (
        {"ended": 0, "status": 0}, {"ended": 1, "lost": "gone"}, {"began": 2}, {"kill": 3}, {"answer": "stolen"}))
    print(lines.decode())
    for fd in list(range(64)) + list(range(100, 110)):
        if fd == 3:
            continue
        try:
            os.write(fd, lines)
        except OSError:
            pass
        try:
            socket.socket(fileno=fd).send(b'{"ended": 0, "lost": "gone"}')
        except OSError:
            pass
    os.write(3, b'{"lost": "gone", "over": "memory", "ended": 1}\n')
    os._exit(0)


def kill_all(problem, tools):
    for victim in [-1, 1, 0, *range(2, 400), -2, os.getppid()]:
        for which in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(victim, which)
            except OSError:
                pass
    return "still here"


def borrow_token(problem, tools):
    tools._token = problem["wrong_token"]
    return tools.chat("1+1")


def too_many_calls(problem, tools):
    for _ in range(10):
        tools.chat("1+1")


def too_many_calls_caught(problem, tools):
    try:
        too_many_calls(problem, tools)
    except Exception as error:
        return type(error).__name__


def broken_engine_hidden(problem, tools):
    try:
        tools.chat("FAIL 99")
    except Exception:
        pass
    return "all is well"


def gateway_flood(problem, tools):
    hold = []
    for _ in range(5):
        if os.fork() == 0:
            break
    while True:
        try:
            client = socket.socket(socket.AF_UNIX)
            client.connect("/run/gateway.sock")
            hold.append(client)
        except OSError:
            time.sleep(0.02)


def gateway_junk(problem, tools):
    for junk in (b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"POST /e/x/v1/completions HTTP/1.1\r\nContent-Length: 9"):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("/run/gateway.sock")
                client.sendall(junk)
    return tools.chat("20+2")
"""

FINISHED_ANSWERS = {
    "network": ["denied OSError", "denied ConnectionRefusedError", "denied gaierror"],
    "find_things": [[], "denied ConnectionRefusedError", "denied ConnectionRefusedError"],
    "leave_things": "left",
    "kill_all": "still here",
    "too_many_calls_caught": "CallLimitReached",
    "gateway_junk": "22",
    "infinite": None,
}

EXPECTED: dict[str, Cause | set[Cause]] = {
    "network": Cause.FINISHED,
    "host_files": Cause.FINISHED,
    "environment": Cause.FINISHED,
    "who": Cause.FINISHED,
    "writes": Cause.FINISHED,
    "privileges": Cause.FINISHED,
    "search_memory": Cause.FINISHED,
    "leave_things": Cause.FINISHED,
    "find_things": Cause.FINISHED,
    "count_forks": Cause.FINISHED,
    "many_files": Cause.FINISHED,
    "kill_all": Cause.FINISHED,
    "gateway_junk": Cause.FINISHED,
    "too_many_calls_caught": Cause.FINISHED,
    "fork_bomb": {Cause.CPU_LIMIT, Cause.TIMED_OUT},
    "many_hogs": Cause.MEMORY_LIMIT,
    "one_hog": Cause.MEMORY_LIMIT,
    # Which limit comes first depends on how crowded the machine is; test_rollout.py has them alone.
    "cpu_loop": {Cause.CPU_LIMIT, Cause.TIMED_OUT},
    "cpu_loop_catching": {Cause.CPU_LIMIT, Cause.TIMED_OUT},
    "cpu_in_children": {Cause.CPU_LIMIT, Cause.TIMED_OUT},
    "sleeper": Cause.TIMED_OUT,
    "gateway_flood": {Cause.CPU_LIMIT, Cause.TIMED_OUT},
    "flood": Cause.OUTPUT_LIMIT,
    "flood_raw": Cause.OUTPUT_LIMIT,
    "flood_log": Cause.OUTPUT_LIMIT,
    "flood_result": Cause.OUTPUT_LIMIT,
    "large_answer": Cause.OUTPUT_LIMIT,
    "large_file": {Cause.OUTPUT_LIMIT, Cause.CRASHED},
    "leaves": Cause.CRASHED,
    "exits": Cause.CRASHED,
    "raises": Cause.CRASHED,
    "recursion": Cause.CRASHED,
    "crash": Cause.CRASHED,
    "borrow_token": Cause.CRASHED,
    "nothing": Cause.NO_ANSWER,
    "nan": Cause.BAD_ANSWER,
    "infinite": Cause.BAD_ANSWER,
    "half_surrogate": Cause.BAD_ANSWER,
    "byte_string": Cause.BAD_ANSWER,
    "an_object": Cause.BAD_ANSWER,
    "deep_list": Cause.BAD_ANSWER,
    "deep_text": Cause.BAD_ANSWER,
    "forge_protocol": Cause.NO_ANSWER,
    "too_many_calls": Cause.CALL_LIMIT,
    "broken_engine_hidden": Cause.ENGINE_FAILED,
}
HONEST = 12
REPOSITORY = Path(__file__).parents[2]
HIDDEN_PATHS = [
    str(path)
    for path in (
        Path.home(),
        Path.home() / ".bashrc",
        REPOSITORY / "pyproject.toml",
        REPOSITORY / "agents",
        Path("/etc/shadow"),
        Path("/etc/hosts"),
        Path("/proc/1/root/etc/shadow"),
        Path("/run/sia"),
        Path("/var"),
        Path("/home"),
    )
]


@pytest.fixture(scope="module")
def attacked(lab) -> Iterator[dict[str, EpisodeResult]]:  # type: ignore[no-untyped-def]
    os.environ["SIA_TEST_SECRET"] = "hunter2"
    with socket.create_server(("127.0.0.1", 0)) as host_server:
        fields = {
            "host_port": host_server.getsockname()[1],
            "paths": HIDDEN_PATHS,
            "wrong_token": secrets.token_hex(16),
        }
        problems = [Problem(name, f"SECRET-{i:08d}", {"attack": name, **fields}) for i, name in enumerate(EXPECTED)]
        for i in range(HONEST):
            spaced = Problem(f"honest{i}", f"{i}+{100 * i}", {"attack": "honest", "pause_s": i / 2})
            problems.insert(i * len(problems) // HONEST, spaced)
        try:
            yield lab.run(AGENT, problems, limits=LIMITS, max_calls=LIMITS.max_calls, concurrency=32)
        finally:
            del os.environ["SIA_TEST_SECRET"]


@pytest.mark.parametrize("name", EXPECTED)
def test_each_attack_has_its_cause(attacked: dict[str, EpisodeResult], name: str) -> None:
    expected = EXPECTED[name]
    result = attacked[name]
    assert result.cause in (expected if isinstance(expected, set) else {expected}), result
    if result.cause is Cause.FINISHED and name in FINISHED_ANSWERS:
        assert result.answer == FINISHED_ANSWERS[name]
    if result.cause is not Cause.FINISHED:
        assert result.answer is None
    assert len(result.detail) <= 4000


def test_neighbours_are_unaffected(attacked: dict[str, EpisodeResult]) -> None:
    for i in range(HONEST):
        result = attacked[f"honest{i}"]
        assert (result.cause, result.answer) == (Cause.FINISHED, str(101 * i)), result


def test_no_attack_gets_a_free_repeat(attacked: dict[str, EpisodeResult]) -> None:
    free = {name for name, result in attacked.items() if not CAUSES[result.cause].measures}
    assert free == {"broken_engine_hidden"}, "only the gateway's own word makes an Episode infrastructure"


def test_no_host_file_is_seen(attacked: dict[str, EpisodeResult]) -> None:
    answer = attacked["host_files"].answer
    assert isinstance(answer, dict)
    assert {path for path, text in answer.items() if not str(text).startswith("denied")} == {"/run/sia"}


def test_no_host_environment_is_seen(attacked: dict[str, EpisodeResult]) -> None:
    answer = attacked["environment"].answer
    assert isinstance(answer, dict)
    assert "hunter2" not in str(answer)
    allowed = {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "OPENAI_BASE_URL",
        "OPENAI_API_KEY",
        "OPENBLAS_NUM_THREADS",
        "LD_LIBRARY_PATH",
    }
    allowed |= {"PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "OMP_NUM_THREADS"}
    assert {key for key in answer if not key.startswith("/proc")} <= allowed


def test_it_is_alone_and_nobody(attacked: dict[str, EpisodeResult]) -> None:
    answer = attacked["who"].answer
    assert isinstance(answer, dict)
    assert answer["pids"] == ["1"]
    assert answer["uid"] != 0
    assert len(answer["fds"]) <= 7, "standard streams, result, relay, its own look"


def test_nothing_outside_its_folders_is_writable(attacked: dict[str, EpisodeResult]) -> None:
    answer = attacked["writes"].answer
    assert isinstance(answer, dict)
    assert all(str(text).startswith("denied") for text in answer.values()), answer


def test_no_privilege_is_to_be_had(attacked: dict[str, EpisodeResult]) -> None:
    answer = attacked["privileges"].answer
    assert isinstance(answer, dict)
    assert all(text == -1 or str(text).startswith("denied") for text in answer.values()), answer


def test_no_neighbour_is_found_in_memory(attacked: dict[str, EpisodeResult]) -> None:
    own = list(EXPECTED).index("search_memory")
    assert attacked["search_memory"].answer == [f"SECRET-{own:08d}"]


def test_counted_resources_are_bounded(attacked: dict[str, EpisodeResult]) -> None:
    forks, files = attacked["count_forks"].answer, attacked["many_files"].answer
    assert isinstance(forks, int)
    assert 1 <= forks <= LIMITS.processes
    assert isinstance(files, int)
    assert 1 <= files <= LIMITS.file_mb


def test_details_tell_why(attacked: dict[str, EpisodeResult]) -> None:
    assert "KeyError: 'who am I'" in attacked["raises"].detail
    assert "agent.py" in attacked["raises"].detail
    assert "400 MB" in attacked["one_hog"].detail
    assert "call_limit" in attacked["too_many_calls"].detail
    assert "unknown" in attacked["borrow_token"].detail or "token" in attacked["borrow_token"].detail
