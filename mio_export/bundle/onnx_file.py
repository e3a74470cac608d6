"""What an ONNX file names beyond its own bytes, read from the file itself: no library of ONNX or protobuf is imported.

Only messages on the way to a node or a tensor are entered, weights are skipped over, so that it takes milliseconds.
Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

import mmap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mio_export.errors import GateError

_STANDARD = frozenset({"", "ai.onnx"})
"""Domains of the operators that an export writes; those of vendors include some that load libraries and files."""
_ENTERED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 14: "metadata", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "metadata": {1: "key", 2: "value"},
    "external": {1: "key", 2: "value"},
}
_MAX_DEPTH = 64
_MAX_TAG = 2**32
"""Protobuf drops the bits of a tag beyond these, so that a larger one would be another field there than here."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """What a file names."""

    domains: set[str] = field(default_factory=set)
    """Of its operators."""
    external: set[str] = field(default_factory=set)
    """Files that hold weights of it, as they are named there."""
    metadata: dict[str, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    """Kinds of messages that it holds, ``function`` and ``training`` among them."""


def read_onnx(path: Path) -> OnnxFacts:
    """Read what an ONNX file names.

    Raises:
        GateError: it is no ONNX file.
    """
    facts = OnnxFacts()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _enter(data, 0, len(data), "model", facts, 0)
    except (ValueError, IndexError):
        raise GateError(f"{path} is damaged: it is no ONNX model") from None
    if "graph" not in facts.kinds:
        raise GateError(f"{path} is damaged: it is no ONNX model")
    return facts


def check_onnx(path: Path, companions: Collection[str]) -> None:
    """Refuse an ONNX file that reads other files than those beside it, or runs other operators than the standard's.

    Args:
        path: the file.
        companions: names of the files beside it that may hold its weights.

    Raises:
        GateError: it does, or it is no ONNX file.
    """
    if path.suffix != ".onnx":  # by it ONNX Runtime and OpenVINO choose what reads a file
        raise GateError(f"{path} is no ONNX file by its name; those of bundles end in .onnx")
    facts = read_onnx(path)
    if strange := sorted(facts.domains - _STANDARD):
        raise GateError(f"{path} has operators of {', '.join(strange)[:80]}; only those of ONNX itself are run")
    if strange := sorted(facts.kinds & {"function", "training"}):
        raise GateError(f"{path} holds a {strange[0]}, which no export writes")
    beyond = sorted(name for name in facts.external if name not in companions or Path(name).name != name)
    if beyond:
        raise GateError(f"{path} reads {beyond[0][:80]!r}, which the manifest does not name beside it")


def _enter(data: mmap.mmap, start: int, end: int, kind: str, facts: OnnxFacts, depth: int) -> None:
    """Walk through one message and what is in it; protobuf merges fields that come twice, so each counts."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    facts.kinds.add(kind)
    texts: dict[str, str] = {}
    for number, first, last in _fields(data, start, end):
        inner = _ENTERED[kind].get(number)
        if inner == "domain":
            facts.domains.add(data[first:last].decode())
        elif inner in ("key", "value"):
            texts[inner] = data[first:last].decode()
        elif inner is not None:
            _enter(data, first, last, inner, facts, depth + 1)
    if kind == "metadata":
        facts.metadata[texts.get("key", "")] = texts.get("value", "")
    elif kind == "external" and texts.get("key") == "location":
        facts.external.add(texts.get("value", ""))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first byte and end of each field with a length; pass over the others."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        if tag >= _MAX_TAG:
            raise ValueError("a tag of more than 32 bits")
        kind = tag & 7
        if kind == _VARINT:
            at = _varint(data, at)[1]
        elif kind == _BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                break
            yield tag >> 3, at, at + length
            at += length
        else:
            at += {_FIXED64: 8, _FIXED32: 4}.get(kind) or _refuse(kind)
    if at != end:
        raise ValueError("a field ends beyond its message")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number without an end")


def _refuse(kind: int) -> int:
    raise ValueError(f"wire type {kind}")


__all__ = ["OnnxFacts", "check_onnx", "read_onnx"]
