"""The terminal's screens of Runs: `list`, `status`, the result at the end, `show`.

Made for 80 columns and up, and readable without colour: whatever a colour says, a word says too. Text that agents
or models wrote is printed with control characters made visible and is never read as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import JsonValue
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.episode import CAUSES, Cause
from flows import words
from flows.records import KILLED, CallView, EpisodeView, GenerationView, RunSummary, RunView, VerdictView
from flows.scaffold_diff import scaffold_diff
from flows.settings import Places, SandboxKind

WIDE = 120
"""From this many columns on, a figure and its interval stand on one line in tables."""

_DIFF_STYLES = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))


def print_runs(console: Console, runs: Sequence[RunSummary]) -> None:
    """`sia list`: a line for each Run."""
    if not runs:
        console.print("No runs yet. Start one with: sia run chain-sum", highlight=False)
        return
    table = text_table("Run", "Task", "Seed", "Status", "Gens", "Kept", "Test", "Time")
    for run in runs:
        table.add_row(
            _text(run.id, "bold"),
            _text(run.task),
            str(run.seed),
            _status(run.status),
            str(run.generations),
            str(run.accepted),
            "-" if run.winner is None else words.percent(run.winner),
            words.duration(run.active_s),
        )
    print_table(console, table)
    for run in runs:
        if run.sandbox is SandboxKind.NONE:
            console.print(Text.assemble(_text(run.id), ": ", (words.UNCONFINED, "bold red")))


def print_status(console: Console, view: RunView) -> None:
    """`sia status RUN`: where it stands, what is open, what it has cost so far."""
    _title(console, view)
    if view.error:
        console.print(Text.assemble(("Error: ", "bold red"), _text(view.error)))
    if view.incumbent is not None:
        incumbent = view.generation(view.incumbent)
        if incumbent is not None:
            console.print(
                f"Incumbent: generation {incumbent.number}, {words.lever(incumbent)}, dev {words.dev_score(incumbent)}",
                markup=False,
                highlight=False,
            )
    if view.open_work:
        console.print("Open work:", style="bold")
        for work in view.open_work:
            total = "" if work.total is None else f" {work.done}/{work.total}"
            so_far = "" if work.accuracy is None else f", {words.percent(work.accuracy)} so far"
            console.print(_text(f"  {work.what}{total}{so_far}"))
    on = words.way_on(view)
    if on is not None:
        console.print(_text(on, "bold"))
    _print_evaluations(console, view)
    _print_generations(console, view)
    _print_spending(console, view)


def print_result(console: Console, view: RunView) -> None:
    """The end of `sia run`: the sealed test, what each lever brought, every Generation, published scores beside it."""
    _title(console, view)
    for sentence in words.headline(view):
        console.print(_text(sentence))
    if view.test:
        table = text_table("Sealed test", "What it is", "Gen", "n", "Score", "95 % interval")
        for arm in view.test:
            table.add_row(
                _text(words.ARM_NAMES.get(arm.arm, arm.arm), "bold"),
                _text(arm.words),
                str(arm.generation),
                str(arm.n),
                words.percent(arm.mean),
                words.bounds(arm.low, arm.high),
            )
        print_table(console, table)
        console.print(_text(f"Intervals: {view.test[0].method}. A missing answer counts 0.", "dim"))
    if view.test_differences:
        table = text_table("Paired difference", "Points", "95 % interval", "n", "")
        for found in view.test_differences:
            table.add_row(
                f"{words.ARM_NAMES[found.left]} - {words.ARM_NAMES[found.right]}",
                words.points(found.mean),
                words.signed_bounds(found.low, found.high),
                str(found.n),
                "same candidate" if found.same else "beyond noise" if found.beyond_noise else "not beyond noise",
            )
        print_table(console, table)
    _print_evaluations(console, view)
    _print_generations(console, view)
    if view.baselines:
        table = text_table("Published or measured elsewhere", "Score", "Source")
        for baseline in view.baselines:
            source = baseline.source if baseline.comparable else f"{baseline.source} (not comparable)"
            table.add_row(_text(baseline.name), f"{words.percent_points(baseline.score)} %", _text(source))
        print_table(console, table)
    _print_spending(console, view)


def print_generation(console: Console, view: RunView, number: int, places: Places) -> None:
    """`sia show RUN --generation N`: what it changed, how it did, the gate's word, and what was decided after it."""
    _sandbox(console, view.sandbox)
    generation = view.generation(number)
    if generation is None:
        known = ", ".join(str(g.number) for g in view.generations) or "none yet"
        console.print(_text(f"Run '{view.id}' has no generation {number}; it has: {known}"))
        return
    console.print(_text(f"Generation {number} of {view.id}: {words.lever(generation)}", "bold"))
    parent = "none" if generation.parent is None else f"generation {generation.parent}"
    console.print(_text(f"Parent: {parent}. {words.accepted(generation).capitalize()}."))
    console.print(
        _text(f"Scaffold {words.short(generation.scaffold_id)}, weights {words.short(generation.adapter_id)}")
    )
    if generation.note:
        console.print(_text(generation.note))
    _print_measured(console, view, generation)
    _print_training(console, view, number)
    for decision in view.decisions:
        if decision.after_generation == number:
            console.print(_text(f"\nDecision after it: {words.LEVERS.get(decision.lever, decision.lever)}", "bold"))
            for reason in decision.reasons:
                console.print(_text(f"  - {reason}"))
            if decision.settings is not None:
                console.print(_text(f"  settings: {_json(decision.settings)}"))
    console.print(_text("\nScaffold, compared with its parent's:", "bold"))
    for line in scaffold_diff(view, generation, places.scaffolds):
        style = next((style for prefix, style in _DIFF_STYLES if line.startswith(prefix)), "")
        console.print(_text(line, style))


