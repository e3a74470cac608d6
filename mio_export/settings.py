"""``key=value`` settings from the command line, laid over values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mio_export.errors import UsageError


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``key=value`` settings laid over them.

    Dots in a key reach inside; a value is JSON, a list of numbers with commas, or else plain text.

    Raises:
        UsageError: a setting has no ``=``, or reaches inside a plain value.
    """
    merged: dict[str, Any] = json.loads(json.dumps(values))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"a setting is KEY=VALUE, got {setting!r}")
        *parents, last = key.strip().split(".")
        place = merged
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"setting {setting!r}: {parent} holds no settings of its own")
        place[last] = _value(text.strip())
    return merged


def _value(text: str) -> Any:
    for candidate in (text, f"[{text}]"):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return text


__all__ = ["with_settings"]
