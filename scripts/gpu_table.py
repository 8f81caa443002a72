"""Compile every kernel for every supported chip and write the table into docs/performance.md; no GPU is needed.

python scripts/gpu_table.py          # rewrites the part of docs/performance.md between its markers
python scripts/gpu_table.py --check  # exits 1 if that would change it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from lowbit.ops.triton import elementwise, fp8, int8, int8_weight_only, launch, persistent, quantize_rows
from lowbit.ops.triton.ahead_of_time import CHIPS, Chip, compile_launch, specialize

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
K = N = 3840
ROWS = (4096, 256, 64, 1)
INSTRUCTION = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+)(\S*)")
MODULES = (
    (int8, "scaled_mm_kernel"),
    (fp8, "scaled_mm_kernel"),
    (persistent, "persistent_mm_kernel"),
    (int8_weight_only, "weight_only_mm_kernel"),
    (quantize_rows, "quantize_rows_kernel"),
    (fp8, "quantize_groups_kernel"),
    (elementwise, "normalize_kernel"),
    (elementwise, "gate_kernel"),
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scale(*shape: int) -> torch.Tensor:
    """Return empty float32 scales."""
    return empty(*shape, dtype=torch.float32)


def product(kind: str, m: int) -> None:
    """Launch a product of [m, K] by [K, N]."""
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    x, weight, bias = empty(m, K, dtype=dtype), empty(N, K, dtype=dtype), empty(N)
    if kind == "int8":
        int8.int8_scaled_mm(x, scale(m, 1), weight, scale(N, 1), bias, torch.bfloat16)
    elif kind == "fp8":
        fp8.fp8_scaled_mm(x, scale(m, 1), weight, scale(N, 1), bias, torch.bfloat16)
    else:
        scales = scale(m, K // 128), scale(N // 128, K // 128)
        fp8.fp8_scaled_mm(x, scales[0], weight, scales[1], bias, torch.bfloat16, [128, 128])


def cases() -> dict[str, Callable[[], Any]]:
    """Return what to launch, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for kind in ("int8", "fp8", "fp8, blocks of 128"):
        for m in ROWS:
            found[f"{kind}, M = {m}"] = partial(product, kind, m)
    found["int8 weight-only, M = 1"] = lambda: int8_weight_only.weight_only_mm(
        empty(1, K), empty(N, K, dtype=torch.int8), scale(N, 1), empty(N)
    )
    found["fp8 weight-only, M = 1"] = lambda: int8_weight_only.weight_only_mm(
        empty(1, K), empty(N, K, dtype=torch.uint8), scale(N, 1), empty(N)
    )
    found["quantize to int8"] = lambda: int8.quantize_int8_per_token(empty(4096, K))
    found["quantize to fp8"] = lambda: fp8.quantize_fp8_per_token(empty(4096, K))
    found["quantize to fp8 in groups"] = lambda: fp8.quantize_fp8_per_group(empty(4096, K), 128)
    found["norm and rotary embedding of heads of 128"] = lambda: elementwise.normalize(
        empty(1, 4160, 30, 128), 1e-5, empty(128), empty(1, 4160, 64, 2, dtype=torch.float32)
    )
    found["norm"] = lambda: elementwise.normalize(empty(4160, K), 1e-5, empty(K), None)
    found["gate"] = lambda: elementwise.gate(empty(4160, 10240), empty(4160, 10240))
    return found


class Recorder:
    """Takes a kernel's place and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append(specialize(self.kernel, arguments, keywords))


def recorded(call: Callable[[], Any], chip: Chip) -> Any:
    """Return the one launch that ``call`` makes on ``chip``."""
    launches: list[Any] = []
    patches: list[Any] = [
        mock.patch.object(module, name, Recorder(getattr(module, name), launches)) for module, name in MODULES
    ]
    patches.append(mock.patch.object(launch, "_accelerator", return_value=chip.target))
    for patch in patches:
        patch.start()
    try:
        call()
    finally:
        for patch in patches:
            patch.stop()
    (found,) = launches
    return found


def row(name: str, chip_name: str, call: Callable[[], Any]) -> str:
    """Compile one kernel for one chip; return its row of the table."""
    chip = CHIPS[chip_name]
    launched = recorded(call, chip)
    compiled = compile_launch(launched, chip)
    if compiled.spilled:
        raise SystemExit(f"{name} on {chip_name} spills {compiled.spilled} bytes of registers")
    if compiled.shared_memory > chip.shared_memory:
        raise SystemExit(f"{name} on {chip_name} needs {compiled.shared_memory} bytes of shared memory")
    found = INSTRUCTION.search(compiled.assembly)
    instruction = f"`{found.group(1)}{found.group(2).rstrip(';')}`" if found else ""
    blocks = [launched.constexprs.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    how = "persistent, TMA" if "cp.async.bulk.tensor" in compiled.assembly else ""
    tile = "x".join(map(str, blocks)) if all(blocks) else ""
    options = launched.options
    limit = chip.shared_memory // 1024
    return (
        f"| {name} | {chip_name} | {tile} | {how} | {options['num_warps']} / {options.get('num_stages', '')} |"
        f" {instruction} | {compiled.registers} | {compiled.shared_memory / 1024:.0f} of {limit} |"
    )


def table() -> str:
    """Return the whole table as Markdown."""
    lines = [
        f"Compiled with Triton {triton.__version__}, K = N = {K}; none spills registers.",
        "",
        "| kernel | chip | tile | operands | warps / stages | tensor-core instruction | registers | shared KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, call in cases().items():
        for chip_name in CHIPS:
            if not (name.startswith("fp8") and "weight-only" not in name and chip_name == "sm_80"):
                lines.append(row(name, chip_name, call))
    return "\n".join(lines)


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write; exit 1 if the page is out of date")
    options = parser.parse_args()
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    changed = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if options.check:
        return int(changed != page)
    PAGE.write_text(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
