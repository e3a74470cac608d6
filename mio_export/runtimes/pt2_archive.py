"""The one shape of ``.pt2`` that is written and read here: a graph of ATen operators and raw tensors, no code.

PyTorch's own reader would unpickle sample inputs, constants and weights, evaluate symbolic sizes, guards and node names
as Python, import what pytree specifications name, and call any function below ``torch``
(``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/serialize.py``, ``torch/utils/_pytree.py`` of 2.15).
So the archive is read and checked first, member by member and string by string, and PyTorch is given a new one that is
made of what was checked.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mio_export.errors import GateError, one_line

ROOT = "encoder"
_MODEL = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_EXTRA = "extra/mio-export.json"
_PLAIN = {"archive_format": rb"pt2", "archive_version": rb"0", "byteorder": rb"little", ".data/version": rb"\d+\n?"}
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_DROPPED = ".data/serialization_id"

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z0-9_.]*", re.ASCII)
_VERSION = re.compile(r"[\w.+<= ]*", re.ASCII)
_TARGET = re.compile(r"torch\.ops\.aten\.([a-z_]\w*)\.(\w+)|_operator\.(\w+)|torch\.(sym_\w+)|math\.(\w+)", re.ASCII)
_ARITHMETIC = "add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem"
_ROUNDING = frozenset({"trunc", "floor", "ceil"})
_FILE_OPERATORS = frozenset({"from_file", "save", "load", "open", "warn"})
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)
_DECLARED = re.compile(
    r"Symbol\('([a-z]+\d+)'(, [a-z_]+=(True|False))*\)|Float\('([0-9.e+-]+)', precision=\d+\)", re.ASCII
)
_EXPRESSION = re.compile(r"[\w\s+\-*/(),<>=!&|~.]{1,1000}", re.ASCII)
_FUNCTIONS = """
    Add Mul Pow Integer Rational FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv
    LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat
    Identity Max Min Abs Eq Ne Lt Le Gt Ge And Or Not true false True False oo floor ceiling
"""
_OPTIONS = re.compile(r"[a-z_]{0,24}", re.ASCII)
"""Values of options such as ``floor``, ``tanh``, ``bilinear``; no path but a bare name has this form."""
_EINSUM = re.compile(r"[A-Za-z ,.]*(->[A-Za-z ,.]*)?", re.ASCII)
_FORBIDDEN = frozenset({"as_graph", "as_custom_obj", "as_operator", "as_string_to_argument", "custom_obj", "token"})


def write_pt2(raw: Path, path: Path) -> None:
    """Rewrite a file of ``torch.export.save`` without pickles, notes of the exporter and what differs from run to run.

    Raises:
        GateError: the program needs something that no ``.pt2`` here may hold.
    """
    members = _members(raw)
    program = json.loads(members[_MODEL])
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    program["graph_module"]["metadata"] = {}
    program["guards_code"] = []  # Python text for retracing; the graph itself refuses other shapes
    members |= {_MODEL: json.dumps(program).encode(), _SAMPLE_INPUTS: b""}
    members.pop(_DROPPED, None)
    path.write_bytes(_checked(path, members).getbuffer())


def read_pt2(path: Path) -> io.BytesIO:
    """Check a ``.pt2`` file; return an archive of what was checked, for ``torch.export.load``.

    Raises:
        GateError: it holds anything but a graph of ATen operators, raw tensors and what mio-export says of it.
    """
    members = _members(path)
    if members.get(_SAMPLE_INPUTS):
        raise GateError(f"{path} holds a pickle ({_SAMPLE_INPUTS}), which could run code; export it again")
    return _checked(path, members)


def _members(path: Path) -> dict[str, bytes]:
    """Read every member, by its name below the archive's one folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise GateError(f"{path} is no .pt2 of ours: its members are compressed or encrypted")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise GateError(f"{path} is no .pt2 of ours: its members overlap")
            names = [entry.filename.partition("/") for entry in entries]
            if len({root for root, _, _ in names}) != 1 or len({name for _, _, name in names}) != len(names):
                raise GateError(f"{path} is no .pt2 of ours: its members do not lie in one folder, each once")
            return {name: archive.read(entry) for (_, _, name), entry in zip(names, entries, strict=True)}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise GateError(f"{path} is no .pt2 that loads: {one_line(error, 200)}") from None


def _checked(path: Path, members: dict[str, bytes]) -> io.BytesIO:
    """Check every member and move them into a new archive, the same bytes for the same members."""
    if missing := [name for name in (*_PLAIN, *_CONFIGS, _MODEL) if name not in members]:
        raise GateError(f"{path} is no .pt2 that loads: it lacks {missing[0]}")
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as archive:
        for name in list(members):
            try:
                checked = _member(name, members.pop(name))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise GateError(f"{path} is refused: {name}: {one_line(error, 200)}") from None
            archive.writestr(zipfile.ZipInfo(f"{ROOT}/{name}"), checked)
    result.seek(0)
    return result


def _member(name: str, data: bytes) -> bytes:
    """Return a member as it was checked.

    Raises:
        ValueError: it is not one of those that a ``.pt2`` may hold here.
    """
    if name in _PLAIN:
        if not re.fullmatch(_PLAIN[name], data):
            raise ValueError(f"is {data[:20]!r}, which this mio-export does not read")
        return data
    if _TENSOR.fullmatch(name):
        return data
    if name == _SAMPLE_INPUTS:
        return b""
    if name in (_MODEL, *_CONFIGS, _EXTRA):
        values = json.loads(data)
        if name == _MODEL:
            _check_program(values)
        elif name in _CONFIGS:
            _check_config(values)
        return json.dumps(values).encode()
    raise ValueError("no .pt2 of mio-export holds it, and it could be code; export it again")


