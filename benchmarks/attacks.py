"""Malformed requests, each of which a server has to answer for itself; sent by a process of its own."""

import io
import json
import multiprocessing
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from mio_export.serving.protocol import split, unpack

THREADS = 32
PATIENCE_S = 60.0
"""Beyond it a server has left a connection hanging."""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{ } loop\nshowpage\n%%EOF\n"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a malformed request."""

    kind: str
    status: int | None
    """Of the answer; None: the server closed the connection without one."""
    text: str
    """What the server said."""
    seconds: float

    def problem(self) -> str | None:
        """Return why this is not as it should be: nothing said, said as its own fault, or taken as good."""
        if self.status == -1:
            return f"{self.kind}: {self.text}"
        if self.status is None:  # closed: nothing more was to be had
            return None if self.kind in _MAY_BE_CLOSED else f"{self.kind}: closed without an answer"
        if self.status == 200:
            return None if self.text else f"{self.kind}: taken as good"
        return None if 400 <= self.status < 500 and self.status != 429 else f"{self.kind}: {self.status} {self.text}"


_MAY_BE_CLOSED = ("slow header", "slow body", "half-closed", "long header", "negative length", "endless chunks")


def tensor(data: bytes, *, datatype: str = "BYTES", shape: tuple[int, ...] = (1, 1), binary: bool = True) -> bytes:
    """Return the body of a request for inference, after a line with the length of its JSON."""
    size = {"binary_data_size": len(data)} if binary else {}
    document = {
        "inputs": [{"name": "images", "datatype": datatype, "shape": shape, "parameters": size}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    return b"%d\n" % len(head) + head + data


def file_tensor(*files: bytes) -> bytes:
    """Return the body of a request for the embeddings of files."""
    return tensor(b"".join(struct.pack("<I", len(file)) + file for file in files), shape=(len(files), 1))


def post(path: str, body: bytes, **headers: str | int) -> bytes:
    """Return a whole request in HTTP of what ``tensor`` returns."""
    length, _, rest = body.partition(b"\n")
    named = {"Host": "localhost", "Inference-Header-Content-Length": length.decode(), "Content-Length": len(rest)}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return b"\r\n".join([f"POST {path} HTTP/1.1".encode(), *_lines(named), b"", rest])


def png_bomb() -> bytes:
    """Return a small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


def icon_bomb(side: int = 13_000) -> bytes:
    """Return an icon that says it is small, and holds a large PNG."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 + 4 * side)) for _ in range(side)) + packer.flush()
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    png += _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def attacks(name: str, photo: bytes, max_batch: int) -> dict[str, Callable[[], Iterator[bytes | float | None]]]:
    """Return what each kind of malformed request sends: bytes, pauses in seconds, None for the end of sending."""
    path = f"/v2/models/{name}/infer"
    pixels = path.replace("/infer", "_pixels/infer")
    files = {
        "empty file": b"",
        "cut JPEG": photo[: len(photo) // 3],
        "PNG of 81 million pixels": png_bomb(),
        "text": b"no image at all\n" * 100,
        "endless PostScript": EPS,
        "icon of 169 million pixels": icon_bomb(),
        "file of 33 MB": photo + bytes(33_000_000 - len(photo)),
    }
    whole = {kind: post(path, file_tensor(file)) for kind, file in files.items()}
    whole |= {
        "wrong type": post(path, tensor(bytes(4), datatype="FP32")),
        "wrong shape": post(pixels, tensor(bytes(27), datatype="UINT8", shape=(1, 3, 3, 3))),
        "too many images": post(path, file_tensor(*[photo] * (max_batch + 1))),
        "no tensor": post(path, tensor(b"\xff" * 1000)),
        "negative length": post(path, file_tensor(photo), Content_Length=-5),
        "long header": post(path, file_tensor(photo), X_Long="x" * (1 << 20)),
        "deep JSON": post(path, b"1000000\n" + b"[" * 1_000_000),
        "no JSON": post(path, b"4\n\xff\xfe\xfd\xfc"),
    }
    head = {"Host": "localhost", "Inference-Header-Content-Length": 10, "Transfer-Encoding": "chunked"}
    start = b"\r\n".join([f"POST {path} HTTP/1.1".encode(), *_lines(head), b"", b""])
    good = post(path, file_tensor(photo))

    def once(request: bytes) -> Callable[[], Iterator[bytes | float | None]]:
        return lambda: iter((request,))

    def slowly(data: bytes) -> Iterator[bytes | float | None]:
        for place in range(len(data)):
            yield data[place : place + 1]
            yield 0.25

    def endless() -> Iterator[bytes | float | None]:
        yield start
        for _ in range(100):
            yield b"1\r\nx\r\n" * 10_000
        yield b"0\r\n\r\n"

    def half() -> Iterator[bytes | float | None]:
        yield good[: len(good) // 2]
        yield None

    def slow_body() -> Iterator[bytes | float | None]:
        yield good[:1000]
        yield from slowly(good[1000:])

    return {kind: once(request) for kind, request in whole.items()} | {
        "endless chunks": endless,
        "slow header": lambda: slowly(good),
        "slow body": slow_body,
        "half-closed": half,
    }


def send(kind: str, parts: Iterator[bytes | float | None], port: int) -> Outcome:
    """Send a malformed request, and wait for what the server makes of it."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        received = b""
        try:
            for part in parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                elif part is None:
                    connection.shutdown(socket.SHUT_WR)
                else:
                    connection.settimeout(part)
                    try:
                        received = connection.recv(1 << 16)
                        break  # an answer, or the end
                    except TimeoutError:
                        connection.settimeout(PATIENCE_S)
                if time.monotonic() - begin > PATIENCE_S:
                    return Outcome(kind=kind, status=-1, text="the server waits for ever", seconds=PATIENCE_S)
        except OSError:  # the server has closed its side, maybe after an answer
            pass
        try:
            connection.settimeout(PATIENCE_S)
            while not _is_whole(received) and (more := connection.recv(1 << 16)):
                received += more
        except TimeoutError:
            return Outcome(kind=kind, status=-1, text="the server does not answer", seconds=time.monotonic() - begin)
        except OSError:
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head else None
    text = body.decode(errors="replace")[:200]
    if status == 200:  # then each image has a reason of its own
        length = re.search(rb"inference-header-content-length: *(\d+)", head.lower())
        outputs = {each["name"]: each["data"] for each in split(body, int(length[1]), "outputs")["outputs"]}
        text = b"; ".join(unpack(outputs["error"])).decode()
    return Outcome(kind=kind, status=status, text=text, seconds=time.monotonic() - begin)


class Attacker:
    """The process that sends them; a context manager."""

    def __init__(self, name: str, port: int, photo: bytes, max_batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, name, port, photo, max_batch), daemon=True)
        self._process.start()
        self.kinds: list[str] = self._pipe.recv()

    def start(self, kind: str) -> None:
        """Send one; this returns at once."""
        self._pipe.send(kind)

    def end(self) -> list[Outcome]:
        """Wait for all, and return what became of them."""
        self._pipe.send(None)
        return list(self._pipe.recv())

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()


def _work(pipe: "multiprocessing.connection.Connection", name: str, port: int, photo: bytes, max_batch: int) -> None:
    kinds = attacks(name, photo, max_batch)
    pipe.send(list(kinds))
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(send, kind, kinds[kind](), port) for kind in iter(pipe.recv, None)]
        pipe.send([future.result() for future in futures])


def _lines(headers: dict[str, str | int]) -> list[bytes]:
    return [f"{name}: {value}".encode() for name, value in headers.items()]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _is_whole(received: bytes) -> bool:
    head, ends, body = received.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(ends) and len(body) >= (lengths[0] if lengths else 1 << 60)
