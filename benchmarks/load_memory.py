"""Peak memory and speed of quantizing a checkpoint while loading it.

Writes a random BF16 checkpoint in the shape of Z-Image's transformer, shard by shard, then loads it in fresh processes
through diffusers: in BF16, in Int8 and in FP8, and from checkpoints that are quantized already (``int8-serialized``,
``fp8-serialized``, and ``gguf``, a file of Q8_0). Prints one JSON object. The checkpoints are deleted afterwards.

Files are in the page cache. A hypervisor may take free memory back and give it out again page by page: so that it is
not that which is measured, as much memory as the model will need is touched and freed just before loading;
``--cold-memory`` leaves that out.

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
import mmap
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
SERIALIZED = "-serialized"
GGUF = "gguf"
GGUF_FILE = "transformer.gguf"
ALL_METHODS = (*METHODS, "int8-serialized", "fp8-serialized", GGUF)
SHARD_BYTES = 2_000_000_000
TEXT_TOKENS, TEXT_WIDTH = 64, 2560
HEAD_WIDTH = 128


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(measure(Path(options.worker), options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        component = Path(folder) / "transformer"
        component.mkdir()
        size = write_checkpoint(component, options.dim, options.layers, options.refiner_layers)
        runs = [run_worker(component, method, options) for method in options.methods]
    results = {"checkpoint_bytes": size, "runs": runs}
    print(json.dumps(results, indent=2))
    if options.output:
        write(options.output, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=3840, help="width, a multiple of 128 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--refiner-layers", type=int, default=2, help="of each kind (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, default=METHODS, help="default: %(default)s")
    parser.add_argument("--step", action="store_true", help="also compute one step: slow in BF16 on an old CPU")
    parser.add_argument("--cold-memory", action="store_true", help="take memory as the system gives it")
    parser.add_argument("--folder", help="where to write the checkpoint (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
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
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.gguf")):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def run_worker(folder: Path, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Load in a fresh process; a quantized checkpoint is written by another one before."""
    flags = [f"--{name}" for name in ("step", "cold-memory") if getattr(options, name.replace("-", "_"))]
    source = folder
    if method == GGUF:
        write_gguf(folder)
    elif method.endswith(SERIALIZED):
        source = folder / method
        start_worker(folder, method.removesuffix(SERIALIZED), ["--cold-memory", "--save", str(source)])
    warm_cache(source)
    found = start_worker(source, method, flags)
    if source != folder:
        shutil.rmtree(source)
    return found


def write_gguf(folder: Path) -> None:
    from lowbit.checkpoints.gguf.write import export_gguf
    from lowbit.quantization.methods.gguf import GgufConfig

    export_gguf(folder, "ZImageTransformer2DModel", GgufConfig(gguf_type="Q8_0"), folder / GGUF_FILE)


def load(folder: Path, method: str) -> Any:
    """Load the transformer of ``folder`` as ``method`` says."""
    import torch
    from diffusers import ZImageTransformer2DModel

    import lowbit  # noqa: F401 - a quantized checkpoint is read by it
    from lowbit.checkpoints.external import load_component
    from lowbit.quantization import build_quant_config

    if method == GGUF:
        from lowbit.quantization.methods.gguf import GgufConfig

        file = GgufConfig(gguf_model=str(folder / GGUF_FILE))
        kind = ZImageTransformer2DModel.__name__
        return load_component(str(folder.parent), folder.name, "diffusers", kind, file, dtype=torch.bfloat16)
    config = None if method == "bf16" or method.endswith(SERIALIZED) else build_quant_config(method)
    return ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)


def start_worker(source: Path, method: str, flags: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.load_memory", "--worker", str(source), "--methods", method]
    result = subprocess.run(
        [*command, *flags, "--started", str(time.time())], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def warm_memory(size: int) -> None:
    """Touch ``size`` bytes and give them back, so that they are the machine's and not its hypervisor's."""
    memory = mmap.mmap(-1, max(size, 1))
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    memory.close()


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


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load ``folder`` in this process and return what it took."""
    method = options.methods[0]
    import torch  # importing libraries is not loading
    from diffusers import ZImageTransformer2DModel  # noqa: F401

    import lowbit  # noqa: F401
    from lowbit.hosts.attention import speed_up_attention
    from lowbit.hosts.fused import fuse_elementwise

    preparing = time.perf_counter()
    if method in ("int8", "fp8") and not options.cold_memory:
        warm_memory(sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2)
    preparing = time.perf_counter() - preparing
    watch = MemoryWatch()
    begin, cpu = time.perf_counter(), time.process_time()
    model = load(folder, method)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    watch.stop()
    times = {"load_seconds": seconds, "load_cpu_seconds": cpu}
    result = {"method": method, **times, **memory_report(watch), **model_report(model, watch, seconds)}
    if options.save:
        model.save_pretrained(options.save)
    if options.step:
        if method != "bf16":
            speed_up_attention(model, device=torch.device("cpu"), dtype=torch.bfloat16)  # as Omni does
            fuse_elementwise(model, device=torch.device("cpu"), dtype=torch.bfloat16)
        compute_step(model)
        result["seconds_to_end_of_first_step"] = time.perf_counter() - begin
        result["seconds_from_process_start"] = time.time() - options.started - preparing
        result["end_rss_anon_bytes_after_step"] = watch.read()["RssAnon"]
    return result


def memory_report(watch: MemoryWatch) -> dict[str, int]:
    """Return what loading took of memory."""
    return {
        "start_rss_anon_bytes": watch.start["RssAnon"],
        "peak_rss_anon_bytes": watch.peak["RssAnon"],
        "peak_rss_file_bytes": watch.peak["RssFile"],
        "end_rss_anon_bytes": watch.read()["RssAnon"],
    }


def model_report(model: Any, watch: MemoryWatch, seconds: float) -> dict[str, Any]:
    """Return what was quantized, how fast, and the peak beyond it and beyond what the process held before."""
    manifest: Any = getattr(model, "lowbit_manifest", None)
    if manifest is None:
        return {}
    converted = sum(record.bytes_before for record in manifest.quantized)
    return {
        "model_bytes": manifest.bytes_after,
        "bf16_gb_converted_per_second": converted / 1e9 / seconds,
        "peak_over_model_bytes": watch.peak["RssAnon"] - manifest.bytes_after,
        "peak_over_model_and_start_bytes": watch.peak["RssAnon"] - watch.start["RssAnon"] - manifest.bytes_after,
        "kernels": {f"{name} ({kernel})": n for (name, kernel), n in manifest.by_kernel().items()},
    }


def compute_step(model: Any) -> None:
    """One step of a picture of 512 x 512: 1,024 image tokens and 64 of text."""
    import torch

    latents = [torch.randn(16, 1, 64, 64, dtype=torch.bfloat16)]
    text = [torch.randn(TEXT_TOKENS, TEXT_WIDTH, dtype=torch.bfloat16)]
    with torch.inference_mode():
        model(latents, torch.tensor([0.5], dtype=torch.bfloat16), text, return_dict=False)


if __name__ == "__main__":
    main()
