"""OpenAI's interface to embeddings, for images: a data URI or base64 where a text would be."""

import asyncio
import base64

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mio_export.runtimes.base import Embeddings
from mio_export.serving.engine import Engine
from mio_export.serving.metrics import Record
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import RequestError, file_of, numbers_of
from mio_export.serving.requests import Bodies, json_of, unless_gone

_MOST_INPUTS = 2048


class OpenAI:
    """What the paths under ``/v1`` do."""

    def __init__(self, engine: Engine, options: ServeOptions, bodies: Bodies) -> None:
        self._engine, self._options, self._bodies = engine, options, bodies

    async def models(self, request: Request, record: Record) -> Response:
        """The names that ``/v1/embeddings`` takes as ``model``: the space and the bundle's name."""
        names = (self._engine.served.parameters["space"], self._engine.served.name)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "mio-export"} for name in names]
        return JSONResponse({"object": "list", "data": models})

    async def embeddings(self, request: Request, record: Record) -> Response:
        """Embed images as OpenAI's clients ask for it; one bad image fails its request, as nothing there says which."""
        served = self._engine.served
        record.model = served.name
        with self._bodies.reader(request) as read:
            body = await read()
            asked = json_of(body, 4 * _MOST_INPUTS)
            names = (served.name, served.parameters["space"])
            if asked.get("model") not in names:
                raise RequestError("not_found", f"the model here is {names[0]!r}, its space {names[1]}")
            if asked.get("dimensions") not in (None, served.embedding_dim):
                raise RequestError("invalid", f"dimensions must be {served.embedding_dim} or left out")
            form = asked.get("encoding_format") or "float"
            if form not in ("float", "base64"):
                raise RequestError("invalid", "encoding_format must be float or base64")
            items = [asked["input"]] if isinstance(asked.get("input"), str) else asked.get("input")
            if not isinstance(items, list) or not 1 <= len(items) <= _MOST_INPUTS:
                raise RequestError("invalid", f"input must be a string or a list of 1 to {_MOST_INPUTS} strings")
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    images, num_bytes = [], 0
                    for index, item in enumerate(items):
                        images.append(await self._file(index, item))
                        num_bytes += len(images[-1])
                        if num_bytes > self._engine.max_body_bytes:
                            raise RequestError(
                                "too_large", f"images have at most {self._engine.max_body_bytes:,} bytes"
                            )
            except TimeoutError:
                raise RequestError("too_slow", "the images could not be fetched in time") from None
            rows: list[Embeddings] = []
            for start in range(0, len(images), served.max_batch):
                part = images[start : start + served.max_batch]
                vectors, errors = await unless_gone(request, self._engine.infer(part))
                record.count(errors)
                for index, error in enumerate(errors, start):
                    if error:
                        raise RequestError("invalid", f"input {index}: {error}")
                rows.extend(vectors)
        encoded = [numbers_of(row) if form == "float" else base64.b64encode(row.tobytes()).decode() for row in rows]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(encoded)]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return JSONResponse({"object": "list", "data": data, "model": served.parameters["space"], "usage": usage})

    async def _file(self, index: int, item: object) -> bytes:
        if not isinstance(item, str):
            raise RequestError("invalid", f"input {index} must be a string: a data URI or base64 of an image file")
        try:
            if item[:8].lower().startswith(("http://", "https://")):
                return await asyncio.to_thread(_fetched, item, self._options)
            return file_of(item)
        except ValueError as error:
            raise RequestError("invalid", f"input {index}: {error}") from None


def _fetched(url: str, options: ServeOptions) -> bytes:
    """Fetch an image from a host that is allowed; it may not send on to another."""
    import urllib3

    try:
        host = (urllib3.util.parse_url(url).host or "").strip("[]")  # as it is read where the connection is made
        if host not in {allowed.lower() for allowed in options.allow_url_hosts}:
            raise ValueError("this server fetches no URL of that host; send the image itself, as a data URI")
        with urllib3.PoolManager(retries=False, timeout=options.max_wait_s) as pool:
            answer = pool.request("GET", url, redirect=False, preload_content=False)
            if answer.status != 200:
                raise ValueError(f"{host} answered with status {answer.status}")
            data = answer.read(options.max_file_bytes + 1)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ValueError(f"{url[:100]} cannot be read ({type(error).__name__})") from None
    return bytes(data)


__all__ = ["OpenAI"]
