"""What a person sees when something is wrong: one line that names it and the fix, and an exit code.

    0    done
    1    the work failed (a resumed run may succeed)
    2    the request cannot be met as it stands: usage, settings, an unknown name, this machine
    3    busy: another process works on that run
    130  interrupted by Ctrl-C or SIGTERM

A traceback is printed only if SIA_DEBUG=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException


class UserError(Exception):
    """Raised when a request cannot be met as it stands; the message is one line with the fix."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SiaGroup(TyperGroup):
    """The root command: turns every exception that leaves a command into one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: object,
    ) -> None:
        """Run a command line and exit with its code."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            result = super().main(words, "sia", complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            fail(f"{error.format_message()} See `{self._path(words)} --help`.", 2)
        except Abort:
            sys.exit(130)
        except Exception as error:
            if os.environ.get("SIA_DEBUG") == "1":
                raise
            fail(*explain(error))
        sys.exit(result if isinstance(result, int) else 0)

    def _path(self, words: Sequence[str]) -> str:
        """The command that the words led to: "sia tasks fetch" of `sia tasks fetch --nonsense`."""
        path, group = ["sia"], self
        for word in words:
            found = group.commands.get(word)
            if found is None:
                break
            path.append(word)
            if not isinstance(found, TyperGroup):
                break
            group = found  # type: ignore[assignment]
        return " ".join(path)


def fail(message: str, exit_code: int) -> None:
    """Say it on standard error, on one line, and exit."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(exit_code)


def explain(error: Exception) -> tuple[str, int]:
    """A message and an exit code for an exception that left a command."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    code = _known(error)
    if code is not None:
        return str(error), code
    said = str(error).strip() or "no message"
    return f"{type(error).__name__}: {said} (a fault in sia; SIA_DEBUG=1 shows where)", 1


def _known(error: Exception) -> int | None:
    """The exit code of an error that was written for people, or None for any other.

    Only modules that are loaded are asked: what was never imported cannot have raised.
    """
    for module, name in WRITTEN_FOR_PEOPLE:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(error, kind):
            return getattr(error, "exit_code", 2)
    return None


WRITTEN_FOR_PEOPLE = (
    ("flows.control", "RunProblem"),
    ("flows.views", "UnknownRun"),
    ("flows.pooling", "PoolingError"),
    ("flows.settings", "SettingsError"),
    ("flows.server", "ServerError"),
    ("flows.state.database", "StateError"),
    ("tasks.contract", "TaskError"),
    ("agents.scaffold", "ScaffoldError"),
    ("agents.sandbox", "SandboxUnavailable"),
    ("training.base_model", "BaseModelError"),
)
"""(module, error) whose messages are one line with the fix. A test checks that each exists."""
