"""What a Run tells the person or the machine that watches it, as it goes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A watcher. Thread-safe; never raises; called often, so each call is cheap."""

    def generation(self, number: int, of: int, lever: str, note: str) -> None:
        """A Generation begins: its number, how many the run may make, its lever and what it tries."""
        ...

    def step(self, name: str, total: int | None) -> None:
        """A step begins ("rollout dev/03", "train step 4/10", ...) with `total` episodes, if it has any."""
        ...

    def advance(self, done: int, accuracy: float | None) -> None:
        """So many episodes of the step are done, with this mean reward so far."""
        ...

    def note(self, text: str) -> None:
        """One line worth keeping: a verdict, a decision, something fetched, a retry."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...
