"""The one protocol of every server and client here: the Open Inference Protocol v2 with two models and one vocabulary.

``NAME`` takes encoded image files, ``NAME_pixels`` decoded images; both give an embedding and a reason for each image.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mio_export.errors import UsageError
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings

if TYPE_CHECKING:
    from mio_export.bundle import Bundle
    from mio_export.runtimes import Choice

PIXELS = "_pixels"
"""What the name of the model that takes decoded images ends with."""
IMAGES, EMBEDDING, ERROR = "images", "embedding", "error"
"""The names of the tensors: the input of both models, and their outputs."""
VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that says where JSON ends and binary tensors begin."""
OUTCOMES = {
    "invalid": (400, "INVALID_ARGUMENT"),
    "unauthorized": (401, "UNAUTHENTICATED"),
    "not_found": (404, "NOT_FOUND"),
    "too_slow": (408, "DEADLINE_EXCEEDED"),
    "too_large": (413, "INVALID_ARGUMENT"),
    "unsupported": (415, "UNIMPLEMENTED"),
    "queue_full": (429, "RESOURCE_EXHAUSTED"),
    "failed": (500, "INTERNAL"),
    "not_ready": (503, "UNAVAILABLE"),
    "timed_out": (503, "DEADLINE_EXCEEDED"),
}
"""Why a request is not answered: the status in HTTP, and the code in gRPC."""


_MOST_CHARACTERS = 300
"""Of a message, which may quote what was sent; gRPC cuts calls off whose messages are very long."""


