"""How close ``mio embed`` comes to what the machine can do, and what a plain PyTorch loop does beside it.

    python benchmarks/embedding.py --photos /usr/share/backgrounds /usr/share/wallpapers

600 JPEGs of 640x480 and, for scaled decoding, 60 of 12 megapixels, cut from large photographs; ResNet-18, 224 px. Each
figure is the best of three interleaved rounds. With m images/s of the model alone and d of decoding alone, a
pipeline that shares all cores between the two reaches at most 1 / (1/m + 1/d).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from runtimes import cut, photographs

NUM_IMAGES = 600
NUM_LARGE = 60
LARGE = (4000, 3000)
BATCH_SIZE = 32
ROUNDS = 3


def cut_large(photos: list[Path], folder: Path) -> None:
    """Write 12-megapixel JPEGs with the grain of a camera, so that they weigh what camera files weigh."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(NUM_LARGE):
        photo = Image.open(photos[index % len(photos)]).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (LARGE[1], LARGE[0], 1)).astype(np.float32)
        pixels = np.clip(np.asarray(photo, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(np.roll(pixels, 37 * index, axis=1)).save(folder / f"{index:03d}.jpg", quality=88)


def build():
    """Return a ResNet-18 whose batch norms have seen images."""
    import torch

    from mio_export.models import build_encoder
    from mio_export.parity.images import parity_images
    from mio_export.preprocess import Preprocess

    torch.manual_seed(0)
    encoder = build_encoder("resnet18", Preprocess(image_size=224, resize_size=256))
    images, _ = parity_images(encoder.preprocess, limit=64)
    with torch.no_grad():
        encoder.train()
        encoder(torch.from_numpy(images.pixels))
    return encoder.eval()


def plain_loop(folder: Path, encoder) -> int:
    """What one writes without a tool: a DataLoader with workers, torchvision's transforms, eager float32."""
    import torch
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    from mio_export.runtimes.devices import num_threads

    transform = v2.Compose(
        [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32)]  # normalised in the encoder
    )

    class Files(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.files = sorted(folder.iterdir())

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int):
            return transform(default_loader(self.files[index]))

    torch.set_num_threads(num_threads())
    loader = torch.utils.data.DataLoader(Files(), batch_size=BATCH_SIZE, num_workers=num_threads())
    with torch.inference_mode():
        return sum(len(encoder.embed_pixels(batch)) for batch in loader)


def decode_all(folder: Path, preprocess, *, scaled: bool) -> int:
    """Read and decode on all cores, and drop the pixels."""
    from mio_export.embedding.pipeline import decode
    from mio_export.runtimes.devices import num_threads
    from mio_export.sources import list_images

    with ThreadPoolExecutor(num_threads()) as pool:
        files = list_images(folder).files
        return sum(d.pixels is not None for d in pool.map(lambda f: decode(f, preprocess, scaled=scaled), files))


def infer_all(runtime, count: int) -> int:
    """Embed ready images."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, *runtime.image_shape), dtype=np.uint8)
    return sum(len(runtime.embed(images)) for _ in range(-(-count // BATCH_SIZE)))


def rates(work: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Return images/s of each, the best of the rounds; they take turns."""
    best = dict.fromkeys(work, 0.0)
    for _ in range(ROUNDS):
        for name, function in work.items():
            start = time.perf_counter()
            count = function()
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure and store."""
    from machine import save

    from mio_export.embedding import embed
    from mio_export.exporting import export
    from mio_export.runtimes import open_runtime
    from mio_export.store import load_embeddings

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    photos = photographs(parser.parse_args().photos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut(photos, folder / "small", NUM_IMAGES, seed=0)
        cut_large(photos, folder / "large")
        encoder = build()
        bundle = export(encoder, folder / "resnet18.mio", images=folder / "small", limit=64).bundle

        def embedded(source: str, decode: str) -> int:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                options = {"runtime": "onnxruntime", "batch_size": BATCH_SIZE, "decode": decode}
                return embed(bundle.path, folder / source, Path(out) / "store", **options).num_ok

        preprocess = encoder.preprocess
        with open_runtime(bundle, "onnxruntime") as runtime:
            small = rates(
                {
                    "model alone": lambda: infer_all(runtime, NUM_IMAGES),
                    "decoding alone": lambda: decode_all(folder / "small", preprocess, scaled=False),
                    "mio embed": lambda: embedded("small", "full"),
                    "plain PyTorch loop": lambda: plain_loop(folder / "small", encoder),
                }
            )
        large = rates(
            {
                "decoding in full": lambda: decode_all(folder / "large", preprocess, scaled=False),
                "decoding scaled": lambda: decode_all(folder / "large", preprocess, scaled=True),
                "mio embed, full": lambda: embedded("large", "full"),
                "mio embed, scaled": lambda: embedded("large", "scaled"),
            }
        )
        vectors = []
        for decode in ("full", "scaled"):
            embed(bundle.path, folder / "large", folder / decode, runtime="onnxruntime", decode=decode)
            vectors.append(load_embeddings(folder / decode).vectors)
        settled = embed(bundle.path, folder / "large", folder / "auto", runtime="onnxruntime").info.decode
        megabytes = np.mean([path.stat().st_size for path in (folder / "large").iterdir()]) / 1e6
    a, b = vectors
    cosine = float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    bound = 1 / (1 / small["model alone"] + 1 / small["decoding alone"])
    results = {
        "images_per_s": {name: round(rate, 1) for name, rate in {**small, **large}.items()},
        "share of what model and decoding allow": small["mio embed"] / bound,
        "times the plain loop": small["mio embed"] / small["plain PyTorch loop"],
        "large files": {
            "megabytes each": round(float(megabytes), 2),
            "decoding, times full": large["decoding scaled"] / large["decoding in full"],
            "end to end, times full": large["mio embed, scaled"] / large["mio embed, full"],
            "min cosine": cosine,
            "what auto chose": settled,
        },
    }
    save("embedding", results)


if __name__ == "__main__":
    main()
