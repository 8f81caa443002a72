"""Every kernel, as it is launched, compiled for every chip of the support table; no GPU is needed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops.gguf_types import block_type
from lowbit.ops.triton import (
    ahead_of_time,
    attention,
    elementwise,
    fp8,
    gguf,
    int8,
    int8_weight_only,
    integer_groups,
    launch,
    microscaling,
    mx,
    mx_weight_only,
    nvfp4,
    nvfp4_weight_only,
    persistent,
    quantize_rows,
    w4a16,
    w8a16,
)
from lowbit.ops.triton.ahead_of_time import CHIPS, Chip, Compiled, Launch, compile_kernel, compile_launch, specialize

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"
)

K = N = 3840
MX_KINDS = ("mxfp8", "mxfp4", "dualscale")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(m: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    scales = meta(m, 1, dtype=torch.float32), meta(N, 1, dtype=torch.float32)
    return meta(m, K, dtype=dtype), scales[0], meta(N, K, dtype=dtype), scales[1], meta(N)


def int8_product(m: int) -> None:
    int8.int8_scaled_mm(*operands(m, torch.int8), torch.bfloat16)


def fp8_product(m: int) -> None:
    fp8.fp8_scaled_mm(*operands(m, torch.float8_e4m3fn), torch.bfloat16)


def fp8_block_product(m: int) -> None:
    x, _, weight, _, bias = operands(m, torch.float8_e4m3fn)
    scales = meta(m, K // 128, dtype=torch.float32), meta(N // 128, K // 128, dtype=torch.float32)
    fp8.fp8_scaled_mm(x, scales[0], weight, scales[1], bias, torch.bfloat16, [128, 128])


def run_attention(kind: str, width: int) -> None:
    tensors = (meta(1, 4160, 30, width) for _ in range(3))
    attention.attention(*tensors, None, width**-0.5, False, kind)


def mx_operands(m: int, kind: str) -> list[torch.Tensor]:
    """Elements and scales of x [m, K] and of a weight [N, K], dual scales at the end."""
    element = {"dtype": torch.float8_e4m3fn} if kind == "mxfp8" else {"dtype": torch.uint8}
    width = K if kind == "mxfp8" else K // 2
    tensors = [
        part for rows in (m, N) for part in (meta(rows, width, **element), meta(rows, K // 32, dtype=torch.uint8))
    ]
    dual = [meta(rows, K // 512 + 1, dtype=torch.float32) for rows in (m, N)]
    return [*tensors, *(dual if kind == "dualscale" else [])]


def mx_product(m: int, kind: str) -> None:
    x, x_scale, weight, scale, *dual = mx_operands(m, kind)
    mx.mx_scaled_mm(x, x_scale, weight, scale, meta(N), torch.bfloat16, *dual)


def mx_weight_product(m: int, kind: str) -> None:
    _, _, weight, scale, *dual = mx_operands(m, kind)
    mx_weight_only.mx_weight_only_mm(meta(m, K), weight, scale, meta(N), *dual[1:])


def nvfp4_operands(rows: int) -> list[torch.Tensor]:
    return [meta(rows, K // 2, dtype=torch.uint8), meta(rows, K // 16, dtype=torch.float8_e4m3fn)]


def nvfp4_product(m: int) -> None:
    outer = meta(m, 1, dtype=torch.float32), meta(dtype=torch.float32)
    nvfp4.nvfp4_scaled_mm(*nvfp4_operands(m), outer[0], *nvfp4_operands(N), outer[1], meta(N), torch.bfloat16)


def nvfp4_weight_product(m: int) -> None:
    nvfp4_weight_only.nvfp4_weight_only_mm(meta(m, K), *nvfp4_operands(N), meta(N), meta(dtype=torch.float32))


@dataclass(frozen=True)
class Case:
    """Where a kernel is, and a call that launches it."""

    module: ModuleType
    kernel: str
    call: Callable[..., Any]


PRODUCTS = {
    "int8": Case(int8, "scaled_mm_kernel", int8_product),
    "fp8": Case(fp8, "scaled_mm_kernel", fp8_product),
    "fp8 block-wise": Case(fp8, "scaled_mm_kernel", fp8_block_product),
}


def int8_weight_only_product(m: int) -> None:
    x, _, weight, scale, bias = operands(m, torch.int8)
    int8_weight_only.weight_only_mm(x.to(torch.bfloat16), weight, scale, bias)


def fp8_weight_only_product(m: int) -> None:
    x, _, weight, scale, bias = operands(m, torch.uint8)
    int8_weight_only.weight_only_mm(x.to(torch.bfloat16), weight, scale, bias)


WEIGHT_ONLY_PRODUCTS = {
    "int8": Case(int8_weight_only, "weight_only_mm_kernel", int8_weight_only_product),
    "fp8": Case(int8_weight_only, "weight_only_mm_kernel", fp8_weight_only_product),
}
SCALED_PRODUCTS = {
    **{kind: Case(microscaling, "scaled_mm_kernel", partial(mx_product, kind=kind)) for kind in MX_KINDS},
    **{
        f"{kind} weight-only": Case(microscaling, "scaled_mm_kernel", partial(mx_weight_product, kind=kind))
        for kind in MX_KINDS
    },
    "nvfp4": Case(microscaling, "scaled_mm_kernel", nvfp4_product),
    "nvfp4 weight-only": Case(microscaling, "scaled_mm_kernel", nvfp4_weight_product),
}
QUANTIZATIONS = {
    "int8": Case(quantize_rows, "quantize_rows_kernel", lambda: int8.quantize_int8_per_token(meta(4096, K))),
    "int8 of long rows": Case(
        quantize_rows, "quantize_rows_kernel", lambda: int8.quantize_int8_per_token(meta(4096, 4 * K))
    ),
    "fp8": Case(quantize_rows, "quantize_rows_kernel", lambda: fp8.quantize_fp8_per_token(meta(4096, K))),
    "fp8 in groups": Case(fp8, "quantize_groups_kernel", lambda: fp8.quantize_fp8_per_group(meta(4096, K), 128)),
    "fp8 with a scale": Case(
        fp8,
        "quantize_with_scale_kernel",
        lambda: fp8.quantize_fp8_per_tensor(meta(4096, K), meta(dtype=torch.float32)),
    ),
}

# The tensor-core instruction of a product with many rows.
INSTRUCTIONS = {
    ("int8", "sm_80"): r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("int8", "sm_89"): r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    ("int8", "sm_90"): r"wgmma\.mma_async\S*\.s32\.s8\.s8",
    ("int8", "sm_100"): r"tcgen05\.mma\S*\.kind::i8",
    ("int8", "gfx942"): r"v_mfma_i32_32x32x16_i8",
    ("fp8", "sm_89"): r"mma\.sync\.aligned\.m16n8k32\S*\.f32\.e4m3\.e4m3\.f32",
    ("fp8", "sm_90"): r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3",
    ("fp8", "sm_100"): r"tcgen05\.mma\S*\.kind::f8f6f4",
    ("fp8", "gfx942"): r"v_mfma_f32_32x32x8_f16",
}
# With one row the tile is smaller than wgmma and tcgen05 take. There Triton multiplies e4m3 as float16.
NARROW_INSTRUCTIONS = {
    **dict.fromkeys([("int8", chip) for chip in ("sm_80", "sm_89", "sm_90", "sm_100")], INSTRUCTIONS["int8", "sm_80"]),
    ("int8", "gfx942"): r"v_mfma_i32_16x16x32_i8",
    ("fp8", "sm_89"): INSTRUCTIONS["fp8", "sm_89"],
    ("fp8", "sm_90"): r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.f16\.f16\.f32",
    ("fp8", "sm_100"): r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.f16\.f16\.f32",
    ("fp8", "gfx942"): r"v_mfma_f32_16x16x16_f16",
}


ATTENTION_CHIPS = [(kind, chip) for kind in ("int8", "fp8") for chip in CHIPS if chip != "gfx950"]
# Decoded to float16 where e4m3 can't be multiplied.
ATTENTION_INSTRUCTIONS = {
    **{key: instruction for key, instruction in INSTRUCTIONS.items() if key != ("fp8", "gfx942")},
    ("fp8", "sm_80"): r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.f16\.f16\.f32",
    ("fp8", "gfx942"): r"v_mfma_f32_\d+x\d+x\d+_f16",
    ("int8", "gfx942"): r"v_mfma_i32_\d+x\d+x\d+_i8",
}
# How operands get to shared memory where it is not by cp.async.
OPERAND_LOADS = {"sm_90": r"cp\.async\.bulk\.tensor\.2d\.shared", "gfx942": "_load_dwordx4"}


class Recorder:
    """Takes a kernel's place and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append(specialize(self.kernel, arguments, keywords))


