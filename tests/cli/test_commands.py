import json
import re
import shutil
import statistics
import subprocess
import sys
import time

import pytest

COMMANDS = (
    "quickstart",
    "train",
    "evaluate",
    "export",
    "verify",
    "sign",
    "bench",
    "embed",
    "merge",
    "serve",
    "search",
    "inspect",
    "doctor",
)


def example_lines(text):
    """Every example in a help text; a long one is wrapped."""
    joined = re.sub(r"\n\s+", " ", text.split("Arguments:")[0].split("Options:")[0])
    return [line.strip() for line in re.findall(r"Example:\s+mio (.*?)(?=\s*Example:|$)", joined)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_carries_an_example(mio, command):
    result = mio(command, "--help")
    assert result.code == 0
    examples = example_lines(result.out)
    assert examples
    assert all(example.split()[0] == command for example in examples)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, photos, bundle, run_folder):
    """A folder with everything that the examples name."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(bundle.path, folder / "encoder.mio")
    for name in ("run", "runs/seed-0", "runs/seed-1"):
        shutil.copytree(run_folder, folder / name)
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "signer.key").write_bytes(key)
    state = {key: value.contiguous() for key, value in resnet50().state_dict().items()}
    save_file(state, folder / "resnet50.safetensors")
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("quickstart", "serve")])
def test_every_example_runs_as_it_stands(mio, workplace, monkeypatch, command):
    monkeypatch.chdir(workplace)
    for example in example_lines(mio(command, "--help").out):
        arguments = example.split()
        if "-o run " in example:
            shutil.rmtree("run")
            arguments[arguments.index("20")] = "1"  # one epoch is enough to see that it runs
        if "resnet50" in example:
            arguments += [
                "--max-batch",
                "2",
                "--limit",
                "4",
                "--preprocess",
                "image_size=64",
            ]  # the same path with less to compute
        if example.startswith("merge part-1"):
            shutil.rmtree("embeddings", ignore_errors=True)
            for index in (1, 2):
                assert mio("embed", "encoder.mio", "photos", "-o", f"part-{index}", "--shard", f"{index}/2").code == 0
        result = mio(*arguments)
        assert result.code == 0, result.err
        assert "Traceback" not in result.err


def test_the_exit_status_of_a_wrong_call_is_2(mio, bundle):
    for arguments in (["embed"], ["nonsense"], ["verify", "nowhere.mio"], ["export", "-o", "x.mio"]):
        result = mio(*arguments)
        assert result.code == 2, (arguments, result)
        assert "Traceback" not in result.err


def test_an_error_is_a_line_or_two_and_debug_adds_the_traceback(mio, tmp_path):
    result = mio("verify", tmp_path)
    assert result.code == 2
    assert result.err == f"mio: {tmp_path} is not a bundle (it holds no manifest.json); make one with: mio export\n"
    assert "Traceback" in mio("verify", tmp_path, "--debug").err


def test_an_unexpected_error_is_one_line_too(mio, bundle, monkeypatch):
    monkeypatch.setattr("mio_export.inspection.describe", lambda path: 1 / 0)
    result = mio("inspect", bundle.path)
    assert result.code == 1
    assert result.err.startswith("mio: unexpected ZeroDivisionError: division by zero\n")


def test_json_is_the_only_thing_on_standard_output(mio, bundle, photos, tmp_path):
    calls = {
        "verify": ["verify", bundle.path, "--images", photos],
        "embed": ["embed", bundle.path, photos, "-o", tmp_path / "out"],
        "inspect": ["inspect", bundle.path],
        "store": ["inspect", tmp_path / "out"],
        "doctor": ["doctor"],
    }
    values = {}
    for name, arguments in calls.items():
        result = mio(*arguments, "--json")
        assert result.code == 0, result.err
        values[name] = json.loads(result.out)
    assert values["verify"]["passed"] is True
    assert values["embed"]["num_ok"] == values["store"]["counts"]["ok"] == 24
    assert values["inspect"]["name"] == "encoder"


def test_inspect_says_what_a_bundle_and_a_store_hold(mio, bundle, photos, tmp_path):
    words = mio("inspect", bundle.path).out
    assert "encoder.onnx: onnx fp32 opset" in words
    assert re.search(r"proved \(min cosine (1\.0{7}|0\.99999)", words)
    assert "uint8 images (N, 32, 32, 3), N from 1 to 32" in words
    assert bundle.manifest.space in words
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "bad.jpg").write_bytes(b"x")
    embedded = mio("embed", bundle.path, copy, "-o", tmp_path / "out")
    assert "25 files, 24 embedded, 1 failed" in embedded.out
    words = mio("inspect", tmp_path / "out").out
    assert "25 files: 24 embedded, 1 failed" in words
    assert "1 x not an image that Pillow can read" in words
    assert mio("inspect", tmp_path).code == 2


def test_doctor_names_runtimes_and_extras(mio):
    words = mio("doctor").out
    for name in ("runtime torch", "runtime torchscript", "runtime onnxruntime", "extra timm", "extra heic", "CUDA"):
        assert name in words
    assert re.search(r"yes\s+runtime onnxruntime\s+onnxruntime\S* \d", words)


def test_export_takes_a_run_or_weights_but_not_both(mio, run_folder, tmp_path):
    for arguments in ([run_folder, "--backbone", "resnet18"], ["--backbone", "resnet18"], []):
        result = mio("export", *arguments, "-o", tmp_path / "x.mio")
        assert result.code == 2
        assert "either a RUN, or --backbone together with --weights" in result.err


def test_version(mio):
    assert re.fullmatch(r"mio-export \d+\.\d+\.\d+\n", mio("--version").out)


def seconds(command):
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_help_answers_within_a_few_starts_of_the_interpreter():
    bare = seconds([sys.executable, "-c", "import asyncio, http.client, sqlite3"])
    ours = seconds(
        [sys.executable, "-c", "import sys; sys.argv[1:] = ['--help']; from mio_export.cli.main import main; main()"]
    )
    assert ours < 2.5 * bare  # torch alone would be twenty times as much