def print_episode(console: Console, episode: EpisodeView) -> None:
    """`sia show RUN --episode ID`: one Trajectory, from the first call to the Score."""
    _sandbox(console, episode.sandbox)
    console.print(_text(f"Episode {episode.id} of {episode.run_id}: problem {episode.problem_id}", "bold"))
    policy = ", training policy (temperature 1 forced)" if episode.train_policy else ""
    console.print(
        _text(
            f"{episode.slot}, {episode.split} split, generation {episode.generation}, sample {episode.sample}, "
            f"seed {episode.seed}{policy}"
        )
    )
    console.print(_text(f"Scaffold {words.short(episode.scaffold_id)}, weights {words.short(episode.adapter_id)}"))
    for number, call in enumerate(episode.calls, 1):
        _print_call(console, number, len(episode.calls), call)
    if episode.events:
        console.print(_text("\nEvents that the scaffold logged", "bold"))
        for event in episode.events:
            console.print(_text(f"  {_json(event)}"))
    console.print(_text("\nEnd", "bold"))
    console.print(_text(f"  {episode.status}: {cause_words(episode.cause)}, after {episode.wall_s:.1f} s"))
    if episode.infrastructure_failures:
        console.print(_text(f"  repeated after {episode.infrastructure_failures} infrastructure failures"))
    console.print(_text(f"  answer: {_json(episode.answer)}"))
    if episode.detail:
        console.print(_text(episode.detail))
    if episode.reward is None:
        console.print(_text("  not scored"))
    else:
        console.print(_text(f"  reward {episode.reward:g}: {episode.reason}", "bold"))


def cause_words(cause: str | None) -> str:
    """`timed_out` -> what it means, in words; "not ended" for None."""
    if cause is None:
        return "not ended"
    return f"{cause} ({CAUSES[Cause(cause)].text})" if cause in list(Cause) else cause