def compiled(case: Case, chip: Chip, *arguments: Any) -> Compiled:
    """Compile what ``case`` launches on ``chip``; fail if it would not fit there."""
    (recorded,) = recorded_launches(case, chip, *arguments)
    result = compile_launch(recorded, chip)
    assert result.shared_memory <= chip.shared_memory
    assert not result.spilled
    return result


def recorded_launches(case: Case, chip: Chip, *arguments: int) -> list[Launch]:
    """Return what ``case`` launches on ``chip``: its own kernel or the persistent one."""
    recorder = Recorder(getattr(case.module, case.kernel))
    persistent_recorder = Recorder(persistent.persistent_mm_kernel)
    with (
        mock.patch.object(case.module, case.kernel, recorder),
        mock.patch.object(persistent, "persistent_mm_kernel", persistent_recorder),
        mock.patch.object(launch, "_accelerator", return_value=chip.target),
    ):
        case.call(*arguments)
    return recorder.launches + persistent_recorder.launches


def family_of(name: str) -> str:
    return name.split(maxsplit=1)[0]


def sampled(cases: Sequence[tuple[str, str]], others: Collection[tuple[str, str]] = ()) -> list[Any]:
    """Mark cases (name, chip) exhaustive but those of a chip of each make and kind of tensor core, and ``others``."""
    kept = ("sm_90", "sm_100", "gfx942")
    return [
        pytest.param(*case, marks=[] if case[1] in kept or case in others else pytest.mark.exhaustive) for case in cases
    ]


