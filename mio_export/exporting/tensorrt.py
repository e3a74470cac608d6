"""An ONNX file as an engine of TensorRT, or of TensorRT for RTX; one builder for both."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mio_export.bundle.sidecar import Library, Profile, Sidecar, write_sidecar
from mio_export.errors import MioError, MissingBackendError, UsageError, one_line
from mio_export.files import sha256_file
from mio_export.runtimes.backends import BACKENDS
from mio_export.runtimes.tensorrt import NAMES, collecting_logger, compute_capability, load_library

OPT_BATCH = 32


def engine_from_onnx(
    onnx_file: Path, path: Path, *, library: Library, capability: str, max_batch: int, provenance: str
) -> dict[str, str]:
    """Write an engine and, beside it, its sidecar ``path`` + ``.json``.

    The engine takes ``images`` uint8 (N, H, W, C), 1 ≤ N ≤ ``max_batch``, and gives ``embeddings`` (N, D), computed in
    the types that the graph names and without TF32. Two builds of one graph are not the same bytes: the library
    numbers its temporaries differently each time.

    Args:
        onnx_file: a graph of ``onnx_from_encoder``, in any precision.
        path: where to write.
        library: ``tensorrt`` builds for the GPU of this machine; ``tensorrt-rtx`` builds for any, and needs none.
        capability: compute capability of the GPUs that will run it, such as ``8.6``.
        max_batch: largest batch that the engine must take.
        provenance: JSON text for the sidecar.

    Returns:
        Versions of the libraries that wrote it.

    Raises:
        UsageError: the library does not build for that compute capability, or ``max_batch`` is below 1.
        MissingBackendError: the library is not installed, or it is ``tensorrt`` and this machine's GPU is another.
        MioError: the library cannot take the graph.
    """
    if max_batch < 1:
        raise UsageError(f"max_batch must be 1 or more, got {max_batch}")
    trt = _library_for(library, capability)
    profile = Profile(min=1, opt=min(OPT_BATCH, max_batch), max=max_batch)
    path.write_bytes(_engine(trt, onnx_file, library, capability, profile))
    sidecar = Sidecar(
        library=library,
        library_version=BACKENDS[library].version or trt.__version__,
        capability=capability,
        profile=profile,
        engine_sha256=sha256_file(path),
        provenance=json.loads(provenance),
    )
    write_sidecar(path, sidecar)
    return {library: sidecar.library_version, "onnx": version("onnx")}


def _library_for(library: Library, capability: str) -> Any:
    if library == "tensorrt":
        if (found := compute_capability()) != capability:
            here = f"is {found}" if found else "is none: no NVIDIA GPU is visible"
            raise MissingBackendError(
                f"TensorRT builds for the GPU of the machine only, whose compute capability {here}; "
                f"got {capability}: build there, or use format tensorrt-rtx"
            )
        return load_library(library)
    trt = load_library(library)
    if capability not in (known := _capabilities(trt)):
        raise UsageError(f"{NAMES[library]} builds for compute capability {', '.join(known)}; got {capability!r}")
    return trt


def _capabilities(trt: Any) -> dict[str, Any]:
    """Map ``8.6`` to the library's ``SM86``, for all that it knows."""
    members = trt.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def _engine(trt: Any, onnx_file: Path, library: Library, capability: str, profile: Profile) -> bytes:
    errors: list[str] = []
    logger = collecting_logger(trt, errors)
    builder = trt.Builder(logger)
    # TensorRT 10 needs the flag; 11 types every network strongly and ignores it
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)  # it owns the network's weights, so it must live until the build
    if not parser.parse_from_file(str(onnx_file)):
        raise MioError(f"{NAMES[library]} cannot take {onnx_file}: {_first_error(parser)}")
    plan = builder.build_serialized_network(network, _config(trt, builder, network, library, capability, profile))
    if plan is None:
        raise MioError(f"{NAMES[library]} builds no engine of {onnx_file}: {'; '.join(errors)[:300]}")
    return bytes(plan)


def _config(trt: Any, builder: Any, network: Any, library: Library, capability: str, profile: Profile) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and it keeps 10 bits of mantissa
    if library == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capabilities(trt)[capability], 0)
    images = network.get_input(0)
    shape = tuple(images.shape)[1:]
    optimization = builder.create_optimization_profile()
    optimization.set_shape(images.name, *((batch, *shape) for batch in (profile.min, profile.opt, profile.max)))
    config.add_optimization_profile(optimization)
    return config


def _first_error(parser: Any) -> str:
    error = parser.get_error(0)
    reason = one_line(error.desc())
    return f"node {error.node_name()} ({error.node_operator()}): {reason}"
