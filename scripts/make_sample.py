"""Build the embedded sample from Debian's package ``dataset-fashion-mnist``.

    apt-get install dataset-fashion-mnist
    python scripts/make_sample.py /usr/share/datasets/fashion-mnist

Takes the first 500 training and the first 100 test images of each class, in file order, and writes them as PNGs named
``train/<class>/<index>.png`` into ``mio_export/sample/fashion_mnist.tar.xz``. The same input gives the same bytes.
"""

import gzip
import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
SPLITS = {"train": ("train", 500), "test": ("t10k", 100)}
TARGET = Path(__file__).parent.parent / "mio_export" / "sample" / "fashion_mnist.tar.xz"


def read_idx(path: Path, header_bytes: int) -> np.ndarray:
    """Return the raw bytes of a gzipped IDX file, its header skipped; shape (num_bytes,), uint8."""
    return np.frombuffer(gzip.decompress(path.read_bytes())[header_bytes:], dtype=np.uint8)


def png_members(source: Path) -> list[tuple[str, bytes]]:
    """Return (name, PNG bytes) of every chosen image, in archive order."""
    members = []
    for split, (prefix, num_per_class) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
        for label, name in enumerate(CLASSES):
            for index in np.flatnonzero(labels == label)[:num_per_class]:
                buffer = io.BytesIO()
                Image.fromarray(images[index]).save(buffer, "PNG", compress_level=0)
                members.append((f"{split}/{name}/{index:05d}.png", buffer.getvalue()))
    return members


def main() -> None:
    """Write the archive."""
    source = Path(sys.argv[1])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in png_members(source):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    TARGET.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
