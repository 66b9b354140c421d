"""Recipes go through the archive and come back equal; what is not a recipe is no error."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from agents.program_recipes import ProgramSpace
from agents.recipes import Trial, parse_recipe, parse_trials, render, space_for, with_trials
from agents.solve_recipes import SolveSpace
from tasks.contract import AnswerKind, Example, Problem, Split, TaskKind, TaskSpec

EXAMPLES = [Example(Problem(str(i), f"What is {i}?"), str(i)) for i in range(80)]


def make_task(kind: TaskKind) -> TaskSpec:
    return TaskSpec(
        name="t",
        title="T",
        kind=kind,
        answer=AnswerKind.INTEGER,
        dev_block=10,
        sizes={Split.TRAIN: 10, Split.DEV: 10, Split.TEST: 10},
    )


def test_each_kind_of_task_has_its_space() -> None:
    assert isinstance(space_for(make_task(TaskKind.SOLVE)), SolveSpace)
    assert isinstance(space_for(make_task(TaskKind.PROGRAM)), ProgramSpace)


@pytest.mark.parametrize("kind", TaskKind)
def test_a_recipe_comes_back_from_its_draft(kind: TaskKind) -> None:
    space, draw = space_for(make_task(kind)), random.Random(1)
    for _ in range(100):
        recipe = space.build({axis: draw.choice(values) for axis, values in space.axes.items()})
        draft = render(recipe, make_task(kind), EXAMPLES)
        assert parse_recipe(draft.recipe) == recipe
        trial = Trial(recipe=recipe, adapter_id="a", n=48, mean=0.5, margin=-0.125)
        told = with_trials(draft, [trial, trial])
        assert parse_recipe(told.recipe) == recipe
        assert parse_trials(told.recipe) == [trial, trial]
        assert told.files == draft.files


@pytest.mark.parametrize("kind", TaskKind)
def test_first_and_openings_are_canonical_points_of_the_grid(kind: TaskKind) -> None:
    space = space_for(make_task(kind))
    recipes = [space.first(), *space.openings()]
    assert len(set(recipes)) == len(recipes)
    for recipe in recipes:
        values = recipe.model_dump(mode="json")
        assert space.build({axis: values[axis] for axis in space.axes}) == recipe
        assert all(values[axis] in space.axes[axis] for axis in space.axes)


scalars: st.SearchStrategy[JsonValue] = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
records: st.SearchStrategy[dict[str, JsonValue]] = st.dictionaries(
    st.sampled_from(["kind", "style", "trials", "other"]), scalars | st.lists(scalars, max_size=3), max_size=4
)


@given(records | st.none())
def test_a_record_of_another_author_is_no_recipe_and_no_error(record: dict[str, JsonValue] | None) -> None:
    parse_recipe(record)
    assert parse_trials(record) == []


def test_what_is_not_a_recipe_reads_as_none() -> None:
    assert parse_recipe(None) is None
    assert parse_recipe({}) is None
    assert parse_recipe({"kind": "solve"}) is None
    assert parse_recipe({"kind": "poem"}) is None
