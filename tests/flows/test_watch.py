"""Watchers: what they show, that they estimate soberly, and that nothing they meet can end a Run."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flows.cli_common import error_console
from flows.progress import Progress
from flows.watch import JsonProgress, Pace, QuietProgress, TerminalProgress, clock_words, words_for


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TornPipe(io.StringIO):
    """A reader that has gone away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def play(progress: Progress) -> None:
    progress.generation(1, 3, "first", "writes [bold]the first[/bold] scaffold")
    progress.step("roll out dev/00", 4)
    progress.advance(2, 0.5)
    progress.advance(4, 0.25)
    progress.step("score", None)
    progress.note("gate 1: accepted [/nonsense]")
    progress.close()
    progress.close()


def in_log(clock: Hand | None = None) -> tuple[TerminalProgress, io.StringIO]:
    stream = io.StringIO()
    return TerminalProgress(Console(file=stream, width=200), clock or Hand()), stream


@pytest.mark.parametrize("seconds", [0, 29, 31, 119, 3599, 3600, 86400])
def test_durations_read_well(seconds: int) -> None:
    assert words_for(seconds).endswith("min")
    assert clock_words(seconds).count(":") == (2 if seconds >= 3600 else 1)


def test_a_log_has_every_word_and_no_markup() -> None:
    progress, stream = in_log()
    play(progress)
    text = stream.getvalue()
    for words in (
        "generation 1/3 · first",
        "[bold]the first[/bold]",
        "roll out dev/00 0/4",
        "roll out dev/00 4/4",
        "accuracy so far 0.250",
        "gate 1: accepted [/nonsense]",
    ):
        assert words in text
    assert "\x1b" not in text


def test_a_log_is_not_flooded() -> None:
    clock = Hand()
    progress, stream = in_log(clock)
    progress.step("roll out dev/00", 1000)
    for done in range(999):
        clock.now += 0.01
        progress.advance(done, 0.5)
    assert len(stream.getvalue().splitlines()) <= 2
    progress.advance(1000, 0.5)
    assert "1000/1000" in stream.getvalue().splitlines()[-1]


def test_a_terminal_shows_one_live_line_and_keeps_notes() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=160))
    progress.generation(2, 8, "weights", "grpo")
    progress.step("train step 1/10", 256)
    progress.advance(128, 0.375)
    time.sleep(0.7)
    progress.note("verdict [x]")
    progress.close()
    text = stream.getvalue()
    assert "train step 1/10 128/256" in text
    assert "accuracy so far 0.375" in text
    assert "verdict [x]" in text
    assert threading.active_count() < 20


def test_json_is_a_line_an_event() -> None:
    stream = io.StringIO()
    play(JsonProgress(stream, Hand()))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["generation", "step", "advance", "advance", "step", "note", "close"]
    assert events[3] == {
        "event": "advance",
        "elapsed_s": 0.0,
        "generation": 1,
        "step": "roll out dev/00",
        "done": 4,
        "total": 4,
        "accuracy": 0.25,
        "left_s": None,
    }


def test_json_advances_are_thinned_but_the_last_one_is_there() -> None:
    clock, stream = Hand(), io.StringIO()
    progress = JsonProgress(stream, clock)
    progress.step("roll out", 500)
    for done in range(501):
        clock.now += 0.01
        progress.advance(done, None)
    advances = [json.loads(line) for line in stream.getvalue().splitlines()][1:]
    assert 5 <= len(advances) <= 15
    assert advances[-1]["done"] == 500