def _check_config(values: Mapping[str, Any]) -> None:
    """Tensors are raw bytes; none is pickled."""
    if set(values) != {"config"}:
        raise ValueError("is not the configuration that it should be")
    for name, payload in values["config"].items():
        _require(_DOTTED, name, "name")
        if payload["use_pickle"] is not False:
            raise ValueError(f"{name} is pickled, which could run code; export it again with this mio-export")
        _require(re.compile(r"(weight|tensor)_\d+"), payload["path_name"], "path")
        _walk(payload, "")


def _check_program(program: Mapping[str, Any]) -> None:
    """Hold every string of a program, keys too, to what its place allows."""
    if program.get("guards_code"):
        raise ValueError("holds guards, which are Python text; export it again with this mio-export")
    module = program["graph_module"]
    if module["graph"].get("custom_obj_values") or module.get("metadata") or module.get("treespec_namedtuple_fields"):
        raise ValueError("holds objects of other libraries; only ATen operators are run")
    if any(node.get("metadata") for node in module["graph"]["nodes"]):
        raise ValueError("holds notes of its exporter; export it again with this mio-export")
    _walk(program, "")


def _walk(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in _FORBIDDEN:
                raise ValueError(f"holds {name}; only ATen operators on tensors and numbers are run")
            _require(_DOTTED, name, "key")
            _walk(inner, _place(name, value, key))
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, key)
    elif isinstance(value, str):
        _STRINGS.get(key, _check_name)(value)


def _place(name: str, values: Mapping[str, Any], outer: str) -> str:
    """Return what decides about strings: the key they are under, or for an argument that of its operator's schema."""
    if name == "arg" and values.get("name") == "equation":
        return "equation"
    return "equation" if outer == "equation" and name == "as_string" else name


def _check_name(text: str) -> None:
    _require(_NAME, text, "name")


def _check_dotted(text: str) -> None:
    _require(_DOTTED, text, "name")


def _check_target(text: str) -> None:
    found = _TARGET.fullmatch(text)
    operator, _, arithmetic, _, rounding = found.groups() if found else (None,) * 5
    allowed = found and operator not in _FILE_OPERATORS
    if arithmetic is not None:
        allowed = arithmetic in _ARITHMETIC.split()
    if rounding is not None:
        allowed = rounding in _ROUNDING
    if not allowed:
        raise ValueError(f"calls {text[:80]!r}; only ATen operators and arithmetic are run")


def _check_expression(text: str) -> None:
    """Sizes are evaluated by SymPy as Python: only arithmetic on symbols and SymPy's functions of numbers."""
    whole, text = text, _DECLARED.sub(lambda match: match[1] or match[4], text)
    words = re.findall(r"[A-Za-z_]\w*", text)
    if not _EXPRESSION.fullmatch(text) or not all(
        word in _FUNCTIONS.split() or _SYMBOL.fullmatch(word) for word in words
    ):
        raise ValueError(f"has the size {whole[:80]!r}; only arithmetic on symbols is evaluated")
    if re.search(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_(]|\*\*.*\*\*", text):
        raise ValueError(f"has the size {whole[:80]!r}; only arithmetic on symbols is evaluated")


def _check_treespec(text: str) -> None:
    """How arguments nest: in tuples, lists and dictionaries of tensors; other types are imported by their names."""
    protocol, spec = json.loads(text)
    if protocol != 1:
        raise ValueError(f"has a pytree of protocol {protocol!r}; 1 is read")
    _check_tree(spec)


def _check_tree(spec: Mapping[str, Any]) -> None:
    if set(spec) != {"type", "context", "children_spec"}:
        raise ValueError("has a pytree that is not one")
    kind, context = spec["type"], spec["context"]
    if kind not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
        raise ValueError(f"has arguments in {str(kind)[:80]!r}; tuples, lists and dictionaries are read")
    names = json.loads(context) if isinstance(context, str) else context
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("has a pytree with a context, which could be code")
    for name in names or ():
        _check_name(name)
    for child in spec["children_spec"]:
        _check_tree(child)


def _require(pattern: re.Pattern[str], text: Any, what: str) -> None:
    if not (isinstance(text, str) and pattern.fullmatch(text)):
        raise ValueError(f"has the {what} {str(text)[:80]!r}, which could be code")


_STRINGS: Mapping[str, Callable[[str], None]] = {
    "target": _check_target,
    "expr_str": _check_expression,
    "in_spec": _check_treespec,
    "out_spec": _check_treespec,
    "as_string": lambda text: _require(_OPTIONS, text, "option"),
    "as_strings": lambda text: _require(_OPTIONS, text, "option"),
    "equation": lambda text: _require(_EINSUM, text, "equation"),
    "torch_version": lambda text: _require(_VERSION, text, "version"),
    "fqn": _check_dotted,
    "parameter_name": _check_dotted,
    "buffer_name": _check_dotted,
    "tensor_constant_name": _check_dotted,
}
"""What strings under a key may be; under any other they are names."""


__all__ = ["read_pt2", "write_pt2"]
