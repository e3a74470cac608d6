"""What a server is told, by its user and by the process that starts its workers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mio_export.bundle import Bundle
from mio_export.errors import UsageError
from mio_export.runtimes import Choice

SETTINGS = "settings.json"
JPEG = "_jpeg"
"""What the name of the model that takes encoded images ends with."""
DECODE = "_decode"
"""The same of its first half, which gives pixels."""

BUSY = "mio_busy_workers"
"""Metric: the workers that compute now."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, what it runs, and how much it takes."""

    runtime: str = "auto"
    """``auto``: the fastest proved artifact, measured now; or a name in ``runtimes.BACKENDS``."""
    precision: str = "auto"
    """``auto``: fp32; or another that the bundle has proved."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, or ``tensorrt`` of ONNX Runtime."""
    host: str = "127.0.0.1"
    """Address to listen at; everything but the loopback is open to whoever reaches it."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    max_batch: int | None = None
    """Most images in a request and in a batch; None: the largest batch that the artifact was proved at."""
    max_image_bytes: int = 32_000_000
    """Longest encoded image, in bytes."""
    max_pixels: int = 50_000_000
    """Most pixels of an encoded image, if the bundle's own contract is not stricter."""
    timeout_s: float = 30.0
    """How long open requests are waited for when the server ends."""

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise UsageError(f"{name} must be 1 to 65535, got {getattr(self, name)}")
        if len({self.http_port, self.grpc_port, self.metrics_port}) < 3:
            raise UsageError("the ports for HTTP, gRPC and metrics must be three different ones")
        for name in ("max_image_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0.1 <= self.timeout_s <= 3600:
            raise UsageError(f"timeout_s must be 0.1 to 3600, got {self.timeout_s}")

    def batch_for(self, bundle: Bundle) -> int:
        """Return the most images in a batch.

        Raises:
            UsageError: nobody proved the bundle at so many.
        """
        proved = bundle.manifest.max_batch
        if self.max_batch is not None and not 1 <= self.max_batch <= proved:
            raise UsageError(f"max_batch must be 1 to {proved}, the largest batch proved; got {self.max_batch}")
        return self.max_batch or proved


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker reads when it starts: written beside its model, never shown to a client."""

    bundle: str
    """Absolute path."""
    choice: Choice
    max_batch: int
    max_image_bytes: int
    max_pixels: int

    def save(self, folder: Path) -> None:
        """Write the settings into a model's version folder."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, arguments: Mapping[str, str]) -> "WorkerSettings":
        """Read what ``save`` wrote; ``arguments`` are those that Triton gives to a model."""
        path = Path(arguments["model_repository"]) / arguments["model_version"] / SETTINGS
        values = json.loads(path.read_text())
        return cls(**{**values, "choice": Choice(**values["choice"])})


__all__ = ["BUSY", "DECODE", "JPEG", "SETTINGS", "ServeOptions", "WorkerSettings"]
