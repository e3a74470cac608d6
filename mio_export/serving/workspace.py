"""The folder that a Triton server is started on: two models, the backend that runs them, and its command line."""

import importlib.util
import os
import secrets
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from mio_export.bundle import Bundle
from mio_export.errors import MissingBackendError, UsageError
from mio_export.runtimes import Choice
from mio_export.serving.settings import DECODE, JPEG, ServeOptions, WorkerSettings

_NUM_DECODERS = 2
"""Processes that decode, each with a thread for every core; what crashes one takes no model with it."""
_BATCHING = "dynamic_batching {}\n"
"""No limit of the queue: with one, of length or of time, this Triton lets requests lie for half a second whenever every
client waits (triton-inference-server/server issue 8870), up to one in eight of them."""
_CLOSED = "logging,trace,model-repository"
"""Parts of Triton's protocol that would let a client change the server or write files."""


@dataclass(frozen=True, kw_only=True)
class Triton:
    """An installed Triton server: the parts of the package nvidia-pytriton that are used."""

    home: Path
    """Its folder ``tritonserver``."""
    libraries: Path

    @classmethod
    def installed(cls) -> "Triton":
        """Find it.

        Raises:
            MissingBackendError: it is not there, or not for this Python.
        """
        found = importlib.util.find_spec("pytriton")
        if found is None or found.origin is None or importlib.util.find_spec("tritonclient") is None:
            raise MissingBackendError(
                "mio serve needs the Triton server, which is not installed: pip install 'mio-export[serve]'"
                " (in an environment of its own: it needs numpy < 2)"
            )
        package = Path(found.origin).parent
        triton = cls(home=package / "tritonserver", libraries=package.parent / "nvidia_pytriton.libs")
        if not triton.stub.is_file():
            raise MissingBackendError(
                f"nvidia-pytriton has no Triton for Python {sysconfig.get_python_version()};"
                " use one of 3.11 to 3.13: pip install 'mio-export[serve]'"
            )
        return triton

    @property
    def stub(self) -> Path:
        """The program that a worker is."""
        return self.home / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"

    def environment(self) -> dict[str, str]:
        """Return the variables that the server runs under; its workers find this very Python by them."""
        # the stub names libpython only by its file name, which no loader finds for Pythons of pyenv or uv
        libraries = [self.libraries, sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        library_path = os.pathsep.join(str(folder) for folder in libraries if folder)
        return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": library_path}


def write_workspace(
    folder: Path, triton: Triton, *, name: str, bundle: Bundle, choice: Choice, options: ServeOptions
) -> None:
    """Write the models and the backend into an empty folder."""
    settings = WorkerSettings(
        bundle=str(bundle.path.resolve()),
        choice=replace(choice, companions=dict(choice.companions), options=dict(choice.options)),
        max_batch=options.batch_for(bundle),
        max_image_bytes=options.max_image_bytes,
        max_pixels=options.max_pixels,
    )
    for model, config in _models(name, bundle, choice, options).items():
        version = folder / "models" / model / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(config)
        if model in (name, name + DECODE):
            kind = "EncoderModel" if model == name else "DecoderModel"
            (version / "model.py").write_text(f"from mio_export.serving.worker import {kind} as TritonPythonModel\n")
            settings.save(version)
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(triton.home / "backends" / "python").iterdir(), triton.stub):
        (backend / file.name).symlink_to(file)


def _models(name: str, bundle: Bundle, choice: Choice, options: ServeOptions) -> dict[str, str]:
    """Return the three models' configurations, in Triton's own text, by their names."""
    manifest, max_batch = bundle.manifest, options.batch_for(bundle)
    says = {
        "space": manifest.space,
        "artifact": choice.file,
        "sha256": choice.sha256,
        "runtime": choice.runtime,
        "precision": choice.precision,
        "device": choice.device,
        "decode": "full",
    }
    parameters = "\n".join(f'parameters {{key: "{k}" value {{string_value: "{v}"}}}}' for k, v in says.items())
    pixels = f'{{name: "images" data_type: TYPE_UINT8 dims: {list(manifest.preprocess.shape)}}}'
    files = '{name: "images" data_type: TYPE_STRING dims: [1]}'
    embedding = f'{{name: "embedding" data_type: TYPE_FP32 dims: [{manifest.encoder.embedding_dim}]}}'
    error = '{name: "error" data_type: TYPE_STRING dims: [1]}'
    given = '{name: "error" data_type: TYPE_STRING dims: [1] optional: true}'
    encoder = f"""\
backend: "python"
max_batch_size: {max_batch}
input [{pixels}, {given}]
output [{embedding}, {error}]
instance_group [{{kind: KIND_CPU count: 1}}]
{_BATCHING}{parameters}
"""
    decoder = f"""\
backend: "python"
max_batch_size: {max_batch}
input [{files}]
output [{pixels}, {error}]
instance_group [{{kind: KIND_CPU count: {_NUM_DECODERS}}}]
{_BATCHING}"""
    chain = f"""\
platform: "ensemble"
max_batch_size: {max_batch}
input [{files}]
output [{embedding}, {error}]
ensemble_scheduling {{
  step [
    {{
      model_name: "{name}{DECODE}" model_version: 1
      input_map {{key: "images" value: "images"}}
      output_map {{key: "images" value: "pixels"}}
      output_map {{key: "error" value: "unread"}}
    }},
    {{
      model_name: "{name}" model_version: 1
      input_map {{key: "images" value: "pixels"}}
      input_map {{key: "error" value: "unread"}}
      output_map {{key: "embedding" value: "embedding"}}
      output_map {{key: "error" value: "error"}}
    }}
  ]
}}
{parameters}
"""
    return {name: encoder, name + DECODE: decoder, name + JPEG: chain}


def command(folder: Path, triton: Triton, options: ServeOptions, *, shm_prefix: str) -> list[str]:
    """Return the server's command line."""
    closed = _CLOSED if options.host in ("127.0.0.1", "::1", "localhost") else f"{_CLOSED},shared-memory"
    key = f"{closed}:mio-export-key={secrets.token_urlsafe(16)}"
    arguments = {
        "model-repository": folder / "models",
        "backend-directory": folder / "backends",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "strict-readiness": "true",
        "http-address": options.host,
        "http-port": options.http_port,
        "http-restricted-api": key,
        "grpc-address": options.host,
        "grpc-port": options.grpc_port,
        "grpc-restricted-protocol": key,
        "metrics-address": options.host,
        "metrics-port": options.metrics_port,
        "allow-gpu-metrics": "false",
        "log-info": "false",
        "log-warning": "false",
        "pinned-memory-pool-byte-size": 0,
        "exit-timeout-secs": max(1, round(options.timeout_s)),
    }
    server = triton.home / "bin" / "tritonserver"
    return [str(server), "--disable-auto-complete-config", *(f"--{name}={value}" for name, value in arguments.items())]


def model_name(bundle: Bundle) -> str:
    """Return the name that a bundle is served under: its folder's, without ``.mio``.

    Raises:
        UsageError: Triton takes no such name.
    """
    name = bundle.path.resolve().name.removesuffix(".mio")
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise UsageError(f"a served bundle's name is made of letters, digits, '.', '_' and '-'; rename {name!r}")
    return name


__all__ = ["Triton", "command", "model_name", "write_workspace"]