class RequestError(Exception):
    """A request is not answered; the message is for its sender: short, and of characters that can be sent.

    Attributes:
        outcome: one of ``OUTCOMES``.
        retry_after_s: when it is worth to try again, in seconds; None: never.
    """

    def __init__(self, outcome: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message[:_MOST_CHARACTERS].encode(errors="backslashreplace").decode())
        self.outcome, self.retry_after_s = outcome, retry_after_s

    @property
    def status(self) -> int:
        """The status in HTTP."""
        return OUTCOMES[self.outcome][0]

    @property
    def code(self) -> str:
        """The name of the status code in gRPC."""
        return OUTCOMES[self.outcome][1]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server says of the encoder that it serves."""

    name: str
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    embedding_dim: int
    max_batch: int
    """Most images in a request."""
    parameters: Mapping[str, str]
    """``space artifact artifact_sha256 precision runtime device decode versions``, the last as a JSON object."""

    @classmethod
    def of(cls, bundle: "Bundle", choice: "Choice", *, decode: str, max_batch: int) -> "Served":
        """Describe an artifact of a bundle as it is served.

        Raises:
            UsageError: the bundle's name cannot be a model's.
        """
        from mio_export.embedding.versions import versions_here

        manifest = bundle.manifest
        return cls(
            name=model_name(bundle.path.resolve().name.removesuffix(".mio")),
            image_shape=manifest.preprocess.shape,
            embedding_dim=manifest.encoder.embedding_dim,
            max_batch=max_batch,
            parameters={
                "space": manifest.space,
                "artifact": choice.file,
                "artifact_sha256": choice.sha256,
                "precision": choice.precision,
                "runtime": choice.runtime,
                "device": choice.device,
                "decode": decode,
                "versions": json.dumps(versions_here(choice.runtime)),
            },
        )

    @property
    def models(self) -> tuple[str, str]:
        """The names of the model that takes files and of the one that takes pixels."""
        return self.name, self.name + PIXELS

    def metadata(self, model: str) -> dict[str, Any]:
        """Return a model's metadata: names, types and shapes of its tensors.

        Raises:
            RequestError: there is no such model.
        """
        config = self.config(model)
        return {
            "name": model,
            "versions": [VERSION],
            "platform": f"mio_{self.parameters['runtime']}",
            **{
                kind + "s": [
                    {"name": t["name"], "datatype": _DATATYPES[t["data_type"]], "shape": [-1, *t["dims"]]}
                    for t in config[kind]
                ]
                for kind in ("input", "output")
            },
        }

    def config(self, model: str) -> dict[str, Any]:
        """Return a model's configuration, in the terms of Triton's ``ModelConfig``.

        Raises:
            RequestError: there is no such model.
        """
        if model not in self.models:
            raise RequestError("not_found", f"unknown model {model!r}; there are {' and '.join(self.models)}")
        is_files = model == self.name
        image = {
            "data_type": "TYPE_STRING" if is_files else "TYPE_UINT8",
            "dims": [1] if is_files else [*self.image_shape],
        }
        return {
            "name": model,
            "max_batch_size": self.max_batch,
            "input": [{"name": IMAGES, **image}],
            "output": [
                {"name": EMBEDDING, "data_type": "TYPE_FP32", "dims": [self.embedding_dim]},
                {"name": ERROR, "data_type": "TYPE_STRING", "dims": [1]},
            ],
            "parameters": {name: {"string_value": value} for name, value in self.parameters.items()},
        }

    def images(self, model: str, inputs: Sequence[tuple[str, str, list[int], Any]]) -> list[bytes] | Pixels:
        """Check the input of a request and return its images.

        Args:
            model: the model that is asked.
            inputs: name, type, shape and content of each input; the content is bytes, or what JSON or gRPC has instead:
                files (bytes or base64), or numbers.

        Returns:
            Files, or uint8 of shape (N, H, W, C); at least one and at most ``max_batch``.

        Raises:
            RequestError: no such model, or another input than it takes.
        """
        metadata = self.metadata(model)["inputs"][0]
        if [name for name, *_ in inputs] != [IMAGES]:
            raise RequestError("invalid", f"{model} takes one input, {IMAGES!r}; got {[name for name, *_ in inputs]}")
        (_, datatype, shape, content), expected = inputs[0], metadata["shape"][1:]
        is_shape = isinstance(shape, list) and bool(shape) and all(type(extent) is int for extent in shape)
        if datatype != metadata["datatype"] or not is_shape or shape[1:] != expected:
            wanted = f"{metadata['datatype']} of shape (N, {', '.join(map(str, expected))})"
            raise RequestError("invalid", f"{IMAGES} must be {wanted}, got {datatype} of shape {shape}")
        number = shape[0]
        if not 1 <= number <= self.max_batch:
            raise RequestError("invalid", f"a request holds 1 to {self.max_batch} images, got {number}")
        if model == self.name:
            return _files(content, number)
        return _pixels(content, (number, *self.image_shape))


def model_name(name: str) -> str:
    """Return a name if it can be a model's.

    Raises:
        UsageError: it cannot.
    """
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise UsageError(f"a served bundle's name is made of letters, digits, '.', '_' and '-'; rename {name!r}")
    return name


def pack(items: Iterable[bytes]) -> bytes:
    """Return the elements of a BYTES tensor as its binary form: each after its length, 4 bytes, little endian."""
    return b"".join(part for item in items for part in (struct.pack("<I", len(item)), item))


def unpack(data: bytes | bytearray | memoryview) -> list[bytes]:
    """Return the elements that ``pack`` joined.

    Raises:
        ValueError: they do not end where the data ends.
    """
    view, items, place = memoryview(data), [], 0
    while place < len(view):
        if place + 4 > len(view):
            raise ValueError("a length is cut off")
        (length,) = struct.unpack_from("<I", view, place)
        place += 4 + length
        if place > len(view):
            raise ValueError("an element is cut off")
        items.append(bytes(view[place - length : place]))
    return items


def join(document: dict[str, Any], tensors: Sequence[bytes | memoryview]) -> tuple[bytes, int]:
    """Return an HTTP body of JSON and binary tensors, and the length of its JSON."""
    header = json.dumps(document).encode()
    return b"".join([header, *tensors]), len(header)


def split(body: bytes | bytearray, header_length: int, kind: str) -> dict[str, Any]:
    """Return the JSON of an HTTP body, with the bytes of each binary tensor as its ``data``.

    Args:
        body: JSON, then binary tensors.
        header_length: number of bytes of JSON.
        kind: ``inputs`` or ``outputs``.

    Raises:
        ValueError: it is no such body.
    """
    if not 0 <= header_length <= len(body):
        raise ValueError(f"{HEADER_LENGTH} is {header_length}, the body has {len(body)} bytes")
    view, place = memoryview(body), header_length
    try:
        document = json.loads(bytes(view[:place]))
        for tensor in document[kind]:
            size = tensor.get("parameters", {}).get("binary_data_size")
            if size is not None:
                if type(size) is not int or not 0 <= size <= len(view) - place:
                    raise ValueError(f"binary_data_size {size} is not there")
                tensor["data"] = view[place : place + size]
                place += size
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the JSON is no inference {kind[:-1]} document ({type(error).__name__})") from None
    if place != len(view):
        raise ValueError(f"{len(view) - place} bytes belong to no tensor")
    return dict(document)


def file_of(text: str) -> bytes:
    """Return the bytes of a data URI or of base64.

    Raises:
        ValueError: it is neither.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("a data URI must be data:TYPE;base64,DATA")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an image must be base64 or a data URI") from None


