"""Text on its way to a terminal: nothing in it steers the terminal, and every encoding can write it."""

import io
import json
import os
import re
import select
import sys
from typing import Any

# C0, DEL and C1; direction marks, embeddings, overrides and isolates; line separators, invisible operators, byte order
# mark, annotations and tags; surrogates that stand alone
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    r"""Return text as one line that a terminal shows and does not obey.

    Control characters, line breaks among them, become ``\n``, ``\x1b``, ``\u202e`` and so on; so do characters that
    change the direction of the text or are invisible. A byte of a path that is not UTF-8 becomes ``\xff``, as in a
    store's keys. Everything else stays as it is.
    """
    return _STEERING.sub(lambda found: _escaped(found[0]), text)


def printable_lines(text: str) -> str:
    """Return text of several lines, each of them printable; those after the first are indented if they are not yet.

    So no name with a line break in it can pass for a line of the program's own.
    """
    first, *others = text.split("\n")
    indented = [line if not line or line.startswith(" ") else f"     {line}" for line in others]
    return "\n".join(map(printable, [first, *indented]))


def json_text(values: Any, *, indent: int | None = None) -> str:
    """Return JSON in ASCII, every control character in it escaped; what JSON does not know is written as text."""
    return json.dumps(values, indent=indent, default=str).replace("\x7f", "\\u007f")


def tolerate_encodings() -> None:
    """Let standard output and error write backslash escapes for what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more, as behind ``| head``."""
    return any(_is_broken(descriptor) for descriptor in (1, 2))


def discard_output() -> None:
    """Send to nowhere what standard output and error still hold: at the end of the program it would be tried again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if _is_broken(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        code -= 0xDC00
    short = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _NAMED.get(character, short)


def _is_broken(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


__all__ = ["discard_output", "json_text", "printable", "printable_lines", "reader_is_gone", "tolerate_encodings"]
