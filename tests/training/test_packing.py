"""A token tree holds every distinct prefix once, and its mask is the ancestor relation."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from training.packing import TokenTree

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


@settings(max_examples=40)
@given(SEQUENCES)
def test_each_prefix_is_one_node(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    for ids in sequences:
        before = len(tree)
        grown = tree.new_tokens(ids)
        path = tree.add(ids)
        assert len(tree) - before == grown
        assert [tree.tokens[node] for node in path] == ids
        assert [tree.depths[node] for node in path] == list(range(len(ids)))
    prefixes = {tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)}
    assert len(tree) == len(prefixes)


@settings(max_examples=40)
@given(SEQUENCES)
def test_mask_shows_exactly_the_past(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    paths = [tree.add(ids) for ids in sequences]
    mask = tree.mask()
    for path in paths:
        for depth, node in enumerate(path):
            assert mask[node].nonzero()[0].tolist() == sorted(path[: depth + 1])