def chips_of(cases: dict[str, Case]) -> list[tuple[str, str]]:
    return [(name, chip) for name in cases for chip in CHIPS if (family_of(name), chip) in INSTRUCTIONS]


@pytest.mark.parametrize(("name", "chip"), chips_of(PRODUCTS))
def test_products_use_tensor_cores(name: str, chip: str) -> None:
    assembly = compiled(PRODUCTS[name], CHIPS[chip], 4096).assembly
    assert re.search(INSTRUCTIONS[family_of(name), chip], assembly)
    # Operands come 16 bytes at a time, or a tile at a time.
    assert re.search(OPERAND_LOADS.get(chip, r"cp\.async\.cg\.shared\.global"), assembly)
    if family_of(name) == "int8":  # A contracted epilogue would not be the reference's, bit for bit.
        assert "fma.rn.f32" not in assembly


# What multiplies: the chip's scaled units where it has them, else tensor cores on decoded bfloat16.
SCALED = {
    ("mx", "sm_100"): r"tcgen05\.mma\S*\.kind::mxf(8f6f4|4)\S*block_scale",
    ("nvfp4", "sm_100"): r"tcgen05\.mma\S*\.kind::mxf4nvf4\S*block_scale",
    ("mx", "gfx950"): r"v_mfma_scale_f32",
}
DECODED = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "sm_89": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "sm_90": r"(wgmma\.mma_async|mma\.sync)\S*\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\S*\.kind::f16|mma\.sync\S*\.f32\.bf16\.bf16",
    "gfx942": r"v_mfma_f32_\S*bf16",
    "gfx950": r"v_mfma_f32_\S*bf16",
}
QUICK_SCALED = [("mxfp4", "sm_100"), ("nvfp4", "sm_100"), ("mxfp8", "gfx950"), ("nvfp4 weight-only", "sm_90")]


def check_scaled_product(name: str, chip: str, m: int) -> None:
    assembly = compiled(SCALED_PRODUCTS[name], CHIPS[chip], m).assembly
    family = "nvfp4" if name.startswith("nvfp4") else "mx"
    native = None if "weight-only" in name else SCALED.get((family, chip))
    assert re.search(native or DECODED[chip], assembly)


@pytest.mark.parametrize(("name", "chip"), QUICK_SCALED)
def test_scaled_products_use_tensor_cores(name: str, chip: str) -> None:
    check_scaled_product(name, chip, 4096)


@pytest.mark.exhaustive
@pytest.mark.parametrize("m", [64, 4096])
@pytest.mark.parametrize("chip", DECODED)
@pytest.mark.parametrize("name", SCALED_PRODUCTS)
def test_every_scaled_product_uses_tensor_cores(name: str, chip: str, m: int) -> None:
    if m == 64 and "weight-only" not in name:
        pytest.skip("tiles this low are multiplied decoded on some chips")
    check_scaled_product(name, chip, m)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip"), sampled(chips_of(PRODUCTS)))
