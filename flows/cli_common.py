"""What several commands need: consoles, the database, and values given as `--set key=value`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from pydantic import JsonValue

from flows.cli_errors import UserError
from flows.settings import Places

if TYPE_CHECKING:
    from rich.console import Console

    from flows.state.database import Database

PIPE_WIDTH = 120
"""Columns when the output is no terminal and nobody has said how wide it is."""


def out_console() -> Console:
    """Where results go."""
    from rich.console import Console

    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(highlight=False, width=fixed)


def error_console() -> Console:
    """Where progress and remarks go, so that a result can be piped."""
    from rich.console import Console

    class Remarks(Console):
        def on_broken_pipe(self) -> None:
            """Nobody reads the remarks any more; rich's own answer closes standard output and ends the program."""
            self.quiet = True

    return Remarks(stderr=True, highlight=False)


def say(text: str) -> None:
    """A remark to the person: standard error."""
    print(text, file=sys.stderr)


def print_json(value: JsonValue, stream: TextIO | None = None, indent: int | None = 2) -> None:
    """A JSON document on standard output (or a given stream)."""
    print(json.dumps(value, ensure_ascii=False, indent=indent), file=stream or sys.stdout, flush=True)


@contextmanager
def open_database(places: Places) -> Iterator[Database]:
    """The database of this home, migrated, closed at the end."""
    from flows.state.database import Database

    database = Database.open(places.database_url)
    try:
        yield database
    finally:
        database.close()


def parse_settings(pairs: list[str]) -> dict[str, JsonValue]:
    """`["weights.iterations=4", "model=foo"]` as `{"weights.iterations": 4, "model": "foo"}`.

    A value is read as TOML (numbers, true, "text", lists); what is no TOML value is text as it stands.

    Raises:
        UserError: no '=' in it, or no key before it.
    """
    found: dict[str, JsonValue] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set '{pair}' is not key=value; for example: --set weights.iterations=4")
        found[key.strip()] = _toml_value(text.strip())
    return found


def _toml_value(text: str) -> JsonValue:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        json.dumps(value)
    except (tomllib.TOMLDecodeError, TypeError):  # plain text, or a date, which JSON does not have
        return text
    checked: JsonValue = value
    return checked


@contextmanager
def terminate_politely() -> Iterator[None]:
    """SIGTERM and a closed terminal do what Ctrl-C does, so that work in flight is booked as interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def as_interrupt(_number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)  # the one of the moment: a run puts its own there
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    kinds = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        kinds.append(signal.SIGHUP)
    before = {kind: signal.signal(kind, as_interrupt) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
