import hashlib
import io
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from mio_export.errors import UsageError
from mio_export.sample import NUM_IMAGES, extract_sample, read_sample

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_it_is_balanced_and_extracts_to_class_folders(tmp_path):
    folder = tmp_path / "images"
    extract_sample(folder)
    counts = Counter(path.parent.relative_to(folder) for path in folder.rglob("*.png"))
    assert len(counts) == 20
    assert {count for place, count in counts.items() if place.parts[0] == "train"} == {500}
    assert {count for place, count in counts.items() if place.parts[0] == "test"} == {100}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    extract_sample(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before


def test_a_folder_with_somebodys_images_is_never_replaced(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists and is not the sample"):
        extract_sample(tmp_path / "images")
    assert (tmp_path / "images" / "mine.jpg").read_bytes() == b"precious"


def test_no_image_appears_twice():
    digests = [hashlib.sha256(data).digest() for split in NUM_IMAGES for data in read_sample(split)]
    assert len(digests) == sum(NUM_IMAGES.values())
    assert len(set(digests)) >= len(digests) - 5  # Fashion-MNIST itself has a few doubles


def test_a_limit_spreads_over_the_classes():
    images = list(read_sample("test", limit=50))
    assert len(images) == 50
    assert len(set(images)) == 50
    image = Image.open(io.BytesIO(images[0]))
    assert (image.size, image.mode) == ((28, 28), "L")


def test_its_licence_lies_beside_it():
    text = (files("mio_export.sample") / "LICENSE").read_text()
    assert "Zalando SE" in text
    assert "MIT License" in text


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_script_makes_the_same_archive_again(tmp_path):
    root = Path(__file__).parent.parent
    target = root / "mio_export" / "sample" / "fashion_mnist.tar.xz"
    code = f"import sys; sys.argv = ['make_sample', {str(DEBIAN)!r}]; sys.path.insert(0, {str(root / 'scripts')!r})\n"
    code += "import make_sample; from pathlib import Path\n"
    code += f"make_sample.TARGET = Path({str(tmp_path / 'again')!r}); make_sample.main()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "again").read_bytes() == target.read_bytes()
