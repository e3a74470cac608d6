"""What an export was asked for: formats and precisions, checked, and put into the order in which they are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from mio_export.bundle import Format, Precision
from mio_export.errors import UsageError
from mio_export.runtimes.backends import check_installed
from mio_export.runtimes.tensorrt import compute_capability

PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16", "bf16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16"),
    "pt2": ("fp32", "bf16"),
    "torchscript": ("fp32", "bf16"),
}
"""What each format can compute in, in the order in which they are made: the ONNX graph is the source of three others.

PyTorch's own formats have no fp16: its range would need fp32 islands, which only the ONNX graph gets.
"""
_NATIVE: frozenset[Format] = frozenset({"pt2", "torchscript"})
"""Formats that PyTorch writes without an ONNX graph."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One artifact to make."""

    format: Format
    precision: Precision
    capability: str | None = None

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{self.format} {self.precision}" + (f" for {self.capability}" if self.capability else "")


def orders(formats: Sequence[str], precisions: Sequence[str], capabilities: Sequence[str]) -> list[Order]:
    """Return what is to be made, the ONNX graphs that others are made from included.

    A precision that a format does not have is left out if another of the given formats has it.

    Raises:
        UsageError: a format or precision is not known, or none of the formats has a precision.
        MissingBackendError: what builds a format is not installed.
    """
    for kind, values, allowed in (
        ("format", formats, get_args(Format)),
        ("precision", precisions, get_args(Precision)),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown or not values:
            raise UsageError(f"{kind} must be one of {', '.join(allowed)}; got {', '.join(unknown) or 'none'}")
    for precision in precisions:
        if not any(precision in PRECISIONS[cast(Format, name)] for name in formats):
            raise UsageError(f"{', '.join(formats)} has no {precision}; see: mio export --help")
    for name in formats:
        check_installed(cast(Format, name))
    if not capabilities and any(name.startswith("tensorrt") for name in formats):
        capabilities = [_capability_here()]
    return list(_made(set(formats), set(precisions), capabilities))


def _capability_here() -> str:
    found = compute_capability()
    if found is None:
        raise UsageError("no NVIDIA GPU is visible here; name those to build engines for: --capability 8.9")
    return found


def _made(formats: set[str], precisions: set[str], capabilities: Sequence[str]) -> Iterator[Order]:
    asked = [(f, p) for f, available in PRECISIONS.items() if f in formats for p in available if p in precisions]
    graphs = {source(f, p) for f, p in asked if f not in _NATIVE}
    yield from (Order(format="onnx", precision=p) for p in PRECISIONS["onnx"] if p in graphs)
    for name, precision in asked:
        if name.startswith("tensorrt"):
            yield from (Order(format=name, precision=precision, capability=number) for number in capabilities)
        elif name != "onnx":
            yield Order(format=name, precision=precision)


def source(format: Format, precision: Precision) -> Precision:
    """Return which ONNX graph an artifact is made from: OpenVINO computes the fp32 graph in bf16."""
    return "fp32" if (format, precision) == ("openvino", "bf16") else precision
