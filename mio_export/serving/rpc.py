"""The protocol over gRPC: the methods of ``GRPCInferenceService`` on ``grpc.aio``, without generated code."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError

from mio_export.serving.engine import Engine
from mio_export.serving.messages import SERVICE, entries, message, message_class
from mio_export.serving.metrics import Journal
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import VERSION, RequestError, outputs_of

_SPARE_CALLS = 256
"""Open calls beside those that hold an image: being read, refused, or about the server."""
_FREE = ("ServerLive", "ServerReady")
"""What is answered without the key."""
_OPTIONS = {
    "grpc.so_reuseport": 1,
    "grpc.compression_enabled_algorithms_bitset": 1,  # none: a few bytes must not become gigabytes
    "grpc.server_handshake_timeout_ms": 10_000,
    "grpc.max_connection_idle_ms": 600_000,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.lookahead_bytes": 1 << 20,  # an image comes without a pause
    "grpc.http2.max_frame_size": 1 << 20,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
}


class RpcService:
    """What the methods do.

    Attributes:
        num_open: requests for embeddings that came and are not answered.
        is_refusing: whether who asks from now on is told that the server ends. A server that stops cancels the calls
            that are on their way, so clients are told first.
    """

    def __init__(self, engine: Engine, options: ServeOptions, journal: Journal) -> None:
        self._engine, self._options, self._journal = engine, options, journal
        self.num_open, self.is_refusing = 0, False

    def server(self, address: str) -> grpc.aio.Server:
        """Return a server that listens at a numeric address, where other processes may listen too.

        Raises:
            RuntimeError: it cannot listen there.
        """
        settings = {**_OPTIONS, "grpc.max_receive_message_length": self._engine.max_body_bytes + (1 << 20)}
        calls = self._options.max_queue + _SPARE_CALLS
        server = grpc.aio.server(options=list(settings.items()), maximum_concurrent_rpcs=calls)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._methods()),))
        place = f"{f'[{address}]' if ':' in address else address}:{self._options.grpc_port}"
        if self._options.tls_cert and self._options.tls_key:
            pair = Path(self._options.tls_key).read_bytes(), Path(self._options.tls_cert).read_bytes()
            server.add_secure_port(place, grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(place)
        return server

    def _methods(self) -> dict[str, grpc.RpcMethodHandler]:
        served = self._engine.served

        def config(model: str) -> dict[str, Any]:
            values = served.config(model)
            return {**values, "parameters": entries(values["parameters"])}

        extensions = ["binary_tensor_data", "model_configuration"]
        about = {"name": "mio-export", "version": version("mio-export"), "extensions": extensions}
        answers: dict[str, Callable[[Any], dict[str, Any]]] = {
            "ServerLive": lambda _: {"live": True},
            "ServerReady": lambda _: {"ready": self._engine.is_ready},
            "ServerMetadata": lambda _: about,
            "ModelReady": lambda asked: {"ready": bool(served.config(asked.name)) and self._engine.is_ready},
            "ModelMetadata": lambda asked: served.metadata(asked.name),
            "ModelConfig": lambda asked: {"config": config(asked.name)},
        }
        unary = grpc.unary_unary_rpc_method_handler
        return {
            **{name: unary(self._simple(name, answer), **_codec(name, name)) for name, answer in answers.items()},
            # a stream of one request is a request on the wire, and the time to read it can be limited
            "ModelInfer": grpc.stream_unary_rpc_method_handler(self._infer, **_codec("ModelInfer", "ModelInfer")),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._stream, **_codec("ModelInfer", "ModelStreamInfer")
            ),
        }

    def _simple(self, name: str, answer: Callable[[Any], dict[str, Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def handle(request: Any, context: Any) -> Any:
            try:
                if name not in _FREE:
                    self._admit(context)
                if request is None:
                    raise RequestError("invalid", f"the message is no {name}Request")
                return message(f"{name}Response", **answer(request))
            except Exception as error:  # noqa: BLE001 - becomes a status
                await _abort(context, error)

        return handle

    async def _infer(self, requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            return await self._answer(requests, context)
        except Exception as error:  # noqa: BLE001 - becomes a status
            await _abort(context, error)

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            try:
                yield message("ModelStreamInferResponse", infer_response=await self._answer(_only(request), context))
            except Exception as error:  # noqa: BLE001 - becomes the answer to this request
                yield message("ModelStreamInferResponse", error_message=str(_known(error)))
            if self._engine.is_ending:  # whoever sends more is told so by the end of the stream
                await _abort(context, RequestError("not_ready", "the server is ending"))

    async def _answer(self, requests: AsyncIterator[Any], context: Any) -> Any:
        """Answer the next request."""
        self.num_open += 1
        try:
            with self._journal.request(protocol="grpc", model="", client=_peer(context)) as record:
                self._admit(context)
                self._engine.check_room(is_at_door=True)
                request = await self._read(requests)
                model, served = request.model_name, self._engine.served
                record.model = model if model in served.models else ""
                if request.model_version not in ("", VERSION):
                    raise RequestError("not_found", f"there is version {VERSION} of each model")
                vectors, errors = await self._engine.infer(served.images(model, _inputs(request)))
                record.count(errors)
                outputs = outputs_of(vectors, errors, [output.name for output in request.outputs])
        finally:
            self.num_open -= 1
        return message(
            "ModelInferResponse",
            model_name=model,
            model_version=VERSION,
            id=request.id,
            outputs=[{"name": name, "datatype": kind, "shape": shape} for name, kind, shape, _ in outputs],
            raw_output_contents=[content for *_, content in outputs],
        )

    def _admit(self, context: Any) -> None:
        if self.is_refusing:
            raise RequestError("not_ready", "the server is ending", retry_after_s=1)
        sent = dict(context.invocation_metadata() or ()).get("authorization")
        if not self._options.admits(sent if isinstance(sent, str) else None):
            raise RequestError("unauthorized", "send the server's key as metadata 'authorization: Bearer KEY'")

    async def _read(self, requests: AsyncIterator[Any]) -> Any:
        try:
            async with asyncio.timeout(self._options.timeout_s):
                request = await anext(requests)
        except TimeoutError:
            raise RequestError("too_slow", f"the request took more than {self._options.timeout_s:g} s") from None
        except StopAsyncIteration:
            raise RequestError("invalid", "the call holds no request") from None
        if request is None:
            raise RequestError("invalid", "the message is no ModelInferRequest")
        return request


def _inputs(request: Any) -> list[tuple[str, str, list[int], Any]]:
    """Return name, type, shape and content of each input."""
    raw = request.raw_input_contents or [None] * len(request.inputs)
    if len(raw) != len(request.inputs):
        raise RequestError("invalid", f"{len(request.inputs)} inputs have {len(raw)} raw_input_contents")
    inputs = []
    for tensor, content in zip(request.inputs, raw, strict=True):
        if content is None:
            numbers = tensor.contents.uint_contents
            is_files = tensor.datatype == "BYTES"
            content = (
                list(tensor.contents.bytes_contents) if is_files else np.fromiter(numbers, np.uint32, len(numbers))
            )
        inputs.append((tensor.name, tensor.datatype, list(tensor.shape), content))
    return inputs


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request


def _known(error: Exception) -> RequestError:
    """Return what the client is told of an error; of one that nobody expects, nothing."""
    if isinstance(error, RequestError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return RequestError("failed", "the server failed")


async def _abort(context: Any, error: Exception) -> NoReturn:
    known = _known(error)
    later = () if known.retry_after_s is None else (("retry-after", str(round(known.retry_after_s))),)
    await context.abort(grpc.StatusCode[known.code], str(known), later)
    raise AssertionError


def _peer(context: Any) -> str:
    """Return a client's address without its port."""
    return unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")


def _codec(request: str, response: str) -> dict[str, Any]:
    def read(data: bytes) -> Any:
        try:
            return message_class(f"{request}Request").FromString(data)
        except DecodeError:  # where gRPC sees it, it ends the call without a reason
            return None

    return {
        "request_deserializer": read,
        "response_serializer": message_class(f"{response}Response").SerializeToString,
    }


__all__ = ["RpcService"]
