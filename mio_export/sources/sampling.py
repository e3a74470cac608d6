"""A few of many, taken from the whole range."""

from collections.abc import Sequence
from typing import TypeVar

from mio_export.errors import UsageError

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], limit: int) -> list[T]:
    """Return at most ``limit`` items at even distances, in their order.

    Raises:
        UsageError: ``limit`` is below 1.
    """
    if limit < 1:
        raise UsageError(f"limit must be 1 or more, got {limit}")
    if len(items) <= limit:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * limit)] for index in range(limit)]


__all__ = ["evenly_spaced"]
