"""The command line.

    sia run chain-sum                                     improve an agent on a task
    sia status                                            where the newest run stands
    sia --task lawbench --max_gen 5 --run_id 1            the same as `sia run`, in the paper's own words

Commands live in `flows.cli_run` (run, resume, eval), `flows.cli_show` (list, status, show, pool, report),
`flows.cli_tasks` and `flows.cli_server` (server, doctor); errors and exit codes in `flows.cli_errors`. Whatever is
heavy (torch, prefect, transformers, the database) is imported inside the command that needs it, so that `sia --help`
answers at once.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows import cli_run, cli_server, cli_show, cli_tasks
from flows.cli_errors import SiaGroup, UserError

app = typer.Typer(
    cls=SiaGroup,
    name="sia",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_run.register(app)
cli_show.register(app)
app.add_typer(cli_tasks.app, name="tasks")
app.add_typer(cli_server.app, name="server")
cli_server.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sia {version('sia')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    task: Annotated[
        str | None, typer.Option("--task", help="The paper's spelling of `sia run TASK`.", metavar="TASK")
    ] = None,
    max_gen: Annotated[
        int | None, typer.Option("--max_gen", help="With --task: as --generations.", metavar="N")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run_id", help="With --task: 1 is as --name run-1.", metavar="ID")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Self-improving agents: rewrites an agent's scaffold or updates its weights, and keeps what is truly better.

    \b
    Examples:
      sia run chain-sum                    no key, no GPU, a quarter of an hour
      sia tasks list                       what can be improved on
      sia status                           where the newest run stands
      sia resume chain-sum-1               go on after Ctrl-C or a crash
      sia show chain-sum-1 --generation 2  what a generation tried
      sia doctor                           is this machine ready?

    \b
    The paper's own spelling works too:
      sia --task lawbench --max_gen 5 --run_id 1
    """
    if ctx.invoked_subcommand is not None:
        if task is not None or max_gen is not None or run_id is not None:
            raise UserError(f"--task, --max_gen and --run_id go without a command; drop '{ctx.invoked_subcommand}'")
        return
    if task is None:
        if max_gen is not None or run_id is not None:
            raise UserError(
                "--max_gen and --run_id need --task; for example: sia --task lawbench --max_gen 5 --run_id 1"
            )
        typer.echo(ctx.get_help())
        return
    cli_run.run_task(task, "offline", {"generations": max_gen}, None if run_id is None else f"run-{run_id}")


def main() -> None:
    """Entry point of the command `sia`."""
    prepare_process()
    app()


def prepare_process() -> None:
    """Environment that libraries read when they are imported: nothing leaves the machine, and they keep quiet."""
    from flows.server_process import PRIVACY

    os.environ.update(PRIVACY)
    quiet = {
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",  # models come from packages and folders; saving an adapter would ask the hub otherwise
        "TOKENIZERS_PARALLELISM": "false",
    }
    if os.environ.get("SIA_DEBUG") != "1":
        # Prefect's own log stays in its UI; the terminal belongs to the progress line.
        quiet["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
