"""What others read of a quantized layer's weight is what an ``nn.Linear`` in the compute dtype answers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.checkpoints import component
from lowbit.errors import UnsupportedError
from lowbit.quantization import QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.plan import quantized_layers
from tests.compat.test_model_dtype import METHODS as LAYOUTS
from tests.support.models import METHODS, relative_error, same_bytes

transformers = pytest.importorskip("transformers")

BF16 = torch.bfloat16
DYNAMIC = [name for name in LAYOUTS if name not in ("fp8-static", "modelopt", "modelopt-FP8")]


def layer_of(method: str = "int8") -> QuantizedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(BF16).requires_grad_(False)
    quantize_model(model, METHODS.get(method) or LAYOUTS[method])
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    return layer


@pytest.mark.parametrize("method", DYNAMIC)
def test_the_facts_are_those_of_a_linear_layer(method: str) -> None:
    layer = layer_of(method)
    for dtype in (BF16, torch.float16):
        layer.to(dtype)
        view, plain = layer.weight, nn.Linear(64, 96).to(dtype).requires_grad_(False).weight
        for fact in ("shape", "dtype", "device", "requires_grad", "grad", "ndim", "is_meta", "layout"):
            assert getattr(view, fact) == getattr(plain, fact), fact
        for call in ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex"):
            assert getattr(view, call)() == getattr(plain, call)(), call
        assert view.data.dtype == view.detach().dtype == dtype
        assert view.size(0) == view.shape[0] == 96


def test_its_numbers_are_refused_and_the_error_says_where_they_are() -> None:
    layer, other = layer_of(), layer_of()
    for compute in (
        lambda: torch.cat([layer.weight.data, other.weight.data]),
        lambda: nn.functional.linear(torch.ones(1, 64, dtype=BF16), layer.weight),
        lambda: setattr(layer.weight, "data", torch.zeros(96, 64)),
        lambda: torch.linalg.norm(layer.weight, dim=1),
    ):
        with pytest.raises(UnsupportedError, match=r"0\.weight .*quantized \(int8\).*dequantized\(\).*get_parameter"):
            compute()
    with pytest.raises(AttributeError, match="has no 'float'.*dequantized"):
        layer.weight.float()
    assert not hasattr(layer.weight, "quant_state")


def test_state_dicts_parameters_copies_and_pickles_hold_the_codes() -> None:
    layer = layer_of()
    x = torch.randn(3, 64, dtype=BF16)
    expected = layer(x)
    codes = layer.state_dict()["weight"]
    assert codes.dtype == dict(layer.named_parameters())["weight"].dtype == torch.int8
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert each.weight.dtype == BF16
        assert torch.equal(each(x), expected)
    other = layer_of()
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()})
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert layer.to("meta").weight.device.type == "meta"


def test_fusing_projections_of_diffusers_is_refused() -> None:
    from diffusers.models.attention_processor import Attention

    attention = Attention(query_dim=64, heads=2, dim_head=32).to(BF16)
    quantize_model(attention, "fp8")
    with pytest.raises(UnsupportedError, match="to_[qk].weight can't be given to cat"):
        attention.fuse_projections()


class Reader(nn.Module):
    """Reads what T5, Gemma and bloom read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wo = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x.to(self.first.weight.dtype))
        if self.wo.weight.dtype.is_floating_point and self.wo.weight.dtype != torch.int8:
            hidden = hidden.to(self.wo.weight.dtype)
        return self.wo(hidden) * self.wo.weight.shape[-1]


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4"])
def test_reads_are_compiled_whole(method: str) -> None:
    torch.manual_seed(0)
    model = Reader().to(BF16).requires_grad_(False)
    quantize_model(model, METHODS[method])
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(torch.compile(model, fullgraph=True)(x), expected) < 0.01
    assert expected.dtype == BF16


@pytest.mark.parametrize("method", ["int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("offload", [True, False])
def test_hooks_of_accelerate_move_the_codes(method: str, offload: bool) -> None:
    from accelerate import cpu_offload, dispatch_model
    from accelerate.hooks import remove_hook_from_module

    torch.manual_seed(0)
    model = Reader().to(BF16).requires_grad_(False)
    quantize_model(model, METHODS[method])
    x = torch.randn(5, 64)
    expected, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooked = cpu_offload(model, "cpu") if offload else dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal((hooked or model)(x), expected)
    remove_hook_from_module(model, recurse=True)
    assert same_bytes(model.state_dict(), before)


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp4"])
def test_dora_takes_the_norm_of_the_numbers(method: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(BF16).requires_grad_(False)
    quantize_model(model, METHODS[method])
    plain = copy.deepcopy(model)
    component.dequantize(plain)
    x, found = torch.randn(5, 64).to(BF16), []
    for each in (model, plain):
        config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
        torch.manual_seed(1)
        found.append(peft.get_peft_model(each, config)(x).detach())
    assert relative_error(*found) < 0.05


@pytest.mark.parametrize("method", ["int8", "fp8", "gguf-Q8_0"])
def test_adapters_are_made_in_the_dtype_that_an_unquantized_model_gives_them(method: str) -> None:
    peft = pytest.importorskip("peft")
    dtypes = []
    for quantized in (True, False):
        model = nn.Sequential(nn.Linear(64, 96)).to(BF16).requires_grad_(False)
        if quantized:
            quantize_model(model, METHODS[method])
        for cast in (True, False):
            config = peft.LoraConfig(r=4, target_modules=["0"])
            adapted: Any = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=cast)
            dtypes.append(adapted.base_model.model[0].lora_A["default"].weight.dtype)
    assert dtypes[:2] == dtypes[2:]


# Models.


def t5(kind: str) -> Any:
    config = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config}[kind]
    made = config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[kind](made)


def clip(kind: str) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, projection_dim=64,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def qwen(kind: str) -> Any:
    return transformers.Qwen2_5_VLTextModel(
        transformers.Qwen2_5_VLTextConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
        )
    )  # fmt: skip


MODELS = {"t5": t5, "umt5": t5, "clip": clip, "qwen2.5-vl": qwen}


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 19)[None])[0]
    return result


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("method", DYNAMIC)
def test_text_encoders_in_memory_and_while_loading(kind: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind](kind).to(dtype).eval().requires_grad_(False)
    expected = output(model.float())
    model.to(dtype).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, torch_dtype=dtype, quantization_config=build_quant_config(LAYOUTS[method])
    )
    quantize_model(model, LAYOUTS[method])
    assert quantized_layers(model).keys() == quantized_layers(loaded).keys()
    four_bits = any(name in method for name in ("fp4", "svdquant", "auto-round"))
    for each in (model, loaded):
        assert relative_error(output(each), expected) < (0.35 if four_bits else 0.12)


def test_a_quantized_layer_before_which_a_model_casts() -> None:
    """T5 reads ``wo.weight`` in every block; it is quantized only where the model does not ask for float32."""
    model = t5("t5").to(BF16).eval().requires_grad_(False)
    expected = output(model)
    model._keep_in_fp32_modules = []
    quantize_model(model, "fp8")
    assert sum(name.endswith(".wo") for name in quantized_layers(model)) == 2
    assert relative_error(output(model), expected) < 0.1
