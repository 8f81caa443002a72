"""What a measurement depends on, and writing it beside the results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowbit import env
from lowbit.containers.atomic import write_text
from lowbit.ops.cpu import helper
from lowbit.ops.cpu.features import processor_facts, processor_name

FLAGS_OF_INTEREST = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "triton", "diffusers", "torchao", "optimum-quanto", "sdnq", "openvino", "gguf")


def machine() -> dict[str, Any]:
    """Describe the machine, the packages and the commit."""
    flags = processor_facts().get("flags", "").split()
    found = {
        "cpu": processor_name(),
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "commit": _commit(),
        "native": helper.description(),
        "allocator": env.snapshot(env.RECORDED),
        "held_to": env.snapshot(env.RECORDED_INSTRUCTIONS),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def version(package: str) -> str | None:
    """Return the version of an installed distribution, ``None`` where it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` as JSON, with the machine and the date; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    write_text(path, json.dumps({**head, **results}, indent=1) + "\n")


def _commit() -> str | None:
    """Return the commit of a source tree; an installed package has none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=source).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
