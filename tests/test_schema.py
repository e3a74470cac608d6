import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mio_export.bundle import MANIFEST
from mio_export.errors import GateError, MioError
from mio_export.inspection import describe
from mio_export.schema import parse_json, read_values, write_json
from mio_export.store import StoreInfo


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": 1e999}',
        b"null",
        b"",
        b"\xff",
        b'{"schema_version": {}}',
    ],
)
def test_json_of_any_kind_is_refused_in_a_line(text):
    with pytest.raises(GateError, match=r"store.json is damaged: not the JSON that it should be$"):
        parse_json(text, StoreInfo, where=Path("store.json"), newest=1)


def test_a_document_without_a_version_is_of_the_first_and_a_newer_one_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text('{"scores": 1}')
    assert read_values(path, newest=1) == {"scores": 1}
    write_json(path, {"schema_version": 1, "scores": 1})
    assert read_values(path, newest=1) == {"schema_version": 1, "scores": 1}
    write_json(path, {"schema_version": 2, "scores": 1})
    with pytest.raises(MioError, match=r"evaluation.json has schema version 2, this mio-export reads up to 1; update"):
        read_values(path, newest=1)
    for text in ("[]", "{", '{"schema_version": "x"}'):
        path.write_text(text)
        with pytest.raises(GateError, match=r"evaluation.json is damaged: not the JSON that it should be$"):
            read_values(path, newest=1)


@pytest.mark.parametrize(
    "change", [{"metrics": {"other": 1}}, {"artifacts": "gone"}], ids=["other scores", "a file that is gone"]
)
def test_a_bundle_that_does_not_fit_its_manifest_is_called_damaged(bundle, tmp_path, change):
    path = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    values = json.loads((path / MANIFEST).read_bytes())
    if "metrics" in change:
        values |= change
    else:
        (path / values["artifacts"][0]["file"]).unlink()
    rest = {name: value for name, value in values.items() if name != "digest"}
    values["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(GateError, match=r"copy.mio is damaged: its manifest does not fit what it describes \("):
        describe(path)
