"""JSON files from outside: one strict model, one version check, the same errors for all of them."""

import json
from pathlib import Path
from typing import TypeVar

from mio_export.errors import GateError, MioError, UsageError

T = TypeVar("T")


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
    from pydantic import TypeAdapter, ValidationError

    try:
        values = json.loads(text)
        version = int(values["schema_version"])
    except (ValueError, KeyError, TypeError):
        raise GateError(f"{where} is damaged: not the JSON that it should be") from None
    if version > newest:
        update = "update with: pip install -U mio-export"
        raise MioError(f"{where} has schema version {version}, this mio-export reads up to {newest}; {update}")
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise GateError(f"{where} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except UsageError as error:
        raise GateError(f"{where} is damaged: {error}") from None


__all__ = ["parse_json"]
