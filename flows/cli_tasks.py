"""Commands about tasks: `sia tasks list`, `describe` and `fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_common import out_console, print_json, say
from flows.settings import Places, load_run_settings
from tasks.contract import TaskKind, TaskSpec

app = typer.Typer(help="What can be improved on.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="TASK", help="Name of a task (`sia tasks list`), or of a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


@app.command("list")
def list_all(json: AsJson = False) -> None:
    """The built-in tasks.

    \b
    Example:
      sia tasks list
    """
    from rich import box
    from rich.table import Table

    from tasks.loader import list_tasks

    specs = list_tasks()
    if json:
        print_json([spec.model_dump(mode="json") for spec in specs])
        return
    table = Table("Task", "Kind", "Problems (train / dev / test)", "Title", box=box.SIMPLE_HEAD, show_edge=False)
    for spec in specs:
        table.add_row(spec.name, spec.kind, _sizes(spec), spec.title)
    out_console().print(table)


@app.command()
def describe(task: Name, json: AsJson = False) -> None:
    """What a task asks, as agents read it, with its sizes, limits and published scores.

    \b
    Example:
      sia tasks describe lawbench
    """
    from tasks.loader import find_folder, load_spec

    spec = load_spec(find_folder(task))
    if json:
        print_json(spec.model_dump(mode="json"))
        return
    console = out_console()
    limits = spec.limits
    lines = [
        f"{spec.title} ({spec.name})",
        f"kind       {spec.kind}, answers are {spec.answer}, scored by {spec.metric}",
        f"problems   {_sizes(spec)} (train / dev / test); {spec.dev_block} a gate"
        + (", fresh ones each time" if spec.fresh_dev else ""),
        f"limits     {limits.wall_s:g} s wall, {limits.cpu_s} s CPU, {limits.memory_mb} MB, "
        f"{limits.max_calls} model calls",
    ]
    if spec.model_only:
        lines.append("model-only an answer counts only if the model wrote it in that episode")
    lines += [f"baseline   {b.name}: {b.score:g} ({b.source})" for b in spec.baselines]
    for line in [*lines, "", spec.text.strip()]:
        console.print(line, markup=False, soft_wrap=True)


@app.command()
def fetch(task: Name) -> None:
    """Get a task ready: its data, and the model that solves it. `sia run` does the same when it is needed.

    \b
    Example:
      sia tasks fetch chain-sum
    """
    from tasks.loader import load_task

    places = Places.from_environment()
    opened = load_task(task, places.cache, say)
    typer.echo(f"{opened.spec.name}: data ready ({_sizes(opened.spec)} problems) in {places.cache}")
    model = load_run_settings("offline", {}, places.home).model
    if opened.spec.kind is TaskKind.SOLVE and model is not None and "/" not in model:
        from training.base_model import ensure_base_model

        typer.echo(f"{model}: ready in {ensure_base_model(model, say)}")


def _sizes(spec: TaskSpec) -> str:
    return " / ".join(f"{size:,}" for size in spec.sizes.values())
