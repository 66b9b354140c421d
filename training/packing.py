"""Several prompts and completions as one packed sequence in which every common prefix stands once.

The trainer's counterpart of `training.kv_tree`: all calls of a micro-batch become one tree of tokens, laid out as a
single row whose mask shows each token its own past only. One forward and backward pass over it yields the gradients of
computing every call by itself, up to rounding, but a few-shot prompt shared by 200 samples is computed once instead of
200 times, and equal answers once as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass
class TokenTree:
    """A tree of tokens that grows by whole sequences. Node numbers are positions in the packed row."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def new_tokens(self, ids: Iterable[int]) -> int:
        """By how many nodes `add(ids)` would grow the tree."""
        node = -1
        grown = 0
        for token in ids:
            found = None if grown else self._children.get((node, token))
            if found is None:
                grown += 1
            else:
                node = found
        return grown

    def add(self, ids: Sequence[int]) -> list[int]:
        """Add one sequence; returns the node of each of its tokens."""
        node = -1
        path = []
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.depths.append(depth)
                self.parents.append(node)
                self._children[(node, token)] = child
            path.append(child)
            node = child
        return path

    def mask(self) -> npt.NDArray[np.bool_]:
        """`[N, N]`: True where the row's token may look at the column's (its ancestors and itself)."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask
