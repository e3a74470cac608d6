"""Ordered MINC: do the first features carry more than as many of the same features turned at random?

    python benchmarks/truncation.py

Trains ordered MINC with 128 projections on 10,000 images of Fashion-MNIST (the small net, three seeds, norm none and a
head without a last batch norm, since the statements on order hold there), and scores kNN (k = 20) on the whole test
set with the first 1, 2, 4, 8, 16, 32 projections, beside ten random rotations of the 128 cut to as many. The subspace
form runs beside it: its projections have no order. Stores ``results/truncation.json``; fails unless the first 4 lie
above the rotations with a 95 % interval that excludes zero.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

DIM = 128
KEPT = (1, 2, 4, 8, 16, 32)
ROTATIONS = 10
SEEDS = (0, 1, 2)
EPOCHS = 3


def projections(ordered: bool, seed: int, data: Path) -> tuple[np.ndarray, ...]:
    """Train one run; projections and labels of the training and the test images."""
    from mio_export.console.progress import Progress
    from mio_export.models import load_projector_encoder
    from mio_export.train import recipe_from_dict, train
    from mio_export.train.data import load_images, open_data

    recipe = recipe_from_dict(
        {
            "objective": "minc",
            "loss": {"norm": "none", "ordered": ordered},
            "head_norm": False,
            "output_dim": DIM,
            "epochs": EPOCHS,
            "seed": seed,
            "precision": "fp32",
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, data, Path(folder) / "run")
        encoder = load_projector_encoder(Path(folder) / "run")
    opened = open_data(data)
    sets = [load_images(part, encoder.preprocess, Progress()) for part in (opened.labelled, opened.test)]
    return tuple(values for images in sets for values in (encoder.embed(images.pixels), images.labels))


def correct(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return which test images kNN with k = 20 names rightly."""
    from mio_export.metrics import knn_predictions

    return knn_predictions(bank, labels, queries, ks=(20,))[20] == truth


def compare(seeds: list[tuple[np.ndarray, ...]], kept: int) -> dict[str, float]:
    """Return accuracy of the first ``kept`` projections and of rotations cut to as many, and the paired interval."""
    from mio_export.metrics import paired_bootstrap

    first, turned = [], []
    for number, (bank, labels, queries, truth) in enumerate(seeds):
        plain = correct(bank[:, :kept], labels, queries[:, :kept], truth)
        for index in range(ROTATIONS):
            rng = np.random.default_rng(1_000 * number + index)
            rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32)[:, :kept]
            first.append(plain)
            turned.append(correct(bank @ rotation, labels, queries @ rotation, truth))
    interval = paired_bootstrap(np.stack(first), np.stack(turned))
    return {
        "first": float(np.mean(first)),
        "rotated": float(np.mean(turned)),
        "difference": interval.difference,
        "low": interval.low,
        "high": interval.high,
    }


def main() -> None:
    """Train, compare, store, hold the claim."""
    import torch
    from machine import save
    from objectives import DATA, subset

    from mio_export.runtimes.devices import num_threads

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    torch.set_num_threads(num_threads())
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = subset(parser.parse_args().data, Path(folder), 10_000)
        for name, ordered in (("ordered", True), ("subspace", False)):
            seeds = [projections(ordered, seed, data) for seed in (SEEDS if ordered else SEEDS[:1])]
            results[name] = {kept: compare(seeds, kept) for kept in KEPT}
            for kept, row in results[name].items():
                print(name, kept, {key: round(value, 4) for key, value in row.items()}, flush=True)
    save("truncation", {"seeds": len(SEEDS), "rotations": ROTATIONS, "epochs": EPOCHS, "dim": DIM, **results})
    assert results["ordered"][4]["low"] > 0, results["ordered"][4]


if __name__ == "__main__":
    main()
