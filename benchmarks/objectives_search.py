"""How the systems of ``objectives.py`` were tuned: the same budget for each, three values of what it depends on most.

    python benchmarks/objectives_search.py

kNN (k = 20) of a tenth of 10,000 training images of Fashion-MNIST against the others, two epochs, one seed, the small
net; the test set plays no part. MINC's norm takes two more trials. Finished trials are kept in ``.objectives/search/``.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from objectives import BATCH, DATA, WORK, subset

EPOCHS = 2
NUM_IMAGES = 10_000
BUDGET = {
    "mio": [{"loss": {"temperature": value}} for value in (0.1, 0.2, 0.5)],
    "simclr": [{"loss": {"temperature": value}} for value in (0.1, 0.2, 0.5)],
    "minc": [{"loss": {"scale": value}} for value in (3.0, 10.0, 30.0)],
    "spectral": [{"loss": {"scale": value}} for value in (3.0, 10.0, 30.0)],
    "byol": [{"target_momentum": value} for value in (0.95, 0.98, 0.996)],
    "linear-byol": [{"target_momentum": value} for value in (0.95, 0.98, 0.996)],
    "simsiam": [{"learning_rate": value} for value in (5e-4, 1e-3, 2e-3)],
}
NORMS = [("minc", {"loss": {"norm": "ball", "scale": 10.0}}), ("minc", {"loss": {"norm": "none"}})]


def trials() -> list[tuple[str, dict[str, object]]]:
    """Return every system with each of its settings."""
    return [(name, change) for name, changes in BUDGET.items() for change in changes] + NORMS


def run_trial(name: str, change: dict[str, object], data: Path) -> float:
    """Train on the images, without labels; the accuracy on a tenth of them with the labels of the others."""
    import numpy as np

    from mio_export.console.progress import Progress
    from mio_export.metrics import knn_accuracy
    from mio_export.train import recipe_from_dict, train
    from mio_export.train.data import load_images, open_data

    values = {"objective": name, "epochs": EPOCHS, "batch_size": BATCH, "precision": "fp32", **change}
    with tempfile.TemporaryDirectory() as folder:
        encoder = train(recipe_from_dict(values), data, Path(folder) / "run", device="cpu").encoder
    images = load_images(open_data(data).labelled, encoder.preprocess, Progress())
    embeddings, labels = encoder.embed(images.pixels), images.labels
    held_out = np.arange(len(labels)) % 10 == 0
    scores = knn_accuracy(embeddings[~held_out], labels[~held_out], embeddings[held_out], labels[held_out], ks=(20,))
    return scores[20]


def main() -> None:
    """Run the trials that nobody has begun, and store the table."""
    from machine import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    kept = WORK / "search"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = subset(arguments.data, Path(folder), NUM_IMAGES)
        for number, (name, change) in enumerate(trials()):
            path = kept / f"{number:02d}-{name}.json"
            try:
                path.open("x").close()  # claimed
            except FileExistsError:
                continue
            try:
                row = {"system": name, "change": change, "knn_20": run_trial(name, change, data)}
                path.write_text(json.dumps(row))
            except BaseException:
                path.unlink()
                raise
            print(row, flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(kept.glob("*.json")) if path.stat().st_size]
    save("objectives_search", {"what": " ".join(__doc__.split("\n\n")[2].split()), "rows": rows})


if __name__ == "__main__":
    main()
