"""How a name becomes a key: UTF-8, and told apart from every other name."""


def key_of(name: bytes | str) -> str:
    """Return a name as UTF-8 text, with undecodable bytes and backslashes escaped with a backslash.

    Args:
        name: its bytes, or text whose undecodable bytes are surrogates, as ``os.fsdecode`` gives it.
    """
    raw = _bytes(name) if isinstance(name, str) else name
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte, as JSON can hold it
        return name.encode("utf-8", "surrogatepass")


__all__ = ["key_of"]
