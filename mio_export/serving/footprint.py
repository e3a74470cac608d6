"""What a server of an artifact needs of a machine, measured here, and what Kubernetes is told of that."""

import math
import subprocess
import sys
from typing import Any

from mio_export.benching import bench
from mio_export.bundle import Bundle
from mio_export.errors import MissingBackendError, MioError
from mio_export.runtimes import Choice
from mio_export.serving.options import ServeOptions

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
    """Measure an artifact on this machine, in some seconds.

    Returns:
        ``images_per_s``, ``batch_size`` and ``num_threads`` of ``mio bench``, ``machine`` in words, and ``peak_mib``: the
        memory of a process that embeds the largest batch.

    Raises:
        MissingBackendError: the runtime or the device is not here.
        MioError: the artifact fails.
    """
    most, kind = bundle.manifest.max_batch, (choice.runtime, choice.precision)
    batch_size = min(8, most)
    result = bench(bundle, batch_size=batch_size, seconds=2, device=choice.device, runtimes=[choice.runtime])
    rates = [s.images_per_s for s in result.speeds if (s.contender.runtime, s.contender.precision) == kind]
    if not rates:
        raise MissingBackendError("; ".join(absent.reason for absent in result.absent))
    command = [sys.executable, "-c", _EMBED, str(bundle.path), *kind, choice.device, str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MioError(
            f"{choice.file} cannot be measured: {(done.stderr.split() and done.stderr.splitlines()[-1])[:300]}"
        )
    return {
        "images_per_s": round(rates[0], 1),
        "batch_size": batch_size,
        "num_threads": result.machine.num_threads,
        "peak_mib": math.ceil(int(done.stdout) / 1024),
        "machine": result.machine.describe(),
    }


def resources(bundle: Bundle, measured: dict[str, Any] | None) -> dict[str, str]:
    """Return ``cpu``, ``memory_request`` and ``memory_limit`` of a container; without measurements they are guesses.

    Requested are the artifact's process, a decoding process for each thread and a full queue of decoded images. The limit
    has room for the eight longest requests too, and for the largest image while it is decoded.
    """
    options = ServeOptions()
    threads, peak_mib = (measured["num_threads"], measured["peak_mib"]) if measured else (2, 2048)
    request = peak_mib + 128 * threads + options.max_queue * math.prod(bundle.manifest.preprocess.shape) / 2**20
    largest = 512 + 40 * (options.limits_for(bundle).max_pixels or 0) / 2**20  # as a decoding process limits itself
    limit = request + 8 * options.body_bytes_for(bundle) / 2**20 + largest
    request, limit = (f"{256 * math.ceil(mib / 256)}Mi" for mib in (request, limit))
    return {"cpu": str(threads), "memory_request": request, "memory_limit": limit}


__all__ = ["footprint", "resources"]
