"""The machine: what decides how fast it computes."""

import platform
from dataclasses import dataclass
from pathlib import Path

from mio_export.extras import is_installed
from mio_export.runtimes.devices import num_threads

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides how fast it goes."""

    processor: str
    features: tuple[str, ...] | None
    """Which of the instruction sets that matter the processor has; None where the system does not say."""
    num_threads: int
    """Threads that each runtime is given."""
    gpu: str | None
    """Name of the GPU, if one was used."""

    def describe(self) -> str:
        """Return one line."""
        features = "instruction sets not known" if self.features is None else " ".join(self.features) or "no AVX2"
        gpu = [f"GPU {self.gpu}"] if self.gpu else []
        return "; ".join([self.processor, features, f"{self.num_threads} threads", *gpu])


def this_machine(*, on_gpu: bool = False) -> Machine:
    """Describe this machine; its GPU only if one is used, as torch has to be asked for its name."""
    processor, features = processor_of(_CPUINFO.read_text() if _CPUINFO.exists() else "")
    return Machine(processor=processor, features=features, num_threads=num_threads(), gpu=_gpu() if on_gpu else None)


def processor_of(cpuinfo: str) -> tuple[str, tuple[str, ...] | None]:
    """Return model and instruction sets, from what Linux says of the first core; elsewhere what Python knows."""
    pairs = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    values = {key.strip(): value.strip() for key, _, value in pairs}
    flags = values.get("flags")
    features = None if flags is None else tuple(name for name in _FEATURES if name in flags.split())
    return values.get("model name") or platform.processor() or platform.machine(), features


def _gpu() -> str:
    if not is_installed("torch"):
        return "that only torch can name"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "that torch cannot name"


__all__ = ["Machine", "processor_of", "this_machine"]
