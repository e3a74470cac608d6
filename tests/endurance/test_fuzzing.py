"""Mutants of everything that comes from outside: no traceback, no hang, bounded memory, one row for each entry.

MIO_FUZZ_MUTANTS says how many of each kind, 20,000 without it. ``python tests/endurance/fuzz_block.py KIND NUMBER 1
BUNDLE STORE FOLDER`` shows one again.
"""

import os
import time

import pytest
from watched import PATIENCE_S, fuzz, fuzz_block, in_words

from mio_export.embedding import embed

KINDS = ("tar", "zip", "parquet", "list", "jpeg", "png", "tiff", "webp", "exif", "manifest", "store")
NUM_MUTANTS = int(os.environ.get("MIO_FUZZ_MUTANTS", "20000"))


def test_the_first_forty_mutants_of_each_kind_do_no_harm(bundle, photos, tmp_path, memory_folder):
    embed(bundle.path, photos, tmp_path / "store", runtime="onnxruntime", decode="full", shard_size=8)
    given = (bundle.path, tmp_path / "store")
    found = fuzz_block("every", 0, 40 * len(KINDS), given, memory_folder, PATIENCE_S)
    assert not found, in_words(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutant_does_harm(kind, tiny, tiny_store, memory_folder):
    start = time.monotonic()
    found = fuzz(kind, NUM_MUTANTS, (tiny, tiny_store), memory_folder)
    print(f"{kind}: {NUM_MUTANTS:,} mutants in {time.monotonic() - start:.0f} s, {len(found):,} findings")  # noqa: T201
    assert not found, f"{len(found):,} findings of {NUM_MUTANTS:,} {kind} mutants\n{in_words(found)}"


@pytest.mark.slow
def test_the_search_finds_a_hang_a_crash_memory_and_a_traceback(tiny, tiny_store, memory_folder):
    given = (tiny, tiny_store)
    for kind, what in (
        ("planted-crash", "the process died"),
        ("planted-memory", "MiB of memory"),
        ("planted-traceback", "IndexError at fuzz_block: planted"),
        ("planted-hang", "no answer in 2 s"),
    ):
        patience_s = 2 if kind == "planted-hang" else PATIENCE_S
        ((number, said),) = fuzz(kind, 6, given, memory_folder, block=6, patience_s=patience_s)
        assert number == 3
        assert what in said
