"""The client: a served encoder with the interface of a local runtime."""

import os
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from mio_export.errors import MioError, SpaceError, UsageError, one_line
from mio_export.limits import Limits
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.image_files import ImageFile, cannot_be_read, check_files, content_of
from mio_export.serving.protocol import EMBEDDING, ERROR, PIXELS, RequestError, model_name, pack, unpack
from mio_export.serving.transports import MOST_BYTES, GrpcTransport, HttpTransport
from mio_export.sources.secrets import without_secrets

_T = TypeVar("_T")
_KEY = "MIO_API_KEY"
_FIRST_PAUSE_S = 0.1
_PASSING = ("queue_full", "not_ready", "timed_out", "too_slow")
_REQUEST_BYTES = 32 << 20
"""Files are sent in requests of at most so much, or one by one: half of what a server takes by default."""
_REASON_BYTES = 1024
_SAID = ("space", "artifact", "artifact_sha256", "precision", "decode")


class RemoteEncoder(Runtime):
    """A served encoder; for one thread at a time.

        with RemoteEncoder("http://127.0.0.1:8000/encoder") as encoder:
            vectors = encoder.embed(images)  # uint8 (N, H, W, C) to float32 (N, D), any N
            vectors, errors = encoder.embed_files(["cat.jpg", "dog.png"])

    Args:
        url: ``http://HOST:PORT/NAME`` or ``grpc://HOST:PORT/NAME``, as ``mio serve`` prints them; ``https`` and
            ``grpcs`` with TLS.
        space: fingerprint that the server must have; None: any.
        timeout_s: longest wait for one answer, in seconds.
        num_retries: how often a batch is sent again when the server cannot be reached or is too busy; the pauses
            between grow from 0.1 s, doubling, and are as long as the server asks for, up to ``timeout_s``.
        api_key: of the server; None: the environment variable MIO_API_KEY, if it is set.
        ca: PEM file of the certificates that a server's may be signed by; None: those that this machine trusts.

    Raises:
        UsageError: the URL is none, the server has no such model, or it wants another key.
        SpaceError: it serves another embedding space.
        MioError: it cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        space: str | None = None,
        timeout_s: float = 30.0,
        num_retries: int = 5,
        api_key: str | None = None,
        ca: str | Path | None = None,
    ) -> None:
        self.url = url
        self._timeout_s, self._num_retries = timeout_s, num_retries
        self._transport, self._name = _connected(url, timeout_s, api_key or os.environ.get(_KEY), ca)
        try:
            files, pixels = (self._asked(self._transport.config, self._name + ending) for ending in ("", PIXELS))
            self.parameters, self.max_batch, shape, dim = _said(url, files, pixels, space)
        except BaseException:
            self.close()
            raise
        self.space = self.parameters["space"]
        super().__init__(image_shape=shape, embedding_dim=dim, device="server")

    def embed_files(self, files: Sequence[ImageFile]) -> tuple[Embeddings, list[str | None]]:
        """Embed image files, which the server decodes under its bundle's contract.

        Args:
            files: paths here, or the whole bytes of each; any type that ``Preprocess`` takes, one or more.

        Returns:
            float32, shape (N, D), NaN where an image failed; and the reason of each, None where it did not.

        Raises:
            MioError: the server cannot be reached or refused a batch as a whole.
        """
        check_files(files)
        unread: dict[int, str] = {}
        requests = (([len(part), 1], pack(part)) for part in _batches(_contents(files, unread), self.max_batch))
        vectors, errors = self._sent(self._name, "BYTES", requests)
        return vectors, [f"image {n}: {unread[n]}" if n in unread else error for n, error in enumerate(errors)]

    def _run(self, images: Pixels) -> Embeddings:
        parts = (images[start : start + self.max_batch] for start in range(0, len(images), self.max_batch))
        requests = (([*part.shape], part.tobytes()) for part in parts)
        vectors, errors = self._sent(self._name + PIXELS, "UINT8", requests)
        failed = [error for error in errors if error]
        if failed:
            raise MioError(f"{self.url}: {failed[0]}" + (f" (and {len(failed) - 1} more)" if failed[1:] else ""))
        return vectors

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def _sent(
        self, model: str, datatype: str, requests: Iterable[tuple[list[int], bytes]]
    ) -> tuple[Embeddings, list[str | None]]:
        """Send requests one by one; number the errors through."""
        vectors: list[Embeddings] = []
        errors: list[str | None] = []
        for shape, data in requests:
            rows, reasons = self._asked(self._embedded, model, datatype, shape, data)
            vectors.append(rows)
            errors += [f"image {number}: {r}" if r else None for number, r in enumerate(reasons, len(errors))]
        return np.concatenate(vectors), errors

    def _embedded(self, model: str, datatype: str, shape: list[int], data: bytes) -> tuple[Embeddings, list[str]]:
        """Ask for a batch, and take nothing but what was asked for."""
        answer, expected = self._transport.infer(model, datatype, shape, data), [shape[0], self.embedding_dim]
        kind, found, raw = answer[EMBEDDING]
        reasons = [" ".join(reason.decode(errors="replace").split()) for reason in unpack(answer[ERROR][2])]
        if (kind, found) != ("FP32", expected) or len(reasons) != shape[0]:
            raise ValueError(f"{len(reasons)} rows, {kind} {found} instead of FP32 {expected}")
        vectors = np.frombuffer(raw, "<f4").reshape(expected).astype(np.float32)
        vectors[[bool(reason) for reason in reasons]] = np.nan
        return vectors, reasons

    def _asked(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Call, and again where that may help."""
        for number in range(self._num_retries + 1):
            try:
                return call(*arguments)
            except RequestError as error:
                problem = f"{self.url}: {one_line(error)}"
                if error.outcome == "not_found":
                    hint = f"; call it {self.url.removesuffix(PIXELS)}" if self.url.endswith(PIXELS) else ""
                    raise UsageError(problem + hint) from None
                if error.outcome == "unauthorized":
                    raise UsageError(f"{problem}; the key is api_key, --api-key or the variable {_KEY}") from None
                if error.outcome not in _PASSING or number == self._num_retries:
                    raise MioError(problem) from None
                pause_s = _FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1.5)  # many clients do not come at once
                time.sleep(max(pause_s, min(error.retry_after_s or 0.0, self._timeout_s)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = one_line(error)
                raise MioError(f"{self.url}: the answer is not of the protocol: {reason}") from None
        raise AssertionError("the last call returns or raises")


def _contents(files: Sequence[ImageFile], unread: dict[int, str]) -> Iterator[bytes]:
    """Yield the bytes of each file; one that cannot be read is noted, and sent as none, which the server refuses."""
    for number, file in enumerate(files):
        try:
            content = content_of(file, Limits().max_file_bytes)
        except OSError as error:
            unread[number], content = cannot_be_read(error), b""
        yield content


def _batches(files: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for file in files:
        if batch and (len(batch) == most or num_bytes + len(file) > _REQUEST_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(file)
        num_bytes += len(file)
    yield batch


def _said(
    url: str, files: Any, pixels: Any, space: str | None
) -> tuple[dict[str, str], int, tuple[int, int, int], int]:
    """Return what a server says of itself, checked: parameters, most images in a request, image shape, dimension."""
    try:
        says, twice = ({name: str(v["string_value"]) for name, v in c["parameters"].items()} for c in (files, pixels))
        if any(says[name] != twice[name] for name in _SAID):
            raise ValueError("its two models are not of one encoder")
        height, width, channels = (int(extent) for extent in pixels["input"][0]["dims"])
        (dim,) = (int(output["dims"][0]) for output in files["output"] if output["name"] == EMBEDDING)
        most = min(int(files["max_batch_size"]), MOST_BYTES // (4 * dim + _REASON_BYTES))
        if min(most, height, width, channels, dim) < 1:
            raise ValueError("sizes must be positive")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        raise UsageError(f"{url} publishes no embedding space: it was not started by mio serve or mio deploy") from None
    if space is not None and space != says["space"]:
        raise SpaceError(f"{url} serves another embedding space ({says['space'][:12]}…) than {space[:12]}…")
    return says, most, (height, width, channels), dim


def _connected(
    url: str, timeout_s: float, key: str | None, ca: str | Path | None
) -> tuple[HttpTransport | GrpcTransport, str]:
    try:
        parts = urlsplit(url)
        scheme, place, name = parts.scheme, parts.netloc, parts.path.strip("/")
        if scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname or parts.port == 0 or "@" in place:
            raise ValueError
        model_name(name)
    except ValueError:  # of which UsageError is one
        raise UsageError(
            f"a server is http://HOST:PORT/NAME or grpc://HOST:PORT/NAME, https and grpcs with TLS;"
            f" got {without_secrets(url)!r}"
        ) from None
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key must be printable ASCII")
    pem, context = None, None
    if scheme.endswith("s"):
        try:
            pem = Path(ca).read_bytes() if ca else None
            context = ssl.create_default_context(cadata=pem.decode() if pem else None)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageError(f"{ca} is no PEM file of certificates: {error}") from None
    if scheme.startswith("http"):
        return HttpTransport(place, key, context, timeout_s), name
    return GrpcTransport(place, key, pem, timeout_s, tls=context is not None), name


__all__ = ["RemoteEncoder"]
