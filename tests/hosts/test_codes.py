"""Codes never become values: float8 and integer tensors without what says how to read them are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3OmniMoeForConditionalGeneration,
)

from lowbit import Omni
from lowbit.checkpoints.codes import LARGEST_CAST_WEIGHT, scale_of
from lowbit.errors import CheckpointError, ConfigError
from lowbit.hosts.preflight import check_pipeline
from lowbit.quantization import Int8Config, quantize_model
from lowbit.quantization.calibration.static import calibration
from tests.support.models import FAMILIES, METHODS, STATIC, language_model, save, save_pipeline, tensors
from tests.support.omni_models import TEXT, qwen3_moe, qwen3_omni

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {},
    "producer": {"name": "modelopt", "version": "0.40"},
}


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None])[0]


def as_fp8(weight: torch.Tensor, dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().amax() / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], config: dict[str, Any] | None) -> Path:
    """Change the tensors of a folder's one file, and its ``quantization_config``."""
    (file,) = folder.glob("*.safetensors")
    found = load_file(file)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config", None)
    if config is not None:
        settings["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def quantized(*parts: str, scale: str = "weight_scale", dtype: torch.dtype = E4M3) -> Callable[[dict[str, Any]], None]:
    """Put the weights whose names have one of ``parts`` in FP8, with scales as ModelOpt has them."""

    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [
            name
            for name in found
            if name.endswith(".weight") and found[name].ndim > 1 and any(part in name for part in parts)
        ]:
            found[name], value = as_fp8(found[name], dtype)
            if scale:
                found[f"{name.removesuffix('weight')}{scale}"] = value
                found[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.01)

    return change


def cast(dtype: torch.dtype = E4M3, *, all_tensors: bool = True) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name, tensor in found.items():
            found[name] = tensor.to(dtype) if all_tensors or tensor.ndim > 1 else tensor

    return change


# transformers: experts and routers.


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    qwen3_moe().to(BF16).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_quantized_experts_of_modelopt_are_refused(moe: Path) -> None:
    rewrite(moe, quantized("_proj"), MODELOPT)
    assert load_file(moe / "model.safetensors")["model.layers.0.mlp.experts.0.gate_proj.weight"].dtype == E4M3
    with pytest.raises(
        CheckpointError, match=r"24 tensors are codes .*experts\.0\.\w+_proj\.weight and 7 like it"
    ) as e:
        AutoModelForCausalLM.from_pretrained(moe, dtype=BF16)
    assert "Quantized experts that are loaded into one parameter" in str(e.value)
    assert str(moe) in str(e.value)


def test_what_is_not_quantized_of_modelopt_is_read(moe: Path) -> None:
    plain = run(AutoModelForCausalLM.from_pretrained(moe, dtype=BF16)).float()
    rewrite(
        moe,
        quantized("self_attn.q_proj", "self_attn.k_proj"),
        {**MODELOPT, "ignore": ["*v_proj", "*o_proj", "lm_head"]},
    )
    found = run(AutoModelForCausalLM.from_pretrained(moe, dtype=BF16)).float()
    assert float((found - plain).norm() / plain.norm()) < 0.1


def test_quantized_experts_of_an_omni_model_are_refused(tmp_path: Path) -> None:
    qwen3_omni().to(BF16).save_pretrained(tmp_path)
    rewrite(tmp_path, quantized("mlp.experts."), MODELOPT)
    with pytest.raises(CheckpointError, match=r"thinker\.model\.layers\.0\.mlp\.experts\.0\.\w+_proj\.weight and"):
        Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=BF16)


@pytest.mark.parametrize("config", [MODELOPT, None, {"quant_method": "mystery"}])
def test_routers_in_8_bits_are_refused(config: dict[str, Any] | None, moe: Path) -> None:
    rewrite(moe, quantized("mlp.gate.", *(["self_attn"] if config is MODELOPT else [])), config)
    with pytest.raises(
        CheckpointError, match=r"2 tensors are codes .*layers\.0\.mlp\.gate\.weight and 1 .*routers in 8"
    ):
        AutoModelForCausalLM.from_pretrained(moe, dtype=BF16)


def test_a_router_that_is_a_linear_layer_is_refused_too(tmp_path: Path) -> None:
    """Qwen2-MoE's gate of the shared expert is one; a configuration that quantizes everything names it."""
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, shared_expert_intermediate_size=32)).to(BF16)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, quantized("self_attn", "shared_expert"), {**MODELOPT, "ignore": ["lm_head"]})
    with pytest.raises(CheckpointError, match=r"shared_expert_gate.*router"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)


