"""Ask a running server for embeddings and compare them with the encoder's own; needs ``tritonclient[http]`` only.

python smoke_test.py [HOST:PORT]     exit status 0: they agree; 1: they do not.
"""
# ruff: noqa: T201

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http


def main() -> int:
    """Run the test; return the exit status."""
    folder = Path(__file__).parent / "smoke"
    expected = json.loads((folder / "expected.json").read_text())
    client = tritonclient.http.InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "localhost:8000")
    parameters = client.get_model_config(expected["model"])["parameters"]
    failed = False
    for name, value in expected["parameters"].items():
        if (found := parameters.get(name, {}).get("string_value")) != value:
            print(f"{name}: the server has {found}, this folder {value}")
            failed = True
    names = list(expected["embeddings"])
    data = np.array([[(folder / name).read_bytes()] for name in names], dtype=object)
    files = tritonclient.http.InferInput("files", list(data.shape), "BYTES")
    files.set_data_from_numpy(data)
    found = client.infer(expected["model"], [files]).as_numpy("embeddings").astype(np.float64)
    for name, row in zip(names, found, strict=True):
        reference = np.array(expected["embeddings"][name])
        cosine = row @ reference / np.linalg.norm(row) / np.linalg.norm(reference)
        agrees = bool(cosine >= expected["min_cosine"])  # NaN does not
        print(f"{name}: cosine {cosine:.7f}{'' if agrees else ', FAILED'}")
        failed |= not agrees
    print(f"{'FAILED' if failed else 'passed'}: at least {expected['min_cosine']:.7f} is asked for")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
