"""How much of training is training: views, the whole loop, and end to end against the usual pipeline.

    python benchmarks/training_speed.py

Everything in one run on one machine. The peer is what lightly's own examples do: torchvision transforms image by image
in a DataLoader, one loss from lightly. Fails if views alone are not at least 10 times as fast as that pipeline, or the
whole loop does not reach 85 % of the same model fed with ready tensors. Also measures a step's time by batch size for
MINC, and memory by batch size for blocked MIO; draws both into ``results/training_speed.html``.
"""

import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SIZE, BATCH, STEPS = 28, 128, 12


def images(num_images: int, size: int = SIZE, channels: int = 1):
    """Smooth random images, uint8, shape (N, H, W, C)."""
    import torch

    coarse = torch.rand(num_images, channels, 7, 7, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (255 * fine).byte().permute(0, 2, 3, 1).contiguous()


def median_s(work, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def torchvision_pipeline(pixels, batch_size: int):
    """A DataLoader that draws two views of each image with torchvision, as examples do; no workers, like ours."""
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(pixels.shape[1], scale=(0.4, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4)], p=0.4),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
        ]
    )
    pictures = [Image.fromarray(p.squeeze(-1).numpy() if p.shape[-1] == 1 else p.numpy()) for p in pixels]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(pictures)

        def __getitem__(self, index):
            return transform(pictures[index]), transform(pictures[index])

    return torch.utils.data.DataLoader(Pairs(), batch_size=batch_size)


def views_alone() -> dict[str, float]:
    """Microseconds a view, ours and torchvision's."""
    import torch

    from mio_export.train.views import ViewConfig, two_views

    pixels = images(512)
    generator = torch.Generator().manual_seed(0)
    ours = median_s(lambda: [two_views(batch, ViewConfig(), generator) for batch in pixels.split(BATCH)], 5)
    peer = median_s(lambda: [None for _ in torchvision_pipeline(pixels, BATCH)], 3)
    return {"ours_us": 1e6 * ours / 1024, "torchvision_us": 1e6 * peer / 1024, "ratio": peer / ours}


def module_for(objective: str, backbone: str, size: int, channels: int):
    """An untrained module and its optimiser."""
    import torch

    from mio_export.train import recipe_from_dict
    from mio_export.train.cost import build_module, contract, settled
    from mio_export.train.optimizers import build_optimizer

    recipe = recipe_from_dict(
        {"objective": objective, "backbone": backbone, "image_size": size, "channels": channels, "precision": "fp32"}
    )
    recipe = settled(recipe, None, "cpu")
    torch.manual_seed(0)
    module = build_module(recipe, contract(recipe), num_batches=STEPS)
    return module, build_optimizer([module.online, module.predictor], recipe)


def ready_tensors(objective: str, backbone: str, size: int, channels: int, batch_size: int) -> float:
    """Seconds a step of the bare model on views that are there already."""
    from lightly.models.utils import update_momentum

    module, optimizer = module_for(objective, backbone, size, channels)
    view = images(batch_size, size, channels).permute(0, 3, 1, 2).float()

    def step() -> None:
        optimizer.zero_grad()
        module.compare(view, view.flip(3)).backward()
        optimizer.step()
        if module.target is not None:
            update_momentum(module.online, module.target, m=0.98)

    return median_s(step, STEPS)


