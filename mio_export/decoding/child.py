"""The other side of a ``DecodingProcess``: decodes one file at a time, for the process at the other ends of its pipes.

It may be killed at any moment. It ends by itself when the pipe of requests is closed: also in the middle of a file, by
a signal of the kernel, since a decoder that hangs looks at nothing.
"""

import json
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mio_export.decoding.messages import FAILED, NO_MEMORY, NO_MEMORY_STATUS, PIXELS, READY, REPLY, REQUEST
from mio_export.memory import free_bytes, held_bytes
from mio_export.preprocess import DecodeError, Pixels, Preprocess

_BASE_BYTES = 512 << 20
"""What any file may take beside what its own length and size explain: tables, stacks, the allocator's reserves."""
_BYTES_A_PIXEL = 40
"""Where transparency is laid over the background, RGBA is held five times at once; codecs hold two of their own."""
_COPIES = 4
_SLACK_S = 10


def main() -> None:
    """Serve requests until their pipe ends."""
    try:
        _serve()
    except MemoryError:
        sys.exit(NO_MEMORY_STATUS)


def _serve() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _be_silent()
    settings = json.loads(requests.readline())
    values: dict[str, Any] = settings["preprocess"]
    preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    Image.MAX_IMAGE_PIXELS = -(-preprocess.max_pixels // 2)  # Pillow refuses twice as many, inside containers too
    _reply(replies, READY, b"")
    while header := requests.read(REQUEST.size):
        scaled, length = REQUEST.unpack(header)
        data = requests.read(length)
        if len(data) != length:
            return
        with _killed_if_left(requests.fileno(), settings["decode_s"]):
            kind, content = _answer(preprocess, data, scaled=scaled)
        _reply(replies, kind, content)
        del data, content


def _be_silent() -> None:
    """Let no codec write to the pipes, and no warning anywhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGALRM, signal.SIGIO, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that started this process may have blocked them
    with suppress(OSError):  # when memory ends, rather this process than the one that has the work
        Path("/proc/self/oom_score_adj").write_text("500")


def _reply(replies: BinaryIO, kind: bytes, content: bytes) -> None:
    replies.write(REPLY.pack(kind, len(content)) + content)
    replies.flush()


def _answer(preprocess: Preprocess, data: bytes, *, scaled: bool) -> tuple[bytes, bytes]:
    allowed = _allowed_bytes(data, preprocess.max_pixels)
    try:
        with _memory(allowed), preprocess.opened(data, scaled=scaled) as image:
            allowed = _allowed_bytes(data, image.width * image.height)
            with _memory(allowed):
                pixels: Pixels = preprocess.pixels(image)
        return PIXELS, pixels.tobytes()
    except DecodeError as error:
        return FAILED, str(error).encode(errors="backslashreplace")
    except MemoryError:
        pass  # what the failed call holds is free after this block
    return _out_of_memory(allowed)


def _out_of_memory(allowed: int) -> tuple[bytes, bytes]:
    """Say whose fault it is that a file could not have so many bytes of memory."""
    free = free_bytes()
    if free is not None and free < allowed:
        reason = f"decoding it may take {allowed >> 20:,} MiB of memory, and {free >> 20:,} MiB are free"
        return NO_MEMORY, reason.encode()
    return FAILED, f"decoding takes more memory than an image of its size needs ({allowed >> 20:,} MiB)".encode()


def _allowed_bytes(data: bytes, num_pixels: int) -> int:
    """Return how much memory a file may take: what it says of its size explains more than any honest decoder needs."""
    return _BASE_BYTES + _COPIES * len(data) + _BYTES_A_PIXEL * num_pixels


@contextmanager
def _memory(allowed: int) -> Iterator[None]:
    """Let the process take so many bytes more than it has, where the system can hold it to that."""
    try:
        import resource

        held = held_bytes()
        before = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        yield
        return
    limits = [held + allowed, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _killed_if_left(requests: int, decode_s: float) -> Iterator[None]:
    """Die if nobody waits for the reply: the pipe of requests is closed, or the time limit is long past."""
    import fcntl

    flags = fcntl.fcntl(requests, fcntl.F_GETFL)
    fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC)
    signal.setitimer(signal.ITIMER_REAL, decode_s + _SLACK_S)
    try:
        if select.select([requests], [], [], 0)[0]:
            sys.exit()  # closed before the signal was asked for; there is no next request before this one's reply
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        fcntl.fcntl(requests, fcntl.F_SETFL, flags)


__all__ = ["main"]
