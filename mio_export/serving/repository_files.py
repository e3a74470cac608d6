"""What lies around the models of a repository: container, smoke test, and the README that says how to use them."""

import json
import math
import shutil
from pathlib import Path

from mio_export.parity.golden import GOLDEN, golden_files, load_golden
from mio_export.serving.repository_models import ENGINE_SOURCE, Plan

RELEASE = "26.06"
"""Of NVIDIA's containers, unless TRITON_RELEASE names another."""
_SMOKE = {"EXIF-rotated": "png", "transparent": "png", "palette": "png", "wide": "png"}
"""Golden images that the smoke test sends: the rules of decoding that servers tend to break."""
_MIN_COSINE = 0.99999

_COMPOSE = """\
services:
  triton:
    build:
      context: .
      args:
        RELEASE: ${{TRITON_RELEASE:-{release}}}
    # nothing is guessed: every model says what it takes and gives
    command: tritonserver --model-repository=/models --disable-auto-complete-config
    volumes:
      - ./models:/models:ro
    # this machine alone: the server asks nobody who they are, and would let any client change its logging and tracing
    ports:
      - "${{TRITON_ADDRESS:-127.0.0.1}}:8000:8000" # HTTP
      - "${{TRITON_ADDRESS:-127.0.0.1}}:8001:8001" # gRPC
      - "${{TRITON_ADDRESS:-127.0.0.1}}:8002:8002" # metrics
    shm_size: 1gb # images pass between the server and its Python models through shared memory
    environment:
      NVIDIA_TF32_OVERRIDE: "0" # TF32 keeps 10 bits of mantissa; the artifact was proved without it
    healthcheck:
      test: curl --fail --silent localhost:8000/v2/health/ready
      interval: 5s
      retries: 60
"""
_COMPOSE_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""
_DOCKERFILE = """\
ARG RELEASE={release}
FROM nvcr.io/nvidia/tritonserver:${{RELEASE}}-py3
# the versions that this repository was made with: another decoder may round pixels differently
RUN pip install --no-cache-dir --break-system-packages {packages}
"""
_BUILD_ENGINE = """\
#!/bin/sh
# Builds the TensorRT engine on the GPU that will serve; then run the smoke test, which is its proof.
set -eu
cd "$(dirname "$0")"
docker run --rm --gpus all -v "$PWD:/repository" -w /repository \\
    "nvcr.io/nvidia/tensorrt:${{TRITON_RELEASE:-{release}}}-py3" \\
    trtexec --onnx={source} --saveEngine=models/{encoder}/1/model.plan \\
    --stronglyTyped --noTF32 \\
    --minShapes=images:{smallest} --optShapes=images:{middle} --maxShapes=images:{largest}
"""
_README = """\
# {name}: embeddings from Triton Inference Server

Made by `mio deploy triton` from the bundle `{name}`. Nothing here names the machine that made it.

| model | takes | gives |
|---|---|---|
| `{ensemble}` | `files` BYTES (N, 1): image files as they are | `embeddings` FP32 (N, {dim}) |
| `{decoder}` | `files` BYTES (N, 1) | `images` UINT8 (N, {height}, {width}, {channels}) |
| `{encoder}` | `{source}` UINT8 (N, {height}, {width}, {channels}) | `{target}` FP32 (N, {dim}) |

At most {max_batch} images a request: the largest batch that was proved. Smaller requests are put together.
{engine}
## Start

    docker compose up --build --wait
    pip install 'tritonclient[http]'
    python smoke_test.py                # exit status 0: the server gives the encoder's own embeddings

The ports are open to this machine alone. `TRITON_ADDRESS=0.0.0.0 docker compose up --wait` opens them to every network
that it is on, or to one with the address that it has there; the server asks for no password and no key, so do that only
behind a firewall or a proxy that does.

Another release of the container: `TRITON_RELEASE=YY.MM docker compose up --build --wait`. A server that runs already
needs `models/` only, and in the Python of its Python backend: {packages}.

## Use

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
data = np.array([[open("photo.jpg", "rb").read()]], dtype=object)
files = triton.InferInput("files", list(data.shape), "BYTES")
files.set_data_from_numpy(data)
vectors = client.infer("{ensemble}", [files]).as_numpy("embeddings")  # float32 (1, {dim})
```

A file that is no image fails its request, with the reason; others that were batched with it are answered. Files are
decoded under the contract in `models/{decoder}/1/preprocess.json`, by the very code of `mio embed --decode {decode}`.

## What is served

| parameter of every model | value |
|---|---|
{parameters}

Vectors of another `space` must not be mixed with these. `client.get_model_config("{ensemble}")` returns them.
Backend: {backend}, on {device}. `count` in `instance_group` of a `config.pbtxt` says how many copies of a model run;
`max_queue_delay_microseconds` how long a request waits for others.

The images in `smoke/` are crops of china.jpg (danielbuechele) and flower.jpg (vultilion), CC BY 2.0, as scikit-learn
ships them.
"""
_ENGINE = """
The engine is not here: TensorRT builds for the GPU of the machine. On the one that will serve, run `sh build_engine.sh`
once, before the start. What it builds has no proof but the smoke test; run it.
"""
_PROVED_ENGINE = """
The engine runs on GPUs of compute capability {capability} with TensorRT {library} only: take the release of the
container that has it.
"""


