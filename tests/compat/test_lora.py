"""LoRA adapters on quantized transformers, through the pipelines' own loaders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline, ZImagePipeline
from safetensors.torch import save_file

from lowbit.checkpoints import component as loading
from lowbit.errors import UnsupportedError
from lowbit.quantization import QuantizedLinear
from lowbit.quantization.plan import quantized_layers
from tests.support.foreign_models import FOREIGN, foreign_model
from tests.support.models import FAMILIES, METHODS, quantized_model, relative_error, same_bytes

pytest.importorskip("peft")

PIPELINES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "flux": (FluxPipeline, ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    "qwen-image": (QwenImagePipeline, ("scheduler", "vae", "text_encoder", "tokenizer")),
    "z-image": (ZImagePipeline, ("scheduler", "vae", "text_encoder", "tokenizer")),
}


def pipeline_of(family: str, transformer: torch.nn.Module) -> Any:
    kind, others = PIPELINES[family]
    return kind(transformer=transformer, **dict.fromkeys(others))


def adapter(model: Any, folder: Path, seed: int, strength: float = 1.0) -> Path:
    """Write an adapter for all quantized layers and for one that is kept; as strong as the weights are."""
    generator = torch.Generator().manual_seed(seed)
    kept = model.lowbit_manifest.kept[0].name
    tensors = {}
    for name in [*quantized_layers(model), kept]:
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        down = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
        up = torch.randn(layer.out_features, 4, generator=generator) * strength
        tensors[f"transformer.{name}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"transformer.{name}.lora_B.weight"] = up.to(torch.bfloat16)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load_two(pipeline: Any, folders: list[Path], weights: list[float]) -> None:
    for folder, name in zip(folders, ("first", "second"), strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)
    pipeline.set_adapters(["first", "second"], weights)


# Static scales were found without the adapter, which may lead beyond what they cover where activations are rounded.
CASES = [("z-image", method) for method in METHODS if method not in ("fp8-static", "modelopt-FP8")]
VARIATIONS = ("-reference", "-onednn", "-smoothing", "-rotation", "-weight_only")  # of methods that are there without
EVERY_LAYOUT = (
    *("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4", "gguf-Q4_0"),
    *("auto-round", "svdquant-nvfp4", "modelopt-NVFP4", "comfyui"),
)
CASES += [(name, method) for name in ("flux", "qwen-image") for method in EVERY_LAYOUT]


def is_sampled(name: str, method: str) -> bool:
    if name == "qwen-image":
        return method in ("int8", "gguf-Q4_0", "auto-round", "svdquant-nvfp4")
    return not method.endswith(VARIATIONS)


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*case, marks=[] if is_sampled(*case) else pytest.mark.exhaustive) for case in CASES],
)
def test_adapters_act_as_on_the_weights_that_the_layers_stand_for(name: str, method: str, tmp_path: Path) -> None:
    check_adapters(quantized_model(FAMILIES[name], method), name, tmp_path)


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_on_checkpoints_of_other_tools(name: str, tmp_path: Path) -> None:
    # W8A8 of ascend has static scales, which clip what stronger ones add.
    strength = 0.3 if name.startswith("ascend") else 1.0
    check_adapters(foreign_model(name, tmp_path / "model"), "flux", tmp_path, strength)


def check_adapters(model: Any, name: str, tmp_path: Path, strength: float = 1.0) -> None:
    """Hold two adapters on ``model``, of the family ``name``, against those on a float model of its weights."""
    family = FAMILIES[name]
    folders = [adapter(model, tmp_path / name, seed, strength) for seed, name in ((1, "first"), (2, "second"))]
    plain = copy.deepcopy(model)
    loading.dequantize(plain)
    before = snapshot(model)
    base, plain_base = family.run(model), family.run(plain)
    error = relative_error(base, plain_base)

    pipeline, reference = pipeline_of(name, model), pipeline_of(name, plain)
    for weights in ([1.0, 0.0], [0.5, -0.7]):
        if weights[1]:
            pipeline.set_adapters(["first", "second"], weights)
            reference.set_adapters(["first", "second"], weights)
        else:
            load_two(pipeline, folders, weights)
            load_two(reference, folders, weights)
        found, expected = family.run(model), family.run(plain)
        allowed = 0.02 + 4 * error  # the adapter changes the activations that are rounded, too
        assert relative_error(found, expected) < allowed
        assert relative_error(expected, plain_base) > 2 * allowed, "the adapter is too weak to see"

    model.disable_lora()
    assert torch.equal(family.run(model), base)
    pipeline.unload_lora_weights()
    assert same_bytes(model.state_dict(), before)
    assert torch.equal(family.run(model), base)


@pytest.mark.parametrize(
    ("name", "method"), [("flux", "int8"), ("qwen-image", "fp8"), ("z-image", "mxfp4"), ("z-image", "gguf-Q4_0")]
)
def test_fusing_is_refused_and_changes_nothing(name: str, method: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = quantized_model(family, method)
    pipeline = pipeline_of(name, model)
    pipeline.load_lora_weights(adapter(model, tmp_path / "first", 1), adapter_name="first")
    before, output = snapshot(model), family.run(model)
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match="can't be fused into quantized layers.*set_adapters"):
            pipeline.fuse_lora(safe_fusing=safe)
    adapted = [module for module in model.modules() if hasattr(module, "base_layer")]
    layer = next(module for module in adapted if isinstance(module.base_layer, QuantizedLinear))
    with pytest.raises(UnsupportedError, match="can't be fused"):
        layer.merge(safe_merge=True)
    assert all(
        torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)) for key, tensor in snapshot(model).items()
    )
    assert torch.equal(family.run(model), output)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_added_to_what_the_layer_computes(method: str, tmp_path: Path) -> None:
    family = FAMILIES["z-image"]
    model = quantized_model(family, method)
    pipeline = pipeline_of("z-image", model)
    pipeline.load_lora_weights(adapter(model, tmp_path / "first", 1), adapter_name="first")
    pipeline.set_adapters(["first"], [0.5])
    layer: Any = model.get_submodule(family.quantized)
    x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
    down, up = layer.lora_A["first"], layer.lora_B["first"]
    assert down.weight.dtype == up.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x) + up(down(x)) * 0.5)


@pytest.mark.parametrize("method", ["int8", "mxfp4", "auto-round"])
def test_an_adapter_for_fewer_inputs_is_padded(method: str, tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    model = quantized_model(family, method)
    down, up = torch.randn(4, 48), torch.randn(64, 4)
    tensors = {f"transformer.{family.quantized}.lora_{part}.weight": each for part, each in (("A", down), ("B", up))}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline_of("flux", model).load_lora_weights(tmp_path)
    layer: Any = model.get_submodule(family.quantized)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        found = layer(x) - layer.base_layer(x)
    assert relative_error(found, x[:, :48].float() @ down.t() @ up.t()) < 0.02


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    model = quantized_model(family, "mxfp4")
    tensors = {
        f"transformer.{family.quantized}.lora_A.weight": torch.zeros(4, 96),
        f"transformer.{family.quantized}.lora_B.weight": torch.zeros(64, 4),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UnsupportedError, match=rf"larger layer than {family.quantized} \(64 to 64.*ignored_layers"):
        pipeline_of("flux", model).load_lora_weights(tmp_path)
    assert isinstance(model.get_submodule(family.quantized), QuantizedLinear)