def test_routers_are_kept_when_quantizing(moe: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(moe, dtype=BF16, quantization_config=Int8Config())
    assert {record.name.rpartition(".")[2] for record in model.lowbit_manifest.quantized} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    shared = Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, shared_expert_intermediate_size=32)).to(BF16)
    kept = {record.name for record in quantize_model(shared, "int8").kept}
    assert "model.layers.0.mlp.shared_expert_gate" in kept


# What ignore names, and configurations that nobody knows.


@pytest.mark.parametrize("ignored", ["model.layers.0.self_attn.q_proj", "*q_proj"])
def test_layers_that_ignore_names_but_are_quantized(ignored: str, tmp_path: Path) -> None:
    folder = save(language_model(), tmp_path)
    rewrite(folder, quantized("_proj"), {**MODELOPT, "ignore": [ignored, "lm_head"]})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight.*F8_E4M3 .* which nothing applies"
    ):
        AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)


def test_the_same_in_diffusers(tmp_path: Path) -> None:
    folder = save(FAMILIES["flux"].make(), tmp_path)
    change = quantized("attn.to_q", "attn.to_k")
    rewrite(
        folder,
        change,
        {**MODELOPT, "ignore": ["*to_k", "*to_v", "*to_out*", "*add*", "*ff*", "*norm*", "*_embed*", "*proj*"]},
    )
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0\.attn\.to_k\.weight: found F8_E4M3"):
        FluxTransformer2DModel.from_pretrained(folder, torch_dtype=BF16)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("config", [None, {"quant_method": "mystery"}])
