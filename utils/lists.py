"""Lists."""
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly over the list."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
