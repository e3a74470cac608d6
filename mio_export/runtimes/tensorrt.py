"""Engines of TensorRT and of TensorRT for RTX, on the GPU that they were built for."""

import ctypes
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mio_export.bundle.sidecar import Library, Sidecar, read_sidecar
from mio_export.errors import GateError, MioError, MissingBackendError, UsageError
from mio_export.files import sha256_file
from mio_export.preprocess import Pixels
from mio_export.runtimes.backends import BACKENDS
from mio_export.runtimes.base import Embeddings, Runtime

NAMES: dict[Library, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


class TensorRTRuntime(Runtime):
    """One engine and its execution context; inputs and outputs are torch tensors on the GPU."""

    def __init__(
        self,
        engine: Any,
        context: Any,
        *,
        sidecar: Sidecar,
        image_shape: tuple[int, int, int],
        embedding_dim: int,
        device: str,
    ) -> None:
        super().__init__(image_shape=image_shape, embedding_dim=embedding_dim, device=device)
        self._engine = engine
        self._context = context
        self._profile = sidecar.profile

    def _run(self, images: Pixels) -> Embeddings:
        import torch

        smallest, largest = self._profile.min, self._profile.max
        if not smallest <= len(images) <= largest:
            raise UsageError(
                f"this engine takes {smallest} to {largest} images at once, got {len(images)};"
                " embed smaller batches, or export with a larger max_batch"
            )
        pixels = torch.from_numpy(images).to(self.device)
        embeddings = torch.empty((len(images), self.embedding_dim), dtype=torch.float32, device=self.device)
        source, target = (self._engine.get_tensor_name(index) for index in range(2))
        accepted = (
            self._context.set_input_shape(source, tuple(images.shape))
            and self._context.set_tensor_address(source, pixels.data_ptr())
            and self._context.set_tensor_address(target, embeddings.data_ptr())
            and self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        )
        if not accepted:
            raise MioError(f"the engine refused a batch of shape {images.shape}; see: mio doctor")
        result: Embeddings = embeddings.cpu().numpy()  # waits for the stream
        return result

    def close(self) -> None:
        """Drop the context, the engine and their memory, in this order."""
        self._context = None
        self._engine = None


def open_tensorrt(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> TensorRTRuntime:
    """Load an engine of TensorRT; there are no options.

    Raises:
        GateError: the engine is not the one that its sidecar describes, or does not load.
        MissingBackendError: the library or the GPU that it was built for is not here.
        UsageError: the device is not ``cuda``.
    """
    del options
    return _open("tensorrt", artifact, image_shape, embedding_dim, device)


def open_tensorrt_rtx(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> TensorRTRuntime:
    """Load an engine of TensorRT for RTX, which has no options.

    Its kernels are compiled for this GPU now, which takes seconds.

    Raises:
        GateError: the engine is not the one that its sidecar describes, or does not load.
        MissingBackendError: the library or the GPU that it was built for is not here.
        UsageError: the device is not ``cuda``.
    """
    del options
    return _open("tensorrt-rtx", artifact, image_shape, embedding_dim, device)


def compute_capability() -> str | None:
    """Return the compute capability of the first visible GPU, such as ``8.6``; asks the driver, without torch.

    None where there is no driver or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
    return f"{major.value}.{minor.value}"


def load_library(library: Library) -> Any:
    """Import TensorRT or TensorRT for RTX, which have the same Python interface.

    Raises:
        MissingBackendError: it is not installed.
    """
    try:
        return importlib.import_module(BACKENDS[library].module)
    except ImportError:
        raise MissingBackendError(f"{NAMES[library]} is not installed: {BACKENDS[library].install}") from None


def collecting_logger(trt: Any, errors: list[str]) -> Any:
    """Return a logger for ``trt`` that adds errors to ``errors`` and prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(msg.split()))

    return Collector()


def _open(
    library: Library, artifact: Path, image_shape: tuple[int, int, int], embedding_dim: int, device: str
) -> TensorRTRuntime:
    sidecar = read_sidecar(artifact)
    _check_engine(artifact, sidecar, library)
    _check_machine(artifact, sidecar)
    if device != "cuda":
        raise UsageError(f"{NAMES[library]} runs on cuda, got {device!r}")
    trt = load_library(library)
    errors: list[str] = []
    runtime = trt.Runtime(collecting_logger(trt, errors))
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = False  # an engine may carry plugin libraries, which would run here
    engine = runtime.deserialize_cuda_engine(artifact.read_bytes())
    context = engine.create_execution_context() if engine else None
    if context is None:
        reason = "; ".join(errors)[:300] or "it gives no reason"
        raise GateError(f"{artifact} does not load in {NAMES[library]}: {reason}")
    _check_tensors(trt, engine, artifact, image_shape, embedding_dim)
    return TensorRTRuntime(
        engine, context, sidecar=sidecar, image_shape=image_shape, embedding_dim=embedding_dim, device=device
    )


def _check_engine(artifact: Path, sidecar: Sidecar, library: Library) -> None:
    if sidecar.library != library:
        raise GateError(f"{artifact} is an engine of {NAMES[sidecar.library]}, not of {NAMES[library]}")
    if (found := sha256_file(artifact)) != sidecar.engine_sha256:
        raise GateError(
            f"{artifact} is not the engine that its sidecar describes (its sha256 is {found[:12]}…, "
            f"expected {sidecar.engine_sha256[:12]}…); export it again"
        )


def _check_machine(artifact: Path, sidecar: Sidecar) -> None:
    """Refuse an engine that cannot run here, without importing its library.

    NVIDIA: an engine of TensorRT for RTX fits no other release of it, nor by default one of TensorRT
    (https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html).
    """
    name = NAMES[sidecar.library]
    installed = BACKENDS[sidecar.library].version
    if installed not in (None, sidecar.library_version):
        raise MissingBackendError(
            f"{artifact} was built by {name} {sidecar.library_version} and runs in no other version; "
            f"{installed} is installed: install {sidecar.library_version}, or export it again"
        )
    if (found := compute_capability()) != sidecar.capability:
        here = f"that of the GPU here is {found}" if found else "no NVIDIA GPU is visible here"
        raise MissingBackendError(
            f"{artifact} was built for GPUs of compute capability {sidecar.capability}; {here}: "
            "use another artifact, or export one for this GPU"
        )


def _check_tensors(
    trt: Any, engine: Any, artifact: Path, image_shape: tuple[int, int, int], embedding_dim: int
) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = [(engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in names]
    if found != [(trt.uint8, image_shape), (trt.float32, (embedding_dim,))]:
        shown = ", ".join(f"{kind.name} (N, {', '.join(map(str, shape))})" for kind, shape in found)
        raise GateError(
            f"{artifact} must take uint8 (N, {', '.join(map(str, image_shape))}) and give float (N, {embedding_dim}),"
            f" it has {shown}"
        )
