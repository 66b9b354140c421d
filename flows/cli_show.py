"""Commands that look: `sia list`, `sia status`, `sia show`, `sia pool` and `sia report`. They read, and start nothing.

A Run whose process was killed is still "running" in the tables; these commands try its lock and say "killed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_common import open_database, out_console, print_json
from flows.cli_errors import UserError
from flows.cli_run import RunName
from flows.settings import Places

if TYPE_CHECKING:
    from flows.records import RunSummary, RunView
    from flows.state.database import Database

AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_all)
    app.command("status")(status)
    app.command("show")(show)
    app.command("pool")(pool)
    app.command("report")(report)


def list_all(json: AsJson = False) -> None:
    """All runs, the newest first.

    \b
    Example:
      sia list
    """
    from flows.present import print_runs
    from flows.views import list_runs

    places = Places.from_environment()
    with open_database(places) as database:
        found = [_seen_summary(places, database, run) for run in list_runs(database)]
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
    from flows.views import list_runs

    places = Places.from_environment()
    with open_database(places) as database:
        if run is None:
            found = list_runs(database)
            if not found:
                raise UserError("there is no run yet; start one with `sia run chain-sum`")
            run = found[0].id
        view = _seen(places, database, run)
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
    from flows.views import episode_view

    if generation is not None and episode is not None:
        raise UserError("--generation and --episode exclude each other; give one of them")
    places = Places.from_environment()
    with open_database(places) as database:
        view = _seen(places, database, run)
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


def pool(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN [...]", help="Finished runs of one task.")],
    json: AsJson = False,
) -> None:
    """Several finished runs of one task, of different seeds, together: what each lever brought over all of them.

    The figure to quote is "over problems": each problem's mean difference over the seeds, with a 95 % interval over
    problems. It holds the noise of the problems; how much another seed would differ is said "between seeds".

    \b
    Examples:
      sia pool seed-0 seed-1 seed-2
      sia pool seed-0 seed-1 seed-2 --json > pooled.json
    """
    from flows.pooling import pool_runs, print_pool

    places = Places.from_environment()
    with open_database(places) as database:
        found = pool_runs(database, runs, lambda run: _seen(places, database, run))
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        print_pool(out_console(), found)


def report(run: RunName) -> None:
    """Write the self-contained HTML report of a run, and print its path.

    \b
    Example:
      sia report chain-sum-1
    """
    from flows.report import write_report

    places = Places.from_environment()
    with open_database(places) as database:
        view = _seen(places, database, run)
    typer.echo(str(write_report(view, places)))


def _seen(places: Places, database: Database, run: str) -> RunView:
    """A Run as it stands, where "running" is only said of one that somebody works on."""
    from flows.control import is_abandoned
    from flows.records import KILLED
    from flows.state.tables import RunStatus
    from flows.views import run_view

    view = run_view(database, run)
    if view.status == RunStatus.RUNNING and is_abandoned(places, database, run):
        return view.model_copy(update={"status": KILLED})
    return view


def _seen_summary(places: Places, database: Database, run: RunSummary) -> RunSummary:
    """The same for a line of the list."""
    from flows.control import is_abandoned
    from flows.records import KILLED
    from flows.state.tables import RunStatus

    if run.status == RunStatus.RUNNING and is_abandoned(places, database, run.id):
        return run.model_copy(update={"status": KILLED})
    return run
