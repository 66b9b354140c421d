"""The contract between the gateway and whoever keeps the record of model calls.

A call's identity within its Episode is (sha256 of the canonical request, how many equal requests came before it), so
that a Scaffold that asks in parallel and is resumed finds each answer again whatever the order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agents.model import Completion, ModelRequest, Sampling


@dataclass(frozen=True)
class CallKey:
    """Identity of a ModelCall. `problem_id` is None for a call that no Problem could be attributed to."""

    episode_id: int
    digest: str
    occurrence: int
    problem_id: str | None


@dataclass(frozen=True)
class CallPolicy:
    """What the gateway imposes on an Episode's calls.

    `train` forces temperature 1, top-p 1 and no penalties, whatever the Scaffold asks (both are recorded), so that the
    recorded log-probabilities are those of the policy being trained.
    """

    adapter: str | None
    train: bool
    max_calls: int
    max_tokens_per_call: int


class CallRecorder(Protocol):
    """Durable record of calls; `agents.gateway` asks it, `flows.state` implements it. Thread-safe."""

    def recorded(self, key: CallKey) -> Completion | None:
        """The completion already on record for this call, or None."""
        ...

    def begin(self, key: CallKey, asked: Sampling, request: ModelRequest) -> Completion | None:
        """Write the intent before the call is sent: `asked` by the Scaffold, `request.sampling` as effective.

        Returns:
            None, or the completion that got on record meanwhile: then nothing is written and nothing is to be sent.
        """
        ...

    def finish(self, key: CallKey, completion: Completion, wall_s: float) -> Completion:
        """Write the completion; returns only when it is durable.

        Returns:
            What is on record, which the Scaffold must get: this one, or an earlier one, which is never replaced.
        """
        ...

    def failed(self, key: CallKey, reason: str) -> None:
        """Write that the call failed; it may be sent again."""
        ...
