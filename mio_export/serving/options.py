"""What a server is told."""

import hmac
import math
import re
from dataclasses import dataclass

from mio_export.bundle import Bundle
from mio_export.errors import UsageError
from mio_export.limits import Limits

_MIN_BODY_BYTES = 64 << 20
_HEADER_BYTES = 1 << 20
_HOST = re.compile(r"[\w.-]+|[0-9a-fA-F.]*:[0-9a-fA-F.:]*:[0-9a-fA-F.:]*")
_RANGES = {
    "workers": (1, 256),
    "http_port": (1, 65535),
    "grpc_port": (1, 65535),
    "max_queue": (1, 1_000_000),
    "max_wait_s": (0.01, 3600),
    "timeout_s": (0.1, 3600),
}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, what it runs, and how much it takes.

    Raises:
        UsageError: a value is not allowed.
    """

    runtime: str = "auto"
    """``auto``: the fastest proved artifact, measured now; or a name in ``runtimes.BACKENDS``."""
    precision: str = "auto"
    """``auto``: fp32; or another that the bundle has proved."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, or ``tensorrt`` of ONNX Runtime."""
    decode: str = "full"
    """``full``, or ``scaled``: large JPEGs at a fraction of their size, as the store that is searched."""
    host: str = "127.0.0.1"
    """Address to listen at; everything but the loopback is open to whoever reaches it."""
    http_port: int = 8000
    grpc_port: int = 8001
    workers: int = 1
    """Processes, each with a runtime of its own."""
    max_batch: int | None = None
    """Most images in a request and in a batch; None: the largest batch that the artifact was proved at."""
    max_body_bytes: int | None = None
    """Longest request; None: 64 MiB, or what the largest request of pixels needs if that is more."""
    max_file_bytes: int = 32_000_000
    """Longest encoded image, in bytes."""
    max_pixels: int = 50_000_000
    """Most pixels of an encoded image, if the bundle's own contract is not stricter."""
    max_decode_s: float = 10.0
    """Longest time to decode an image, in seconds."""
    max_queue: int = 1024
    """Most images that are taken and not yet answered, in each worker."""
    max_wait_s: float = 10.0
    """A request that would wait longer is refused at once; one that has waited longer, then."""
    timeout_s: float = 30.0
    """Longest time to receive a request; and how long open ones are waited for at the end."""
    api_key: str | None = None
    """What clients must send; None: nobody is asked."""
    tls_cert: str | None = None
    """PEM file of the certificate and its chain; needs ``tls_key``."""
    tls_key: str | None = None
    allow_url_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from, for ``/v1/embeddings``."""
    access_log: bool = True
    """Write a JSON line for each request to standard output."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                option = "--" + re.sub("_s$", "_seconds", name).replace("_", "-")
                raise UsageError(f"{option} must be {least} to {most}, got {getattr(self, name)}")
        if self.http_port == self.grpc_port:
            raise UsageError(f"the ports for HTTP and gRPC must differ, got {self.http_port} for both")
        if self.max_body_bytes is not None and self.max_body_bytes < 1:
            raise UsageError(f"max_body_bytes must be 1 or more, got {self.max_body_bytes}")
        if self.decode not in ("full", "scaled"):
            raise UsageError(f"decode must be full or scaled, got {self.decode!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("TLS needs both --tls-cert and --tls-key")
        if wrong := [host for host in self.allow_url_hosts if not _HOST.fullmatch(host)]:
            raise UsageError(f"--allow-url-host takes a host's name alone, without port; got {wrong[0]!r}")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise UsageError("the API key must be printable ASCII without spaces at its ends, and not empty")
        Limits(max_file_bytes=self.max_file_bytes, max_pixels=self.max_pixels, decode_s=self.max_decode_s)

    def admits(self, authorization: str | None) -> bool:
        """Whether a client may ask, by what it sent as ``Authorization``."""
        if self.api_key is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else authorization or ""
        return hmac.compare_digest(given.encode(), self.api_key.encode())

    def batch_for(self, bundle: Bundle) -> int:
        """Return the most images in a request and in a batch.

        Raises:
            UsageError: nobody proved the bundle at so many.
        """
        proved = bundle.manifest.max_batch
        if self.max_batch is not None and not 1 <= self.max_batch <= proved:
            raise UsageError(f"max_batch must be 1 to {proved}, the largest batch proved; got {self.max_batch}")
        return self.max_batch or proved

    def body_bytes_for(self, bundle: Bundle) -> int:
        """Return the longest request, in bytes."""
        pixels = self.batch_for(bundle) * math.prod(bundle.manifest.preprocess.shape)
        return self.max_body_bytes or max(_MIN_BODY_BYTES, pixels + _HEADER_BYTES)

    def limits_for(self, bundle: Bundle) -> Limits:
        """Return what one image may cost."""
        most = min(self.max_pixels, bundle.manifest.preprocess.max_pixels)
        return Limits(max_file_bytes=self.max_file_bytes, max_pixels=most, decode_s=self.max_decode_s)


__all__ = ["ServeOptions"]
