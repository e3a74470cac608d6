"""fastembed over a folder of images; run in an environment of its own by ``benchmarks/embedding.py``.

    python fastembed_images.py MODEL_FOLDER IMAGES BATCH_SIZE PARALLEL OUT.npy

Prints the seconds from loading the model to the last vector; PARALLEL is a number of processes, 1 for none.
"""

import sys
import time
from pathlib import Path

import numpy as np
from fastembed import ImageEmbedding

if __name__ == "__main__":
    model, images, batch_size, parallel, out = sys.argv[1:]
    files = [str(path) for path in sorted(Path(images).iterdir())]
    start = time.perf_counter()
    embedding = ImageEmbedding("Qdrant/resnet50-onnx", specific_model_path=model, cuda=False)
    processes = int(parallel) if int(parallel) > 1 else None
    vectors = np.stack(list(embedding.embed(files, batch_size=int(batch_size), parallel=processes)))
    print(time.perf_counter() - start)
    np.save(out, vectors)