def test_products_of_one_row_use_tensor_cores(name: str, chip: str) -> None:
    assembly = compiled(PRODUCTS[name], CHIPS[chip], 1).assembly
    assert re.search(NARROW_INSTRUCTIONS[family_of(name), chip], assembly)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip"), sampled(chips_of(PRODUCTS)))
def test_products_of_few_rows_use_tensor_cores(name: str, chip: str) -> None:
    assembly = compiled(PRODUCTS[name], CHIPS[chip], 64).assembly
    assert re.search(INSTRUCTIONS[family_of(name), chip], assembly)


@pytest.mark.parametrize(("kind", "chip"), sampled(ATTENTION_CHIPS, [("fp8", "sm_80")]))
def test_attention_uses_tensor_cores_for_both_products(kind: str, chip: str) -> None:
    with mock.patch.object(attention, "quantize_keys_kernel", Recorder(attention.quantize_keys_kernel)):
        result = compiled(Case(attention, "attention_kernel", run_attention), CHIPS[chip], kind, 128)
    found = re.findall(ATTENTION_INSTRUCTIONS[kind, chip], result.assembly)
    # A product of 64 or 128 numbers takes several; no product may be left to 32-bit arithmetic.
    assert len(found) >= 2


@pytest.mark.parametrize(("kind", "chip"), [("int8", "sm_90"), ("fp8", "sm_80"), ("fp8", "gfx942")])
def test_quantizing_keys_compiles(kind: str, chip: str) -> None:
    with mock.patch.object(attention, "attention_kernel", Recorder(attention.attention_kernel)):
        compiled(Case(attention, "quantize_keys_kernel", run_attention), CHIPS[chip], kind, 128)


@pytest.mark.parametrize(("name", "chip"), sampled([(name, chip) for name in WEIGHT_ONLY_PRODUCTS for chip in CHIPS]))
def test_weight_only_products_use_tensor_cores_in_16_bits(name: str, chip: str) -> None:
    assembly = compiled(WEIGHT_ONLY_PRODUCTS[name], CHIPS[chip], 1).assembly
    assert re.search(r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16|v_mfma_f32_16x16x(16|32)_bf16", assembly)


@pytest.mark.parametrize(("name", "chip"), chips_of(QUANTIZATIONS))
def test_quantizations_divide_exactly_and_load_wide(name: str, chip: str) -> None:
    assembly = compiled(QUANTIZATIONS[name], CHIPS[chip]).assembly
    if CHIPS[chip].target.backend == "hip":
        assert "v_div_fixup_f32" in assembly
        assert re.search(r"(buffer|global)_load_dwordx4", assembly)
        return
    assert "div.rn.f32" in assembly
    assert not re.search(r"div\.(full|approx)|\.ftz", assembly)
    assert re.search(r"ld\.global\S*\.v4", assembly)
    if family_of(name) == "fp8":
        assert "cvt.rn.satfinite.e4m3x2.f32" in assembly


@pytest.mark.parametrize(("name", "chip"), [("int8", "sm_90"), ("int8", "gfx942")])
def test_ragged_shapes_compile(name: str, chip: str) -> None:
    call = mock.Mock(
        side_effect=lambda: int8.int8_scaled_mm(
            meta(7, 100, dtype=torch.int8),
            meta(7, 1, dtype=torch.float32),
            meta(33, 100, dtype=torch.int8),
            meta(33, 1, dtype=torch.float32),
            None,
            torch.float32,
        )
    )
    assembly = compiled(Case(int8, "scaled_mm_kernel", call), CHIPS[chip]).assembly
    assert re.search(NARROW_INSTRUCTIONS[name, chip], assembly)


def rotated_heads() -> None:
    frequencies = meta(1, 4160, 64, 2, dtype=torch.float32)
    elementwise.normalize(meta(1, 4160, 30, 128), 1e-5, meta(128), frequencies)


ELEMENTWISE = {
    "heads": Case(elementwise, "normalize_kernel", rotated_heads),
    "rows": Case(elementwise, "normalize_kernel", lambda: elementwise.normalize(meta(4160, K), 1e-5, meta(K), None)),
    "gate": Case(elementwise, "gate_kernel", lambda: elementwise.gate(meta(4160, 10240), meta(4160, 10240))),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_kernels_load_and_store_wide(name: str, chip: str) -> None:
    result = compiled(ELEMENTWISE[name], CHIPS[chip])
    if CHIPS[chip].target.backend == "hip":
        assert re.search(r"(buffer|global)_load_dwordx4", result.assembly)
        assert re.search(r"(buffer|global)_store_dwordx4", result.assembly)
    else:
        assert re.search(r"ld\.global\S*\.v4\.", result.assembly)
        assert re.search(r"st\.global\S*\.v4\.", result.assembly)


# Few rows: from FUSED_ROWS on the weight is decoded first. SM 8.9 is as SM 8.0 here.
GGUF_INSTRUCTIONS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "sm_89": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\S*\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\S*\.kind::f16",
    "gfx942": r"v_mfma_f32_32x32x8_bf16",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_bf16",
}


def gguf_product(weight_type: str, m: int) -> Case:
    packed = meta(N, block_type(weight_type).row_bytes(K), dtype=torch.uint8)
    return Case(gguf, "mm_kernel", lambda: gguf.gguf_mm(meta(m, K), packed, weight_type, meta(N)))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("weight_type", ["Q4_K", pytest.param("Q6_K", marks=pytest.mark.exhaustive)])
def test_gguf_products_use_tensor_cores(weight_type: str, chip: str) -> None:
    assert re.search(GGUF_INSTRUCTIONS[chip], compiled(gguf_product(weight_type, 64), CHIPS[chip]).assembly)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [1, 64, 255])
