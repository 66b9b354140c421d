"""Commands about this machine: `sia server start|stop|status` (the local Prefect server) and `sia doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_common import out_console, print_json, say
from flows.settings import Places

app = typer.Typer(help="The local Prefect server and its UI.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands that stand on their own."""
    app.command("doctor")(doctor)


@app.command()
def start() -> None:
    """Start the server, unless it runs; `sia run` does this by itself.

    \b
    Example:
      sia server start
    """
    from flows.server import ensure_server

    info = ensure_server(Places.from_environment(), say)
    typer.echo(f"Prefect UI: {info.ui_url}" + ("" if info.started else "  (was running)"))


@app.command()
def stop() -> None:
    """Stop the server. Runs keep their state, which is not in it.

    \b
    Example:
      sia server stop
    """
    from flows.server import stop_server

    typer.echo("stopped" if stop_server(Places.from_environment()) else "it was not running")


@app.command()
def status(json: AsJson = False) -> None:
    """Whether the server runs, and where its UI is.

    \b
    Example:
      sia server status
    """
    from flows.server import server_status
    from flows.server_process import log_path

    places = Places.from_environment()
    info = server_status(places)
    if json:
        up = info is not None and info.healthy
        detail = {} if info is None else {"api_url": info.api_url, "ui_url": info.ui_url, "pid": info.pid}
        print_json({"up": up, **detail})
    elif info is None:
        typer.echo("not running; `sia run` starts it, or `sia server start`")
    elif not info.healthy:
        typer.echo(
            f"does not answer at {info.api_url}; see {log_path(places)}, or `sia server stop` and start it again"
        )
    else:
        whose = "of your PREFECT_API_URL" if info.pid is None else f"pid {info.pid}"
        typer.echo(f"running ({whose}): {info.ui_url}")


def doctor(json: AsJson = False) -> None:
    """Check this machine, one line each: versions, sandbox, disk, model, database, Prefect, keys.

    \b
    Examples:
      sia doctor
      sia doctor --json
    """
    from flows.doctor import Status, examine

    checks = examine(Places.from_environment())
    if json:
        print_json([check.model_dump(mode="json") for check in checks])
    else:
        from rich.text import Text

        styles = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
        console = out_console()
        for check in checks:
            line = Text.assemble((f"{check.status:<5}", styles[check.status]), f"{check.name:<19}{check.text}")
            console.print(line.append(f"  -> {check.fix}" if check.fix else ""), soft_wrap=True)
    if any(check.status is Status.FAIL for check in checks):
        raise typer.Exit(1)
