"""What a ``DecodingProcess`` and its other side say to each other, after a line of JSON with the settings."""

import struct

REQUEST = struct.Struct(">?Q")
"""Whether a large JPEG is decoded at a fraction of its size, and the length of the file that follows."""
REPLY = struct.Struct(">cQ")
"""One of the kinds below, and the length of what follows."""
READY = b"r"
"""The other side has started; nothing follows."""
PIXELS = b"p"
"""uint8, (H, W, C) of the contract."""
FAILED = b"f"
"""Why the file cannot be decoded, as text."""
NO_MEMORY = b"m"
"""There is not enough memory, which is not the file's fault; the reason, as text."""
NO_MEMORY_STATUS = 12
"""Exit status of the other side where there is not enough memory even for a reply."""

__all__ = ["FAILED", "NO_MEMORY", "NO_MEMORY_STATUS", "PIXELS", "READY", "REPLY", "REQUEST"]
