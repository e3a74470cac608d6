"""Encoders: backbones, projection heads, the Encoder with its decode contract, its checkpoint."""

from mio_export.models.backbones import build_backbone
from mio_export.models.checkpoint import load_encoder, load_projector_encoder, save_encoder
from mio_export.models.encoder import Encoder, build_encoder
from mio_export.models.weights import encoder_from_weights

__all__ = [
    "Encoder",
    "build_backbone",
    "build_encoder",
    "encoder_from_weights",
    "load_encoder",
    "load_projector_encoder",
    "save_encoder",
]
