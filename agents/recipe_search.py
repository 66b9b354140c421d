"""Proposals over a recipe space: openings, neighbours of the best, and Optuna's TPE, never the same recipe twice.

The search holds no state between Decisions. Each Decision builds it anew from what the archive tells (see
`agents.feedback_agent`), asks it for a batch, tells it the results, and may ask again. Everything is drawn from
streams keyed by the seed, so equal histories give equal proposals.

Values told to it are *margins*: a recipe's mean reward less the incumbent's on the same problems. Margins can be
compared across batches that used different problems, which plain means cannot.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agents.recipes import Recipe, RecipeSpace

MAX_DRAWS = 60
"""Draws that may give a recipe already seen before a plain scan of the grid takes over."""


def derived_seed(*parts: object) -> int:
    """A 32-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


class RecipeSearch:
    """One Decision's search. `seen` recipes are never proposed.

    Args:
        space: where to search.
        seed: keys every draw.
        seen: canonical recipes that must not be proposed.
    """

    def __init__(self, space: RecipeSpace, seed: int, seen: Iterable[Recipe]) -> None:
        self.space = space
        self.seen = set(seen)
        self._random = random.Random(f"recipes-{seed}")
        self._seed = seed
        self._study: Any = None
        self._grid: Any = None

    def learn(self, recipe: Recipe, margin: float) -> None:
        """Tell the model of the space how a recipe did; a recipe off the grid is only remembered as seen."""
        from optuna.trial import create_trial

        self.seen.add(recipe)
        study, grid = self._open()
        values = recipe.model_dump(mode="json")
        params = {axis: values[axis] for axis in grid}
        if all(params[axis] in self.space.axes[axis] for axis in grid):
            study.add_trial(create_trial(params=params, distributions=grid, value=margin))

    def propose(self, count: int, around: Recipe | None, neighbours: int) -> list[Recipe]:
        """Up to `count` distinct recipes not seen before, which then count as seen.

        Args:
            count: how many; fewer come back only when the space is used up.
            around: the recipe whose neighbours are worth a look (None: no such recipe).
            neighbours: how many of the batch differ from `around` in one choice. Openings that are still untried
                go first and may take two thirds of the batch; TPE proposes what remains. Of recipes that call the
                model several times an Episode, a batch takes one in four at most: they cost that much more.
        """
        batch: list[Recipe] = []
        dear_left = max(1, count // 4)

        def take(recipe: Recipe) -> None:
            nonlocal dear_left
            dear_left -= recipe.asks_often
            self.seen.add(recipe)
            batch.append(recipe)

        def fits(recipe: Recipe) -> bool:
            return recipe not in self.seen and (dear_left > 0 or not recipe.asks_often)

        for recipe in self.space.openings():
            if len(batch) < (2 * count + 2) // 3 and fits(recipe):
                take(recipe)
        if around is not None:
            near = self._neighbours(around)
            self._random.shuffle(near)
            last = min(count, len(batch) + neighbours)
            for recipe in near:
                if len(batch) < last and fits(recipe):
                    take(recipe)
        while len(batch) < count:
            found = self._ask(fits)
            if found is None:
                break
            take(found)
        return batch

    def untried(self) -> bool:
        """Whether the space holds a recipe not seen yet."""
        return next((True for recipe in self._scan() if recipe not in self.seen), False)

    def _neighbours(self, recipe: Recipe) -> list[Recipe]:
        """Recipes that differ in one axis, in grid order, each once."""
        values = recipe.model_dump(mode="json")
        found: dict[Recipe, None] = {}
        for axis, choices in self.space.axes.items():
            for choice in choices:
                other = self.space.build({**values, axis: choice})
                if other != recipe:
                    found[other] = None
        return list(found)

    def _ask(self, fits: Callable[[Recipe], bool]) -> Recipe | None:
        """A recipe that fits, from TPE, or from the scan where TPE keeps missing."""
        from optuna.trial import TrialState

        study, grid = self._open()
        for _ in range(MAX_DRAWS):
            trial = study.ask(grid)
            study.tell(trial, state=TrialState.FAIL)  # its result comes through `learn`, in canonical form
            recipe = self.space.build(trial.params)
            if fits(recipe):
                return recipe
        return next((recipe for recipe in self._scan() if fits(recipe)), None)

    def _scan(self) -> Iterator[Recipe]:
        axes = self.space.axes
        for values in itertools.product(*axes.values()):
            yield self.space.build(dict(zip(axes, values, strict=True)))

    def _open(self) -> tuple[Any, dict[str, Any]]:
        """The in-memory study and its distributions, made when first needed (Optuna takes 0.6 s to import)."""
        if self._study is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            sampler = optuna.samplers.TPESampler(seed=self._seed, n_startup_trials=5)
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
            self._grid = {
                axis: optuna.distributions.CategoricalDistribution(choices) for axis, choices in self.space.axes.items()
            }
        return self._study, self._grid
