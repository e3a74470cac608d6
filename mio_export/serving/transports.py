"""How a client asks a server: over HTTP or gRPC. What fails is a ``RequestError``; every answer is bounded."""

import json
import ssl
import time
from collections.abc import Mapping
from typing import Any

from mio_export.serving.messages import SERVICE, message_class
from mio_export.serving.protocol import HEADER_LENGTH, IMAGES, OUTCOMES, RequestError, join, split

MOST_BYTES = 64 << 20
"""Longest answer that is read."""
_OUTCOMES: Mapping[Any, str] = {key: name for name, keys in reversed(OUTCOMES.items()) for key in keys}
Tensors = Mapping[str, tuple[str, list[int], Any]]
"""Type, shape and binary form of each output, by name."""


class HttpTransport:
    """The protocol over HTTP; with TLS if there is a context."""

    def __init__(self, place: str, key: str | None, context: ssl.SSLContext | None, timeout_s: float) -> None:
        import urllib3

        self._pool = urllib3.PoolManager(ssl_context=context)
        self._url = f"{'https' if context else 'http'}://{place}/v2/models/"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s
        self.close = self._pool.clear

    def config(self, model: str) -> Any:
        """Return a model's configuration, whatever it is."""
        return json.loads(self._answer("GET", f"{model}/config", b"", {})[0])

    def infer(self, model: str, datatype: str, shape: list[int], data: bytes) -> Tensors:
        """Send a tensor; ``ValueError``, ``KeyError`` and ``TypeError`` say that the answer is not of the protocol."""
        tensor = {"name": IMAGES, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        body, length = join({"inputs": [tensor], "parameters": {"binary_data_output": True}}, [data])
        answer, headers = self._answer("POST", f"{model}/infer", body, {HEADER_LENGTH: str(length)})
        outputs = split(answer, int(headers.get(HEADER_LENGTH, len(answer))), "outputs")["outputs"]
        return {output["name"]: (output["datatype"], output["shape"], output["data"]) for output in outputs}

    def _answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, Mapping[str, str]]:
        from urllib3.exceptions import HTTPError, SSLError

        end, content = time.monotonic() + self._timeout_s, bytearray()
        options: Any = {"retries": False, "preload_content": False, "timeout": self._timeout_s}
        options |= {"body": body, "headers": {**self._headers, **headers}}
        try:
            with self._pool.request(method, self._url + path, **options) as response:
                while part := response.read1(1 << 20, decode_content=False):
                    content += part
                    if len(content) > MOST_BYTES or time.monotonic() > end:
                        raise RequestError("failed", "the answer is too long, or took too long")
        except SSLError as error:
            raise RequestError("failed", str(error)) from None
        except (HTTPError, OSError) as error:  # refused, reset, timed out
            raise RequestError("not_ready", str(error)) from None
        if response.status == 200:
            return bytes(content), response.headers
        try:
            reason = str(json.loads(content)["error"])
        except (ValueError, TypeError, KeyError, RecursionError):
            reason = f"HTTP status {response.status}"
            if response.status >= 500 or (method, response.status) == ("POST", 404):  # of a proxy without its server
                raise RequestError("not_ready", reason) from None
        raise _refusal(response.status, reason, response.headers.get("Retry-After"))


class GrpcTransport:
    """The protocol over gRPC; ``pem`` are the certificates that are trusted with TLS, if not gRPC's own."""

    def __init__(self, place: str, key: str | None, pem: bytes | None, timeout_s: float, *, tls: bool) -> None:
        import grpc

        options = [
            ("grpc.max_receive_message_length", MOST_BYTES),
            ("grpc.enable_http_proxy", 0),  # as urllib3
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that every worker gets clients
            ("grpc.initial_reconnect_backoff_ms", 100),
        ]
        if tls:
            self._channel = grpc.secure_channel(place, grpc.ssl_channel_credentials(pem), options)
        else:
            self._channel = grpc.insecure_channel(place, options)
        self._metadata = [("authorization", f"Bearer {key}")] if key else []
        self._timeout_s = timeout_s
        self.close = self._channel.close

    def config(self, model: str) -> Any:
        """Return the parts of a model's configuration that the protocol names, as JSON has them."""
        config = self._answer("ModelConfig", name=model).config
        tensors = {
            kind: [{"name": t.name, "data_type": t.data_type, "dims": [*t.dims]} for t in getattr(config, kind)]
            for kind in ("input", "output")
        }
        parameters = {entry.key: {"string_value": entry.value.string_value} for entry in config.parameters}
        return {"max_batch_size": config.max_batch_size, "parameters": parameters, **tensors}

    def infer(self, model: str, datatype: str, shape: list[int], data: bytes) -> Tensors:
        """Send a tensor; a ``ValueError`` says that the answer is not of the protocol."""
        tensor = {"name": IMAGES, "datatype": datatype, "shape": shape}
        answer = self._answer("ModelInfer", model_name=model, inputs=[tensor], raw_input_contents=[data])
        outputs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        return {output.name: (output.datatype, [*output.shape], raw) for output, raw in outputs}

    def _answer(self, method: str, **fields: Any) -> Any:
        import grpc

        request, response = (message_class(f"{method}{kind}") for kind in ("Request", "Response"))
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return call(request(**fields), timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            hints = [value for name, value in error.trailing_metadata() or () if name == "retry-after"]
            raise _refusal(error.code().name, error.details() or "", hints[0] if hints else None) from None


def _refusal(status: int | str, reason: str, hint: str | None) -> RequestError:
    outcome = "not_found" if "unknown model" in reason else _OUTCOMES.get(status, "failed")  # Triton says 400 then
    pause_s = float(hint) if hint and hint.isascii() and hint.isdecimal() else None
    return RequestError(outcome, reason or str(status), retry_after_s=pause_s)


__all__ = ["MOST_BYTES", "GrpcTransport", "HttpTransport", "Tensors"]
