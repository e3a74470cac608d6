"""How close ``mio embed`` comes to what the machine can do, and what a plain PyTorch loop does beside it.

    python benchmarks/embedding.py --photos /usr/share/backgrounds /usr/share/wallpapers

600 JPEGs of 640x480 and, for scaled decoding, 200 of 12 megapixels, cut from large photographs; ResNet-18, 224 px,
trained on other crops, in the runtime that ``auto`` finds fastest here. Each figure is the best of three interleaved
rounds, and loading the model is in it. fastembed runs in an environment of its own (``make peers``) on the same weights
and files. With m images/s of the model alone and d of decoding alone, a pipeline that shares all cores between the two
reaches at most 1 / (1/m + 1/d).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from runtimes import cut, photographs, trained

NUM_TRAIN = 1500
NUM_IMAGES = 600
NUM_LARGE = 200
LARGE = (4000, 3000)
BATCH_SIZE = 32
ROUNDS = 3
PEERS = Path(__file__).parent.parent / ".peers" / "bin" / "python"


def cut_large(photos: list[Path], folder: Path) -> None:
    """Write 12-megapixel JPEGs with the grain of a camera, so that they weigh what camera files weigh."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(NUM_LARGE):
        photo = Image.open(photos[index % len(photos)]).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (LARGE[1], LARGE[0], 1)).astype(np.float32)
        pixels = np.clip(np.asarray(photo, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(np.roll(pixels, 37 * index, axis=1)).save(folder / f"{index:03d}.jpg", quality=88)


def for_fastembed(encoder, folder: Path) -> Path:
    """Write the same encoder as fastembed wants it: an ONNX file of normalised float (N, C, H, W), and its settings."""
    import torch

    size, preprocess = encoder.preprocess.image_size, encoder.preprocess
    folder.mkdir()
    example = torch.zeros(2, 3, size, size)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.onnx.export(encoder.backbone, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
    program.save(folder / "model.onnx")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize_size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    for name in ("preprocessor_config.json", "config.json"):
        (folder / name).write_text(json.dumps(settings))
    return folder


def fastembed(model: Path, images: Path, out: Path, processes: int) -> float:
    """Return the seconds that fastembed takes in its own environment; as of ``mio embed``, loading is in them."""
    command = [PEERS, Path(__file__).parent / "peers" / "fastembed_images.py", model, images]
    command += [BATCH_SIZE, processes, out]
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


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


def infer_all(bundle, choice, count: int) -> tuple[int, float]:
    """Embed ready images; return how many, and the seconds without loading. None stays open: some threads spin."""
    from mio_export.runtimes.opening import open_choice

    with open_choice(bundle, choice) as runtime:
        images = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, *runtime.image_shape), dtype=np.uint8)
        runtime.embed(images)
        start = time.perf_counter()
        done = sum(len(runtime.embed(images)) for _ in range(-(-count // BATCH_SIZE)))
        return done, time.perf_counter() - start


def rates(work: dict[str, Callable[[], tuple[int, float | None] | int]]) -> dict[str, float]:
    """Return images/s of each, the best of the rounds; they take turns. Work may say its own seconds."""
    best = dict.fromkeys(work, 0.0)
    for _ in range(ROUNDS):
        for name, function in work.items():
            start = time.perf_counter()
            done = function()
            seconds = time.perf_counter() - start
            count, own = done if isinstance(done, tuple) else (done, None)
            best[name] = max(best[name], count / (own or seconds))
            print(f"{name}: {best[name]:.1f}/s", flush=True)
    return best


def rows_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the lowest cosine of two stores' rows."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def main() -> None:
    """Measure and store."""
    from machine import save

    from mio_export.console.progress import Progress
    from mio_export.embedding import embed
    from mio_export.exporting import export
    from mio_export.metrics import neighbor_agreement
    from mio_export.runtimes.devices import num_threads
    from mio_export.runtimes.timing import fastest
    from mio_export.store import load_embeddings

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    photos = photographs(parser.parse_args().photos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut(photos[::2], folder / "train", NUM_TRAIN, seed=0)
        cut(photos[1::2], folder / "small", NUM_IMAGES, seed=1)
        cut_large(photos, folder / "large")
        encoder = trained(folder / "train", folder / "run")
        precisions = ("fp32", "int8")
        options = {"formats": ("onnx", "openvino"), "precisions": precisions, "images": folder / "small", "limit": 128}
        bundle = export(encoder, folder / "e.mio", **options).bundle
        chosen = {}
        for precision in precisions:
            with fastest(bundle, precision=precision, device="cpu", progress=Progress()) as selected:
                chosen[precision] = selected.choice
        peer = for_fastembed(encoder, folder / "fastembed")

        def embedded(source: str, **options) -> int:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                return stored(source, Path(out) / "store", batch_size=BATCH_SIZE, **options).num_ok

        def stored(source: str, out: Path, *, precision: str = "fp32", decode: str = "full", **options):
            options |= {"runtime": chosen[precision].runtime, "precision": precision, "decode": decode}
            return embed(bundle.path, folder / source, out, **options)

        def fast(processes: int) -> tuple[int, float]:
            return NUM_IMAGES, fastembed(peer, folder / "small", folder / "peer.npy", processes)

        preprocess = encoder.preprocess
        small = rates(
            {
                "model alone": lambda: infer_all(bundle, chosen["fp32"], NUM_IMAGES),
                "int8 model alone": lambda: infer_all(bundle, chosen["int8"], NUM_IMAGES),
                "decoding alone": lambda: decode_all(folder / "small", preprocess, scaled=False),
                "mio embed": lambda: embedded("small"),
                "mio embed, int8": lambda: embedded("small", precision="int8"),
                "fastembed": lambda: fast(1),
                "fastembed, a process per core": lambda: fast(num_threads()),
                "plain PyTorch loop": lambda: plain_loop(folder / "small", encoder),
            }
        )
        large = rates(
            {
                "decoding in full": lambda: decode_all(folder / "large", preprocess, scaled=False),
                "decoding scaled": lambda: decode_all(folder / "large", preprocess, scaled=True),
                "mio embed, full": lambda: embedded("large"),
                "mio embed, scaled": lambda: embedded("large", decode="scaled"),
            }
        )
        stores = {}
        for key, source, options in (
            ("fp32", "small", {}),
            ("int8", "small", {"precision": "int8"}),
            ("full", "large", {}),
            ("scaled", "large", {"decode": "scaled"}),
        ):
            stored(source, folder / key, **options)
            stores[key] = load_embeddings(folder / key).vectors
        settled = stored("large", folder / "auto", decode="auto").info.decode
        megabytes = np.mean([path.stat().st_size for path in (folder / "large").iterdir()]) / 1e6
        peer_vectors = np.load(folder / "peer.npy")
    best_peer = max(small["fastembed"], small["fastembed, a process per core"])
    results = {
        "runtimes": {precision: choice.runtime for precision, choice in chosen.items()},
        "images_per_s": {name: round(rate, 1) for name, rate in {**small, **large}.items()},
        "share of what model and decoding allow": share(small, "mio embed", "model alone"),
        "share, int8": share(small, "mio embed, int8", "int8 model alone"),
        "times the plain loop": small["mio embed"] / small["plain PyTorch loop"],
        "times fastembed at its best": {
            "fp32": small["mio embed"] / best_peer,
            "int8": small["mio embed, int8"] / best_peer,
            "min cosine, fp32 to fastembed": rows_cosine(stores["fp32"], peer_vectors),
            "recall@10, int8 to fp32": neighbor_agreement(stores["fp32"], stores["int8"], k=10),
        },
        "large files": {
            "megabytes each": round(float(megabytes), 2),
            "decoding, times full": large["decoding scaled"] / large["decoding in full"],
            "end to end, times full": large["mio embed, scaled"] / large["mio embed, full"],
            "min cosine": rows_cosine(stores["full"], stores["scaled"]),
            "what auto chose": settled,
        },
    }
    save("embedding", results)


def share(rate: dict[str, float], whole: str, model: str) -> float:
    """Return how much of the bound a pipeline reaches that shares the cores between a model and decoding."""
    return rate[whole] * (1 / rate[model] + 1 / rate["decoding alone"])


if __name__ == "__main__":
    main()
