"""The client: a served encoder with the interface of a local runtime."""

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from mio_export.errors import MioError, MissingBackendError, SpaceError, UsageError
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.serving.settings import JPEG

_FIRST_PAUSE_S = 0.1
_PASSING = ("503", "429", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED")
"""States that may be others in a moment: starting, too long a queue."""


class RemoteEncoder(Runtime):
    """A served encoder; for one thread at a time.

        with RemoteEncoder("http://127.0.0.1:8000/encoder") as encoder:
            vectors = encoder.embed(images)  # uint8 (N, H, W, C) to float32 (N, D), any N
            vectors, errors = encoder.embed_files([path.read_bytes() for path in paths])

    Args:
        url: ``http://HOST:PORT/NAME`` or ``grpc://HOST:PORT/NAME``, as ``mio serve`` prints them.
        space: fingerprint that the server must have; None: any.
        timeout_s: longest wait for one answer, in seconds.
        num_retries: how often a batch is sent again when the server cannot be reached or is too busy; the pauses
            between grow from 0.1 s, doubling.

    Raises:
        UsageError: the URL is none, or the server has no such model.
        SpaceError: it serves another embedding space.
        MissingBackendError: tritonclient is not installed.
        MioError: it cannot be reached.
    """

    def __init__(self, url: str, *, space: str | None = None, timeout_s: float = 30.0, num_retries: int = 5) -> None:
        self.url = url
        self._timeout_s, self._num_retries = timeout_s, num_retries
        self._triton, self._client, self._name = _connected(url, timeout_s)
        try:
            config = self._asked(self._config)
            self.parameters = _says(url, config, space)
        except BaseException:
            self._client.close()
            raise
        self.space = self.parameters["space"]
        self.max_batch = int(config["max_batch_size"])
        height, width, channels = (int(extent) for extent in config["input"][0]["dims"])
        dim = int(next(output for output in config["output"] if output["name"] == "embedding")["dims"][0])
        super().__init__(image_shape=(height, width, channels), embedding_dim=dim, device="server")

    def embed_files(self, files: Sequence[bytes]) -> tuple[Embeddings, list[str | None]]:
        """Embed encoded images, which the server decodes under its bundle's contract.

        Args:
            files: the whole bytes of each, any type that ``Preprocess`` takes, one or more.

        Returns:
            float32, shape (N, D), NaN where an image failed; and the reason of each, None where it did not.

        Raises:
            MioError: the server cannot be reached or refused a batch as a whole.
        """
        if not files:
            raise UsageError("there is no image to embed")
        return self._sent(self._name + JPEG, np.array([[file] for file in files], dtype=np.object_), "BYTES")

    def _run(self, images: Pixels) -> Embeddings:
        vectors, errors = self._sent(self._name, images, "UINT8")
        failed = [error for error in errors if error]
        if failed:
            raise MioError(f"{self.url}: {failed[0]}" + (f" (and {len(failed) - 1} more)" if failed[1:] else ""))
        return vectors

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _sent(self, model: str, items: npt.NDArray[Any], datatype: str) -> tuple[Embeddings, list[str | None]]:
        """Send items in batches of the server's size; number the errors through."""
        vectors, errors = [], []
        for start in range(0, len(items), self.max_batch):
            tensor = self._triton.InferInput("images", list(items[start : start + self.max_batch].shape), datatype)
            tensor.set_data_from_numpy(items[start : start + self.max_batch])
            answer = self._asked(lambda tensor=tensor: self._infer(model, tensor))
            vectors.append(answer.as_numpy("embedding"))
            for number, error in enumerate(answer.as_numpy("error")[:, 0], start):
                errors.append(f"image {number}: {error.decode()}" if error else None)
        return np.concatenate(vectors), errors

    def _infer(self, model: str, tensor: Any) -> Any:
        if self.url.startswith("grpc"):
            return self._client.infer(model, [tensor], client_timeout=self._timeout_s)
        return self._client.infer(model, [tensor])

    def _config(self) -> dict[str, Any]:
        if self.url.startswith("grpc"):
            return dict(self._client.get_model_config(self._name, as_json=True)["config"])
        return dict(self._client.get_model_config(self._name))

    def _asked(self, call: Any) -> Any:
        """Call, and again where that may help."""
        from tritonclient.utils import InferenceServerException

        for pause_s in self._pauses():
            try:
                return call()
            except InferenceServerException as error:
                problem, status = " ".join(str(error.message()).split()), str(error.status())
                if status in ("404", "StatusCode.NOT_FOUND") or "unknown model" in problem:
                    raise UsageError(f"{self.url}: {problem}") from None
                passing = status in _PASSING
            except (OSError, EOFError) as error:  # refused, reset, timed out
                problem, passing = " ".join(str(error).split()) or type(error).__name__, True
            if not passing or pause_s is None:
                raise MioError(f"{self.url}: {problem}")
            time.sleep(pause_s)
        raise AssertionError("the last pause is None")

    def _pauses(self) -> Iterator[float | None]:
        for number in range(self._num_retries):
            yield _FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1.5)  # so that many clients do not come at once
        yield None


def _says(url: str, config: dict[str, Any], space: str | None) -> dict[str, str]:
    """Return what a model says that it serves, if that is what is wanted."""
    says = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    if not {"space", "artifact", "sha256", "precision"} <= says.keys():
        raise UsageError(f"{url} does not say which embedding space it serves; it is none of mio serve")
    if space is not None and space != says["space"]:
        raise SpaceError(f"{url} serves another embedding space ({says['space'][:12]}…) than {space[:12]}…")
    return says


def _connected(url: str, timeout_s: float) -> tuple[Any, Any, str]:
    parts = urlsplit(url)
    name = parts.path.strip("/")
    if parts.scheme not in ("http", "grpc") or not parts.netloc or not name or "/" in name:
        raise UsageError(f"a server is http://HOST:PORT/NAME or grpc://HOST:PORT/NAME, got {url!r}")
    try:
        if parts.scheme == "grpc":
            import tritonclient.grpc as triton

            return triton, triton.InferenceServerClient(parts.netloc), name
        import tritonclient.http as triton

        client = triton.InferenceServerClient(parts.netloc, connection_timeout=timeout_s, network_timeout=timeout_s)
        return triton, client, name
    except ImportError as error:
        raise MissingBackendError(
            f"a server is called with tritonclient, which is not installed ({error.name}):"
            " pip install 'tritonclient[http,grpc]'"
        ) from None


__all__ = ["RemoteEncoder"]
