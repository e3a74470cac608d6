"""Clients that see what became of each request: an answer, a refusal, or a connection that was cut."""

import asyncio
import re
import time
from dataclasses import dataclass, field

import grpc
import numpy as np
import numpy.typing as npt
from attacks import file_tensor, post, tensor

from mio_export.serving.messages import SERVICE, message, message_class
from mio_export.serving.protocol import pack, split, unpack

Vector = npt.NDArray[np.float32]
PATIENCE_S = 90.0
PAUSE_S = 0.1
"""After a request that nobody took or that a server refused because it ends, as ``RemoteEncoder`` pauses."""
_HTTP = {"200": "ok", "429": "busy", "503": "not ready"}
_GRPC = {"RESOURCE_EXHAUSTED": "busy", "DEADLINE_EXCEEDED": "timed out", "UNAVAILABLE": "not ready"}


@dataclass
class Item:
    """One image, as both protocols ask for it."""

    model: str
    image: bytes
    http: bytes = field(repr=False)
    grpc: bytes = field(repr=False)
    expected: Vector | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a request: ``ok``, ``failed`` with a reason, ``busy``, ``timed out``, ``not ready``, ``cut``.

    ``unreachable``: nobody took the connection; then nothing was sent.
    """

    status: str
    seconds: float
    vector: Vector | None = None
    reason: str = ""
    retry_after: bool = False


def items_of(models: dict[str, str], files: list[bytes], *, side: int) -> list[Item]:
    """Return files and pixels in turn."""
    rng, items = np.random.default_rng(0), []
    for file in files:
        pixels = rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8).tobytes()
        shape = (1, side, side, 3)
        pixel_body = tensor(pixels, datatype="UINT8", shape=shape)
        for kind, image, body, datatype, extents, raw in (
            ("files", file, file_tensor(file), "BYTES", (1, 1), pack([file])),
            ("pixels", pixels, pixel_body, "UINT8", shape, pixels),
        ):
            inputs = [{"name": "images", "datatype": datatype, "shape": extents}]
            asked = message("ModelInferRequest", model_name=models[kind], inputs=inputs, raw_input_contents=[raw])
            http = post(f"/v2/models/{models[kind]}/infer", body)
            items.append(Item(models[kind], image, http, asked.SerializeToString()))
    return items


class HttpClient:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._port, self._writer = port, None

    async def ask(self, item: Item) -> Answer:
        """Ask, and wait for what becomes of it."""
        start = time.perf_counter()
        if self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(PAUSE_S)
                return Answer("unreachable", time.perf_counter() - start)
        try:
            async with asyncio.timeout(PATIENCE_S):
                self._writer.write(item.http)
                await self._writer.drain()
                head = await self._reader.readuntil(b"\r\n\r\n")
                headers = dict(re.findall(r"\n([a-z-]+): *([^\r]*)", head.decode().lower()))
                body = await self._reader.readexactly(int(headers["content-length"]))
        except (OSError, EOFError, TimeoutError) as error:
            await self.close()
            return Answer("cut", time.perf_counter() - start, reason=repr(error))
        seconds = time.perf_counter() - start
        if headers.get("connection") == "close":
            await self.close()
        status = _HTTP.get(head.split()[1].decode(), "failed")
        if status != "ok":
            if b"waited for more" in body:
                status = "timed out"
            return Answer(status, seconds, reason=body[:200].decode(), retry_after="retry-after" in headers)
        length = int(headers["inference-header-content-length"])
        outputs = {each["name"]: bytes(each["data"]) for each in split(body, length, "outputs")["outputs"]}
        return _answer(outputs["embedding"], outputs["error"], seconds)

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class GrpcClient:
    """One channel, which is connected again as gRPC does it; a request is sent once."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
        options += [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [*options, ("grpc.enable_retries", 0)])
        self._infer = self._channel.unary_unary(f"/{SERVICE}/ModelInfer")

    async def ask(self, item: Item) -> Answer:
        """Ask, and wait for what becomes of it."""
        start = time.perf_counter()
        try:
            data = await self._infer(item.grpc, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            seconds, reason = time.perf_counter() - start, str(error.details())
            status = _GRPC.get(error.code().name, "failed")
            if status == "not ready" and "server" not in reason:  # said by gRPC itself
                status = "unreachable" if "onnection refused" in reason else "cut"
            later = "retry-after" in dict(error.trailing_metadata() or ())
            await asyncio.sleep(PAUSE_S if status in ("unreachable", "not ready") else 0)
            return Answer(status, seconds, reason=reason, retry_after=later)
        answer = message_class("ModelInferResponse").FromString(data)
        return _answer(*answer.raw_output_contents, time.perf_counter() - start)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _answer(embedding: bytes, errors: bytes, seconds: float) -> Answer:
    (reason,) = unpack(errors)
    vector = np.frombuffer(embedding, "<f4")
    return Answer("failed" if reason else "ok", seconds, vector=vector, reason=reason.decode())


__all__ = ["Answer", "GrpcClient", "HttpClient", "Item", "items_of"]
