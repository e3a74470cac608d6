"""Every format and precision of a ResNet-18, trained here at 64 px and exported at 224: size, speed, rows, retrieval.

    python benchmarks/runtimes.py --photos /usr/share/backgrounds /usr/share/wallpapers

Photographs: any folders of large ones, such as those of Debian's lomiri-wallpapers, plasma-workspace-wallpapers and
gnome-backgrounds. Crops of 640x480 are cut from them; training, calibration and proof take different photographs'
crops or different crops. Speeds are interleaved, beside eager PyTorch in the same run.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

SIZE = (640, 480)
NUM_TRAIN = 1500
NUM_PROOF = 768
EPOCHS = 3
LIMIT = 256
FORMATS = ("onnx", "openvino", "pt2", "torchscript")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
GOALS = {("onnx", "fp32"): 1.5, ("openvino", "bf16"): 3.0, ("any", "int8"): 5.0}
"""Images/s as multiples of eager PyTorch in float32."""


def photographs(folders: list[Path]) -> list[Path]:
    """Return the large photographs, each once."""
    files = {path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg")}
    return sorted(path for path in files if min(Image.open(path).size) >= 2 * SIZE[1])


def cut(photos: list[Path], folder: Path, count: int, seed: int) -> None:
    """Write crops as JPEG, in turn from each photograph, of a third to the whole of its height."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    opened = [Image.open(path).convert("RGB") for path in photos]
    for index in range(count):
        photo = opened[index % len(opened)]
        height = int(rng.uniform(SIZE[1], min(photo.height, photo.width * SIZE[1] / SIZE[0])))
        width = height * SIZE[0] // SIZE[1]
        left, top = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        crop = photo.crop((left, top, left + width, top + height)).resize(SIZE)
        crop.save(folder / f"{index:05d}.jpg", quality=92)


def trained(folder: Path, run: Path):
    """Train on the crops at 64 px; return the encoder, taking images of 224 px."""
    from mio_export.models import Encoder
    from mio_export.train import recipe_from_dict, train

    values = {
        "backbone": "resnet18",
        "stem": "imagenet",
        "image_size": 64,
        "epochs": EPOCHS,
        "batch_size": 64,
        "precision": "fp32",
    }
    encoder = train(recipe_from_dict(values), folder, run, device="cpu").encoder
    preprocess = replace(encoder.preprocess, image_size=224, resize_size=256)
    return Encoder(encoder.spec, preprocess, encoder.backbone).eval()


def row(bundle, artifact, speeds: dict[tuple[str, str], float]) -> dict[str, object]:
    """Return what the table shows of an artifact, its worst batch size counting."""
    report = json.loads((bundle.path / artifact.parity.report).read_text())
    found = report["comparisons"]
    return {
        "format": artifact.format,
        "precision": artifact.precision,
        "verdict": artifact.parity.verdict,
        "why unproven": report["unproven"],
        "megabytes": round((bundle.path / artifact.file).stat().st_size / 1e6, 2),
        "images_per_s": speeds.get((artifact.format, artifact.precision)),
        "times eager": _ratio(speeds, artifact),
        "min_cosine": min((c["min_cosine"] for c in found), default=None),
        "recall_at_10": min((c["recall_at_10_agreement"] for c in found), default=None),
    }


def _ratio(speeds, artifact):
    rate = speeds.get((artifact.format, artifact.precision))
    return rate and rate / speeds["torch", "fp32"]


def main() -> None:
    """Train, export, measure and store the table."""
    from machine import save

    from mio_export.benchmark import bench
    from mio_export.console.progress import Progress
    from mio_export.exporting import export

    class Spoken(Progress):
        def line(self, text: str) -> None:
            print(text, flush=True)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut(photos[::2], folder / "train", NUM_TRAIN, seed=0)
        cut(photos[1::2], folder / "held-out", NUM_PROOF, seed=1)
        encoder = trained(folder / "train", folder / "run")
        options = {"formats": FORMATS, "precisions": PRECISIONS, "images": folder / "held-out", "limit": LIMIT}
        bundle = export(encoder, folder / "resnet18.mio", **options, max_batch=32, progress=Spoken()).bundle
        result = bench(bundle, batch_size=arguments.batch_size, seconds=arguments.seconds)
        speeds = {(s.contender.format, s.contender.precision): s.images_per_s for s in result.speeds}
        rows = [row(bundle, artifact, speeds) for artifact in bundle.manifest.artifacts]
    settings = {"photographs": len(photos), "trained": f"{EPOCHS} epochs of {NUM_TRAIN} crops at 64 px"}
    settings |= {"held out": NUM_PROOF, "batch_size": arguments.batch_size, "processor": result.machine.describe()}
    save("runtimes", {"settings": settings, "rows": rows, "bench": result.to_dict()})
    for line in rows:
        print(line)
    best = {
        (name, precision): max(
            (r["times eager"] or 0 for r in rows if name in ("any", r["format"]) and r["precision"] == precision),
            default=0,
        )
        for name, precision in GOALS
    }
    for goal, wanted in GOALS.items():
        print(f"{goal}: {best[goal]:.2f} times eager, goal {wanted}")


if __name__ == "__main__":
    main()
