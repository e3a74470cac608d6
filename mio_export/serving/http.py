"""The application behind HTTP: the Open Inference Protocol, OpenAI's embeddings, health, metrics, documentation."""

import asyncio
import base64
import json
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mio_export.runtimes.base import Embeddings
from mio_export.serving.engine import Engine
from mio_export.serving.metrics import CONTENT_TYPE, Journal, Record
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import (
    HEADER_LENGTH,
    VERSION,
    RequestError,
    file_of,
    join,
    outputs_of,
    split,
)

_MOST_HELD_BODIES = 8
"""Bodies of the longest size that are held at once; beyond them requests are refused."""
_MOST_INPUTS = 2048
"""Of OpenAI's interface."""
_MOST_DIGITS = 20
_MEDIA = {"docs.html": "text/html", "docs.css": "text/css", "docs.js": "text/javascript"}

Work = Callable[[Request, Record], Awaitable[Response]]


def http_app(engine: Engine, options: ServeOptions, journal: Journal) -> ASGIApp:
    """Return the ASGI application of an engine."""
    api = _Api(engine, options, journal)
    models = ("/v2/models/{model}", f"/v2/models/{{model}}/versions/{VERSION}")
    routes = [  # in the order in which they are looked for: what is asked most comes first
        *(Route(f"{model}/infer", api.guarded(api.infer), methods=["POST"]) for model in models),
        Route("/v1/embeddings", api.guarded(api.openai_embeddings), methods=["POST"]),
        Route("/v1/models", api.guarded(api.openai_models)),
        Route("/v2/health/live", lambda _: JSONResponse({"live": True})),
        Route("/v2/health/ready", api.ready),
        Route("/v2", api.guarded(api.server)),
        Route("/metrics", api.guarded(api.metrics)),
        Route("/", lambda _: RedirectResponse("/docs")),
        Route("/docs", _page("docs.html", engine)),
        *(Route(f"/{name}", _page(name, engine)) for name in ("docs.css", "docs.js", "openapi.json")),
    ]
    for model in models:
        routes += [
            Route(model, api.guarded(api.metadata)),
            Route(f"{model}/ready", api.ready),
            Route(f"{model}/config", api.guarded(api.config)),
        ]
    lost = dict.fromkeys((404, 405), api.lost)
    return _gate(Starlette(routes=routes, exception_handlers=lost), engine, journal)