def write_surroundings(folder: Path, plan: Plan) -> None:
    """Write everything but ``models/`` into a repository's folder.

    Raises:
        GateError: the bundle's golden images are damaged.
    """
    packages = _packages(plan)
    gpu = _COMPOSE_GPU if plan.device == "cuda" else ""
    texts = {
        "compose.yaml": _COMPOSE.format(release=RELEASE) + gpu,
        "Dockerfile": _DOCKERFILE.format(release=RELEASE, packages=packages),
        "README.md": _readme(plan, packages),
    }
    if plan.builds_engine:
        texts["build_engine.sh"] = _build_engine(plan)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("repository_smoke_test.py"), folder / "smoke_test.py")
    _write_smoke(folder / "smoke", plan)


def _packages(plan: Plan) -> str:
    """Return what the Python models need beyond numpy, in the versions that are used here."""
    import PIL

    if plan.backend != "python":
        return f"pillow=={PIL.__version__}"
    import onnxruntime

    return f"pillow=={PIL.__version__} onnxruntime=={onnxruntime.__version__}"


def _write_smoke(folder: Path, plan: Plan) -> None:
    """Write the images and what the encoder in float64 makes of them, which is what artifacts were proved against."""
    folder.mkdir()
    pixels, embeddings = load_golden(plan.bundle.path / GOLDEN)
    rows = dict(zip(pixels, embeddings, strict=True))
    report = json.loads((plan.bundle.path / plan.artifact.parity.report).read_text(encoding="utf-8"))
    names = {name: f"{name}.{suffix}" for name, suffix in _SMOKE.items()}
    # twice the error that these very images showed in the proof; int8 has no bound of its own on them
    error = min(1.0, 2 * max(report["golden"][name] for name in names))
    expected = {
        "model": plan.ensemble,
        "parameters": plan.parameters,
        "min_cosine": min(_MIN_COSINE, report["budget"]["min_cosine"], math.sqrt(1 - error**2)),
        "embeddings": {file: rows[name].astype("float32").tolist() for name, file in names.items()},
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
    files = golden_files()
    for name, file in names.items():
        (folder / file).write_bytes(files[name])


def _build_engine(plan: Plan) -> str:
    shape = "x".join(map(str, plan.bundle.manifest.preprocess.shape))
    smallest, middle, largest = (f"{batch}x{shape}" for batch in (1, min(32, plan.max_batch), plan.max_batch))
    return _BUILD_ENGINE.format(
        release=RELEASE,
        source=ENGINE_SOURCE,
        encoder=plan.encoder,
        smallest=smallest,
        middle=middle,
        largest=largest,
    )


def _readme(plan: Plan, packages: str) -> str:
    manifest, artifact = plan.bundle.manifest, plan.artifact
    height, width, channels = manifest.preprocess.shape
    source, target = plan.tensors
    engine = _ENGINE if plan.builds_engine else ""
    if artifact.format == "tensorrt":
        engine = _PROVED_ENGINE.format(capability=artifact.capability, library=artifact.tools.get("tensorrt"))
    return _README.format(
        name=manifest.name,
        ensemble=plan.ensemble,
        decoder=plan.decoder,
        encoder=plan.encoder,
        source=source,
        target=target,
        height=height,
        width=width,
        channels=channels,
        dim=manifest.encoder.embedding_dim,
        max_batch=plan.max_batch,
        engine=engine,
        packages=packages,
        decode=plan.decode,
        parameters="\n".join(f"| `{name}` | `{value}` |" for name, value in plan.parameters.items()),
        backend=plan.backend,
        device={"cuda": "a GPU", "cpu": "the CPU"}[plan.device],
    )


__all__ = ["RELEASE", "write_surroundings"]
