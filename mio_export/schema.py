"""Values from outside (JSON files, settings): one strict validator, one version check, the same errors for all."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mio_export.errors import GateError, MioError, UsageError

T = TypeVar("T")


class InvalidValueError(UsageError):
    """A value from outside does not fit its model; ``where`` names the field."""

    def __init__(self, message: str, *, where: str, kind: str) -> None:
        super().__init__(message)
        self.where = where
        self.kind = kind


def validated(values: Any, model: type[T]) -> T:
    """Turn plain values into a frozen dataclass, strictly.

    Raises:
        InvalidValueError: a key is unknown or missing, or a value is not allowed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, UsageError):
            raise InvalidValueError(str(raised), where=where, kind=first["type"]) from None
        got = repr(first["input"])
        message = f"{where}: {first['msg']} (got {got if len(got) <= 80 else got[:77] + '...'})"
        raise InvalidValueError(message, where=where, kind=first["type"]) from None


def parse_json(text: bytes, model: type[T], *, where: Path, newest: int) -> T:
    """Turn the text of a JSON file into a frozen dataclass, strictly.

    Args:
        text: the whole file.
        model: a dataclass with a ``schema_version``.
        where: the file's path, for messages.
        newest: the newest ``schema_version`` that this program reads.

    Raises:
        MioError: the file was written by a newer mio-export.
        GateError: it is damaged.
    """
    try:
        values = json.loads(text)
        version = int(values["schema_version"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise GateError(f"{where} is damaged: not the JSON that it should be") from None
    if version > newest:
        update = "update with: pip install -U mio-export"
        raise MioError(f"{where} has schema version {version}, this mio-export reads up to {newest}; {update}")
    try:
        return validated(values, model)
    except InvalidValueError as error:
        raise GateError(f"{where} is damaged: {error}") from None


def finite(values: Any) -> Any:
    """Return JSON-ready values with NaN and infinity, which JSON lacks, as null."""
    if isinstance(values, Mapping):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


__all__ = ["InvalidValueError", "finite", "parse_json", "validated"]
