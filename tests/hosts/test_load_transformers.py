from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from lowbit.errors import CheckpointError, ConfigError
from lowbit.quantization import (
    AutoRoundConfig,
    Fp8Config,
    Int8Config,
    QuantizationConfig,
    QuantizedLinear,
    SvdQuantConfig,
    quantize_model,
)
from lowbit.quantization.calibration.static import calibration
from tests.support.kernels import skip_if_refused
from tests.support.models import (
    METHODS,
    STATIC,
    language_model,
    relative_error,
    same_bytes,
    save,
    stored_config,
    tensors,
)

BF16 = torch.bfloat16
LAYER = "model.layers.0.self_attn.q_proj"


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(language_model(tie_word_embeddings=True), tmp_path / "bf16")


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_online_then_saved_then_reloaded(kind: str, config: QuantizationConfig, tmp_path: Path) -> None:
    model = language_model(kind)
    folder = save(model, tmp_path / "bf16", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    online = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=config)
    output = run(online)
    assert 0 < relative_error(output, run(model)) < 0.1
    assert isinstance(online.get_submodule(LAYER), QuantizedLinear)
    assert type(online.lm_head) is torch.nn.Linear
    assert len(online.lowbit_manifest.quantized) == 14

    online.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", quantization_config=type(config)(kernel=config.kernel)
    )
    assert torch.equal(run(reloaded), output)
    assert not any(parameter.requires_grad for parameter in reloaded.get_submodule(LAYER).parameters())


def test_serialized_layout(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    assert stored_config(tmp_path / "saved") == {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "is_checkpoint_int8_serialized": True,
        "ignored_layers": ["lm_head"],
    }
    found = tensors(tmp_path / "saved")
    assert found[f"{LAYER}.weight"].dtype == torch.int8
    assert found[f"{LAYER}.weight_scale"].dtype == torch.float32
    assert found[f"{LAYER}.weight_scale"].shape == (64, 1)
    assert "lm_head.weight" not in found, "it is tied to the embedding"


@pytest.mark.parametrize(
    ("config", "needed"), [(AutoRoundConfig(group_size=32), "qweight"), (SvdQuantConfig(rank=8), "wscales")]
)
def test_other_names_and_layouts_on_disk(config: QuantizationConfig, needed: str, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=config)
    model.save_pretrained(saved)
    stored = tensors(saved)
    assert f"{LAYER}.qweight" in stored
    assert f"{LAYER}.weight" not in stored
    reloaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(run(reloaded), run(model))
    assert same_bytes(reloaded.state_dict(), model.state_dict())
    base = AutoModel.from_pretrained(saved)
    assert torch.equal(run(base), run(model.model))
    edit(saved, **{f"{LAYER}.{needed}": None})
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {LAYER}\.{needed}"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_tied_weights_stay_tied(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_online_equals_quantize_model_which_can_be_saved(folder: Path, tmp_path: Path) -> None:
    online = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    in_memory = Qwen3ForCausalLM.from_pretrained(folder, dtype=BF16)
    quantize_model(in_memory, "int8")
    assert torch.equal(run(online), run(in_memory))
    in_memory.save_pretrained(tmp_path / "saved")
    online.save_pretrained(tmp_path / "online")
    assert stored_config(tmp_path / "saved") == stored_config(tmp_path / "online")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), run(online))


def test_a_head_less_model_from_a_checkpoint_with_a_head(folder: Path, tmp_path: Path) -> None:
    config = Int8Config(ignored_layers=["layers.0.mlp"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    for source, options in ((folder, {"quantization_config": config}), (tmp_path / "saved", {})):
        base = AutoModel.from_pretrained(source, dtype=BF16, **options)
        assert len(base.lowbit_manifest.quantized) == 11
        assert len(base.lowbit_manifest.kept) == 3


def test_static_fp8(folder: Path, tmp_path: Path) -> None:
    config = Fp8Config(activation_scheme="static")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=config)
    with pytest.raises(ConfigError, match="have no input_scale yet"):
        model.save_pretrained(tmp_path / "early")
    with calibration(model):
        run(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), run(model))


def test_dequantize(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    expected = run(model)
    model.dequantize()
    assert type(model.get_submodule(LAYER)) is torch.nn.Linear
    assert relative_error(run(model), expected) < 0.03
    assert not hasattr(model.config, "quantization_config")


def test_fused_experts_are_kept_and_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    folder = save(model, tmp_path / "moe")
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    experts = {name: tensor for name, tensor in quantized.named_parameters() if "experts" in name}
    assert all(tensor.dtype == BF16 for tensor in experts.values())
    assert any("fused expert weights" in note for note in quantized.lowbit_manifest.notes)
    quantized.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), run(quantized))