@pytest.mark.parametrize("tty", [True, False])
def test_a_torn_pipe_ends_nothing(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    play(JsonProgress(TornPipe()))
    monkeypatch.setenv("FORCE_COLOR" if tty else "NO_COLOR", "1")
    console = error_console()
    console.file = TornPipe()
    assert console.is_terminal is tty
    play(TerminalProgress(console))
    play(QuietProgress())


def test_nonsense_ends_nothing() -> None:
    stream = io.StringIO()
    for progress in (in_log()[0], JsonProgress(stream, Hand())):
        progress.advance(5, 0.5)
        progress.generation(9, 2, "", "")
        progress.step("s", 0)
        progress.advance(-3, float("nan"))
        progress.close()
        progress.advance(1, None)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {"generation", "step"} <= {event["event"] for event in events}


def test_many_threads_write_whole_lines() -> None:
    stream = io.StringIO()
    progress = JsonProgress(stream)

    def work(number: int) -> None:
        for _ in range(50):
            progress.note(f"thread {number}")
            progress.advance(number, 0.5)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notes = [json.loads(line) for line in stream.getvalue().splitlines() if "note" in line]
    assert len(notes) == 400


def test_an_advance_is_cheap() -> None:
    progress, _ = in_log(Hand())
    progress.step("roll out", 10**9)
    began = time.perf_counter()
    for done in range(10_000):
        progress.advance(done, 0.5)
    assert time.perf_counter() - began < 1.0, "0.1 ms each, with room for a busy machine"


def test_time_left_comes_from_finished_generations_and_the_current_step() -> None:
    pace = Pace(started=0.0)
    pace.begin_generation(0.0, 1, 4, "first")
    pace.begin_step(0.0, "roll out", 100)
    assert pace.left(5.0) is None
    assert pace.left_words(5.0) == ""
    pace.count(10.0, 50, 0.5)
    assert pace.step_left(10.0) == pytest.approx(10.0)
    assert pace.left_words(10.0) == "less than 1 min left in this step"
    pace.begin_generation(120.0, 2, 4, "harness")
    assert pace.left(150.0) == pytest.approx(90 + 2 * 120)
    assert pace.left_words(150.0) == "about 6 min left"
    pace.begin_step(150.0, "train step 1/10", 10)
    pace.count(250.0, 1, 0.1)
    assert pace.left(250.0) == pytest.approx(900 + 2 * 120), "the step at hand outlasts the usual generation"


def test_the_first_episodes_of_many_say_nothing_about_the_pace() -> None:
    pace = Pace(started=0.0)
    pace.begin_step(0.0, "roll out", 400)
    pace.count(27.0, 1, 0.0)
    assert pace.step_left(27.0) is None
    pace.count(30.0, 20, 0.0)
    assert pace.step_left(30.0) == pytest.approx(570.0)


def test_a_generation_announced_twice_is_one() -> None:
    pace = Pace(started=0.0)
    pace.begin_generation(0.0, 1, 4, "harness")
    pace.begin_generation(60.0, 1, 4, "harness")
    assert pace.durations == []
    pace.begin_generation(120.0, 2, 4, "weights")
    assert pace.durations == [120.0]


def test_what_was_replayed_from_the_record_is_no_measure_of_pace() -> None:
    pace = Pace(started=0.0)
    for number in range(1, 6):
        pace.begin_generation(0.01 * number, number, 8, "harness")
    assert pace.durations == []
    pace.begin_step(1.0, "roll out", 200)
    pace.count(1.1, 150, 0.5)
    assert pace.step_left(1.1) is None
    pace.count(11.1, 160, 0.5)
    assert pace.step_left(11.1) == pytest.approx(40.0), "1 a second, not 16"


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e4),
            st.integers(0, 300),
            st.one_of(st.none(), st.integers(0, 200)),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_time_left_is_never_negative(moves: list[tuple[float, int, int | None, bool]]) -> None:
    pace, now = Pace(started=0.0), 0.0
    for index, (wait, done, total, generation) in enumerate(moves):
        now += wait
        if generation:
            pace.begin_generation(now, index, 10, "harness")
        if total is not None:
            pace.begin_step(now, "s", total)
        pace.count(now, done, 0.5)
        for left in (pace.left(now), pace.step_left(now)):
            assert left is None or left >= 0
        assert "-" not in pace.left_words(now)
        assert pace.line(now)
