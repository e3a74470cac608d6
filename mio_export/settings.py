"""``key=value`` settings from the command line, laid over values."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the known name that is nearest, or nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _value(text: str) -> Any:
    for candidate in (text, f"[{text}]"):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return text


__all__ = ["did_you_mean", "with_settings"]