def test_fp8_is_dispatched_by_what_it_is() -> None:
    ours, theirs = Fp8Config(), FineGrainedFP8Config()
    assert type(AutoHfQuantizer.from_config(ours, pre_quantized=False)).__name__ == "LowbitTransformersQuantizer"
    assert isinstance(AutoHfQuantizer.from_config(theirs, pre_quantized=False), FineGrainedFP8HfQuantizer)
    assert isinstance(AutoQuantizationConfig.from_dict(ours.as_serialized([]).to_dict()), Fp8Config)
    assert isinstance(AutoQuantizationConfig.from_dict(theirs.to_dict()), FineGrainedFP8Config)
    assert isinstance(AutoQuantizationConfig.from_dict({"quant_method": "int8"}), Int8Config)


def test_a_quantized_checkpoint_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder, quantization_config=Int8Config()).save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match="already quantized with 'int8' and can't be quantized again with 'fp8'"):
        AutoModel.from_pretrained(tmp_path / "int8", quantization_config=Fp8Config())


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    content = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del content[name]
        else:
            content[name] = tensor
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_of_quantized_layers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    other = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "saved", **{f"{LAYER}.weight_scale": None, other: None})
    with pytest.raises(CheckpointError, match="2 tensors are missing") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert f"{LAYER}.weight_scale" in str(error.value)
    assert other in str(error.value)
    edit(folder, **{f"{LAYER}.weight": None})
    with pytest.raises(CheckpointError, match=f"1 tensors are missing: {LAYER}.weight"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())


# comfyui's checkpoints tell quantized layers by their scales: without one a layer counts as kept, of a wrong dtype.
WHOLE = {
    name: options
    for name, options in METHODS.items()
    if name not in (*STATIC, "comfyui") and "smoothing" not in options
}


@pytest.mark.parametrize("method", WHOLE)
def test_every_tensor_that_is_missing_is_named(method: str, tmp_path: Path) -> None:
    skip_if_refused(WHOLE[method])
    model = language_model().to(BF16)
    quantize_model(model, WHOLE[method])
    model.save_pretrained(tmp_path)
    whole = tensors(tmp_path)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, QuantizedLinear)
    optional = {f"{LAYER}.{layer.stored_name(name)}" for name in layer.method.optional}
    own = [name for name in whole if name.startswith(f"{LAYER}.") and name not in optional]
    kept = "model.layers.1.input_layernorm.weight"
    for absent in [*([name, kept] for name in own), own]:
        save_file({name: whole[name] for name in whole.keys() - set(absent)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{tmp_path}: .* tensors are missing") as error:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        found = set(str(error.value).partition("missing: ")[2].split(", "))
        # Nothing tells of a layer that lacks everything that it was quantized.
        assert set(absent) <= found or (absent == own and f"{LAYER}.weight" in found)


def test_scales_of_other_shapes(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    scale = tensors(tmp_path / "saved")[f"{LAYER}.weight_scale"]
    edit(tmp_path / "saved", **{f"{LAYER}.weight_scale": scale.reshape(-1)})
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), run(model))
    edit(tmp_path / "saved", **{f"{LAYER}.weight_scale": torch.ones(3, 1)})
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight_scale: found float32 \[3, 1\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("quantized", [False, True])
def test_wrong_and_missing_tensors_in_one_error(auto: Any, quantized: bool, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": BF16, "quantization_config": Int8Config()}
    if quantized:
        AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(tmp_path / "int8")
        folder, options = tmp_path / "int8", {}
    absent, kept, tied = "layers.0.mlp.up_proj.weight", "layers.1.input_layernorm.weight", "embed_tokens.weight"
    edit(
        folder,
        **{
            f"model.{absent}": None,
            f"model.{kept}": torch.zeros(7),
            f"model.{tied}": torch.zeros(128, 32, dtype=BF16),
            f"{LAYER}.weight": torch.zeros(3, 64, dtype=torch.int8 if quantized else BF16),
        },
    )
    with pytest.raises(CheckpointError) as error:
        auto.from_pretrained(folder, **options)
    prefix = "" if auto is AutoModel else "model."
    layer = "found int8 [3, 64], int8 needs int8 [64, 64]" if quantized else "found BF16 [3, 64], needs [64, 64]"
    for part in (
        f"{folder}: Qwen3",
        f"1 tensors are missing: {prefix}{absent}\n",
        "3 tensors are wrong:\n",
        f"  {prefix}{kept}: found F32 [7], needs [64] (model.safetensors)",
        f"  {prefix}{tied}: found BF16 [128, 32], needs [128, 64] (model.safetensors)",
        f"  {prefix}{LAYER.removeprefix('model.')}.weight: {layer} (model.safetensors)",
    ):
        assert part in str(error.value)


def test_a_config_that_keeps_what_was_quantized(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["ignored_layers"].append(LAYER)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight \(I8 \[64, 64\]\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_pickles_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: refused, only safetensors"):
        AutoModel.from_pretrained(folder, quantization_config=Int8Config())