def whole_loop(objective: str, backbone: str, size: int, channels: int, batch_size: int) -> dict[str, float]:
    """Seconds a step of ``train`` itself, by its own clock from batch to batch, and the watchdog's share."""
    import tempfile

    import numpy as np
    from PIL import Image

    from mio_export.train import recipe_from_dict, train
    from mio_export.train.recorder import Recorder
    from mio_export.train.watchdog import Watchdog

    ends, looks = [], []
    end_batch, look = Recorder.on_train_batch_end, Watchdog.look

    def timed_end(self, *arguments) -> None:
        end_batch(self, *arguments)
        ends.append(time.perf_counter())

    def timed_look(self, module):
        start = time.perf_counter()
        found = look(self, module)
        looks.append(time.perf_counter() - start)
        return found

    Recorder.on_train_batch_end, Watchdog.look = timed_end, timed_look
    try:
        with tempfile.TemporaryDirectory() as folder:
            for index, pixels in enumerate(images((STEPS + 1) * batch_size * 5 // 4, size, channels).numpy()):
                (Path(folder) / "data").mkdir(exist_ok=True)
                Image.fromarray(np.squeeze(pixels)).save(Path(folder) / "data" / f"{index:05d}.png")
            settings = {"objective": objective, "backbone": backbone, "batch_size": batch_size, "epochs": 1}
            recipe = recipe_from_dict({**settings, "precision": "fp32"})
            train(recipe, Path(folder) / "data", Path(folder) / "run")
    finally:
        Recorder.on_train_batch_end, Watchdog.look = end_batch, look
    steps = [b - a for a, b in pairwise(ends)]
    return {"step_s": statistics.median(steps), "watchdog_s": statistics.median(looks)}


def peer_loop(backbone: str, size: int, channels: int, batch_size: int) -> float:
    """Seconds a step end to end with torchvision's pipeline and lightly's NT-Xent, the same model and optimiser."""
    from lightly.loss import NTXentLoss

    module, optimizer = module_for("simclr", backbone, size, channels)
    loss, loader = NTXentLoss(0.2), torchvision_pipeline(images(4 * batch_size, size, channels), batch_size)
    times, start = [], time.perf_counter()
    import torch

    for first, second in loader:
        optimizer.zero_grad()
        z0, z1 = module.online(torch.cat([first, second])).chunk(2)
        loss(z0, z1).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return statistics.median(times[1:])


def minc_by_batch() -> dict[int, float]:
    """Seconds of MINC's loss, forward and backward, by batch size."""
    import torch

    from mio_export.train.objectives import MINCLoss

    found = {}
    for num_images in (256, 512, 1024, 2048, 4096, 8192):
        loss, z = MINCLoss(512), [torch.randn(num_images, 512).requires_grad_() for _ in range(4)]
        found[num_images] = median_s(lambda loss=loss, z=z: loss(*z).backward(), 3)
    return found


def mio_memory(num_images: int) -> float:
    """Megabytes that MIO's loss takes at most, in a process of its own."""
    code = (
        "import json; from objective_cost import measure; "
        f"print(json.dumps(measure('mio', {num_images}, 512)['memory_mb']))"
    )
    folder = Path(__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    return float(json.loads(out))


def slope(values: dict[int, float]) -> float:
    """Exponent p of value ~ size^p over the upper half, by least squares on logs."""
    import numpy as np

    sizes = sorted(values)[len(values) // 2 - 1 :]
    return float(np.polyfit(np.log(sizes), np.log([values[size] for size in sizes]), 1)[0])


def plot(minc: dict[int, float], mio: dict[int, float]) -> str:
    """Both curves as a page."""
    from mio_export.pages import Figure, Line, line_chart
    from mio_export.pages.html import environment

    curves = {
        "MINC, ms for a forward and backward pass (D = 512)": [(n, 1e3 * s) for n, s in minc.items()],
        "MIO in blocks, MB at most (D = 128)": list(mio.items()),
    }
    charts = [
        Figure(
            picture=line_chart(
                [Line(name=name, points=points)],
                title=name,
                x_label="images in a batch",
                x_limits=(0, max(x for x, _ in points)),
            ),
            meaning=name,
        )
        for name, points in curves.items()
    ]
    page = (
        '{% extends "base.html" %}{% from "parts.html" import figure %}'
        "{% block body %}<h1>{{ title }}</h1>{% for chart in charts %}{{ figure(chart) }}{% endfor %}{% endblock %}"
    )
    return environment().from_string(page).render(title="Cost by batch size", charts=charts)


def main() -> None:
    """Measure everything, store it, hold the bounds."""
    import torch
    from machine import save

    from mio_export.runtimes.devices import num_threads

    torch.set_num_threads(num_threads())
    results = {"views": views_alone()}
    print(results, flush=True)
    for name, case in {"small net": ("small", SIZE, 1, BATCH), "resnet18": ("torchvision/resnet18", 32, 3, 16)}.items():
        loop = whole_loop("simclr", *case)
        ready, peer = ready_tensors("simclr", *case), peer_loop(*case)
        results[name] = {
            "ready_tensors_s": ready,
            "whole_loop_s": loop["step_s"],
            "share_of_ready": ready / loop["step_s"],
            "peer_s": peer,
            "times_the_peer": peer / loop["step_s"],
            "watchdog_share_of_100_steps": loop["watchdog_s"] / (100 * loop["step_s"]),
        }
        print(name, results[name], flush=True)
    minc, mio = minc_by_batch(), {n: mio_memory(n) for n in (1024, 2048, 4096, 8192, 16_384)}
    results["minc_step_s_by_batch"] = minc
    results["mio_memory_mb_by_batch"] = mio
    results["exponents"] = {"minc time": slope(minc), "mio memory": slope(mio)}
    save("training_speed", results)
    (Path(__file__).parent / "results" / "training_speed.html").write_text(plot(minc, mio))
    assert results["views"]["ratio"] >= 10, results["views"]
    assert results["small net"]["share_of_ready"] >= 0.85, results["small net"]
    assert results["exponents"]["minc time"] < 1.2, results["exponents"]
    assert results["exponents"]["mio memory"] < 1.2, results["exponents"]


if __name__ == "__main__":
    main()
