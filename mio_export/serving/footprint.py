"""How fast an artifact of a bundle is on this machine, and how much memory its process takes."""

import math
import subprocess
import sys
from typing import Any

from mio_export.benchmark import bench
from mio_export.bundle import Bundle
from mio_export.errors import MioError, MissingBackendError
from mio_export.runtimes import Choice

_BATCH_SIZE = 8
_SECONDS = 2
_EMBED = """
import resource, sys, numpy
from pathlib import Path
from mio_export.runtimes import open_runtime
with open_runtime(sys.argv[1], sys.argv[2], precision=sys.argv[3], device=sys.argv[4]) as runtime:
    runtime.embed(numpy.zeros((int(sys.argv[5]), *runtime.image_shape), numpy.uint8))
status = Path("/proc/self/status")  # on Linux ru_maxrss counts what the parent process held
lines = status.read_text().splitlines() if status.exists() else []
kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
print(kib[0] if kib else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def footprint(bundle: Bundle, choice: Choice) -> dict[str, Any]:
    """Measure an artifact, in some seconds.

    Returns:
        JSON-ready values: ``images_per_s``, ``batch_size`` and ``num_threads`` of ``bench``; ``peak_mib``, the most
        memory of a process that embeds the largest batch; ``machine`` in words.

    Raises:
        MissingBackendError: the runtime or the device is not here.
        MioError: the process that embeds fails.
    """
    most, kind = bundle.manifest.max_batch, (choice.runtime, choice.precision)
    batch_size = min(_BATCH_SIZE, most)
    result = bench(bundle, batch_size=batch_size, seconds=_SECONDS, device=choice.device, runtimes=[choice.runtime])
    rates = [s.images_per_s for s in result.speeds if (s.contender.runtime, s.contender.precision) == kind]
    if not rates:
        raise MissingBackendError("; ".join(absent.reason for absent in result.absent))
    command = [sys.executable, "-c", _EMBED, str(bundle.path), *kind, choice.device, str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise MioError(f"the memory of {choice.file} cannot be measured: {reason[:300]}")
    return {
        "images_per_s": round(rates[0], 1),
        "batch_size": batch_size,
        "num_threads": result.machine.num_threads,
        "peak_mib": math.ceil(int(done.stdout) / 1024),
        "machine": result.machine.describe(),
    }


__all__ = ["footprint"]
