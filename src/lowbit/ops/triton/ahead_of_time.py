"""Compile kernels for chips that are not here.

Triton needs no GPU to compile for one, so the assembly can show before any device does which tensor-core instruction a
kernel uses, what shared memory it needs and whether its registers suffice.

>>> launch = specialize(kernel, arguments, keywords)
>>> compile_launch(launch, CHIPS["sm_90"]).asm["ptx"]
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.ops.triton.launch import Target

# How Triton spells the element types of pointers.
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Chip:
    """A chip to compile for.

    Attributes:
        target: as kernels are chosen by it.
        warp_size: threads of a warp.
        shared_memory: the most bytes a program may have.
    """

    target: Target
    warp_size: int
    shared_memory: int

    def gpu_target(self) -> GPUTarget:
        """Return Triton's name for it."""
        return GPUTarget(self.target.backend, self.target.arch, self.warp_size)


# With the processors of an A100, an L40S, an H100, a B200, an MI300X and an MI355X.
CHIPS = {
    "sm_80": Chip(Target("cuda", 80, 108), 32, 163 * 1024),
    "sm_89": Chip(Target("cuda", 89, 142), 32, 99 * 1024),
    "sm_90": Chip(Target("cuda", 90, 132), 32, 227 * 1024),
    "sm_100": Chip(Target("cuda", 100, 148), 32, 227 * 1024),
    "gfx942": Chip(Target("hip", "gfx942", 304), 64, 64 * 1024),
    "gfx950": Chip(Target("hip", "gfx950", 256), 64, 160 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that is fixed when it is compiled.

    Attributes:
        signature: parameter -> type, ``"constexpr"`` for those in ``constexprs``.
        constexprs: parameter -> value.
        aligned: parameters that are multiples of 16.
        options: ``num_warps`` and the like.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What compilation yields.

    Attributes:
        asm: stage -> its text or binary: ``"ttgir"``, ``"ptx"``, ``"cubin"``, ``"amdgcn"``...
        shared_memory: bytes a program needs.
        registers: per thread; vector registers on AMD. ``None`` where no tool tells.
        spilled: bytes per thread (CUDA) or registers (AMD) that did not fit; ``None`` where no tool tells.
    """

    asm: Mapping[str, Any]
    shared_memory: int
    registers: int | None
    spilled: int | None

    @property
    def assembly(self) -> str:
        """The text that names the instructions."""
        return str(self.asm["ptx" if "ptx" in self.asm else "amdgcn"])


def specialize(kernel: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Launch:
    """Derive from a launch what Triton would compile for it.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: positional ones: tensors (on any device, meta too, taken to be aligned) and descriptors of tensors,
            numbers, ``None``.
        keywords: compile-time arguments and launch options.
    """
    names: list[str] = kernel.arg_names
    constexprs = {name: value for name, value in keywords.items() if name in names}
    options = {name: value for name, value in keywords.items() if name not in names}
    signature, aligned = dict.fromkeys(names, "constexpr"), set()
    for name, value in zip(names, arguments, strict=False):
        if value is None or (isinstance(value, int) and value == 1):
            constexprs[name] = value  # Triton compiles None and the integer 1 in.
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            aligned.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.add(name)
    return Launch(kernel, signature, constexprs, frozenset(aligned), options)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: GPUTarget,
    options: Mapping[str, Any],
    aligned: frozenset[str] = frozenset(),
) -> Compiled:
    """Compile ``kernel`` for ``target``; the other arguments as in ``Launch``."""
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError("Triton's interpreter has taken this kernel (TRITON_INTERPRET is set): it can't be compiled")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)}
    source = ASTSource(kernel, dict(signature), dict(constexprs), attributes)
    result = triton.compile(source, target=target, options=dict(options))
    usage = _amd_registers(result.asm["amdgcn"]) if "amdgcn" in result.asm else _cuda_registers(result.asm["cubin"])
    return Compiled(result.asm, result.metadata.shared, *usage)


def compile_launch(launch: Launch, chip: Chip) -> Compiled:
    """Compile ``launch`` for ``chip``."""
    return compile_kernel(
        launch.kernel, launch.signature, launch.constexprs, chip.gpu_target(), launch.options, launch.aligned
    )


def _amd_registers(assembly: str) -> tuple[int | None, int | None]:
    """Read vector registers and spilled ones from the metadata that LLVM writes below the code."""
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", assembly)}
    return found.get("vgpr_count"), found.get("vgpr_spill_count", 0) + found.get("sgpr_spill_count", 0)


def _cuda_registers(cubin: bytes) -> tuple[int | None, int | None]:
    """Ask cuobjdump, which Triton ships, for registers and for the local memory that spills take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        try:
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.CalledProcessError):
            return None, None
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
