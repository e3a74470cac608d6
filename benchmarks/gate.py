"""Whether parity's gate can be fooled, and whether it cries wolf: clean and faulty exports of several encoders.

    python benchmarks/gate.py

60 clean exports (three backbones, 20 seeds) through ``export``: none may be refused. Five backbones at output scales
of 1e-3, 1 and 1e3, once clean and once with random relative noise of 1e-3 on one layer, judged by the one
configuration that there is; beside it what a fixed largest absolute error of 1e-5 and of 5e-3 would have said.
"""

import copy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

CLEAN = ("small", "resnet18", "timm/mobilenetv3_small_050")
BACKBONES = {
    "small": 64,
    "resnet18": 64,
    "timm/mobilenetv3_small_050": 64,
    "timm/test_vit": 160,
    "timm/test_convnext": 160,
}
SEEDS = range(20)
SCALES = (1e-3, 1.0, 1e3)
NOISE = 1e-3
FIXED = (1e-5, 5e-3)
MAX_BATCH = 8
NUM_IMAGES = 32


def build(backbone, size, seed):
    """Return an encoder with weights of its own, its batch norms having seen images, and those images."""
    import torch

    from mio_export.models import build_encoder
    from mio_export.parity.images import parity_images
    from mio_export.preprocess import Preprocess

    torch.manual_seed(seed)
    encoder = build_encoder(
        backbone, Preprocess(image_size=size, resize_size=size), stem="small" if backbone == "small" else "imagenet"
    )
    images, _ = parity_images(encoder.preprocess, limit=NUM_IMAGES)
    encoder.train()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):  # ConvNeXt starts its blocks at 1e-6, where noise is rightly invisible
                parameter.fill_(1.0)
        for _ in range(3):
            encoder(torch.from_numpy(images.pixels))
    return encoder.eval(), images


def clean_exports():
    """Export every encoder; return how many were refused, with the largest share of its budget that one used."""
    from mio_export.errors import GateError
    from mio_export.exporting import export

    rows = {}
    for backbone in CLEAN:
        refused, used = [], 0.0
        for seed in SEEDS:
            encoder, _ = build(backbone, 64, seed)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    (report,) = export(encoder, Path(folder) / "x.mio", limit=NUM_IMAGES, max_batch=MAX_BATCH).reports
                    worst = max(c.rms_relative_error for c in report.comparisons)
                    used = max(used, worst / report.budget.max_rms_error)
                except GateError as error:
                    refused.append(f"seed {seed}: {error}")
        rows[backbone] = {"exports": len(SEEDS), "refused": refused, "largest_share_of_budget": used}
        print(backbone, rows[backbone], flush=True)
    return rows


def scaled(encoder, scale):
    """Return a copy whose embeddings are ``scale`` times as large."""
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, pixels):
            return scale * self.backbone(pixels)

    changed = copy.deepcopy(encoder)
    changed.backbone = Scaled(changed.backbone).eval()
    return changed


def noisy(encoder, seed):
    """Return a copy with random relative noise on the weights of one layer in the middle."""
    import torch

    changed = copy.deepcopy(encoder)
    layers = [module for module in changed.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    weight = layers[len(layers) // 2].weight
    with torch.no_grad():
        weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return changed


def judged(encoder, exported, images, folder):
    """Return the report on an ONNX file of ``exported``, held to ``encoder``."""
    from mio_export.bundle import Artifact, Manifest, ParitySummary
    from mio_export.exporting.onnx import onnx_from_encoder, save_onnx
    from mio_export.parity.gate import prove
    from mio_export.parity.reference import Reference

    path = folder / "encoder.onnx"
    save_onnx(onnx_from_encoder(exported, max_batch=MAX_BATCH)[0], path, provenance="{}")
    unproven = ParitySummary(verdict="unproven", devices=(), report="", report_sha256="")
    artifact = Artifact(file=path.name, format="onnx", precision="fp32", sha256="", parity=unproven, tools={})
    manifest = Manifest(
        name="x", encoder=encoder.spec, preprocess=encoder.preprocess, weights_sha256="", space="", max_batch=MAX_BATCH
    )
    reference = Reference.of(encoder, images, weights_sha256="")
    return prove(folder, artifact, manifest=manifest, reference=reference).report


def scales_and_noise():
    """Judge every backbone at every scale, clean and with noise."""
    rows = []
    for backbone, size in BACKBONES.items():
        base, images = build(backbone, size, 0)
        for scale in SCALES:
            encoder = scaled(base, scale)
            for kind, exported in (("clean", encoder), ("noise", noisy(encoder, 1))):
                with tempfile.TemporaryDirectory() as folder:
                    report = judged(encoder, exported, images, Path(folder))
                error = max(c.max_abs_error for c in report.comparisons)
                rows.append(
                    {
                        "backbone": backbone,
                        "scale": scale,
                        "kind": kind,
                        "verdict": report.verdict,
                        "rms_relative_error": max(c.rms_relative_error for c in report.comparisons),
                        "budget": report.budget.max_rms_error,
                        "max_abs_error": error,
                        **{f"fixed {bound:g}": "proved" if error <= bound else "refused" for bound in FIXED},
                    }
                )
                print(rows[-1], flush=True)
    return rows


def right(rows, column):
    """Return how many clean exports a rule passed and how many faulty ones it refused."""
    passed = sum(row[column] == "proved" for row in rows if row["kind"] == "clean")
    refused = sum(row[column] == "refused" for row in rows if row["kind"] == "noise")
    return {"clean passed": passed, "noise refused": refused, "of each": len(rows) // 2}


def main():
    """Store both tables; fail if the gate erred."""
    from machine import save

    rows = scales_and_noise()
    summary = {rule: right(rows, rule) for rule in ("verdict", *(f"fixed {bound:g}" for bound in FIXED))}
    clean = clean_exports()
    save("gate", {"rules": summary, "clean exports": clean, "rows": rows})
    print(summary)
    assert not any(row["refused"] for row in clean.values())
    assert summary["verdict"]["clean passed"] == summary["verdict"]["noise refused"] == len(rows) // 2


if __name__ == "__main__":
    main()
