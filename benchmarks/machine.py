"""What every result is stored with: the machine and the versions."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from mio_export.runtimes.machine import this_machine

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("mio-export", "torch", "torchvision", "lightly", "pytorch-lightning", "onnx", "onnxruntime-gpu", "numpy")


def machine() -> dict[str, object]:
    """Return processor, its instruction sets that matter, usable cores, memory and library versions."""
    here = this_machine()
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": here.processor,
        "features": list(here.features or ()),
        "cores": here.num_threads,
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
