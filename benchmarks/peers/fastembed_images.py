"""fastembed over a folder of images; run in an environment of its own by ``benchmarks/embedding.py``.

    python fastembed_images.py MODEL_FOLDER IMAGES BATCH_SIZE PARALLEL OUT.npy

Prints the seconds that embedding took, without loading the model; PARALLEL is a number of processes, 1 for none.
"""

import sys
import time
from pathlib import Path

import numpy as np
from fastembed import ImageEmbedding

if __name__ == "__main__":
    model, images, batch_size, parallel, out = sys.argv[1:]
    files = [str(path) for path in sorted(Path(images).iterdir())]
    embedding = ImageEmbedding("Qdrant/resnet50-onnx", specific_model_path=model, cuda=False)
    list(embedding.embed(files[: int(batch_size)], batch_size=int(batch_size)))
    start = time.perf_counter()
    processes = int(parallel) if int(parallel) > 1 else None
    vectors = np.stack(list(embedding.embed(files, batch_size=int(batch_size), parallel=processes)))
    print(time.perf_counter() - start)
    np.save(out, vectors)
