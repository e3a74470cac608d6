"""How a name becomes a key: UTF-8, and told apart from every other name."""


def key_of(name: bytes | str) -> str:
    """Return a name as UTF-8 text, with undecodable bytes and backslashes escaped with a backslash.

    Args:
        name: its bytes, or text whose undecodable bytes are surrogates, as ``os.fsdecode`` gives it.
    """
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


__all__ = ["key_of"]
