"""Keys and values of everything a model has read, kept as a tree of tokens.

Prompts of one scaffold share their instructions and few-shot examples, the samples of one problem share its whole
prompt, and short answers share their first tokens. A tree makes all of that one mechanism: a node is one token after
one particular past, computed once, and a row of a batch is a node to go on from. A forward pass takes any set of new
nodes as one packed sequence; a 4-D mask lets each see its ancestors only, so the result is that of computing every
row alone, up to rounding, without padding and without copying a shared past to each row.

Nodes that no row stands on stay as a cache until their slots are needed; the longest unused go first, leaves before
their ancestors. Not thread-safe: one worker owns a tree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROOT = -1
CHUNK_TOKENS = 512
"""The most tokens of one forward pass: more gain no speed on a CPU and only cost memory."""
ATTENTION_PAIRS = 600_000
"""The most (new token, visible token) pairs of one pass. Attention over unrelated rows is wasted work; at this bound it
stays below the work of the linear layers, and splitting a batch further would stream the weights too often."""
LEAF_LOGITS = 64
"""Prompts whose next-token logits are kept, so that a sample asked for later costs no forward pass."""

Slots = npt.NDArray[np.int64]


@dataclass
class EngineStats:
    """Work done, in tokens. `prefill_tokens` counts prompt tokens computed (not those found in a tree),
    `decode_tokens` the sampled tokens that were fed back, and `sampled_tokens` all that were drawn."""

    forwards: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    completions: int = 0
    models_merged: int = 0


class KvTree:
    """The tree of one model.

    Args:
        model: a causal language model in evaluation mode.
        stats: counted into.
        capacity: slots (tokens) to hold before unused ones are dropped. Soft: what rows stand on is never dropped.
    """

    def __init__(self, model: PreTrainedModel, stats: EngineStats, capacity: int = 16_384) -> None:
        self.model = model
        self.capacity = capacity
        self.active = 0
        """Slots that some row stands on or above."""
        self._stats = stats
        self._parent: list[int] = []
        self._token: list[int] = []
        self._depth: list[int] = []
        self._rows: list[int] = []
        self._used: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self._free: list[int] = []
        self._clock = 0
        self._paths: dict[int, Slots] = {}
        self._leaf_logits: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._pool: torch.Tensor | None = None  # [layer, key or value, slot, head, dimension]

    def missing(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` would have to be computed."""
        node = ROOT
        for depth, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                return len(ids) - depth
            node = child
        return 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, torch.Tensor]]:
        """Stand one row on the end of each prompt, computing what is not in the tree yet.

        Returns:
            The node of each prompt (equal prompts, equal nodes) and the logits [vocabulary] behind each of those nodes.
        """
        self._make_room(sum(self.missing(ids) for ids in set(map(tuple, prompts))))
        fresh: list[int] = []
        leaves = []
        for ids in prompts:
            node = ROOT
            path = np.empty(len(ids), dtype=np.int64)
            for depth, token in enumerate(ids):
                child = self._children.get((node, token))
                if child is None:
                    child = self._add(node, token)
                    fresh.append(child)
                self._hold(child)
                path[depth] = node = child
            self._paths[node] = path
            leaves.append(node)
        known = {node: self._leaf_logits[node] for node in leaves if node in self._leaf_logits}
        wanted = set(leaves) - known.keys()
        recomputed = sorted(wanted - set(fresh), key=lambda node: self._depth[node])
        todo = recomputed + fresh  # ancestors first
        self._stats.prefill_tokens += len(todo)
        logits = self._compute(todo, wanted, set(fresh))
        for node in wanted:
            self._leaf_logits[node] = logits[node].clone()  # not a view, which would keep the whole batch's logits
        for node in leaves:
            self._leaf_logits.move_to_end(node)
        while len(self._leaf_logits) > LEAF_LOGITS:
            self._leaf_logits.popitem(last=False)
        return leaves, known | logits

    def extend(self, steps: Sequence[tuple[int, int]]) -> tuple[list[int], dict[int, torch.Tensor]]:
        """Move each row one token on: `steps` holds its node and the token drawn there.

        Returns:
            The new node of each row (rows of equal past and token share one) and the logits behind each.
        """
        self._make_room(len(set(steps)))
        fresh: set[int] = set()
        nodes = []
        for parent, token in steps:
            child = self._children.get((parent, token))
            if child is None:
                child = self._add(parent, token)
                fresh.add(child)
            self._hold(child)
            if child not in self._paths:
                self._paths[child] = np.append(self._path(parent), child)
            nodes.append(child)
        # Rows of one prompt side by side: where the pass has to be split, the halves then share little.
        # Sorting by path also puts ancestors first.
        todo = sorted(set(nodes), key=lambda node: self._paths[node].tobytes())
        for parent, _ in steps:
            self._paths.pop(parent, None)
        self._stats.decode_tokens += len(todo)
        return nodes, self._compute(todo, set(todo), fresh)

    def release(self, node: int) -> None:
        """A row that stood on `node` is done. What it computed stays as a cache."""
        self._clock += 1
        for slot in self._path(node).tolist():
            self._used[slot] = self._clock
            self._rows[slot] -= 1
            if self._rows[slot] == 0:
                self.active -= 1
                self._paths.pop(slot, None)

    def _hold(self, slot: int) -> None:
        if self._rows[slot] == 0:
            self.active += 1
        self._rows[slot] += 1

    def _add(self, parent: int, token: int) -> int:
        if self._free:
            slot = self._free.pop()
            self._parent[slot], self._token[slot] = parent, token
        else:
            slot = len(self._parent)
            self._parent.append(parent)
            self._token.append(token)
            self._depth.append(0)
            self._rows.append(0)
            self._used.append(0)
        self._depth[slot] = 0 if parent == ROOT else self._depth[parent] + 1
        self._used[slot] = self._clock
        self._children[(parent, token)] = slot
        return slot

    def _make_room(self, needed: int) -> None:
        """Drop unused nodes if `needed` more would pass the capacity; some more than needed, so that it is rare."""
        used = len(self._parent) - len(self._free)
        if used + needed <= self.capacity:
            return
        idle = [slot for slot in self._children.values() if self._rows[slot] == 0]
        # A node was used no earlier than its descendants, so this order never orphans one.
        idle.sort(key=lambda slot: (self._used[slot], -self._depth[slot]))
        for slot in idle[: used + needed - self.capacity + self.capacity // 4]:
            del self._children[(self._parent[slot], self._token[slot])]
            self._leaf_logits.pop(slot, None)
            self._free.append(slot)

    def _path(self, node: int) -> Slots:
        """The slots from the first token to `node`."""
        cached = self._paths.get(node)
        if cached is not None:
            return cached
        slots = []
        while node != ROOT:
            slots.append(node)
            node = self._parent[node]
        return np.array(slots[::-1], dtype=np.int64)

    def _compute(self, nodes: list[int], wanted: set[int], fresh: set[int]) -> dict[int, torch.Tensor]:
        """Compute `nodes` (ancestors first) in as few passes as the bounds allow, and the logits of `wanted`."""
        if not nodes:
            return {}
        place = {node: row for row, node in enumerate(nodes)}
        pasts = [
            self._path(self._parent[node])
            for node in nodes
            if self._parent[node] != ROOT and self._parent[node] not in place
        ]
        context = np.unique(np.concatenate(pasts)) if pasts else np.empty(0, dtype=np.int64)
        visible = len(context) + len(nodes)
        if len(nodes) > 1 and (len(nodes) > CHUNK_TOKENS or len(nodes) * visible > ATTENTION_PAIRS):
            middle = len(nodes) // 2
            first = self._compute(nodes[:middle], wanted, fresh)
            return first | self._compute(nodes[middle:], wanted, fresh)
        mask = np.zeros((len(nodes), visible), dtype=np.bool_)
        past = iter(pasts)
        for row, node in enumerate(nodes):
            parent = self._parent[node]
            if parent in place:
                mask[row] = mask[place[parent]]
            elif parent != ROOT:
                mask[row, np.searchsorted(context, next(past))] = True
            mask[row, len(context) + row] = True
        rows = [row for row, node in enumerate(nodes) if node in wanted]
        logits_RV = self._forward(nodes, context, mask, rows, [node in fresh for node in nodes])
        return {nodes[row]: logits_RV[index] for index, row in enumerate(rows)}

    def _forward(
        self,
        nodes: Sequence[int],
        context: Slots,
        mask: npt.NDArray[np.bool_],
        rows: Sequence[int],
        keep: Iterable[bool],
    ) -> torch.Tensor:
        """One packed pass. Returns logits [len(rows), vocabulary]; stores keys and values of the nodes to `keep`."""
        import torch
        from transformers import DynamicCache

        device = self.model.device
        cache = DynamicCache()
        if len(context):
            assert self._pool is not None
            kv = self._pool.index_select(2, torch.from_numpy(context).to(device)).transpose(2, 3)
            for layer, (key, value) in enumerate(kv):
                cache.update(key[None], value[None], layer)
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([[self._token[node] for node in nodes]], device=device),
                position_ids=torch.tensor([[self._depth[node] for node in nodes]], device=device),
                attention_mask=torch.from_numpy(mask).to(device)[None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(rows or [len(nodes) - 1], device=device),
            )
            self._stats.forwards += 1
            kept = [row for row, flag in enumerate(keep) if flag]
            if kept:
                self._store(cache, [nodes[row] for row in kept], [len(context) + row for row in kept])
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _store(self, cache: object, slots: list[int], columns: list[int]) -> None:
        import torch
        from transformers import DynamicCache

        assert isinstance(cache, DynamicCache)
        keys = cache.layers[0].keys
        heads, width = keys.shape[1], keys.shape[3]
        have = 0 if self._pool is None else self._pool.shape[2]
        if len(self._parent) > have:
            size = max(1024, 2 * have, len(self._parent))
            grown = keys.new_empty((len(cache.layers), 2, size, heads, width))
            if self._pool is not None:
                grown[:, :, :have] = self._pool
            self._pool = grown
        assert self._pool is not None
        where = torch.tensor(slots, device=keys.device)
        which = torch.tensor(columns, device=keys.device)
        for number, layer in enumerate(cache.layers):
            self._pool[number, 0, where] = layer.keys[0, :, which].transpose(0, 1)
            self._pool[number, 1, where] = layer.values[0, :, which].transpose(0, 1)
