"""Rolling out: what comes back, what is left behind, and what happens when something dies."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from agents.calls import CallPolicy
from agents.episode import Cause, EpisodeResult
from agents.rollout import ProgramResult, run_program
from agents.sandbox import NoSandbox, Sandbox
from agents.scaffold import Scaffold
from tasks.contract import EpisodeLimits, Problem, TaskKind

ROOM = EpisodeLimits(wall_s=20, cpu_s=10, memory_mb=400, output_bytes=20_000, processes=16, file_mb=8)
CHAT = "def solve(problem, tools):\n    return tools.chat(problem['prompt'])\n"


def numbered(count: int, prompt: str = "{}+1") -> list[Problem]:
    return [Problem(f"p{i}", prompt.format(i)) for i in range(count)]


def test_answers_come_from_the_model(lab: Any, no_orphans: None) -> None:
    results = lab.run(CHAT, numbered(40), concurrency=8)
    assert {name: (r.cause, r.answer) for name, r in results.items()} == {
        f"p{i}": (Cause.FINISHED, str(i + 1)) for i in range(40)
    }


def test_results_come_as_they_end_in_the_callers_thread(lab: Any) -> None:
    source = "import time\ndef solve(problem, tools):\n    time.sleep(problem['s'])\n    return problem['s']\n"
    order: list[object] = []
    threads = set()

    def on_result(result: EpisodeResult) -> None:
        order.append(result.answer)
        threads.add(threading.current_thread())

    problems = [Problem(f"p{s}", "", {"s": s}) for s in (1.2, 0.6, 0.0)]
    lab.run(source, problems, on_result=on_result)
    assert order == [0.0, 0.6, 1.2]
    assert threads == {threading.current_thread()}


def test_events_and_printed_text_are_kept(lab: Any) -> None:
    source = """
def solve(problem, tools):
    tools.log({"step": 1})
    tools.log(object())
    print("hello", end="")
    return [1, {"a": None}, "\\u00e9"]
"""
    result = lab.run(source, numbered(1))["p0"]
    assert result.cause is Cause.FINISHED
    assert result.answer == [1, {"a": None}, "é"]
    assert result.events[0] == {"step": 1}
    assert "object" in str(result.events[1])
    assert result.events[2] == {"printed": "hello"}
    assert result.wall_s > 0


def test_the_same_seed_draws_the_same(lab: Any) -> None:
    source = """
import random
def solve(problem, tools):
    return [random.random(), sorted({"a", "b", "c"}, key=hash), list({"x", "y", "z"})]
"""
    first, second = lab.run(source, numbered(3)), lab.run(source, numbered(3), concurrency=1)
    assert {n: r.answer for n, r in first.items()} == {n: r.answer for n, r in second.items()}
    assert first["p0"].answer != first["p1"].answer


def test_any_sdk_can_call_by_loopback(lab: Any) -> None:
    source = """
import json, os, urllib.request
from concurrent.futures import ThreadPoolExecutor
def ask(text):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body,
        {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]
def solve(problem, tools):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, ["%d+%d" % (i, i) for i in range(10)]))
"""
    results = lab.run(source, numbered(4))
    assert {str(r.answer) for r in results.values()} == {str([str(2 * i) for i in range(10)])}


def test_installed_packages_can_be_imported(lab: Any) -> None:
    source = "import numpy\ndef solve(problem, tools):\n    return float(numpy.arange(4).sum())\n"
    results = lab.run(source, numbered(2), limits=EpisodeLimits(wall_s=30, cpu_s=30))
    assert {r.answer for r in results.values()} == {6.0}


def test_helper_files_can_be_imported_and_ours_cannot(lab: Any) -> None:
    from agents.decision import ScaffoldDraft
    from agents.rollout import roll_out
    from agents.scaffold import store_scaffold

    files = {
        "agent.py": "import lib.words\ndef solve(p, t):\n    try:\n        import agents.gateway\n"
        "    except ImportError:\n        return lib.words.WORD\n",
        "lib/words.py": "WORD = 'found'\n",
    }
    stored = store_scaffold(ScaffoldDraft(files=files, note=""), lab.folder / "scaffolds")
    assert stored.kind is TaskKind.SOLVE
    got: list[EpisodeResult] = []
    from agents.episode import EpisodeSpec
    from agents.sandbox import BubblewrapSandbox

    roll_out(
        stored,
        [EpisodeSpec(1, Problem("p", ""), 0, 0)],
        policy=CallPolicy(None, False, 4, 10),
        limits=ROOM,
        sandbox=BubblewrapSandbox(),
        gateway=lab.gateway,
        on_result=got.append,
    )
    assert got[0].answer == "found", got


def test_waiting_for_the_model_is_not_the_scaffolds_time(lab: Any) -> None:
    tight = ROOM.model_copy(update={"wall_s": 0.8})
    assert lab.run(CHAT, [Problem("p", "1+1 SLOW 1.6")], limits=tight)["p"].cause is Cause.FINISHED
    slow = "import time\n" + CHAT.replace("    return", "    time.sleep(2)\n    return")
    assert lab.run(slow, [Problem("p", "1+1")], limits=tight)["p"].cause is Cause.TIMED_OUT


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import os\n    for _ in range(4):\n        if os.fork() == 0:\n            while True: pass\n    os.wait()",
    ],
)
def test_processor_time_is_limited_over_all_processes(lab: Any, body: str, no_orphans: None) -> None:
    limits = ROOM.model_copy(update={"wall_s": 60, "cpu_s": 1})
    result = lab.run(f"def solve(problem, tools):\n    {body}\n", numbered(1), limits=limits)["p0"]
    assert result.cause is Cause.CPU_LIMIT
    assert result.wall_s < 30


def test_an_import_that_fails_or_hangs_is_the_scaffolds_fault(lab: Any) -> None:
    failing = lab.run("import no_such_module\ndef solve(p, t): return 1\n", numbered(1))["p0"]
    assert (failing.cause, "no_such_module" in failing.detail) == (Cause.CRASHED, True)
    limits = ROOM.model_copy(update={"wall_s": 0.6})
    hanging = "import time\ntime.sleep(100)\ndef solve(p, t): return 1\n"
    assert lab.run(hanging, numbered(1), limits=limits)["p0"].cause is Cause.TIMED_OUT


@pytest.mark.parametrize("victim", ["bwrap", "supervisor"])
def test_a_dead_sandbox_is_infrastructure(lab: Any, no_orphans: None, victim: str) -> None:
    source = "import time\ndef solve(problem, tools):\n    time.sleep(problem['s'])\n    return 'done'\n"
    problems = [Problem("quick", "", {"s": 0}), *(Problem(f"slow{i}", "", {"s": 60}) for i in range(4))]

    def on_result(result: EpisodeResult) -> None:
        if result.cause is not Cause.FINISHED:
            return
        # bubblewrap on the host, bubblewrap as the room's first process, the supervisor
        outer = next(p for p in psutil.Process().children() if "agents.inside" in " ".join(p.cmdline()))
        supervisor = outer.children()[0].children()[0]
        (outer if victim == "bwrap" else supervisor).send_signal(signal.SIGKILL)

    began = time.monotonic()
    results = lab.run(source, problems, concurrency=3, on_result=on_result, limits=EpisodeLimits(wall_s=90))
    assert results.pop("quick").cause is Cause.FINISHED
    assert {r.cause for r in results.values()} == {Cause.SANDBOX_LOST}
    assert len(results) == 4
    assert time.monotonic() - began < 30


def test_an_exception_in_the_host_leaves_nothing(lab: Any, no_orphans: None) -> None:
    source = "import time\ndef solve(problem, tools):\n    time.sleep(problem['s'])\n    return 1\n"

    def on_result(result: EpisodeResult) -> None:
        raise RuntimeError("the disk is full")

    problems = [Problem("quick", "", {"s": 0}), Problem("slow", "", {"s": 60})]
    with pytest.raises(RuntimeError, match="disk is full"):
        lab.run(source, problems, on_result=on_result)


HOST = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lab", {conftest!r})
lab = importlib.util.module_from_spec(spec)
sys.modules["lab"] = lab
spec.loader.exec_module(lab)
from agents.gateway import Gateway
from agents.sandbox import {kind}
from tasks.contract import EpisodeLimits, Problem
source = '''
import os, time
def solve(problem, tools):
    if problem["id"] == "first":
        return 1
    if os.fork() == 0:
        os.setsid()
    time.sleep(120)
'''
folder = pathlib.Path({folder!r})
engine, recorder = lab.AddingEngine(), lab.MemoryRecorder()
with Gateway(engine, recorder, folder / "g.sock") as gateway:
    room = lab.Lab(folder, engine, recorder, gateway)
    problems = [Problem("a", ""), Problem("b", ""), Problem("first", "")]
    room.run(source, problems, sandbox={kind}(), limits=EpisodeLimits(wall_s=100),
             on_result=lambda result: print("ready", flush=True))
"""


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("BubblewrapSandbox", signal.SIGINT),
        ("BubblewrapSandbox", signal.SIGKILL),
        ("NoSandbox", signal.SIGKILL),
        pytest.param("BubblewrapSandbox", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("NoSandbox", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("NoSandbox", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_killed_host_leaves_nothing(tmp_path: Path, no_orphans: None, which: signal.Signals, kind: str) -> None:
    # A process of its own, killed in the middle of a shard.
    program = HOST.format(conftest=str(Path(__file__).parent / "conftest.py"), folder=str(tmp_path), kind=kind)
    tmp_path.chmod(0o755)
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert host.stdout is not None
    assert host.stdout.readline() == b"ready\n", host.stderr.read() if host.stderr else ""
    rooms = psutil.Process(host.pid).children(recursive=True)
    assert len(rooms) >= 3
    host.send_signal(which)
    host.communicate(timeout=20)
    _, alive = psutil.wait_procs(rooms, timeout=8)
    assert not alive


def test_without_a_sandbox_the_same_endings(lab: Any, no_orphans: None) -> None:
    source = """
import os, time
def solve(problem, tools):
    kind = problem["prompt"]
    if kind == "chat":
        return tools.chat("2+3")
    if kind == "sleep":
        if os.fork() == 0:
            os.setsid()
        time.sleep(60)
    if kind == "print":
        while True:
            print("x" * 1000)
    if kind == "kill":
        os.kill(os.getpid(), 9)
    if kind == "memory":
        return bytearray(2**31)
"""
    expected = {
        "chat": Cause.FINISHED,
        "sleep": Cause.TIMED_OUT,
        "print": Cause.OUTPUT_LIMIT,
        "kill": Cause.CRASHED,
        "memory": Cause.MEMORY_LIMIT,
        "none": Cause.NO_ANSWER,
    }
    limits = ROOM.model_copy(update={"wall_s": 1.5})
    results = lab.run(source, [Problem(k, k) for k in expected], sandbox=NoSandbox(), limits=limits)
    assert {name: result.cause for name, result in results.items()} == expected
    assert results["chat"].answer == "5"


# --- Programs ---------------------------------------------------------------------------------------------------------


def program(
    lab: Any, source: str, tmp_path: Path, *, limits: EpisodeLimits = ROOM, sandbox: Sandbox | None = None
) -> ProgramResult:
    from agents.sandbox import BubblewrapSandbox

    dataset = tmp_path / "dataset"
    (dataset / "part").mkdir(parents=True, mode=0o700)
    (dataset / "part" / "questions.json").write_text(json.dumps({"q1": "1+2", "q2": "3+4"}))
    (dataset / "part" / "questions.json").chmod(0o600)
    stored: Scaffold = lab.scaffold(textwrap.dedent(source))
    assert stored.kind is TaskKind.PROGRAM
    return run_program(
        stored,
        dataset,
        tmp_path / "work",
        policy=CallPolicy(None, False, 4, 10),
        limits=limits,
        sandbox=sandbox or BubblewrapSandbox(),
        gateway=lab.gateway,
        episode_id=77,
        seed=5,
    )


class TimedOut(Exception):
    """What a workflow engine raises inside a thread whose time is up."""


@pytest.mark.parametrize("kind", ["solve", "program"])
def test_a_thread_that_waits_can_be_timed_out(lab: Any, tmp_path: Path, no_orphans: None, kind: str) -> None:
    ended: list[BaseException] = []

    def work() -> None:
        try:
            if kind == "solve":
                lab.run("import time\ndef solve(problem, tools):\n    time.sleep(15)\n", numbered(2))
            else:
                program(lab, "import time; time.sleep(15)", tmp_path)
        except TimedOut as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(1.0)
    began = time.monotonic()
    assert thread.ident is not None
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(TimedOut))
    assert raised == 1
    thread.join(12)
    assert ended
    assert time.monotonic() - began < 8


ASKING = """
    import argparse, json, os, pathlib, urllib.request
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=pathlib.Path)
    parser.add_argument("--working_dir", type=pathlib.Path)
    folders = parser.parse_args()
    questions = json.loads((folders.dataset_dir / "part" / "questions.json").read_text())
    answers = {}
    for name, question in questions.items():
        url = os.environ["OPENAI_BASE_URL"].replace("/v1", "/p/" + name + "/v1") + "/completions"
        request = urllib.request.Request(url, json.dumps({"prompt": question}).encode())
        with urllib.request.urlopen(request) as reply:
            answers[name] = json.load(reply)["choices"][0]["text"]
    (folders.working_dir / "answers.json").write_text(json.dumps(answers))
    print("asked", len(answers))
"""


@pytest.mark.parametrize("kind", ["bubblewrap", "none"])
def test_a_program_asks_about_its_files(lab: Any, tmp_path: Path, no_orphans: None, kind: str) -> None:
    sandbox = NoSandbox() if kind == "none" else None
    result = program(lab, ASKING, tmp_path, sandbox=sandbox)
    assert result.cause is Cause.FINISHED, result
    assert json.loads((tmp_path / "work" / "answers.json").read_text()) == {"q1": "3", "q2": "7"}
    assert result.log == "asked 2\n"
    assert result.calls.calls == 2
    assert result.removed == ()
    asked_by = [key.problem_id for key in lab.recorder.finished if key.episode_id == 77]
    assert sorted(map(str, asked_by)) == ["q1", "q2"], "each call carries its problem"
    lab.recorder.finished.clear()


def test_tricks_in_a_programs_output_are_swept(lab: Any, tmp_path: Path) -> None:
    source = """
        import os, socket
        os.chdir("/work")
        os.symlink("/etc/shadow", "answers.csv")
        os.symlink("/", "root")
        os.symlink("loop", "loop")
        os.mkfifo("pipe")
        socket.socket(socket.AF_UNIX).bind("socket")
        os.mkdir("deep"); os.symlink("../..", "deep/up")
        open("script", "w").write("x"); os.chmod("script", 0o6777)
        open("locked", "w").write("y"); os.chmod("locked", 0)
        os.makedirs("a/b/c")
        os.mkdir("shut"); open("shut/in", "w").write("z"); os.chmod("shut", 0)
    """
    result = program(lab, source, tmp_path)
    assert result.cause is Cause.FINISHED, result
    assert result.removed == ("answers.csv", "deep/up", "loop", "pipe", "root", "socket")
    work = tmp_path / "work"
    assert sorted(p.relative_to(work).as_posix() for p in work.rglob("*")) == [
        "a",
        "a/b",
        "a/b/c",
        "deep",
        "locked",
        "script",
        "shut",
        "shut/in",
    ]
    assert (work / "locked").read_text() == "y"
    assert (work / "script").stat().st_mode & 0o7777 == 0o644


def test_a_bottomless_folder_breaks_nothing(lab: Any, tmp_path: Path) -> None:
    source = """
        import os
        os.chdir("/work")
        for _ in range(5000):
            os.mkdir("d" * 50)
            os.chdir("d" * 50)
    """
    result = program(lab, source, tmp_path)
    assert result.cause in {Cause.FINISHED, Cause.OUTPUT_LIMIT}, result
    assert len(result.removed) == 1
    assert max(len(p.relative_to(tmp_path).parts) for p in tmp_path.rglob("*")) < 40


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ValueError('no idea')", Cause.CRASHED),
        ("import time; time.sleep(60)", Cause.TIMED_OUT),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", Cause.TIMED_OUT),
        ("bytearray(2**31)", Cause.MEMORY_LIMIT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Cause.FINISHED),
        (
            "import time\nfor i in range(200):\n    open(f'/work/{i}', 'wb').write(bytes(2**20))\ntime.sleep(60)",
            Cause.OUTPUT_LIMIT,
        ),
        ("import os\nfor path in ('/input/x', '/scaffold/x', '/x'):\n    open(path, 'w')", Cause.CRASHED),
        (
            "import os, urllib.request\ntry:\n"
            "    urllib.request.urlopen(os.environ['OPENAI_BASE_URL'] + '/completions', b'{\"prompt\": \"FAIL 9\"}')\n"
            "except OSError: pass",
            Cause.ENGINE_FAILED,
        ),
    ],
)
def test_how_a_program_ends(lab: Any, tmp_path: Path, source: str, cause: Cause, no_orphans: None) -> None:
    result = program(lab, source, tmp_path, limits=ROOM.model_copy(update={"wall_s": 2.0, "cpu_s": 5}))
    assert result.cause is cause, result
    assert len(result.log) <= ROOM.output_bytes
    if cause is Cause.CRASHED:
        assert "Error" in result.detail


def test_the_clock_of_a_shard_of_trivial_episodes(lab: Any) -> None:
    """The design's promise is 100 a second and processor on an idle machine; this only guards against a collapse."""
    names: Sequence[Problem] = numbered(60)
    began = time.monotonic()
    lab.run("def solve(problem, tools): return 1\n", names)
    assert len(names) / (time.monotonic() - began) > 8, os.getloadavg()
