"""Commands that look: `sia list`, `sia status`, `sia show` and `sia report`. They read, and start nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_common import open_database, out_console, print_json
from flows.cli_errors import UserError
from flows.cli_run import RunName
from flows.settings import Places

AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_all)
    app.command("status")(status)
    app.command("show")(show)
    app.command("report")(report)


def list_all(json: AsJson = False) -> None:
    """All runs, the newest first.

    \b
    Example:
      sia list
    """
    from flows.present import print_runs
    from flows.views import list_runs

    with open_database(Places.from_environment()) as database:
        found = list_runs(database)
    if json:
        print_json([run.model_dump(mode="json") for run in found])
    else:
        print_runs(out_console(), found)


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run; the newest if left out.")] = None,
    json: AsJson = False,
) -> None:
    """Where a run stands, what is open, and what it has cost so far.

    \b
    Examples:
      sia status
      sia status chain-sum-1 --json
    """
    from flows.present import print_status
    from flows.views import list_runs, run_view

    with open_database(Places.from_environment()) as database:
        if run is None:
            found = list_runs(database)
            if not found:
                raise UserError("there is no run yet; start one with `sia run chain-sum`")
            run = found[0].id
        view = run_view(database, run)
    if json:
        print_json(view.model_dump(mode="json"))
    else:
        print_status(out_console(), view)


def show(
    run: RunName,
    generation: Annotated[int | None, typer.Option(help="One generation: what it changed and how it did.")] = None,
    episode: Annotated[int | None, typer.Option(help="One episode: every model call, the answer, the score.")] = None,
    json: AsJson = False,
) -> None:
    """The result of a run, or one of its generations or episodes.

    \b
    Examples:
      sia show chain-sum-1
      sia show chain-sum-1 --generation 3
      sia show chain-sum-1 --episode 512
    """
    from flows.present import print_episode, print_generation, print_result
    from flows.views import episode_view, run_view

    if generation is not None and episode is not None:
        raise UserError("--generation and --episode exclude each other; give one of them")
    places = Places.from_environment()
    with open_database(places) as database:
        view = run_view(database, run)
        found = None if episode is None else episode_view(database, episode)
    if found is not None:
        if found.run_id != view.id:
            raise UserError(
                f"episode {episode} is of run '{found.run_id}': sia show {found.run_id} --episode {episode}"
            )
        if json:
            print_json(found.model_dump(mode="json"))
        else:
            print_episode(out_console(), found)
    elif generation is not None:
        one = view.generation(generation)
        if one is None:
            known = ", ".join(str(g.number) for g in view.generations) or "none yet"
            raise UserError(f"run '{run}' has no generation {generation}; it has: {known}")
        if json:
            print_json(one.model_dump(mode="json"))
        else:
            print_generation(out_console(), view, generation, places)
    elif json:
        print_json(view.model_dump(mode="json"))
    else:
        print_result(out_console(), view)


def report(run: RunName) -> None:
    """Write the self-contained HTML report of a run, and print its path.

    \b
    Example:
      sia report chain-sum-1
    """
    from flows.report import write_report
    from flows.views import run_view

    places = Places.from_environment()
    with open_database(places) as database:
        view = run_view(database, run)
    typer.echo(str(write_report(view, places)))
