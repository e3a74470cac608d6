import re
from dataclasses import fields, replace

import pytest

from mio_export.bundle import EncoderSpec, ProjectorSpec, space_fingerprint
from mio_export.errors import UsageError
from mio_export.preprocess import Preprocess

PREPROCESS = Preprocess(image_size=32, channels=1, mean=(0.286,), std=(0.353,))
ENCODER = EncoderSpec(backbone="small", stem="small", embedding_dim=256)
PROJECTOR = ProjectorSpec(hidden_dim=64, output_dim=32, num_layers=2, ordered=True, keep=8)


def fingerprint(encoder):
    return space_fingerprint(weights_sha256="0" * 64, encoder=encoder, preprocess=PREPROCESS)


def test_the_fingerprint_of_an_encoder_without_a_projector_stays_what_it_was():
    # written down before encoders could have projectors: stores of that time must still fit
    assert fingerprint(ENCODER) == "c938422daf7b5e5f291d09bcd2285a63e975aec2381f2e4a9d0872e6797283b3"


def test_every_part_of_a_projector_is_in_the_fingerprint():
    changes = {"hidden_dim": 65, "output_dim": 33, "num_layers": 3, "norm": False, "ordered": False, "keep": 9}
    assert changes.keys() == {field.name for field in fields(ProjectorSpec)}
    projectors = [None, PROJECTOR, *(replace(PROJECTOR, **{name: value}) for name, value in changes.items())]
    assert len({fingerprint(replace(ENCODER, projector=projector)) for projector in projectors}) == len(projectors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep must be 1 to 32, the width of the projections; got 0"),
        ({"keep": 33}, "keep must be 1 to 32, the width of the projections; got 33"),
        ({"num_layers": 0}, "num_layers must be 1 or more, got 0"),
    ],
)
def test_a_projector_keeps_one_of_its_projections_or_more(change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        replace(PROJECTOR, **change)