def _print_call(console: Console, number: int, of: int, call: CallView) -> None:
    console.print(
        _text(
            f"\nCall {number}/{of}: {call.prompt_tokens} + {call.completion_tokens} tokens, {call.wall_s:.1f} s, "
            f"{call.finish_reason or call.status}" + (f", sent {call.sends} times" if call.sends > 1 else ""),
            "bold",
        )
    )
    console.print(_text(f"  asked:     {_json(call.asked)}", "dim"))
    console.print(_text(f"  effective: {_effective(call)}", "dim"))
    if call.problem_id is None:
        console.print(_text("  not attributed to a problem, so never trained on", "yellow"))
    for role, content in call.messages:
        console.print(Text.assemble((f"  {words.visible(role, lines=False)}: ", "cyan"), _text(content)))
    if call.prompt is not None:
        console.print(Text.assemble(("  prompt: ", "cyan"), _text(call.prompt)))
    if call.text is not None:
        console.print(Text.assemble(("  -> ", "bold green"), _text(call.text)))
    if call.error:
        console.print(_text(f"  failed: {call.error}", "red"))


def _effective(call: CallView) -> str:
    """The sampling as sent; the seed is ours and no Scaffold asks for one, so it makes no difference to "as asked"."""
    if isinstance(call.asked, dict) and isinstance(call.effective, dict):
        seed = call.effective.get("seed")
        if {key: value for key, value in call.effective.items() if key != "seed"} == call.asked:
            return "as asked" if seed is None else f"as asked, seed {seed}"
    return _json(call.effective)


def _title(console: Console, view: RunView) -> None:
    console.print(_text(view.title, "bold"))
    line = f"run {view.id}, profile {view.profile}, seed {view.seed}, "
    exact = ", deterministic" if view.deterministic else ""
    console.print(Text.assemble(_text(line), _status(view.status), f", {words.duration(view.active_s)} of work{exact}"))
    _sandbox(console, view.sandbox)


def _sandbox(console: Console, kind: SandboxKind) -> None:
    if kind is SandboxKind.NONE:
        console.print(_text(f"!! {words.UNCONFINED} !!", "bold white on red"))


def _print_generations(console: Console, view: RunView) -> None:
    if not view.generations:
        return
    between = " " if console.width >= WIDE else "\n"
    table = text_table("Gen", "Lever", "What it tried", "Dev score", "Gate", "")
    for generation in view.generations:
        dev = words.dev_score(generation)
        table.add_row(
            str(generation.number),
            words.lever(generation).replace(" (", f"{between}("),
            _text(generation.note or "-"),
            dev.replace(" [", f"{between}["),
            _gate(view.verdict_on(generation.number), between),
            _text(words.accepted(generation), "green" if generation.accepted else ""),
        )
    print_table(console, table)


def _gate(verdict: VerdictView | None, between: str) -> str:
    if verdict is None:
        return "-"
    return (
        f"{words.points(verdict.difference)}, p {verdict.p_value:.2g}{between}"
        f"alpha {verdict.alpha:.2g}{between}MDD {words.detectable(verdict)}"
    )


def _print_evaluations(console: Console, view: RunView) -> None:
    if not view.evaluations:
        return
    table = text_table("Evaluated", "Split", "Weights", "n", "Score", "95 % interval")
    for found in view.evaluations:
        estimate = found.estimate
        table.add_row(
            words.short(found.scaffold_id),
            found.split,
            words.short(found.adapter_id),
            str(estimate.n if estimate else found.episodes),
            words.percent(estimate.mean) if estimate else f"{found.done}/{found.episodes} done",
            words.bounds(estimate.low, estimate.high) if estimate else "-",
        )
    print_table(console, table)