class _Api:
    """What the paths do."""

    def __init__(self, engine: Engine, options: ServeOptions, journal: Journal) -> None:
        self._engine, self._options, self._journal = engine, options, journal
        self._held_bytes = 0
        self._most_numbers = engine.served.max_batch * math.prod(engine.served.image_shape) + _MOST_INPUTS

    def guarded(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        """Wrap what answers a request: the key is asked for, every end is written down, and no error leaves it."""

        async def answer(request: Request) -> Response:
            client, path = request.client.host if request.client else "", request.scope["path"]
            model = self._known(request.path_params.get("model", ""))
            try:
                with self._journal.request(protocol="http", model=model, client=client) as record:
                    if not self._options.admits(request.headers.get("authorization")):
                        raise RequestError("unauthorized", "send the server's key as 'Authorization: Bearer KEY'")
                    try:
                        return await work(request, record)
                    except ClientDisconnect:
                        record.status = "cancelled"
                        return Response(status_code=499)
            except RequestError as error:
                return _refusal(error, openai=path.startswith("/v1/"))
            except Exception:  # noqa: BLE001 - nobody outside may see it
                traceback.print_exc(file=sys.stderr)
                return _refusal(RequestError("failed", "the server failed"), openai=path.startswith("/v1/"))

        return answer

    async def ready(self, request: Request) -> Response:
        """Whether new requests are welcome, and the model that is asked for is there."""
        model = request.path_params.get("model")
        if model is not None and model not in self._engine.served.models:
            return _refusal(RequestError("not_found", "unknown model"))
        return JSONResponse({"ready": self._engine.is_ready}, 200 if self._engine.is_ready else 503)

    async def lost(self, request: Request, error: Exception) -> Response:
        """Say that there is nothing at a path, or not for this method."""
        client = request.client.host if request.client else ""
        self._journal.refused(protocol="http", client=client, reason="not_found")
        status = getattr(error, "status_code", 404)
        return JSONResponse(
            {"error": f"{request.method} {request.scope['path'][:100]} is not served; see /docs"}, status
        )

    async def metrics(self, request: Request, record: Record) -> Response:
        """What Prometheus reads."""
        return Response(self._journal.exposition(), media_type=CONTENT_TYPE)

    async def server(self, request: Request, record: Record) -> Response:
        """Name and version of the server."""
        extensions = ["binary_tensor_data", "model_configuration"]
        return JSONResponse({"name": "mio-export", "version": version("mio-export"), "extensions": extensions})

    async def metadata(self, request: Request, record: Record) -> Response:
        """What a model takes and gives."""
        return JSONResponse(self._engine.served.metadata(request.path_params["model"]))

    async def config(self, request: Request, record: Record) -> Response:
        """What a model serves."""
        return JSONResponse(self._engine.served.config(request.path_params["model"]))

    async def infer(self, request: Request, record: Record) -> Response:
        """Embed the images of a request of the Open Inference Protocol."""
        served, model = self._engine.served, request.path_params["model"]
        served.config(model)
        with self._body(request) as read:
            body = await read()
            length = _header_length(request, body)
            document = self._document(body, length)
            try:
                inputs = [(item["name"], item["datatype"], item["shape"], item["data"]) for item in document["inputs"]]
                all_binary = document.get("parameters", {}).get("binary_data_output", False)
                asked = {
                    str(item["name"]): item.get("parameters", {}).get("binary_data", all_binary)
                    for item in document.get("outputs") or ()
                }
            except (KeyError, TypeError, AttributeError):
                raise RequestError("invalid", "an input needs name, datatype, shape and data") from None
            images = served.images(model, inputs)
            vectors, errors = await _unless_gone(request, self._engine.infer(images))
        record.count(errors)
        outputs, tensors = [], []
        for name, datatype, shape, content in outputs_of(vectors, errors, tuple(asked)):
            output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            if asked.get(name, all_binary):
                output["parameters"] = {"binary_data_size": len(content)}
                tensors.append(content)
            else:
                output["data"] = errors if datatype == "BYTES" else _numbers(vectors.ravel())
            outputs.append(output)
        answer = {"model_name": model, "model_version": VERSION, "id": document.get("id", ""), "outputs": outputs}
        content, length = join(answer, tensors)
        if not tensors:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")

    async def openai_models(self, request: Request, record: Record) -> Response:
        """The names that ``/v1/embeddings`` takes as ``model``: the space and the bundle's name."""
        names = (self._engine.served.parameters["space"], self._engine.served.name)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "mio-export"} for name in names]
        return JSONResponse({"object": "list", "data": models})

    async def openai_embeddings(self, request: Request, record: Record) -> Response:
        """Embed images as OpenAI's clients ask for it; one bad image fails its request, as nothing there says which."""
        served = self._engine.served
        record.model = served.name
        with self._body(request) as read:
            body = await read()
            asked = _json(body)
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
                vectors, errors = await _unless_gone(request, self._engine.infer(part))
                record.count(errors)
                for index, error in enumerate(errors, start):
                    if error:
                        raise RequestError("invalid", f"input {index}: {error}")
                rows.extend(vectors)
        encoded = [_numbers(row) if form == "float" else base64.b64encode(row.tobytes()).decode() for row in rows]
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

    def _known(self, model: str) -> str:
        """Return a model's name, if there is one; strangers shall not fill the metrics with names."""
        return model if model in self._engine.served.models else ""

    @contextmanager
    def _body(self, request: Request) -> Iterator[Callable[[], Awaitable[bytearray]]]:
        """Give what reads a request's body, within the limits of its length and time; count what is held meanwhile."""
        body, most = bytearray(), self._engine.max_body_bytes

        async def read() -> bytearray:
            length = request.headers.get("content-length", "0")
            if request.headers.get("content-encoding", "identity") != "identity":
                raise RequestError("unsupported", "send the body without Content-Encoding")
            if length.isdecimal() and int(length) > most:
                raise RequestError("too_large", f"a request has at most {most:,} bytes, got {int(length):,}")
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    async for part in request.stream():
                        self._held_bytes += len(part)
                        body.extend(part)
                        if len(body) > most:
                            raise RequestError("too_large", f"a request has at most {most:,} bytes")
                        if self._held_bytes > _MOST_HELD_BODIES * most:
                            raise RequestError("queue_full", "too many bytes wait; try again later", retry_after_s=1)
            except TimeoutError:
                raise RequestError("too_slow", f"the body took more than {self._options.timeout_s:g} s") from None
            return body

        try:
            yield read
        finally:
            self._held_bytes -= len(body)

    def _document(self, body: bytearray, length: int) -> dict[str, Any]:
        try:
            _check_size(body[:length], 2 * self._most_numbers)
            return split(body, length, "inputs")
        except ValueError as error:
            raise RequestError("invalid", f"the body cannot be read: {error}") from None


