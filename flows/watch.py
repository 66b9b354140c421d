"""Watchers of a Run: what stands on the terminal, or in the pipe, while it works.

    TerminalProgress(console)   a live line at a terminal, plain lines in a log file
    JsonProgress(stream)        one JSON object a line, for a machine
    QuietProgress()             nothing

All three fulfil `flows.progress.Progress`: thread-safe, cheap (`advance` stores three numbers; drawing happens twice a
second), and they never raise, since a full disk under a log or a closed pipe must not end a Run. The time left is an
estimate from the Generations finished by this process and the pace of the current step. It knows nothing of what the
Feedback-Agent will choose next, hence "about".
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from threading import RLock
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

Clock = Callable[[], float]
P = ParamSpec("P")
S = TypeVar("S")

LOG_EVERY_S = 15.0
"""Seconds between two lines on the same step when the output is not a terminal."""
JSON_EVERY_S = 0.5
"""Seconds between two `advance` events; the last one of a step is always written."""
ENOUGH_FOR_A_PACE = 0.05
"""Share of a step that has to be done before its pace says anything: the first Episodes also wait for the model to load
and then end in a bunch."""
SHORTEST_GENERATION_S = 1.0
"""Generations shorter than this were replayed from the record on resume, and say nothing about the next ones."""


def _never_raises(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """A watcher's failure is never a Run's failure."""

    @wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with contextlib.suppress(Exception, SystemExit):  # rich ends the program on a torn pipe
            method(self, *args, **kwargs)

    return guarded


def words_for(seconds: float) -> str:
    """An estimated duration for people: "less than 1 min", "about 4 min", "about 1 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than 1 min"
    return f"about {minutes} min" if minutes < 60 else f"about {minutes // 60} h {minutes % 60} min"


def clock_words(seconds: float) -> str:
    """Elapsed time as m:ss or h:mm:ss."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stamp(seconds: float) -> str:
    """Elapsed time as every line begins with it."""
    return f"{clock_words(seconds):>7}"


@dataclass
class Pace:
    """Where a Run stands and how fast it goes; the arithmetic behind "about N min left".

    Not thread-safe: its owner holds a lock. All times are in seconds on the owner's clock.
    """

    started: float
    number: int = 0
    of: int = 0
    lever: str = ""
    step: str = ""
    total: int | None = None
    done: int = 0
    accuracy: float | None = None
    durations: list[float] = field(default_factory=list)
    generation_began: float | None = None
    step_began: float = 0.0
    base: tuple[float, int] | None = None
    """Time and count from which the step's rate is taken; what was recorded before a resume is not part of it."""

    def begin_generation(self, now: float, number: int, of: int, lever: str) -> None:
        """Close the previous Generation's account and open the next one's; said again, it is still the same one."""
        if self.generation_began is None or number != self.number:
            if self.generation_began is not None and now - self.generation_began >= SHORTEST_GENERATION_S:
                self.durations.append(now - self.generation_began)
            self.generation_began = now
        self.number, self.of, self.lever = number, of, lever
        self.begin_step(now, "", None)

    def begin_step(self, now: float, name: str, total: int | None) -> None:
        """A new step: nothing done, pace unknown."""
        self.step, self.total, self.done, self.accuracy = name, total, 0, None
        self.step_began, self.base = now, None

    def count(self, now: float, done: int, accuracy: float | None) -> None:
        """So many Episodes are done."""
        if self.base is None:
            replayed = now - self.step_began < 0.5
            self.base = (now, done) if replayed else (self.step_began, 0)
        self.done, self.accuracy = done, accuracy

    def step_left(self, now: float) -> float | None:
        """Seconds to the end of the step, or None while its pace is unknown."""
        if self.total is None or self.base is None:
            return None
        since, before = self.base
        if self.done >= self.total:
            return 0.0
        if now <= since or self.done - before < max(1.0, ENOUGH_FOR_A_PACE * (self.total - before)):
            return None
        return (self.total - self.done) * (now - since) / (self.done - before)

    def left(self, now: float) -> float | None:
        """Seconds to the end of the last Generation, or None before the first one has ended."""
        if not self.durations or self.generation_began is None:
            return None
        usual = sum(self.durations) / len(self.durations)
        this = max(usual - (now - self.generation_began), self.step_left(now) or 0.0)
        return this + max(0, self.of - self.number) * usual

    def left_words(self, now: float) -> str:
        """ "about 12 min left", for the step alone as long as nothing is known about a Generation; or nothing."""
        whole = self.left(now)
        if whole is not None:
            return f"{words_for(whole)} left"
        step = self.step_left(now)
        return "" if not step else f"{words_for(step)} left in this step"

    def line(self, now: float) -> str:
        """Elapsed, Generation, lever, step, Episodes, accuracy and time left, in one line."""
        parts = [f"generation {self.number}/{self.of} {self.lever}"] if self.number else []
        if self.step:
            count = "" if self.total is None else f" {self.done}/{self.total}"
            parts.append(self.step + count)
        if self.accuracy is not None:
            parts.append(f"accuracy so far {self.accuracy:.3f}")
        parts.append(self.left_words(now))
        return f"{stamp(now - self.started)}  " + " · ".join(part for part in parts if part)


