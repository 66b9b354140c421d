"""Drawing one token, and noticing where a completion ends.

Which token a call draws at step t depends on its logits, its `Sampling` and a uniform number keyed by (seed, t); never
on what else is in the batch or on how many draws others made. Batching therefore changes a draw only where rounding
moves a boundary of the distribution across that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agents.model import RequestError, Sampling

if TYPE_CHECKING:
    import torch


def check(sampling: Sampling) -> None:
    """Refuse settings that mean nothing.

    Raises:
        RequestError: says which setting and its range.
    """
    if sampling.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {sampling.max_tokens}")
    if not sampling.temperature >= 0:
        raise RequestError(f"temperature must be 0 or more, not {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise RequestError(f"top_p must be above 0 and at most 1, not {sampling.top_p}")
    if "" in sampling.stop:
        raise RequestError("a stop string is empty")


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that belongs to step `step` of the stream `seed` (Philox, counter mode)."""
    import numpy as np

    return float(np.random.Generator(np.random.Philox(key=seed % 2**128, counter=step)).random())


def draw(logits_V: torch.Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """Draw one token per uniform number from one distribution, by inverting its cumulative sum.

    Args:
        logits_V: unnormalised log-probabilities over the vocabulary.
        sampling: temperature 0 takes the likeliest token; otherwise softmax(logits / temperature), cut to the smallest
            set of likeliest tokens whose probability reaches `top_p` (the one that crosses it included).
        uniforms: numbers in [0, 1), one a draw.
    """
    import torch

    if sampling.temperature == 0:
        return [int(logits_V.argmax())] * len(uniforms)
    scaled_V = logits_V.double() / sampling.temperature
    probs_V = torch.softmax(scaled_V - scaled_V.max(), dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        probs_V = probs_V.index_fill(0, order_V[before_V >= sampling.top_p], 0.0)
    cumulative_V = probs_V.cumsum(0)
    # A uniform is below 1, so the target is below the total: the first sum above it belongs to a possible token.
    targets = torch.tensor(uniforms, dtype=torch.double, device=logits_V.device) * cumulative_V[-1]
    found = torch.searchsorted(cumulative_V, targets, right=True)
    return [int(token) for token in found.clamp_max(len(cumulative_V) - 1)]


def cut(text: str, stop: Sequence[str]) -> str | None:
    """`text` up to the first stop string in it, or None if there is none."""
    starts = [start for start in (text.find(string) for string in stop) if start >= 0]
    return text[: min(starts)] if starts else None