def _header_length(request: Request, body: bytearray) -> int:
    """Return how many bytes of a body are JSON."""
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return len(body)
    if not given.isdecimal() or len(given) > _MOST_DIGITS or int(given) > len(body):
        raise RequestError("invalid", f"{HEADER_LENGTH} is {given[:20]!r}, the body has {len(body)} bytes")
    return int(given)


def _check_size(text: bytearray, most: int) -> None:
    """Refuse JSON of more values than the largest request has, before they take memory."""
    if text.count(b",") + text.count(b"[") > most:
        raise ValueError("it has more values than any request")


def _json(body: bytearray) -> dict[str, Any]:
    try:
        _check_size(body, 4 * _MOST_INPUTS)
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid", f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError("invalid", "the body must be a JSON object")
    return document


async def _unless_gone(request: Request, work: Awaitable[tuple[Embeddings, list[str]]]) -> tuple[Embeddings, list[str]]:
    """Wait for work, and drop it when its client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


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


def _numbers(row: Embeddings) -> list[float | None]:
    """Return numbers for JSON, which has no NaN."""
    return row.tolist() if np.isfinite(row).all() else [x if np.isfinite(x) else None for x in row.tolist()]


def _refusal(error: RequestError, *, openai: bool = False) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(round(error.retry_after_s))}
    if error.outcome == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    kind = {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.outcome}
    return JSONResponse({"error": kind if openai else str(error)}, error.status, headers)


def _page(name: str, engine: Engine) -> Callable[[Request], Response]:
    """Return what answers with a file of the package, in which NAME is the model's name."""
    headers = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}

    def answer(request: Request) -> Response:
        text = (files("mio_export.serving") / "templates" / name).read_text(encoding="utf-8")
        text = text.replace("NAME", engine.served.name)
        return Response(text, media_type=_MEDIA.get(name, "application/json"), headers=headers)

    return answer


def _gate(app: ASGIApp, engine: Engine, journal: Journal) -> ASGIApp:
    """Refuse what there is no room for before anything else is spent on it: under overload that is nearly everything.

    While the server ends, each connection is closed after its answer, so that its client turns to another server.
    """

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        answer = app
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                engine.check_room(is_at_door=True)
            except RequestError as error:
                client = scope["client"][0] if scope["client"] else ""
                journal.refused(protocol="http", client=client, reason=error.outcome)
                answer = _refusal(error, openai=scope["path"].startswith("/v1/"))
        await answer(scope, receive, send_closing if engine.is_ending else send)

    return gate


__all__ = ["http_app"]