class TerminalProgress:
    """For people: one line that is redrawn at a terminal; in a log, a line for each step and now and then one more."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._lock = RLock()
        self._pace = Pace(started=clock())
        self._live: Live | None = None
        self._logged = 0.0
        self._closed = False

    @_never_raises
    def generation(self, number: int, of: int, lever: str, note: str) -> None:
        with self._lock:
            self._pace.begin_generation(self._clock(), number, of, lever)
        self._print(f"generation {number}/{of} · {lever}" + (f": {note}" if note else ""), "bold")

    @_never_raises
    def step(self, name: str, total: int | None) -> None:
        with self._lock:
            self._pace.begin_step(self._clock(), name, total)
        if self._console.is_terminal:
            self._show()
        else:
            self._log_line()

    @_never_raises
    def advance(self, done: int, accuracy: float | None) -> None:
        with self._lock:
            now = self._clock()
            self._pace.count(now, done, accuracy)
            due = now - self._logged >= LOG_EVERY_S or done == self._pace.total
        if due and not self._console.is_terminal:
            self._log_line()

    @_never_raises
    def note(self, text: str) -> None:
        self._print(text)

    @_never_raises
    def close(self) -> None:
        with self._lock:
            live, self._live, self._closed = self._live, None, True
        if live is not None:
            live.stop()

    def _print(self, text: str, style: str = "") -> None:
        """A line that stays. No markup: a note may quote a scaffold, brackets and all."""
        from rich.text import Text

        if self._console.is_terminal:
            self._show()
        began = Text(f"{stamp(self._clock() - self._pace.started)}  ", style="dim")
        self._console.print(began.append(text, style=style), soft_wrap=True)

    def _log_line(self) -> None:
        with self._lock:
            now = self._clock()
            self._logged = now
            line = self._pace.line(now)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        """Start the live line on first use; rich's own thread draws it from then on."""
        with self._lock:
            if self._live is not None or self._closed:
                return
            from rich.live import Live

            self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def _draw(self) -> Text:
        from rich.text import Text

        with self._lock:
            return Text(self._pace.line(self._clock()), style="cyan", no_wrap=True, overflow="ellipsis")


class JsonProgress:
    """For machines: `{"event": "generation" | "step" | "advance" | "note" | "close", "elapsed_s": ..., ...}` a line.

    `advance` events are thinned to two a second; the one that completes a step is never left out.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = RLock()
        self._pace = Pace(started=clock())
        self._written = float("-inf")
        self._closed = False

    @_never_raises
    def generation(self, number: int, of: int, lever: str, note: str) -> None:
        with self._lock:
            self._pace.begin_generation(self._clock(), number, of, lever)
            self._write("generation", number=number, of=of, lever=lever, note=note)

    @_never_raises
    def step(self, name: str, total: int | None) -> None:
        with self._lock:
            self._pace.begin_step(self._clock(), name, total)
            self._written = float("-inf")
            self._write("step", name=name, total=total)

    @_never_raises
    def advance(self, done: int, accuracy: float | None) -> None:
        with self._lock:
            now = self._clock()
            self._pace.count(now, done, accuracy)
            if now - self._written < JSON_EVERY_S and done != self._pace.total:
                return
            self._written = now
            left = self._pace.left(now)
            self._write(
                "advance",
                generation=self._pace.number,
                step=self._pace.step,
                done=done,
                total=self._pace.total,
                accuracy=accuracy,
                left_s=None if left is None else round(left, 1),
            )

    @_never_raises
    def note(self, text: str) -> None:
        with self._lock:
            self._write("note", text=text)

    @_never_raises
    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._write("close")

    def _write(self, event: str, **fields: str | int | float | None) -> None:
        elapsed_s = round(self._clock() - self._pace.started, 3)
        self._stream.write(json.dumps({"event": event, "elapsed_s": elapsed_s, **fields}) + "\n")
        self._stream.flush()


class QuietProgress:
    """Says nothing."""

    def generation(self, number: int, of: int, lever: str, note: str) -> None:
        """Ignored."""

    def step(self, name: str, total: int | None) -> None:
        """Ignored."""

    def advance(self, done: int, accuracy: float | None) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""
