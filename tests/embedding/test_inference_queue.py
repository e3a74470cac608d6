"""Batches on their way to a runtime, in a CPU's way and in a GPU's, and the batch that a GPU gets."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mio_export.decoding import Decoder
from mio_export.embedding import inference_queue as module
from mio_export.embedding.computing import ImageMemoryError
from mio_export.embedding.inference_queue import InferenceQueue
from mio_export.embedding.pipeline import Embedder, StageTimer
from mio_export.embedding.run import embed
from mio_export.runtimes import open_runtime
from mio_export.runtimes.base import Runtime
from mio_export.runtimes.onnxruntime import OnnxRuntime
from mio_export.runtimes.timing import best_batch
from mio_export.sources import list_images
from mio_export.store import shard_paths

SHAPE = (4, 4, 3)


class Slow(Runtime):
    """Gives each image's first pixel, after a time for each batch and for each image, up to a number of images."""

    def __init__(self, *, per_batch_s=0.0, per_image_s=0.0, most=1_000, error="out of memory"):
        super().__init__(image_shape=SHAPE, embedding_dim=1, device="cpu")
        self._seconds, self._most, self._error = (per_batch_s, per_image_s), most, error
        self.threads = set()

    def _run(self, images):
        if len(images) > self._most:
            raise RuntimeError(self._error)
        self.threads.add(threading.get_ident())
        time.sleep(self._seconds[0] + self._seconds[1] * len(images))
        return images[:, 0, 0, :1].astype(np.float32)


def batches(sizes):
    number = iter(range(sum(sizes)))
    return [{str(index): np.full(SHAPE, index, np.uint8) for index in (next(number) for _ in range(s))} for s in sizes]


@pytest.mark.parametrize("ahead", [False, True])
def test_every_image_gets_its_own_vector_in_order(ahead):
    with InferenceQueue(Slow(per_batch_s=0.002), 4, ahead=ahead) as queue:
        found = [pair for batch in batches([4, 4, 1, 4, 3]) for pair in queue.submit(batch)] + queue.drain()
        assert queue.drain() == []
    names = [name for names, _ in found for name in names]
    assert names == [str(index) for index in range(16)]
    assert np.concatenate([vectors for _, vectors in found]).ravel().tolist() == list(range(16))


def test_the_next_batch_is_gathered_while_a_gpu_computes():
    seconds = {}
    for ahead in (False, True):
        runtime = Slow(per_batch_s=0.05)
        with InferenceQueue(runtime, 4, ahead=ahead) as queue:
            start = time.perf_counter()
            for batch in batches([4] * 10):
                time.sleep(0.05)  # what gathering takes
                queue.submit(batch)
            queue.drain()
            seconds[ahead] = time.perf_counter() - start
        assert (threading.get_ident() in runtime.threads) is not ahead
    assert seconds[True] < 0.8 * seconds[False]


def test_what_fails_in_the_gpus_thread_comes_out():
    with InferenceQueue(Slow(most=2, error="device lost"), 4, ahead=True) as queue:
        queue.submit(batches([4])[0])
        with pytest.raises(RuntimeError, match="device lost"):
            queue.drain()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_that_memory_does_not_hold_is_embedded_image_by_image(ahead):
    with InferenceQueue(Slow(most=2, error="CUDA out of memory. Tried to allocate 2 GiB"), 4, ahead=ahead) as queue:
        found = [pair for batch in batches([4, 2, 4]) for pair in queue.submit(batch)] + queue.drain()
    assert [name for names, _ in found for name in names] == [str(index) for index in range(10)]
    assert np.concatenate([vectors for _, vectors in found]).ravel().tolist() == list(range(10))


@pytest.mark.parametrize("ahead", [False, True])
def test_an_image_that_memory_does_not_hold_alone_is_named(ahead):
    def embedded():
        with InferenceQueue(Slow(most=0, error="bad allocation"), 4, ahead=ahead) as queue:
            return queue.submit(batches([3])[0]) + queue.drain()

    with pytest.raises(ImageMemoryError, match="not enough memory to embed 0 alone"):
        embedded()


def test_both_ways_give_the_same_store(bundle, photos, tmp_path, monkeypatch):
    embed(bundle.path, photos, tmp_path / "a", runtime="onnxruntime", batch_size=3)
    started = InferenceQueue.__init__
    monkeypatch.setattr(
        module.InferenceQueue, "__init__", lambda self, runtime, size: started(self, runtime, size, ahead=True)
    )
    threads = set()
    run = OnnxRuntime._run
    monkeypatch.setattr(OnnxRuntime, "_run", lambda self, x: (threads.add(threading.get_ident()), run(self, x))[1])
    embed(bundle.path, photos, tmp_path / "b", runtime="onnxruntime", batch_size=3)
    assert threads - {threading.get_ident()}  # this thread only settles what is chosen
    a, b = ([path.read_bytes() for path in shard_paths(tmp_path / name)] for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize("ahead", [False, True])
def test_what_the_runtime_takes_is_what_limits(bundle, photos, monkeypatch, ahead):
    started, run, timer = InferenceQueue.__init__, OnnxRuntime._run, StageTimer()
    monkeypatch.setattr(
        module.InferenceQueue, "__init__", lambda self, runtime, size: started(self, runtime, size, ahead=ahead)
    )
    monkeypatch.setattr(OnnxRuntime, "_run", lambda self, images: (time.sleep(0.6), run(self, images))[1])
    with open_runtime(bundle, "onnxruntime") as runtime, ThreadPoolExecutor(2) as pool:
        embedder = Embedder(runtime, Decoder(bundle.manifest.preprocess), pool, batch_size=2, timer=timer)
        embedder.embed(list_images(photos).files[:6])
    assert timer.bottleneck == "infer"


@pytest.mark.parametrize(
    ("runtime", "largest", "expected"),
    [
        (Slow(per_batch_s=0.02, per_image_s=1e-5), 64, 64),
        (Slow(per_batch_s=0.02, per_image_s=1e-5), 48, 32),
        (Slow(per_image_s=0.002), 64, 8),
        (Slow(per_batch_s=0.02, per_image_s=1e-5, most=20), 64, 16),
        (Slow(per_batch_s=0.001), 4, 4),
    ],
    ids=["the largest", "within what was proved", "a larger one gains nothing", "memory ends", "less than the first"],
)
def test_the_batch_is_doubled_while_that_pays(runtime, largest, expected):
    assert best_batch(runtime, largest) == expected


def test_an_error_at_the_first_batch_is_not_hidden():
    with pytest.raises(RuntimeError, match="out of memory"):
        best_batch(Slow(most=2), 64)