def outputs_of(
    vectors: Embeddings, errors: Sequence[str], names: Sequence[str] = ()
) -> list[tuple[str, str, list[int], bytes]]:
    """Return name, type, shape and binary form of the outputs that are asked for, or of all.

    Raises:
        RequestError: there is no output of a name.
    """
    if unknown := set(names) - {EMBEDDING, ERROR}:
        raise RequestError("invalid", f"there is no output {min(unknown)!r}; there are {EMBEDDING} and {ERROR}")
    outputs = [
        (EMBEDDING, "FP32", [*vectors.shape], np.ascontiguousarray(vectors, "<f4").tobytes()),
        (ERROR, "BYTES", [len(errors), 1], pack(error.encode() for error in errors)),
    ]
    return [output for output in outputs if not names or output[0] in names]


def numbers_of(row: Embeddings) -> list[float | None]:
    """Return numbers for JSON, which has no NaN."""
    return row.tolist() if np.isfinite(row).all() else [x if np.isfinite(x) else None for x in row.tolist()]


_DATATYPES = {"TYPE_STRING": "BYTES", "TYPE_UINT8": "UINT8", "TYPE_FP32": "FP32"}


def _files(content: Any, number: int) -> list[bytes]:
    try:
        if isinstance(content, (bytes, bytearray, memoryview)):
            files = unpack(content)
        else:
            flat = [item for row in content for item in (row if isinstance(row, list) else [row])]
            files = [item if isinstance(item, bytes) else file_of(item) for item in flat]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise RequestError("invalid", f"{IMAGES} cannot be read: {error}") from None
    if len(files) != number:
        raise RequestError("invalid", f"{IMAGES} has {len(files)} elements, its shape says {number}")
    return files


def _pixels(content: Any, shape: tuple[int, ...]) -> Pixels:
    try:
        if isinstance(content, (bytes, bytearray, memoryview)):
            return np.frombuffer(content, np.uint8).reshape(shape)
        numbers = np.asarray(content, np.float64)  # a type found by NumPy may be as wide as the longest string
        if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
            raise ValueError("it must be whole numbers from 0 to 255")
        return numbers.astype(np.uint8).reshape(shape)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RequestError("invalid", f"{IMAGES} cannot be read: {error}") from None


__all__ = [
    "EMBEDDING",
    "ERROR",
    "HEADER_LENGTH",
    "IMAGES",
    "OUTCOMES",
    "PIXELS",
    "VERSION",
    "RequestError",
    "Served",
    "file_of",
    "join",
    "model_name",
    "numbers_of",
    "outputs_of",
    "pack",
    "split",
    "unpack",
]
