"""Keys and seeds: randomness that depends on what is drawn, never on when or in which order.

Every draw of a Run is keyed by (run seed, what it is for). So a recorded result never changes, and what was not yet
recorded at a kill comes out as it would have.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def keyed_seed(*parts: object) -> int:
    """A seed in [0, 2**53) from the parts' text; equal parts, equal seed."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def draw(items: Sequence[Item], count: int, *key: object) -> list[Item]:
    """`count` distinct items (all, if there are fewer), chosen and ordered by the key alone."""
    return random.Random(keyed_seed(*key)).sample(list(items), min(count, len(items)))
