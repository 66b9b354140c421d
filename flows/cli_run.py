"""Commands that work: `sia run`, `sia resume` and `sia eval`.

Output is the same for all: progress on standard error, the result on standard output. With `--json`, standard output
carries JSON lines and nothing else: events (`flows.watch.JsonProgress`), and last `{"event": "result", ...}`. With
`--quiet`, no progress, only the result (together with `--json`: only its line).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import JsonValue

from flows.cli_common import (
    error_console,
    open_database,
    out_console,
    parse_settings,
    print_json,
    say,
    terminate_politely,
)
from flows.cli_errors import UserError
from flows.settings import Places, SandboxKind, load_run_settings
from tasks.contract import Split

if TYPE_CHECKING:
    from flows.progress import Progress

Profile = Annotated[str, typer.Option(help="Which parts work together; a TOML file in <home>/profiles or built in.")]
Seed = Annotated[int | None, typer.Option(help="Varies search and sampling, never the problems.", min=0)]
Sandbox = Annotated[
    SandboxKind | None, typer.Option(help="How scaffold code is confined; 'none' is for machines that cannot.")
]
Deterministic = Annotated[
    bool | None, typer.Option("--deterministic", help="Compute every model call alone: reproducible, slower.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting, as TOML; may be repeated.", metavar="KEY=VALUE")
]
Json = Annotated[bool, typer.Option("--json", help="Events, then the result, as JSON lines on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, as in `sia list`.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("run")(run)
    app.command("resume")(resume)
    app.command("eval")(evaluate)


def run(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of a task (`sia tasks list`), or of a folder.")],
    profile: Profile = "offline",
    generations: Annotated[int | None, typer.Option(help="Candidates in all, the first included.", min=1)] = None,
    seed: Seed = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name again resumes it.")] = None,
    sandbox: Sandbox = None,
    deterministic: Deterministic = None,
    settings: Settings = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Improve an agent on a task: start a run, or go on with the one of that name.

    \b
    Examples:
      sia run chain-sum
      sia run lawbench --generations 5 --seed 1 --name monday
      sia run chain-sum --set weights.iterations=4 --set harness_patience=3
      sia run chain-sum --json > events.jsonl
    """
    given: dict[str, JsonValue] = {
        "generations": generations,
        "seed": seed,
        "sandbox": None if sandbox is None else sandbox.value,
        "deterministic": deterministic,
        **parse_settings(settings or []),
    }
    run_task(task, profile, given, name, json, quiet)


def resume(run: RunName, json: Json = False, quiet: Quiet = False) -> None:
    """Go on with a run after Ctrl-C, a crash or `kill -9`; nothing recorded is done again.

    \b
    Example:
      sia resume chain-sum-1
    """
    places = Places.from_environment()
    with open_database(places) as database:
        from flows.views import run_view

        run_view(database, run)  # an unknown name is told before anything starts
    _work(places, run, json, quiet)


