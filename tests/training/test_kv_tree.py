"""Packed passes over a token tree give each row the logits that it would have alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from training import kv_tree
from training.kv_tree import EngineStats, KvTree
from training.loading import load_model


@pytest.fixture(scope="module")
def model(tiny: Path):  # type: ignore[no-untyped-def]
    return load_model(tiny, "cpu")


def alone(model, ids) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0, -1]
        return logits


def prompts_with_shared_starts(seed: int, count: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    shots = [rng.randrange(100, 900) for _ in range(40)]
    prompts = []
    for _ in range(count):
        own = [rng.randrange(100, 900) for _ in range(rng.randrange(1, 12))]
        prompts.append(tuple(shots[: rng.choice([0, 7, 40])] + own))
    return prompts


@pytest.mark.parametrize("bounds", [(512, 600_000), (16, 600_000), (512, 300)])
def test_rows_see_their_own_past_only(model, monkeypatch, bounds: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(kv_tree, "CHUNK_TOKENS", bounds[0])
    monkeypatch.setattr(kv_tree, "ATTENTION_PAIRS", bounds[1])
    tree = KvTree(model, EngineStats())
    rows = [list(ids) for ids in prompts_with_shared_starts(1, 12)]
    rows += [list(ids) for ids in rows[:3]]
    nodes, logits = tree.prefill(rows)
    rng = random.Random(2)
    for _ in range(4):
        for row, node in zip(rows, nodes, strict=True):
            torch.testing.assert_close(logits[node], alone(model, row), atol=1e-4, rtol=1e-4)
        steps = [(node, rng.choice([11, 12, 500])) for node in nodes]
        for row, (_, token) in zip(rows, steps, strict=True):
            row.append(token)
        nodes, logits = tree.extend(steps)


def test_every_distinct_prefix_is_computed_once(model) -> None:  # type: ignore[no-untyped-def]
    stats = EngineStats()
    tree = KvTree(model, stats)
    prompts = prompts_with_shared_starts(3, 20)
    distinct = {ids[:end] for ids in prompts for end in range(1, len(ids) + 1)}
    tree.prefill(prompts + prompts)
    assert stats.prefill_tokens == len(distinct)
    assert stats.forwards == 1
    tree.prefill(prompts[:5])
    assert stats.prefill_tokens == len(distinct)
    assert stats.forwards == 1, "logits behind a known prompt are kept"


def test_rows_that_draw_the_same_token_share_a_node(model) -> None:  # type: ignore[no-untyped-def]
    stats = EngineStats()
    tree = KvTree(model, stats)
    nodes, _ = tree.prefill([(5, 6, 7)] * 8)
    after, logits = tree.extend([(node, 40 + i % 2) for i, node in enumerate(nodes)])
    assert len(set(after)) == len(logits) == stats.decode_tokens == 2


def test_unused_nodes_make_room_and_results_stay_right(model) -> None:  # type: ignore[no-untyped-def]
    tree = KvTree(model, EngineStats(), capacity=200)
    held, _ = tree.prefill([tuple(range(300, 360))])
    active = tree.active
    for seed in range(12):
        prompts = prompts_with_shared_starts(seed, 5)
        nodes, logits = tree.prefill(prompts)
        for ids, node in zip(prompts, nodes, strict=True):
            torch.testing.assert_close(logits[node], alone(model, ids), atol=1e-4, rtol=1e-4)
            tree.release(node)
        assert tree.active == active == 60
    after, logits = tree.extend([(held[0], 9)])
    expected = alone(model, [*range(300, 360), 9])
    torch.testing.assert_close(logits[after[0]], expected, atol=1e-4, rtol=1e-4)
    assert len(tree._parent) < 400


def test_a_row_may_stand_on_anothers_past(model) -> None:  # type: ignore[no-untyped-def]
    """Rows join at different times: one can go on from a node that another row computed as its answer."""
    tree = KvTree(model, EngineStats())
    (first,), _ = tree.prefill([(5, 6, 7)])
    (ahead,), _ = tree.extend([(first, 8)])
    (behind,), known = tree.prefill([(5, 6, 7)])
    assert behind == first
    torch.testing.assert_close(known[behind], alone(model, [5, 6, 7]), atol=1e-4, rtol=1e-4)
    nodes, logits = tree.extend([(ahead, 9), (behind, 8)])
    torch.testing.assert_close(logits[nodes[0]], alone(model, [5, 6, 7, 8, 9]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[nodes[1]], alone(model, [5, 6, 7, 8]), atol=1e-4, rtol=1e-4)
    (longer, middle), logits = tree.prefill([(5, 6, 7, 8, 9, 10), (5, 6, 7, 8)])
    torch.testing.assert_close(logits[longer], alone(model, [5, 6, 7, 8, 9, 10]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[middle], alone(model, [5, 6, 7, 8]), atol=1e-4, rtol=1e-4)
