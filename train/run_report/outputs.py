"""What a finished training run leaves for its report: the spectrum of its outputs and the views of a few images."""

import json
from pathlib import Path

import torch

from mio_export.files import staged_file, write_text
from mio_export.metrics import spectrum
from mio_export.preprocess import Pixels
from mio_export.sources import evenly_spaced
from mio_export.train.module import SelfSupervised
from mio_export.train.run_files import SPECTRUM, VIEWS
from mio_export.train.run_report.report import write_report
from mio_export.train.run_report.views_sheet import views_sheet
from mio_export.train.views import two_views

_SHOWN = 12


def write_outputs(run: Path, module: SelfSupervised, clean: Pixels) -> None:
    """Write ``spectrum.json``, ``views.png`` and ``report.html``.

    Args:
        run: the run's folder.
        module: what was trained; it is left in eval mode.
        clean: training images as they are held, uint8, shape (N, H, W, C).
    """
    recipe, size = module.recipe, module.view_size
    encoder = module.online.encoder
    module.eval()
    pixels = torch.from_numpy(clean).permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != size:
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    untrained = encoder.untrained(seed=recipe.seed).eval()
    with torch.inference_mode():
        rows = {
            "features": encoder.embed_pixels(pixels.to(module.device)),
            "projections": module.online(pixels.to(module.device)),
            "untrained": untrained.embed_pixels(pixels),
        }
    spectra = {name: spectrum(values.float().cpu().numpy()).tolist() for name, values in rows.items()}
    write_text(run / SPECTRUM, json.dumps(spectra) + "\n")
    images = torch.from_numpy(clean[evenly_spaced(range(len(clean)), _SHOWN)])
    views = two_views(images, recipe.views, torch.Generator().manual_seed(recipe.seed), size=size)
    first, second = (view.round().byte().permute(0, 2, 3, 1).numpy() for view in views)
    with staged_file(run / VIEWS) as temporary:
        temporary.write_bytes(views_sheet(images.numpy(), first, second))
    write_report(run)