def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of a task, or of a folder.")],
    scaffold: Annotated[Path, typer.Option(help="Folder of the scaffold.", metavar="DIR")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of LoRA weights (PEFT).", metavar="DIR")] = None,
    split: Annotated[Split, typer.Option(help="Which problems.")] = Split.DEV,
    problems: Annotated[int | None, typer.Option(help="Only the first so many.", min=1)] = None,
    unseal: Annotated[
        bool, typer.Option("--unseal", help="Allow --split test. The read is recorded with the run.")
    ] = False,
    profile: Profile = "offline",
    seed: Seed = None,
    sandbox: Sandbox = None,
    deterministic: Deterministic = None,
    settings: Settings = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Roll out one scaffold on a task, score it, and nothing else.

    \b
    Examples:
      sia eval chain-sum --scaffold ./my-scaffold
      sia eval chain-sum --scaffold ./my-scaffold --adapter ./my-adapter --problems 50
    """
    if split is Split.TEST and not unseal:
        raise UserError(
            "the test split is sealed, since a score that steers choices stops being a test; "
            "use --split dev, or add --unseal (the read is recorded)"
        )
    for folder in (scaffold, adapter):
        if folder is not None and not folder.is_dir():
            raise UserError(f"no folder '{folder}'; give the path of a folder that exists")
    places = Places.from_environment()
    given: dict[str, JsonValue] = {
        "seed": seed,
        "sandbox": None if sandbox is None else sandbox.value,
        "deterministic": deterministic,
        **parse_settings(settings or []),
    }
    wanted = load_run_settings(profile, given, places.home)
    if split is Split.TEST:
        say("Reading the sealed test split; the read is recorded.")
    with _watched(json, quiet) as progress:
        from flows.evaluate import evaluate_scaffold

        try:
            found = evaluate_scaffold(places, task, scaffold, adapter, split, wanted, problems, progress)
        except KeyboardInterrupt:
            progress.close()
            say("\nInterrupted.")
            raise typer.Exit(130) from None
    if json:
        print_json({"event": "result", **found.model_dump(mode="json")}, indent=None)
    else:
        typer.echo(found.text())


def run_task(
    task: str,
    profile: str,
    given: dict[str, JsonValue],
    name: str | None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Start a run, or find the one of that name, and work on it until it is finished."""
    places = Places.from_environment()
    settings = load_run_settings(profile, given, places.home)
    _prepare_prefect(places)
    from flows.control import start_run

    _work(places, start_run(places, task, settings, name), json, quiet)


def _work(places: Places, run_id: str, json: bool, quiet: bool) -> None:
    _prepare_prefect(places)
    with _watched(json, quiet) as progress:
        from flows.control import execute_run

        if not quiet:
            progress.note(f"run {run_id} (Ctrl-C stops it politely; `sia resume {run_id}` goes on)")
        try:
            execute_run(places, run_id, progress)
        except KeyboardInterrupt:
            progress.close()
            say(f"\nInterrupted; nothing recorded is lost. Go on with: sia resume {run_id}")
            raise typer.Exit(130) from None
    _finish(places, run_id, json, quiet)


def _finish(places: Places, run_id: str, json: bool, quiet: bool) -> None:
    """The result, the report, and where the rest is to be seen."""
    from flows.present import print_result
    from flows.report import write_report
    from flows.server import server_status
    from flows.state.tables import RunStatus
    from flows.views import run_view

    with open_database(places) as database:
        view = run_view(database, run_id)
    report = write_report(view, places)
    server = server_status(places)
    if json:
        ui = None if server is None else server.ui_url
        dumped = view.model_dump(mode="json")
        print_json({"event": "result", **dumped, "report": str(report), "prefect_ui": ui}, indent=None)
    else:
        console = out_console()
        print_result(console, view)
        if not quiet:
            say(f"\nReport:     {report}")
            if server is not None:
                stop = "" if server.pid is None else "  (keeps running; stop it with: sia server stop)"
                say(f"Prefect UI: {server.ui_url}{stop}")
            say(f"More:       sia show {run_id} --generation 1")
    if view.status != RunStatus.FINISHED:
        raise UserError(f"run '{run_id}' is {view.status}; go on with `sia resume {run_id}`", 1)


def _prepare_prefect(places: Places) -> None:
    from flows.server import prepare_environment

    prepare_environment(places)


@contextlib.contextmanager
def _watched(json: bool, quiet: bool) -> Iterator[Progress]:
    """The watcher that was asked for; with `--json`, whatever else prints is moved to standard error meanwhile."""
    from flows.watch import JsonProgress, QuietProgress, TerminalProgress

    progress: Progress
    with contextlib.ExitStack() as stack:
        if quiet:
            progress = QuietProgress()
        elif json:
            progress = JsonProgress(sys.stdout)
        else:
            progress = TerminalProgress(error_console())
        stack.callback(progress.close)
        if json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(terminate_politely())
        yield progress
