"""All seven systems on Fashion-MNIST: one encoder, one schedule, the same views, three seeds; and how they were tuned.

    python benchmarks/objectives.py            # every cell that is missing, then the table
    python benchmarks/objectives.py --table    # the table of the cells that are there

Cells (one trained encoder each) are kept in ``.objectives/`` and taken up again; several processes may work at once.
On a CPU it takes 10,000 training images and the small net, on a GPU all 60,000; the whole test set always. Needs the
files of Fashion-MNIST, such as those of Debian's package dataset-fashion-mnist: ``--data DIR``.

Every system was tuned with the same budget, three values of what it is most sensitive to: ``objectives_search.py``.
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

DATA = Path("/usr/share/datasets/fashion-mnist")
WORK = Path(__file__).parent.parent / ".objectives"
SEEDS = (0, 1, 2)
EPOCHS = 3
BATCH = 128
SYSTEMS = {
    "mio": {"loss": {"temperature": 0.1}},
    "minc": {},
    "spectral": {"loss": {"scale": 30.0}},
    "simclr": {"loss": {"temperature": 0.1}},
    "byol": {"target_momentum": 0.996},
    "linear-byol": {"target_momentum": 0.95},
    "simsiam": {"learning_rate": 5e-4},
}
SWEEP = (32, 64, 256)
CLAIMS = (("mio", "simclr"), ("minc", "spectral"), ("minc", "byol"), ("minc", "linear-byol"))


def cells() -> list[tuple[str, int, int]]:
    """Return system, batch size and seed of every encoder, the main table first."""
    table = [(name, BATCH, seed) for seed in SEEDS for name in SYSTEMS]
    return table + [(name, size, seed) for seed in SEEDS for size in SWEEP for name in ("minc", "spectral")]


def subset(source: Path, folder: Path, num_images: int | None) -> Path:
    """Write the first training images and the whole test set as IDX files."""
    target = folder / "Fashion-MNIST"
    target.mkdir(parents=True)
    for part, count in (("train", num_images), ("t10k", None)):
        for kind, header, width in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            content = gzip.decompress((source / f"{part}-{kind}-ubyte.gz").read_bytes())
            total = (len(content) - header) // width
            kept = min(count or total, total)
            head = content[:4] + kept.to_bytes(4, "big") + content[8:header]
            (target / f"{part}-{kind}-ubyte").write_bytes(head + content[header : header + kept * width])
    return target


def run_cell(name: str, batch_size: int, seed: int, data: Path, device: str) -> dict[str, object]:
    """Train one encoder and score it on the whole test set; ``correct`` is kept beside, for paired intervals."""
    from mio_export.console.progress import Progress
    from mio_export.train import recipe_from_dict, train
    from mio_export.train.data import load_images, open_data
    from mio_export.train.evaluation import evaluate_encoder

    changes = {"objective": name, "epochs": EPOCHS, "batch_size": batch_size, "seed": seed, "precision": "fp32"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe_from_dict(changes | SYSTEMS[name]), data, Path(folder) / "run", device=device)
    seconds = time.monotonic() - start
    opened = open_data(data)
    train_set, test_set = (
        load_images(part, result.encoder.preprocess, Progress()) for part in (opened.labelled, opened.test)
    )
    scores = evaluate_encoder(result.encoder, train_set, test_set, seed=seed).scores
    key = f"{name}-{batch_size}-{seed}"
    for row in ("trained", "untrained", "raw pixels", "PCA"):
        np.save(WORK / f"{key}-{row.replace(' ', '-')}.npy", scores[row].correct)
    return {
        "system": name,
        "batch_size": batch_size,
        "seed": seed,
        "knn": {row: score.knn for row, score in scores.items()},
        "copy_recall": {row: score.copy_recall for row, score in scores.items()},
        "alarm": result.metrics["alarm"],
        "effective_rank": result.metrics["effective_rank"],
        "train_s": round(seconds, 1),
    }


def run_missing(source: Path) -> None:
    """Run every cell that nobody has begun."""
    import torch

    from mio_export.runtimes.devices import num_threads

    torch.set_num_threads(num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = subset(source, Path(folder), None if device == "cuda" else 10_000)
        for name, batch_size, seed in cells():
            path = WORK / f"{name}-{batch_size}-{seed}.json"
            try:
                path.open("x").close()  # claimed
            except FileExistsError:
                continue
            try:
                path.write_text(json.dumps(run_cell(name, batch_size, seed, data, device)))
            except BaseException:
                path.unlink()
                raise
            print(path.stem, json.loads(path.read_text())["knn"]["trained"]["20"], flush=True)


def correct(name: str, batch_size: int, row: str = "trained") -> np.ndarray:
    """Return which test images kNN (k = 20) named rightly, shape (seeds, images)."""
    files = [WORK / f"{name}-{batch_size}-{seed}-{row}.npy" for seed in SEEDS]
    return np.stack([np.load(file) for file in files if file.exists()])


def table() -> None:
    """Store the table, the intervals of the claims and the gap by batch size."""
    from machine import save

    from mio_export.metrics import paired_bootstrap

    rows = [json.loads(path.read_text()) for path in sorted(WORK.glob("*.json")) if path.stat().st_size]

    def figures(name: str, batch_size: int, row: str = "trained") -> dict[str, object]:
        found = [r for r in rows if (r["system"], r["batch_size"]) == (name, batch_size)]
        knn = [r["knn"][row]["20"] for r in found]
        copies = [r["copy_recall"][row]["1"] for r in found]
        return {
            "seeds": len(found),
            "knn_mean": statistics.fmean(knn),
            "knn_deviation": statistics.stdev(knn) if len(knn) > 1 else None,
            "copy_recall_mean": statistics.fmean(copies),
            "train_s": statistics.fmean(r["train_s"] for r in found),
            "alarms": [r["alarm"] for r in found if r["alarm"]],
        }

    def gap(first: tuple[str, int, str], second: tuple[str, int, str]) -> dict[str, float]:
        a, b = correct(*first), correct(*second)
        seeds = min(len(a), len(b))
        interval = paired_bootstrap(a[:seeds], b[:seeds])
        return {"difference": interval.difference, "low": interval.low, "high": interval.high, "seeds": seeds}

    done = {(r["system"], r["batch_size"]) for r in rows}
    systems = {name: figures(name, BATCH) for name in SYSTEMS if (name, BATCH) in done}
    baselines = {row: figures("mio", BATCH, row) for row in ("raw pixels", "PCA", "untrained")}
    claims = {
        f"{a} - {b}": gap((a, BATCH, "trained"), (b, BATCH, "trained")) for a, b in CLAIMS if {a, b} <= systems.keys()
    }
    sizes = [size for size in (*SWEEP, BATCH) if {("minc", size), ("spectral", size)} <= done]
    by_batch = {
        size: {
            "minc": figures("minc", size),
            "spectral": figures("spectral", size),
            "minc - spectral": gap(("minc", size, "trained"), ("spectral", size, "trained")),
        }
        for size in sorted(sizes)
    }
    above = {name: gap((name, BATCH, "trained"), (name, BATCH, "untrained")) for name in systems}
    save(
        "objectives",
        {
            "settings": {
                "epochs": EPOCHS,
                "batch_size": BATCH,
                "systems": SYSTEMS,
                "score": "kNN k=20, whole test set",
            },
            "systems": systems,
            "baselines": baselines,
            "trained - untrained": above,
            "claims": claims,
            "by_batch_size": by_batch,
        },
    )
    for name, f in {**systems, **baselines}.items():
        print(f"{name:<12} kNN {f['knn_mean']:.2%} ± {f['knn_deviation'] or 0:.2%}  copy {f['copy_recall_mean']:.1%}")
    for name, g in {
        **claims,
        **{f"batch {s}: minc - spectral": v["minc - spectral"] for s, v in by_batch.items()},
    }.items():
        print(f"{name:<28} {100 * g['difference']:+.2f} points, 95 % {100 * g['low']:+.2f} to {100 * g['high']:+.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        run_missing(arguments.data)
    table()