@pytest.mark.parametrize("weight_type", gguf.TYPES)
def test_gguf_products_fit(weight_type: str, rows: int, chip: str) -> None:
    assert re.search("mma", compiled(gguf_product(weight_type, rows), CHIPS[chip]).assembly)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("weight_type", gguf.TYPES)
def test_gguf_decoding_fits(weight_type: str, chip: str) -> None:
    packed = meta(N, block_type(weight_type).row_bytes(K), dtype=torch.uint8)
    call = lambda: gguf.gguf_dequantize(packed, weight_type, torch.bfloat16)  # noqa: E731
    assert compiled(Case(gguf, "dequantize_kernel", call), CHIPS[chip]).assembly


def integer_product(bits: int, m: int) -> Case:
    weight = meta(N, K // 2, dtype=torch.uint8) if bits == 4 else meta(N, K, dtype=torch.int8)
    zero = meta(N, K // 128, dtype=torch.uint8 if bits == 4 else torch.int16)
    multiply = w4a16.w4a16_mm if bits == 4 else w8a16.w8a16_mm
    scale = meta(N, K // 128, dtype=torch.float32)
    return Case(integer_groups, "mm_kernel", lambda: multiply(meta(m, K), weight, scale, meta(N), zero))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_integer_products_use_tensor_cores(bits: int, chip: str) -> None:
    assert re.search(GGUF_INSTRUCTIONS[chip], compiled(integer_product(bits, 64), CHIPS[chip]).assembly)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [1, 255])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_products_fit(bits: int, rows: int, chip: str) -> None:
    assert re.search("mma|mfma", compiled(integer_product(bits, rows), CHIPS[chip]).assembly)


def test_registers_are_read_from_what_was_compiled() -> None:
    usage = compiled(QUANTIZATIONS["int8"], CHIPS["gfx942"])
    assert usage.registers is not None
    assert 0 < usage.registers <= 512
    assert usage.spilled == 0


def test_a_missing_tool_leaves_registers_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **keywords: object) -> None:
        raise FileNotFoundError("cuobjdump")

    monkeypatch.setattr("subprocess.run", missing)
    assert ahead_of_time._cuda_registers(b"") == (None, None)


def test_specialize_sees_what_triton_would() -> None:
    def kernel(x: Any, y: Any, size: Any, stride: Any, one: Any, big: Any, bias: Any, BLOCK: int) -> None:  # noqa: N803
        """Do nothing."""

    stand_in = mock.Mock(arg_names=list(kernel.__code__.co_varnames))
    arguments = (meta(3), meta(3, dtype=torch.int8), 17, 32, 1, 2**40, None)
    recorded = specialize(stand_in, arguments, {"BLOCK": 64, "num_warps": 4})
    assert recorded.signature == {
        "x": "*bf16",
        "y": "*i8",
        "size": "i32",
        "stride": "i32",
        "one": "constexpr",
        "big": "i64",
        "bias": "constexpr",
        "BLOCK": "constexpr",
    }
    assert recorded.constexprs == {"one": 1, "bias": None, "BLOCK": 64}
    assert recorded.aligned == {"x", "y", "stride", "big"}
    assert recorded.options == {"num_warps": 4}


def test_an_interpreted_kernel_is_refused() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_kernel(InterpretedFunction(specialize), {}, {}, CHIPS["sm_90"].gpu_target(), {})
