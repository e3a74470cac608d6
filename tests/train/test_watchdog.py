from dataclasses import replace

import pytest

from mio_export.progress import Progress
from mio_export.train.watchdog import Health, diagnosis

HEALTHY = Health(
    effective_rank=40,
    effective_rank_projections=40,
    spread=0.5,
    spread_projections=0.9,
    norm_projections=20,
    alignment=0.3,
    uniformity=-2.5,
)


class Said(Progress):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"spread_projections": 0.05}, "constant collapse"),
        ({"spread_projections": 0.0, "effective_rank_projections": 1.0}, "constant collapse"),
        ({"effective_rank_projections": 1.5}, "dimensional collapse"),
        ({"norm_projections": 1e-6}, "zero norm"),
        ({"norm_projections": 0.0, "spread_projections": 0.0}, "zero norm"),
        ({"norm_projections": float("nan")}, "zero norm"),
    ],
)
def test_each_collapse_is_named(change, cause):
    assert diagnosis(replace(HEALTHY, **change), HEALTHY).startswith(cause)


def test_a_healthy_encoder_gives_no_alarm():
    assert diagnosis(HEALTHY, HEALTHY) is None
