"""What every result is stored with: the machine and the versions."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from mio_export.runtimes.devices import num_threads

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("mio-export", "torch", "torchvision", "lightly", "pytorch-lightning", "onnx", "onnxruntime-gpu", "numpy")
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> dict[str, object]:
    """Return processor, its instruction sets that matter, usable cores, memory and library versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    flags = next((line.split(":")[1].split() for line in _lines("/proc/cpuinfo") if line.startswith("flags")), [])
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": cpu or platform.processor(),
        "features": [name for name in _FEATURES if name in flags],
        "cores": num_threads(),
        "memory_gb": round(memory / 1e6, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def save(name: str, results: object) -> None:
    """Write ``results/NAME.json`` and print it."""
    text = json.dumps({"machine": machine(), "results": results}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
