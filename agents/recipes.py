"""What an offline Scaffold is made from: recipes, the spaces they are drawn from, and their way to and from an archive.

A recipe is a frozen record of choices with a `kind` that says which space it belongs to. It is rendered into a
`ScaffoldDraft`, whose `recipe` field carries the choices through the archive, so that a later Decision can read back
what was tried. Beside the choices a draft may carry `trials`: what the search had measured on train when it chose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from agents.decision import ScaffoldDraft
from agents.program_recipes import ProgramRecipe, ProgramSpace, render_program
from agents.solve_recipes import SolveRecipe, SolveSpace, render_solve
from tasks.contract import Example, TaskKind, TaskSpec

Recipe = SolveRecipe | ProgramRecipe

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="kind")])


class RecipeSpace(Protocol):
    """The recipes of one task: a grid of choices and what to begin with.

    `axes` maps each choice to its values (JSON scalars). `build` accepts one value an axis and returns a recipe in
    canonical form, so different grid points may give equal recipes. Pure: no method draws randomness.
    """

    @property
    def axes(self) -> Mapping[str, tuple[str | int | float | bool, ...]]: ...

    def build(self, choices: Mapping[str, JsonValue]) -> Recipe: ...

    def first(self) -> Recipe: ...

    def openings(self) -> Sequence[Recipe]: ...


class Trial(BaseModel):
    """One recipe tried on train under some weights: its mean reward, its margin over the incumbent's on the same
    problems, and whether the two were equal problem by problem."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: Annotated[Recipe, Field(discriminator="kind")]
    adapter_id: str | None
    n: int
    mean: float
    margin: float
    twin: bool = False


def space_for(task: TaskSpec) -> RecipeSpace:
    """The search space that fits a task's kind."""
    return SolveSpace(task) if task.kind is TaskKind.SOLVE else ProgramSpace(task)


def render(recipe: Recipe, task: TaskSpec, examples: Sequence[Example]) -> ScaffoldDraft:
    """Write a recipe as a Scaffold; `examples` beyond the first `SHOT_POOL` are never looked at."""
    if isinstance(recipe, SolveRecipe):
        return render_solve(recipe, task, examples)
    return render_program(recipe, task)


def parse_recipe(raw: Mapping[str, JsonValue] | None) -> Recipe | None:
    """Read back what a draft's `recipe` held, in canonical form.

    Returns:
        None for a Scaffold that was not written from a recipe (no record, or a record of another author).
    """
    if raw is None:
        return None
    try:
        recipe = _RECIPE.validate_python({k: v for k, v in raw.items() if k != "trials"})
    except ValidationError:
        return None
    return recipe.canonical()


def with_trials(draft: ScaffoldDraft, trials: Sequence[Trial]) -> ScaffoldDraft:
    """The draft with the search's measurements added to its record."""
    record: dict[str, JsonValue] = {
        **(draft.recipe or {}),
        "trials": [trial.model_dump(mode="json") for trial in trials],
    }
    return draft.model_copy(update={"recipe": record})


def parse_trials(raw: Mapping[str, JsonValue] | None) -> list[Trial]:
    """The trials in a draft's record; what cannot be read is left out."""
    listed = (raw or {}).get("trials")
    trials: list[Trial] = []
    for item in listed if isinstance(listed, list) else []:
        try:
            trials.append(Trial.model_validate(item))
        except ValidationError:
            continue
    return trials
