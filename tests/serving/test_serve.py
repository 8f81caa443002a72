"""``lowbit serve`` as a user runs it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit.cli import app
from lowbit.serving.reference_flags import REFUSED_FLAGS, table
from tests.support.commands import lowbit

ROOT = Path(__file__).resolve().parents[2]

# vLLM-Omni 0.30.0's options for diffusion.
REFERENCE = [
    "--omni",
    "--quantization",
    "--diffusion-quantization-config",
    "--diffusion-kv-cache-dtype",
    "--diffusion-kv-cache-skip-steps",
    "--diffusion-kv-cache-skip-layers",
    "--diffusion-attention-backend",
    "--cache-backend",
    "--cache-config",
    "--step-execution",
    "--request-batch-max-wait-ms",
    "--lora-path",
    "--lora-scale",
    "--enable-cpu-offload",
    "--enable-layerwise-offload",
    "--vae-use-slicing",
    "--vae-use-tiling",
    "--boundary-ratio",
    "--flow-shift",
    "--enforce-eager",
    "--tensor-parallel-size",
    "--text-encoder-tp-size",
    "--ulysses-degree",
    "--ring-degree",
    "--usp",
    "--cfg-parallel-size",
    "--vae-patch-parallel-size",
    "--use-hsdp",
    "--enable-expert-parallel",
    "--data-parallel-size",
    "--stage-overrides",
]


def command() -> Any:
    from typer.main import get_command

    group: Any = get_command(app.app)
    return group.get_command(None, "serve")


def test_every_option_of_the_reference_is_taken_or_refused() -> None:
    options = {name: each for each in command().params for name in each.opts}
    assert set(REFERENCE) <= set(options)
    assert {name for name in REFERENCE if options[name].hidden} == {flag.name for flag in REFUSED_FLAGS}


@pytest.mark.parametrize("flag", REFUSED_FLAGS, ids=lambda flag: flag.name)
def test_a_refused_option_says_why(flag: Any, tmp_path: Path) -> None:
    result = lowbit("serve", flag.name, *(["7"] if flag.has_value else []), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {flag.name} is not supported: {flag.reason}")
    for value in flag.neutral:
        assert lowbit("serve", flag.name, value, "--print-config", cwd=tmp_path).returncode == 0


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    assert table() in page
    taken = set(REFERENCE) - {flag.name for flag in REFUSED_FLAGS}
    assert not [name for name in taken if f"`{name}`" not in page]


def test_options_come_from_the_command_line_then_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "model: some/model\nmax-running: 8\nport: 9000\nserved_model_name: one\nenforce-eager: false\n"
        "quantization-config: {method: int8}\nallowed_origin: [a, b]\ntimeout: 5\n"
    )
    printed = lowbit("serve", "--config", str(file), "--port", "9001", "--print-config", cwd=tmp_path)
    found = yaml.safe_load(printed.stdout)
    assert (found["model"], found["max_running"], found["port"]) == ("some/model", 8, 9001)
    assert (found["served_model_name"], found["allowed_origin"]) == (["one"], ["a", "b"])
    assert (found["enforce_eager"], found["timeout"]) == (False, 5.0)
    assert json.loads(found["quantization_config"]) == {"method": "int8"}
    file.write_text(printed.stdout)
    again = lowbit("serve", "--config", str(file), "--print-config", cwd=tmp_path)
    assert yaml.safe_load(again.stdout) == found


def test_the_file_may_hold_what_is_refused_only_to_be_refused(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("tensor_parallel_size: 2\n")
    result = lowbit("serve", "--config", str(file), cwd=tmp_path)
    assert result.returncode == 2
    assert "--tensor-parallel-size is not supported" in result.stderr


def test_keys_are_not_printed(tmp_path: Path) -> None:
    assert "secret" not in lowbit("serve", "--api-key", "secret", "--print-config", cwd=tmp_path).stdout


WRONG: list[tuple[str, str]] = [
    ("nothing: 1\n", "unknown option nothing"),
    ("- a\n", "expected options"),
    ("a: [\n", "while parsing"),
    ("port: many\n", "port"),
    ("port: 70000\n", "less than or equal to 65535"),
    ("max_running: {a: 1}\n", "max-running"),
    ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    result = lowbit("serve", "--config", str(file), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


BAD: list[tuple[list[str], str]] = [
    (["--config", "missing.yaml"], "No such file"),
    (["--api-key", ""], "api_key"),
    (["--ssl-certfile", "x.pem"], "both or neither"),
    (["--ssl-certfile", "x.pem", "--ssl-keyfile", "y.pem"], "no file x.pem"),
    (["--default-sampling-params", '{"steps": 3}'], "unknown steps"),
    (["--host", "256.0.0.1"], "can't listen there"),
    (["-q", "int9"], "int9"),
    (["--cache-backend", "nothing"], "nothing"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda each: " ".join(each)[:30])
def test_impossible_options_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = lowbit("serve", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.engine.Omni", None)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        result = lowbit("serve", "--port", str(sock.getsockname()[1]), cwd=tmp_path)
    assert result.returncode == 2
    assert "Address already in use" in result.stderr


def start(*arguments: str, cwd: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a server and return it with the lines it prints until it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", "serve", "--port", "0", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=None,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("try "):
            break
    return process, lines


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_from_start_to_end(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process, lines = start("--omni", "-q", "int8", cwd=tmp_path)
    try:
        url = next(line.split()[3].rstrip(",") for line in lines if line.startswith("serving"))
        hint = lines[-1].removeprefix("try         ")
        until_it_listens(url.removesuffix("/v1") + "/health")
        drawn = subprocess.run(hint, shell=True, cwd=tmp_path, check=True, capture_output=True)
        assert drawn.returncode == 0
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert "Traceback" not in errors
    finally:
        process.kill()


def until_it_listens(url: str) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")
