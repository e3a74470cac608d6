"""``mio quickstart`` with three seeds and two objectives: scores beside the baselines, wall time, peak memory.

    python benchmarks/quickstart.py

Fails unless every run lies at least 3 points of kNN above the untrained encoder, has at least twice the raw pixels'
copy recall@1, and takes under 4 minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

K = "20"


def run(objective: str, seed: int) -> dict[str, object]:
    """Run one quickstart; what it scored and what it cost."""
    mio = Path(sys.executable).parent / "mio"
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [str(mio), "quickstart", "--objective", objective, "--seed", str(seed), "-o", folder + "/tour"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        seconds = time.monotonic() - start
        scores = json.loads((Path(folder) / "tour" / "run" / "evaluation.json").read_text())["scores"]
    return {
        "objective": objective,
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(usage.ru_maxrss / 1e6, 2),
        "knn": {name: score["knn"] for name, score in scores.items()},
        "copy_recall": {name: score["copy_recall"] for name, score in scores.items()},
    }


def main() -> None:
    """Run all six, store them, hold them to the bounds."""
    from machine import save

    rows = [run(objective, seed) for objective in ("mio", "minc") for seed in (0, 1, 2)]
    save("quickstart", rows)
    for row in rows:
        knn, copies = row["knn"], row["copy_recall"]
        print(
            f"{row['objective']:<5} seed {row['seed']}: kNN {knn['trained'][K]:.1%}"
            f" (untrained {knn['untrained'][K]:.1%}, raw pixels {knn['raw pixels'][K]:.1%}),"
            f" copy recall@1 {copies['trained']['1']:.1%}"
            f" (raw pixels {copies['raw pixels']['1']:.1%}), {row['seconds']} s, {row['peak_memory_gb']} GB"
        )
    for row in rows:
        assert row["knn"]["trained"][K] >= row["knn"]["untrained"][K] + 0.03, row
        assert row["copy_recall"]["trained"]["1"] >= 2 * row["copy_recall"]["raw pixels"]["1"], row
        assert row["seconds"] < 240, row


if __name__ == "__main__":
    main()
