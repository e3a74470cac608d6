"""Values from outside (JSON files, settings): one strict validator, one version check, the same errors for all."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from mio_export.errors import GateError, MioError, UsageError
from mio_export.files import write_text

T = TypeVar("T")


class InvalidValueError(UsageError):
    """A value from outside does not fit its model; ``where`` names the field."""

    def __init__(self, message: str, *, where: str, kind: str) -> None:
        super().__init__(message)
        self.where = where
        self.kind = kind


def strict(model: type[T]) -> type[T]:
    """Let a dataclass of a document take no key that it does not have."""
    setattr(model, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010 - pydantic's name, which T does not have
    return model


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
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # also nested too deep, a version of 1e999
        raise _damaged(where) from None
    _check_version(version, where, newest)
    try:
        return validated(values, model)
    except InvalidValueError as error:
        raise GateError(f"{where} is damaged: {error}") from None


def read_json(path: Path, model: type[T], *, newest: int) -> T:
    """Read a JSON file as ``parse_json`` does, with the same errors."""
    return parse_json(path.read_bytes(), model, where=path, newest=newest)


def read_values(path: Path, *, newest: int) -> dict[str, Any]:
    """Read a JSON object that has no model; one without a ``schema_version`` is of version 1.

    Raises:
        MioError: the file was written by a newer mio-export.
        GateError: it is damaged.
    """
    try:
        values = json.loads(path.read_bytes())
        version = int(values.get("schema_version", 1))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _damaged(path) from None
    _check_version(version, path, newest)
    return dict(values)


def json_text(document: Any) -> str:
    """Return a dataclass, or JSON-ready values, as the text of a file: indented by two, with a newline at the end."""
    values = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, document: Any) -> None:
    """Write a dataclass, or JSON-ready values, into a file, whole or not at all."""
    write_text(path, json_text(document))


def _damaged(where: Path) -> GateError:
    return GateError(f"{where} is damaged: not the JSON that it should be")


def _check_version(version: int, where: Path, newest: int) -> None:
    if version > newest:
        update = "update with: pip install -U mio-export"
        raise MioError(f"{where} has schema version {version}, this mio-export reads up to {newest}; {update}")


def finite(values: Any) -> Any:
    """Return JSON-ready values with NaN and infinity, which JSON lacks, as null."""
    if isinstance(values, Mapping):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


__all__ = [
    "InvalidValueError",
    "finite",
    "json_text",
    "parse_json",
    "read_json",
    "read_values",
    "strict",
    "validated",
    "write_json",
]
