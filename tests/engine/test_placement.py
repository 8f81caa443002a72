"""Layers that need not be on the device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model

from lowbit import Omni, OmniDiffusionSamplingParams
from lowbit.engine.load import load_pipeline
from lowbit.engine.placement import HostEmbedding, find_layer, keep_embeddings_on_host, set_aside
from lowbit.models.unused import UNUSED_LAYERS

PROMPT = "a red circle above a blue star"


def pipeline(kind: str, text_encoder: object) -> Any:
    """Return what has a pipeline's class name and a text encoder."""
    return type(kind, (SimpleNamespace,), {})(text_encoder=text_encoder, components={"text_encoder": text_encoder})


def qwen_vl(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def hidden_states(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    states: tuple[torch.Tensor, ...] = result.hidden_states
    return states


def test_qwen_image_gets_the_same_hidden_states_without_the_head() -> None:
    model = qwen_vl(tied=False)
    before, names = hidden_states(model), set(model.state_dict())
    assert set_aside(pipeline("QwenImagePipeline", model)) == {"text_encoder": ["lm_head"]}
    after = hidden_states(model)
    assert len(after) == len(before)
    assert torch.equal(after[-1], before[-1])
    assert set(model.state_dict()) == names


def test_a_head_that_is_the_embedding_too_stays() -> None:
    assert set_aside(pipeline("QwenImagePipeline", qwen_vl(tied=True))) == {}


def test_z_image_gets_the_same_hidden_states_without_the_last_block() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Qwen3Model(config).eval()
    before = hidden_states(model)
    assert set_aside(pipeline("ZImagePipeline", model)) == {"text_encoder": ["layers.-1", "norm"]}
    after = hidden_states(model)
    assert torch.equal(after[-2], before[-2])
    assert not torch.equal(after[-1], before[-1])


def test_unknown_pipelines_and_encoders_are_left_alone() -> None:
    model = qwen_vl(tied=False)
    assert set_aside(pipeline("FluxPipeline", model)) == {}
    assert set_aside(pipeline("QwenImagePipeline", None)) == {}
    assert set_aside(pipeline("ZImagePipeline", torch.nn.Linear(2, 2))) == {}


@pytest.mark.parametrize("kind", UNUSED_LAYERS)
def test_the_table_s_pipelines_exist(kind: str) -> None:
    import diffusers

    assert set(UNUSED_LAYERS[kind]) <= set(getattr(diffusers, kind).__init__.__annotations__)


def test_the_picture_and_what_is_saved_are_the_same(tmp_path: Path) -> None:
    omni = Omni(quantization="int8", device="cpu")
    assert omni.set_aside == {"text_encoder": ["layers.-1", "norm"]}
    whole = Omni(quantization="int8", device="cpu")
    whole.pipeline.text_encoder = load_pipeline(whole.config).text_encoder
    params = OmniDiffusionSamplingParams(num_inference_steps=2, seed=0)
    first, second = (each.generate(PROMPT, params, progress=False)[0].images[0] for each in (omni, whole))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    omni.save_pretrained(tmp_path / "saved")
    whole.save_pretrained(tmp_path / "whole")
    files = [tmp_path / name / "text_encoder" / "model.safetensors" for name in ("saved", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert find_layer(omni.pipeline.text_encoder, "layers.-1") is not None


def test_a_table_of_embeddings_on_the_host_gives_the_same() -> None:
    model = qwen_vl(tied=False)
    before, names, own = hidden_states(model), list(model.state_dict()), len(list(model.parameters()))
    assert keep_embeddings_on_host(pipeline("QwenImagePipeline", model)) == {}  # too small to matter
    moved = keep_embeddings_on_host(pipeline("QwenImagePipeline", model), least_bytes=0)
    assert moved == {"text_encoder": "model.language_model.embed_tokens"}
    layer = model.get_input_embeddings()
    assert isinstance(layer, HostEmbedding)
    assert len(list(model.parameters())) == own - 1
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(hidden_states(model)[-1], before[-1])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer.table.zero_()
    assert not torch.equal(hidden_states(model)[-1], before[-1])
    model.load_state_dict(state)  # its own, and that of the model as it was
    assert torch.equal(hidden_states(model)[-1], before[-1])
    qwen_vl(tied=False).load_state_dict(state)
    name = "model.language_model.embed_tokens.weight"
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        model.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}: expected .*got"):
        model.load_state_dict({**state, name: state[name][:1]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, name.replace("weight", "bias"): state[name]})
    model.load_state_dict({**state, name: state[name].double()}, assign=True)
    assert layer.weight.dtype == torch.float64
    model.load_state_dict(state, assign=True)
    model.to("meta")
    assert model.device.type == "meta"
    assert layer.weight.device.type == "cpu"


def test_a_table_that_a_head_shares_stays() -> None:
    assert keep_embeddings_on_host(pipeline("QwenImagePipeline", qwen_vl(tied=True)), least_bytes=0) == {}


def test_a_model_with_its_table_on_the_host_is_saved_whole(tmp_path: Path) -> None:
    model = qwen_vl(tied=False)
    model.save_pretrained(tmp_path / "before")
    keep_embeddings_on_host(pipeline("QwenImagePipeline", model), least_bytes=0)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
