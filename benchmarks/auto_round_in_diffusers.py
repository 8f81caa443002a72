"""What diffusers' own auto-round quantizer reads of the checkpoints that lowbit writes.

    python -m venv /tmp/auto_round && /tmp/auto_round/bin/pip install auto-round==0.16.1 torch==2.13.0 \
        transformers==5.23.0 diffusers==0.42.1 accelerate==1.15.0 datasets py-cpuinfo
    python -m benchmarks.auto_round_in_diffusers --python /tmp/auto_round/bin/python \
        --output benchmarks/results/auto_round_in_diffusers.json

lowbit writes a small FLUX.1 transformer with random weights and the embedded model's; ``auto_round_reader`` loads each
in a process of the other environment, without lowbit, and compares weights and output with lowbit's in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import write
from lowbit import Omni
from lowbit.bench.inputs import Workload, step_inputs
from lowbit.bench.transformers import random_transformer
from lowbit.quantization import quantize_model
from lowbit.quantization.plan import quantized_layers

READER = Path(__file__).with_name("auto_round_reader.py")
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flux", {"group_size": 32}),
    ("flux", {"group_size": -1}),
    ("flux", {"group_size": 32, "sym": False}),
    ("flux", {"group_size": 32, "bits": 8}),
    ("flux", {"group_size": 32, "bits": 2}),
    ("flux", {"group_size": 32, "packing_format": "auto_round:auto_awq"}),
    ("embedded", {"group_size": 32}),
    ("embedded", {"group_size": 128}),
)
DTYPES = ("float16", "bfloat16")


def transformer(name: str, options: dict[str, Any]) -> Any:
    """Return a transformer in float32, quantized with ``options``."""
    config = {"method": "auto-round", **options}
    if name == "embedded":
        return Omni(quantization_config=config, dtype="float32", device="cpu").pipeline.transformer
    model = random_transformer("FluxTransformer2DModel", FLUX, torch.float32, torch.device("cpu"))
    quantize_model(model, config)
    return model


@torch.no_grad()
def prepare(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Write ``folder/model`` and ``folder/expected.pt``: weights [N, K], inputs and output in float32."""
    model = transformer(name, options)
    model.save_pretrained(folder / "model")
    layers = quantized_layers(model)
    inputs = step_inputs(model, Workload(height=128, width=128, text_tokens=16), torch.float32)
    output = model(**inputs, return_dict=False)[0]
    expected = {
        "weights": {layer: module.method.dequantize_weight(module).float() for layer, module in layers.items()},
        "inputs": inputs,
        "output": torch.stack(output) if isinstance(output, list) else output,
    }
    torch.save(expected, folder / "expected.pt")


def read(python: Path, folder: Path) -> dict[str, Any]:
    """Return what the reader finds, in the other environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(READER), str(folder), *DTYPES]
    done = subprocess.run(
        command, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with auto-round")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows, versions = [], {}
    for name, options in CASES:
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), name, options)
            found = read(arguments.python, Path(place))
        versions = found["versions"]
        for dtype, result in found["results"].items():
            rows.append({"model": name, "options": options, "dtype": dtype, **result})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        write(arguments.output, {"reader": versions, "rows": rows})


if __name__ == "__main__":
    main()
