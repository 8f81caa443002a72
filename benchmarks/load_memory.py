"""Peak memory and speed of quantizing a checkpoint while loading it.

Writes a random BF16 checkpoint in the shape of Z-Image's transformer, shard by shard, then loads it in fresh processes
through diffusers: in BF16, in Int8 and in FP8. Prints one JSON object. The checkpoint is deleted afterwards.

Examples::

    python -m benchmarks.load_memory --step --output benchmarks/results/load_memory.json
    python -m benchmarks.load_memory                            # the true shape: 6.15 B parameters, 12.3 GB on disk
    python -m benchmarks.load_memory --layers 6                 # the true width, a fifth of the depth
    python -m benchmarks.load_memory --methods int8 --step      # with the time to the end of the first step at 512x512
    python -m benchmarks.load_memory --dim 1024 --layers 16 --refiner-layers 0     # 0.4 GB
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import write

METHODS = ("bf16", "int8", "fp8")
SHARD_BYTES = 2_000_000_000
TEXT_TOKENS, TEXT_WIDTH = 64, 2560
HEAD_WIDTH = 128


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(measure(Path(options.worker), options.methods[0], options.step)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(Path(folder), options.dim, options.layers, options.refiner_layers)
        warm_cache(Path(folder))
        runs = [run_worker(folder, method, options.step) for method in options.methods]
    results = {"checkpoint_bytes": size, "runs": runs}
    print(json.dumps(results, indent=2))
    if options.output:
        write(options.output, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=3840, help="width, a multiple of 128 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--refiner-layers", type=int, default=2, help="of each kind (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--step", action="store_true", help="also compute one step: slow in BF16 on an old CPU")
    parser.add_argument("--folder", help="where to write the checkpoint (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def transformer_config(dim: int, layers: int, refiner_layers: int) -> dict[str, Any]:
    return {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": dim,
        "n_layers": layers,
        "n_refiner_layers": refiner_layers,
        "n_heads": dim // HEAD_WIDTH,
        "n_kv_heads": dim // HEAD_WIDTH,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }


def write_checkpoint(folder: Path, dim: int, layers: int, refiner_layers: int) -> int:
    """Write random weights, holding one shard at a time; return the bytes of the tensors."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import ZImageTransformer2DModel
    from safetensors.torch import save_file

    with init_empty_weights():
        model = ZImageTransformer2DModel(**transformer_config(dim, layers, refiner_layers))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    if shutil.disk_usage(folder).free < 1.05 * total:
        raise SystemExit(f"{folder} has no room for {total / 1e9:.1f} GB; choose another with --folder")
    model.save_config(folder)
    shards = list(split_into_shards({name: 2 * shape.numel() for name, shape in shapes.items()}))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def split_into_shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > SHARD_BYTES:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def warm_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def run_worker(folder: str, method: str, step: bool) -> dict[str, Any]:
    step_option = ["--step"] if step else []
    command = [sys.executable, "-m", "benchmarks.load_memory", "--worker", folder, "--methods", method, *step_option]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


class MemoryWatch:
    """Samples this process's resident memory: anonymous (its own) and of files (mapped, shared with the cache)."""

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.start = self.peak = self.read()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @staticmethod
    def read() -> dict[str, int]:
        """Return both in bytes."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}

    def watch(self) -> None:
        """Keep the highest values until stopped."""
        while not self.stopped.wait(self.seconds):
            found = self.read()
            self.peak = {name: max(value, self.peak[name]) for name, value in found.items()}

    def stop(self) -> None:
        """Stop watching."""
        self.stopped.set()
        self.thread.join()


def measure(folder: Path, method: str, step: bool) -> dict[str, Any]:
    """Load ``folder`` with ``method`` in this process and return what it took."""
    import torch
    from diffusers import ZImageTransformer2DModel

    from lowbit.quantization import build_quant_config

    config = None if method == "bf16" else build_quant_config(method)
    watch = MemoryWatch()
    begin = time.perf_counter()
    model = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    seconds = time.perf_counter() - begin
    watch.stop()
    result: dict[str, Any] = {
        "method": method,
        "load_seconds": seconds,
        "start_rss_anon_bytes": watch.start["RssAnon"],
        "peak_rss_anon_bytes": watch.peak["RssAnon"],
        "peak_rss_file_bytes": watch.peak["RssFile"],
        "end_rss_anon_bytes": watch.read()["RssAnon"],
    }
    if config is not None:
        manifest: Any = model.lowbit_manifest
        converted = sum(record.bytes_before for record in manifest.quantized)
        result["model_bytes"] = manifest.bytes_after
        result["bf16_gb_converted_per_second"] = converted / 1e9 / seconds
        result["peak_over_model_bytes"] = watch.peak["RssAnon"] - manifest.bytes_after
        result["kernels"] = {f"{name} ({kernel})": n for (name, kernel), n in manifest.by_kernel().items()}
    if step:
        compute_step(model)
        result["seconds_to_end_of_first_step"] = time.perf_counter() - begin
    return result


def compute_step(model: Any) -> None:
    """One step of a picture of 512 x 512: 1,024 image tokens and 64 of text."""
    import torch

    latents = [torch.randn(16, 1, 64, 64, dtype=torch.bfloat16)]
    text = [torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=torch.bfloat16)]
    with torch.inference_mode():
        model(latents, torch.tensor([0.5], dtype=torch.bfloat16), text, return_dict=False)


if __name__ == "__main__":
    main()