def test_transformers_would_only_warn(kind: torch.dtype, config: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = save(language_model(), tmp_path)

    def change(found: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        found[name] = torch.randint(0, 100, found[name].shape).to(torch.uint8).view(kind)
        found[f"{name}_scale"] = torch.tensor(0.01)

    rewrite(folder, change, config)
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(CheckpointError, match=r"q_proj\.weight \(.* is missing, unknown, or does not cover"):
            auto.from_pretrained(folder, dtype=BF16)


@pytest.mark.parametrize("family", ["z-image", "flux", "wan"])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, E4M3, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("low_memory", [True, False])
def test_diffusers_would_not_even_warn(family: str, kind: torch.dtype, low_memory: bool, tmp_path: Path) -> None:
    model = FAMILIES[family].make()
    folder, layer = save(model, tmp_path), FAMILIES[family].quantized
    if not low_memory and family == "wan":
        pytest.skip("diffusers loads Wan's float32 modules with low_cpu_mem_usage only")

    def change(found: dict[str, torch.Tensor]) -> None:
        codes = torch.full(found[f"{layer}.weight"].shape, 0x7E, dtype=torch.uint8)
        found[f"{layer}.weight"] = codes[:, ::2].contiguous().view(kind) if "float4" in str(kind) else codes.view(kind)
        found[f"{layer}.weight_scale"] = torch.tensor(0.01)

    rewrite(folder, change, None)
    with pytest.raises(CheckpointError, match=rf"{layer}\.weight \("):
        type(model).from_pretrained(folder, torch_dtype=BF16, low_cpu_mem_usage=low_memory)


# Folders that lowbit wrote and whose configuration was lost.


def lost(folder: Path) -> Path:
    return rewrite(folder, lambda found: None, None)


@pytest.mark.parametrize("method", [name for name in METHODS if "onednn" not in name and "smoothing" not in name])
def test_a_lost_configuration(method: str, tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    model: Any = family.make().to(BF16).requires_grad_(False)
    text: Any = language_model().to(BF16)
    for each in (model, text):
        quantize_model(each, METHODS[method])
    if method in STATIC:
        with calibration(model):
            family.run(model)
        with calibration(text):
            run(text)
    model.save_pretrained(tmp_path / "diffusers")
    text.save_pretrained(tmp_path / "transformers")
    with pytest.raises(CheckpointError, match="codes and not values"):
        FluxTransformer2DModel.from_pretrained(lost(tmp_path / "diffusers"), torch_dtype=BF16)
    with pytest.raises(CheckpointError, match="codes and not values"):
        AutoModelForCausalLM.from_pretrained(lost(tmp_path / "transformers"), dtype=BF16)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_omni_refuses_before_it_loads(component: str, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model")

    def change(found: dict[str, torch.Tensor]) -> None:
        name = next(name for name in found if name.endswith("q.weight") or name.endswith("q_proj.weight"))
        found[name] = torch.randint(-127, 127, found[name].shape).to(torch.int8)

    rewrite(folder / component, change, None)
    with pytest.raises(CheckpointError, match=rf"(?s){component}.*I8"):
        check_pipeline(folder)
    for quantization in (None, "int8"):
        with pytest.raises(CheckpointError, match=rf"(?s){component}.*I8"):
            Omni(str(folder), quantization=quantization, device="cpu")


# Files that were cast, which are values.


@pytest.mark.parametrize("kind", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("all_tensors", [True, False])
def test_cast_checkpoints_are_values(kind: torch.dtype, all_tensors: bool, tmp_path: Path) -> None:
    flux, text = save(FAMILIES["flux"].make(), tmp_path / "flux"), save(language_model(), tmp_path / "text")
    for folder, load in ((flux, FluxTransformer2DModel.from_pretrained), (text, AutoModelForCausalLM.from_pretrained)):
        original = tensors(folder)
        rewrite(folder, cast(kind, all_tensors=all_tensors), None)
        found: Any = load(folder, torch_dtype=BF16)
        for name, tensor in found.state_dict().items():
            expected = original[name].to(kind).to(BF16) if all_tensors or tensor.ndim > 1 else original[name]
            assert torch.equal(tensor, expected), name


def test_a_cast_layer_in_a_scaled_file(tmp_path: Path) -> None:
    """Small codes without a scale are values; large ones have lost their scale."""
    folder, other = save(language_model(), tmp_path), "model.layers.1.self_attn.k_proj.weight"
    original = tensors(folder)

    def change(found: dict[str, torch.Tensor]) -> None:
        quantized("self_attn.q_proj")(found)
        found[other] = found[other].to(E4M3)

    config = {**MODELOPT, "ignore": ["*k_proj", "*v_proj", "*o_proj", "*mlp*", "lm_head"]}
    rewrite(folder, change, config)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    assert torch.equal(model.state_dict()[other], original[other].to(E4M3).to(BF16))

    def spoil(found: dict[str, torch.Tensor]) -> None:
        found[other], _ = as_fp8(original[other])

    rewrite(folder, spoil, config)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight .*without a scale.*448 is a scaled"
    ):
        AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)


def test_a_file_that_lost_all_its_scales(tmp_path: Path) -> None:
    folder = save(language_model(), tmp_path / "text")
    rewrite(folder, quantized("_proj", scale=""), None)
    with pytest.raises(CheckpointError, match="no tensor has a scale, and weights reach 448"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    folder = save(FAMILIES["wan"].make(), tmp_path / "wan")
    rewrite(folder, quantized("attn", scale=""), None)
    with pytest.raises(CheckpointError, match="no tensor has a scale, and weights reach 448"):
        WanTransformer3DModel.from_pretrained(folder, torch_dtype=BF16)


def test_single_files_of_diffusers(tmp_path: Path) -> None:
    folder = save(FAMILIES["z-image"].make(), tmp_path / "z-image")
    load: Any = ZImageTransformer2DModel.from_single_file
    weights = {name: tensor.contiguous() for name, tensor in tensors(folder).items()}
    file = tmp_path / "cast.safetensors"
    save_file({name: tensor.to(E4M3) for name, tensor in weights.items()}, file)
    model = load(str(file), config=str(folder), torch_dtype=BF16)
    name = "layers.0.attention.to_q.weight"
    assert torch.equal(model.state_dict()[name], weights[name].to(E4M3).to(BF16))
    weights[name], weights[f"{name}_scale"] = as_fp8(weights[name])
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"attention\.to_q\.weight .* which nothing applies.*method 'comfyui'"):
        load(str(file), config=str(folder), torch_dtype=BF16)


def test_spellings_of_scales() -> None:
    for scale in ("a.weight_scale", "a.weight_scale_inv", "a.scale_weight", "a.scale", "a.scale_inv", "a.wscales"):
        assert scale_of("a.weight", {scale}) == scale
    assert scale_of("a.gate_up_proj", {"a.gate_up_proj_scale_inv"}) == "a.gate_up_proj_scale_inv"
    assert scale_of("norm.weight", {"norm.scale_shift_table", "scale"}) is None
    assert LARGEST_CAST_WEIGHT < 448 / 10


def test_a_method_that_a_library_knows_is_the_library_s(tmp_path: Path) -> None:
    """transformers' own FP8 still loads, dequantized on a CPU."""
    folder = save(language_model(), tmp_path)
    original = tensors(folder)
    names = [name for name in original if "_proj.weight" in name]

    def change(found: dict[str, torch.Tensor]) -> None:
        for name in names:
            blocks = -(-found[name].shape[0] // 128), -(-found[name].shape[1] // 128)
            found[name], scale = as_fp8(found[name])
            found[f"{name}_scale_inv"] = torch.full(blocks, float(scale))

    rewrite(folder, change, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    for name in names:
        found = model.state_dict()[name].float()
        assert float((found - original[name].float()).norm() / original[name].float().norm()) < 0.05
    with pytest.raises(ConfigError):
        AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