def _print_measured(console: Console, view: RunView, generation: GenerationView) -> None:
    for block in generation.blocks:
        measured = words.score(block.estimate) if block.estimate else f"{block.done}/{block.episodes} episodes"
        console.print(_text(f"  {block.slot}: {measured}, n = {block.episodes}"))
    if len(generation.blocks) > 1 and generation.dev is not None:
        console.print(_text(f"  all dev blocks: {words.score(generation.dev)}, n = {generation.dev.n}"))
    if generation.probe is not None:
        probe = generation.probe
        console.print(
            _text(
                f"  probe at temperature 1: mean {words.percent(probe.mean)}, {probe.alive} of {probe.groups} "
                f"groups of {probe.samples} alive"
            )
        )
    for cause, number in generation.causes.items():
        console.print(_text(f"  {number} episodes: {cause_words(cause)}"))
    verdict = view.verdict_on(generation.number)
    if verdict is not None:
        console.print(_text(f"\nVerdict against generation {verdict.incumbent}", "bold"))
        console.print(_text(f"  {words.verdict(verdict)}"))
        console.print(_text(f"  {verdict.text}", "dim"))
    if generation.trials:
        console.print(_text("\nDrafts tried out on train problems before the next decision", "bold"))
    for trial in sorted(generation.trials, key=lambda t: -t.estimate.mean if t.estimate else 1.0):
        measured = words.score(trial.estimate) if trial.estimate else f"{trial.done}/{trial.episodes} episodes"
        console.print(_text(f"  {measured}: {trial.note} ({words.short(trial.scaffold_id)})"))
    if generation.samples:
        console.print(_text("\nEpisodes to look at (sia show RUN --episode ID)", "bold"))
        for brief in generation.samples:
            reward = "not scored" if brief.reward is None else f"reward {brief.reward:g}"
            console.print(_text(f"  {brief.id}: {brief.problem_id}, {brief.cause or 'not ended'}, {reward}"))


def _print_training(console: Console, view: RunView, number: int) -> None:
    for update in view.weight_updates:
        if update.generation != number:
            continue
        planned = "" if update.iterations is None else f" of {update.iterations}"
        console.print(_text(f"\nWeight update: {update.objective}, {len(update.steps)}{planned} iterations", "bold"))
        table = text_table("Iter", "Mean reward", "Groups alive", "Loss", "KL", "Entropy", "Time")
        for step in update.steps:
            of = "" if step.groups is None else f"/{step.groups}"
            table.add_row(
                str(step.iteration),
                "-" if step.mean_reward is None else words.percent(step.mean_reward),
                "-" if step.groups_alive is None else f"{step.groups_alive}{of}",
                "-" if step.loss is None else f"{step.loss:.4f}",
                "-" if step.kl is None else f"{step.kl:.4f}",
                "-" if step.entropy is None else f"{step.entropy:.3f}",
                words.duration(step.wall_s),
            )
        print_table(console, table)
        for step in update.steps:
            if step.skipped is not None:
                console.print(_text(f"  iteration {step.iteration} took no step: {step.skipped}"))


def _print_spending(console: Console, view: RunView) -> None:
    spent = view.spending
    if not spent.episodes:
        return
    resent = f" ({words.count(spent.resent)} sent twice)" if spent.resent else ""
    usd = f", {spent.usd:.2f} USD" if spent.usd else ""
    console.print()
    console.print(
        _text(
            f"Spent: {words.count(spent.episodes)} episodes, {words.count(spent.calls)} model calls{resent}, "
            f"{words.count(spent.prompt_tokens)} prompt + {words.count(spent.completion_tokens)} completion tokens, "
            f"{words.duration(spent.train_s)} training, {words.duration(spent.wall_s)} in all{usd}"
        )
    )


def _status(status: str) -> Text:
    style = {"finished": "green", "failed": "bold red", "interrupted": "yellow", KILLED: "yellow", "running": "cyan"}
    return Text(status, style.get(status, ""))


def text_table(*columns: str) -> Table:
    """A table in the style of all screens: no frame, long cells folded rather than cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(console: Console, table: Table) -> None:
    """A table with a blank line above it."""
    console.print()
    console.print(table)


def _text(text: str, style: str = "") -> Text:
    """Untrusted or plain text: never markup, never a control character, folded rather than cut."""
    return Text(words.visible(text), style, overflow="fold")


def _json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)
