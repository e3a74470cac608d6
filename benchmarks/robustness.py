"""What this version costs beside an older one: embedding small images, and resuming a store of a million files.

    python benchmarks/robustness.py --old COMMIT [--images 2000] [--files 1000000] [--rounds 10]

The older code is a worktree of COMMIT. Each version makes its own bundle, of the same weights, and its own store. Runs
alternate (old new, new old, ...), each in a process of its own; what is timed is ``embed`` alone, without imports. The
ratio is the median over the pairs, with a 95 % bootstrap interval. Fails if a ratio is above 1.03.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
ALLOWED = 1.03
SIDE = 64
SHARD_SIZE = 4096

BUNDLE = """
import sys
from pathlib import Path
import torch
from mio_export.exporting import export
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
torch.manual_seed(0)
encoder = build_encoder("small", Preprocess(image_size=32), stem="small").eval()
images, path = map(Path, sys.argv[1:])
export(encoder, path, formats=("onnx",), images=images, max_batch=32, limit=64)
"""
STORE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from mio_export.embedding import embed
from mio_export.sources import list_images
from mio_export.store import Row, read_info, shard_path, write_info, write_shard
bundle, images, source, out, size = *map(Path, sys.argv[1:5]), int(sys.argv[5])
embed(bundle, images, out.parent / "few", runtime="onnxruntime", decode="full", shard_size=size)
info = read_info(out.parent / "few")
out.mkdir()
write_info(out, info)
files = list_images(source).files
vectors = np.ones((size, info.embedding_dim), np.float32)
for start in range(0, len(files), size):
    rows = [
        Row(key=f.key, size=f.size, mtime_ns=f.mtime_ns, sha256=f"{i:064x}", status="ok", stage=None, reason=None)
        for i, f in enumerate(files[start : start + size], start)
    ]
    write_shard(shard_path(out, start // size), info, rows, vectors[: len(rows)])
"""
TIMED = """
import json, os, sys, time
from mio_export import __file__ as origin
from mio_export.embedding import embed
bundle, source, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
import onnxruntime
before, start = os.times(), time.perf_counter()
result = embed(bundle, source, out, **options)
wall, after = time.perf_counter() - start, os.times()
processor = sum(after[:4]) - sum(before[:4])
print(json.dumps({"origin": origin, "wall": wall, "processor": processor, "embedded": result.num_embedded}))
"""


def child(code: str, tree: Path, *arguments: object) -> str:
    """Run a program with the version that lies in a tree; return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr[-3000:]}")
    return done.stdout


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out beside this one."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def write_images(folder: Path, count: int) -> Path:
    """Write small JPEGs, each of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def write_empty_files(folder: Path, count: int) -> Path:
    """Write files with the suffix of an image, a thousand a folder."""
    for start in range(0, count, 1000):
        inner = folder / f"{start // 1000:05d}"
        inner.mkdir(parents=True)
        for index in range(start, min(start + 1000, count)):
            (inner / f"image-{index:07d}.jpg").touch()
    return folder


def compared(trees: dict[str, Path], measure: Callable[[str], dict[str, float]], rounds: int) -> dict[str, object]:
    """Time both versions in turn; return medians, and the ratio of each pair's new to old with its interval."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(rounds):
        for name in ("old", "new") if number % 2 else ("new", "old"):
            found[name].append(measure(name))
    result: dict[str, object] = {"rounds": rounds}
    for kind in ("wall", "processor"):
        old, new = (np.array([run[kind] for run in found[name]]) for name in ("old", "new"))
        draws = np.random.default_rng(0).integers(0, rounds, (10_000, rounds))
        low, high = np.percentile(np.median((new / old)[draws], axis=1), [2.5, 97.5])
        result[kind] = {
            "old_s": statistics.median(old),
            "new_s": statistics.median(new),
            "ratio": float(np.median(new / old)),
            "interval": [float(low), float(high)],
        }
    return result


def measured(trees: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Measure both kinds of work for both versions."""
    images = write_images(folder / "images", options.images)
    empty = write_empty_files(folder / "empty", options.files)
    for name, tree in trees.items():
        (folder / name).mkdir()
        child(BUNDLE, tree, images, folder / name / "encoder.mio")
        child(STORE, tree, folder / name / "encoder.mio", images, empty, folder / name / "store", SHARD_SIZE)

    def embedding(name: str) -> dict[str, float]:
        out = folder / name / "fresh"
        shutil.rmtree(out, ignore_errors=True)
        chosen = {"runtime": "onnxruntime", "decode": "full"}
        run = json.loads(child(TIMED, trees[name], folder / name / "encoder.mio", images, out, json.dumps(chosen)))
        assert run["embedded"] == options.images, run
        assert Path(run["origin"]).is_relative_to(trees[name]), run
        return run

    def resuming(name: str) -> dict[str, float]:
        bundle, store = folder / name / "encoder.mio", folder / name / "store"
        run = json.loads(child(TIMED, trees[name], bundle, empty, store, "{}"))
        assert run["embedded"] == 0, run
        return run

    return {
        f"embed {options.images:,} images of {SIDE} px": compared(trees, embedding, options.rounds),
        f"resume a store of {options.files:,} files": compared(trees, resuming, options.rounds),
    }


def main() -> None:
    """Measure, store, hold to the bound."""
    sys.path.insert(0, str(Path(__file__).parent))
    from machine import save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="HEAD", help="commit to compare with")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that gigabytes in memory are given back
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        folder = Path(name).resolve()
        with worktree(options.old, folder / "tree") as tree:
            results = measured({"old": tree, "new": ROOT}, folder, options)
        commit = subprocess.run(
            ["git", "rev-parse", options.old], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
    save("robustness", {"old": commit, **results})
    slow = {name: result for name, result in results.items() if result["wall"]["ratio"] > ALLOWED}
    assert not slow, slow


if __name__ == "__main__":
    main()
