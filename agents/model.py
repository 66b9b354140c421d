"""The words of a model call: what a Scaffold asks, what is sampled, and the `Engine` that samples.

Pure data and one Protocol; no torch here. `training.engine.LocalEngine` is the local implementation.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


class EngineError(Exception):
    """Raised when a model could not answer for reasons outside the Scaffold: infrastructure, never a reward of 0."""


class RequestError(ValueError):
    """Raised when a Scaffold asks something no engine can answer (empty prompt, prompt over the context)."""


@dataclass(frozen=True)
class Message:
    """One chat turn; `role` is system, user or assistant. A last assistant turn is a prefill to continue."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p in (0, 1]; `stop` strings are cut from the text."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRequest:
    """One call: chat `messages` or a raw `prompt` (exactly one of them), an Adapter id or None for the base
    model, and the seed of this call's own random stream (never shared, so batching cannot change a draw)."""

    sampling: Sampling
    seed: int
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Completion:
    """What was sampled. `logprobs[i]` is the log-probability of `completion_ids[i]` under the sampling
    distribution's temperature-1 model (nats, full vocabulary). `completion_ids` are exactly the sampled tokens,
    the end-of-sequence token or the tokens that completed a stop string included; `text` has both cut off."""

    text: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    """`stop` (end token or stop string) or `length`."""


class Engine(Protocol):
    """Draws completions. Thread-safe: `submit` returns at once, requests in flight share forward passes.

    The future raises RequestError (the caller's fault) or EngineError (ours).
    """

    name: str
    trainable: bool

    def submit(self, request: ModelRequest) -> Future[Completion]: ...

    def close(self) -> None: ...
