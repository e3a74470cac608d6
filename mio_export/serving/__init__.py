"""An encoder behind a server: the server, its client, and the proof that a live one is right.

Each name is imported when it is first used, so that a process of the server loads only what it needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mio_export.serving.client import RemoteEncoder
    from mio_export.serving.options import ServeOptions
    from mio_export.serving.server import Server
    from mio_export.serving.triton import Deployment, write_repository
    from mio_export.serving.verification import verify_server

__all__ = ["Deployment", "RemoteEncoder", "ServeOptions", "Server", "verify_server", "write_repository"]

_HOMES = {
    "Deployment": "mio_export.serving.triton",
    "RemoteEncoder": "mio_export.serving.client",
    "ServeOptions": "mio_export.serving.options",
    "Server": "mio_export.serving.server",
    "verify_server": "mio_export.serving.verification",
    "write_repository": "mio_export.serving.triton",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mio_export.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
