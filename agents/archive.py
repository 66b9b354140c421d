"""The archive: what was tried and how it went. Candidates that the gate rejected stay in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import JsonValue


class Lever(StrEnum):
    """Which half of the agent a Generation changed (or none: the first one, and the end)."""

    FIRST = "first"
    HARNESS = "harness"
    WEIGHTS = "weights"
    STOP = "stop"


class Objective(StrEnum):
    """The six weight-update objectives (arXiv 2605.27276, section 7.3)."""

    PPO = "ppo"
    GRPO = "grpo"
    ENTROPIC = "entropic"
    REINFORCE_KL = "reinforce_kl"
    BEST_OF_N = "best_of_n"
    DPO = "dpo"


@dataclass(frozen=True)
class Estimate:
    """A mean reward with its 95 % interval over n problems."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Attempt:
    """One Generation as the archive remembers it. `recipe` is the search's own parameters, where it has any."""

    generation: int
    lever: Lever
    parent: int | None
    scaffold_id: str
    adapter_id: str | None
    recipe: Mapping[str, JsonValue] | None
    dev: Estimate | None
    accepted: bool | None
    """None while undecided; True for the first Generation and for those that the gate let through."""
    objective: Objective | None = None
    note: str = ""
