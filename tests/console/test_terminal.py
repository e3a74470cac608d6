import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mio_export.console.progress import JsonProgress, PlainProgress, TerminalProgress
from mio_export.console.terminal import json_text, printable, printable_lines
from mio_export.store import Row, StoreInfo, shard_path, write_info, write_shard

HOSTILE = "a\x1b]0;owned\x07\x1b[2Kb\nmio: all is well\r\x9b31m\u202egnp.jpg"
SHOWN = r"a\x1b]0;owned\x07\x1b[2Kb\nmio: all is well\r\x9b31m\u202egnp.jpg"
STEERING = set(map(chr, (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))) - {"\n"}


def write_store(folder, keys):
    """A store of two-dimensional vectors, the last row a failed one."""
    info = StoreInfo(
        bundle="x",
        space="s",
        artifact_file="f",
        artifact_sha256="a",
        precision="fp32",
        runtime="onnxruntime",
        device="cpu",
        embedding_dim=2,
        normalized=False,
        batch_size=1,
        shard_size=10,
    )
    rows = [
        Row(key=key, size=1, mtime_ns=0, sha256=f"{i:064d}", status="ok", stage=None, reason=None)
        for i, key in enumerate(keys)
    ]
    failed = Row(key="z", size=1, mtime_ns=0, sha256=None, status="failed", stage="read", reason=f"no {HOSTILE}")
    folder.mkdir()
    write_info(folder, info)
    write_shard(shard_path(folder, 0), info, [*rows, failed], np.ones((len(rows), 2), np.float32))
    return folder


def test_what_steers_a_terminal_is_escaped_and_the_rest_is_not():
    assert printable(HOSTILE) == SHOWN
    assert not any(character in STEERING for character in printable("".join(map(chr, range(0x110000)))))
    for plain in ("ünïcödé", "日本語", "🦊", "שלום", "na\u200cme", r"back\\slash", "a b"):
        assert printable(plain) == plain


def test_bytes_that_are_no_utf8_look_as_in_a_key():
    name = os.fsdecode(b"a\xff\xe4.png")
    assert printable(name) == r"a\xff\xe4.png"
    assert printable("\ud800") == r"\ud800"


def test_a_line_break_in_a_name_cannot_begin_a_line():
    assert printable_lines("mio: bad name\nmio: done\n     more") == "mio: bad name\n     mio: done\n     more"


def test_json_holds_every_character_and_no_control():
    text = json_text({"key": HOSTILE + "\x7f"})
    assert text.isprintable()
    assert json.loads(text) == {"key": HOSTILE + "\x7f"}


def test_tables_and_pairs_show_names_without_obeying_them(mio, tmp_path):
    store = write_store(tmp_path / "store", [HOSTILE, "q.jpg"])
    found = mio("search", store, "--key", "q.jpg")
    assert SHOWN in found.out
    assert found.out.splitlines()[-1].split()[-1] == "1.000000"
    described = mio("inspect", store)
    assert f"1 x no {SHOWN}" in described.out
    assert not set(found.out + described.out) & STEERING
    answers = json.loads(mio("search", store, "--key", "q.jpg", "--json").out)["answers"]
    assert answers[0]["neighbors"][0]["key"] == HOSTILE


def test_errors_and_wrong_command_lines_are_shown_and_not_obeyed(mio, tmp_path):
    result = mio("inspect", tmp_path / HOSTILE)
    assert result.code == 2
    assert not set(result.err) & STEERING
    assert [line for line in result.err.splitlines() if line.startswith("mio: ")] == result.err.splitlines()[:1]
    wrong = mio("inspect", f"--{HOSTILE}", "x")
    assert (wrong.code, set(wrong.err) & STEERING) == (2, set())
    traced = mio("inspect", tmp_path / HOSTILE, "--debug")
    assert "Traceback" in traced.err
    assert not set(traced.err) & STEERING


@pytest.mark.parametrize("style", [PlainProgress, JsonProgress, TerminalProgress])
def test_progress_shows_names_and_does_not_obey_them(style, capsys):
    progress = style()
    progress.line(HOSTILE)
    with progress.task("[red]embedding", 1) as task:
        task.advance(1, note=HOSTILE)
    shown = capsys.readouterr().err
    assert not set(shown) & STEERING
    if style is JsonProgress:
        assert json.loads(shown.splitlines()[0])["message"] == HOSTILE
    else:
        assert shown.startswith(SHOWN)
        assert "[red]emb" in shown


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
def test_every_encoding_can_write_every_name(mio, tmp_path, monkeypatch, encoding):
    store = write_store(tmp_path / "store", ["日本.jpg", "q.jpg"])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    result = mio("search", store, "--key", "q.jpg")
    sys.stdout.flush()
    assert result.code == 0, result.err
    assert ("日本.jpg" if encoding == "utf-8" else r"\u65e5\u672c.jpg") in written.getvalue().decode(encoding)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_ends_it_quietly_as_sigpipe_would(stream):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()"]
    arguments = ["--help"] if stream == "stdout" else ["inspect", "nowhere"]
    others = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {stream: writer}
    result = subprocess.run([*command, *arguments], **others, check=False)
    os.close(writer)
    assert result.returncode == 141
    assert result.stderr in (b"", None)
