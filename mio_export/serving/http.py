"""The application behind HTTP: the Open Inference Protocol, OpenAI's embeddings, health, metrics, documentation."""

import math
import sys
import traceback
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mio_export.serving.engine import Engine
from mio_export.serving.metrics import CONTENT_TYPE, Journal, Record
from mio_export.serving.openai import OpenAI
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import HEADER_LENGTH, VERSION, RequestError, join, numbers_of, outputs_of, split
from mio_export.serving.requests import Bodies, check_size, unless_gone

_SPARE_NUMBERS = 2048
"""In JSON, beside those of the images."""
_MOST_DIGITS = 20
_MEDIA = {"docs.html": "text/html", "docs.css": "text/css", "docs.js": "text/javascript"}

Work = Callable[[Request, Record], Awaitable[Response]]


def http_app(engine: Engine, options: ServeOptions, journal: Journal) -> ASGIApp:
    """Return the ASGI application of an engine."""
    bodies = Bodies(engine.max_body_bytes, options.timeout_s)
    api, openai = _Api(engine, options, journal, bodies), OpenAI(engine, options, bodies)
    models = ("/v2/models/{model}", f"/v2/models/{{model}}/versions/{VERSION}")
    routes = [  # in the order in which they are looked for: what is asked most comes first
        *(Route(f"{model}/infer", api.guarded(api.infer), methods=["POST"]) for model in models),
        Route("/v1/embeddings", api.guarded(openai.embeddings), methods=["POST"]),
        Route("/v1/models", api.guarded(openai.models)),
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

    def __init__(self, engine: Engine, options: ServeOptions, journal: Journal, bodies: Bodies) -> None:
        self._engine, self._options, self._journal, self._bodies = engine, options, journal, bodies
        self._most_numbers = engine.served.max_batch * math.prod(engine.served.image_shape) + _SPARE_NUMBERS

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
        with self._bodies.reader(request) as read:
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
            vectors, errors = await unless_gone(request, self._engine.infer(images))
        record.count(errors)
        outputs, tensors = [], []
        for name, datatype, shape, content in outputs_of(vectors, errors, tuple(asked)):
            output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            if asked.get(name, all_binary):
                output["parameters"] = {"binary_data_size": len(content)}
                tensors.append(content)
            else:
                output["data"] = errors if datatype == "BYTES" else numbers_of(vectors.ravel())
            outputs.append(output)
        answer = {"model_name": model, "model_version": VERSION, "id": document.get("id", ""), "outputs": outputs}
        content, length = join(answer, tensors)
        if not tensors:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")

    def _known(self, model: str) -> str:
        """Return a model's name, if there is one; strangers shall not fill the metrics with names."""
        return model if model in self._engine.served.models else ""

    def _document(self, body: bytearray, length: int) -> dict[str, Any]:
        try:
            check_size(body[:length], 2 * self._most_numbers)
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
