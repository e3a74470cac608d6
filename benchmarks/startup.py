"""How long ``mio --help`` takes beyond the start of the interpreter: wall time, median of 7.

    python benchmarks/startup.py

Fails above 0.2 s.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def median_s(command: list[str]) -> float:
    """Return the median wall time of seven runs, in seconds."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure, store, hold to the bound."""
    from machine import save

    bare = median_s([sys.executable, "-c", "pass"])
    ours = median_s([str(Path(sys.executable).parent / "mio"), "--help"])
    save("startup", {"interpreter_s": bare, "mio_help_s": ours, "beyond_s": ours - bare})
    assert ours - bare < 0.2, ours - bare


if __name__ == "__main__":
    main()
