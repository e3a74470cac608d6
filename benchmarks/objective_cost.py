"""Time and memory of one forward and backward pass of each objective; each in a process of its own.

    python benchmarks/objective_cost.py

The form that MIO's authors published, which broadcasts to (2N, 2N, D), runs beside ours as the peer, at a size where it
still fits. Fails if MIO misses its bounds: 200 ms and 300 MB at N = 1024, D = 128; 1.5 GB at N = 16,384.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

CASES = [
    ("mio", 128, None),
    ("mio authors' form", 128, None),
    ("mio", 1024, None),
    ("mio whole", 1024, 2048),
    ("mio", 16_384, None),
    ("spectral", 1024, None),
    ("minc", 128, None),
    ("minc", 1024, None),
    ("minc", 16_384, None),
]
DIM = 128


def peak_bytes() -> int:
    """Return the highest memory of this process since it was last reset, in bytes (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def authors_form(z0, z1, temperature: float = 0.5):
    """The loss by broadcasting every pair of views to (2N, 2N, D), written anew from the formula."""
    import torch
    import torch.nn.functional as F

    views = torch.cat([z0, z1])
    cosines = F.cosine_similarity(views[:, None], views[None, :], dim=2)
    num_images = len(z0)
    positive = torch.eye(num_images, dtype=torch.bool).repeat(2, 2) & ~torch.eye(2 * num_images, dtype=torch.bool)
    negative = ~torch.eye(num_images, dtype=torch.bool).repeat(2, 2)
    attraction = F.softplus(-cosines[positive] / temperature).mean()
    return attraction + F.softplus(cosines[negative] / temperature).mean()


def measure(name: str, num_images: int, block_size: int | None) -> dict[str, float]:
    """Run one case; seconds (median of 5 after a warm-up) and the growth of memory."""
    import torch

    from mio_export.runtimes.devices import num_threads
    from mio_export.train.objectives import MINCLoss, MIOLoss, SpectralContrastiveLoss

    torch.set_num_threads(num_threads())
    pair = [torch.randn(num_images, DIM).requires_grad_() for _ in range(2)]
    small = [torch.randn(4, DIM).requires_grad_() for _ in range(2)]
    if name == "minc":
        minc = MINCLoss(DIM)
        loss = lambda a, b: minc(a, b, a, b)  # noqa: E731
    elif name == "spectral":
        loss = SpectralContrastiveLoss(10.0, "sphere")
    else:
        loss = authors_form if "authors" in name else MIOLoss(regularizer=0, block_size=block_size or 512)
    loss(*small).backward()  # libraries are loaded before memory is counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_bytes()
    times = []
    for _ in range(2 if num_images > 8192 else 6):
        start = time.perf_counter()
        loss(*pair).backward()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "memory_mb": (peak_bytes() - before) / 1e6}


def main() -> None:
    """Measure every case in its own process, store the table, hold MIO to its bounds."""
    from machine import save

    rows = []
    for case in CASES:
        output = subprocess.run([sys.executable, __file__, json.dumps(case)], check=True, stdout=subprocess.PIPE).stdout
        name, num_images, block_size = case
        rows.append(
            {"objective": name, "num_images": num_images, "dim": DIM, "block_size": block_size, **json.loads(output)}
        )
    save("objective_cost", rows)
    found = {(row["objective"], row["num_images"]): row for row in rows}
    assert found["mio", 1024]["seconds"] < 0.2, found["mio", 1024]
    assert found["mio", 1024]["memory_mb"] < 300, found["mio", 1024]
    assert found["mio", 16_384]["memory_mb"] < 1500, found["mio", 16_384]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
