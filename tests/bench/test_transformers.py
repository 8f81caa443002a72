"""Models to measure: published shapes, random weights, copies that share them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.bench.inputs import Workload, step_inputs
from lowbit.bench.transformers import find_subject, random_transformer, share
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.models import family_of
from lowbit.models.published import PUBLISHED
from lowbit.quantization.plan import quantize_model
from tests.support.bench_models import SMALL

CPU = torch.device("cpu")


@pytest.mark.parametrize("class_name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_every_family_runs(class_name: str, dtype: torch.dtype) -> None:
    model = random_transformer(class_name, SMALL[class_name], dtype, CPU)
    frames = 5 if class_name.startswith("Wan") else 1
    workload = Workload(height=32, width=64, text_tokens=24, batch=2, num_frames=frames)
    with torch.no_grad():
        result = model(**step_inputs(model, workload, dtype), return_dict=False)[0]
    first = result[0] if isinstance(result, list) else result
    assert first.isfinite().all()
    assert first.float().std() > 0
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_published_transformers_are_of_known_families_and_keep_their_size() -> None:
    billions = {"z-image": 6.15, "qwen-image": 20.43, "flux": 11.90, "wan": 14.29}
    for entry in PUBLISHED:
        assert family_of(entry.class_name) is not None
        model = find_subject(entry.name).empty()
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[entry.name], abs=0.01)


def test_layers_are_cut_in_proportion() -> None:
    assert find_subject("flux", layers=2).config["num_single_layers"] == 4
    assert find_subject("Z_Image", layers=3).config["n_refiner_layers"] == 1
    assert find_subject("z-image").config["n_refiner_layers"] == 2


def test_the_embedded_model_and_a_transformers_folder_are_real_models(tmp_path: Path) -> None:
    embedded = find_subject(None)
    assert (embedded.component, embedded.class_name) == ("transformer", "ZImageTransformer2DModel")
    model = random_transformer("ZImageTransformer2DModel", SMALL["ZImageTransformer2DModel"], torch.bfloat16, CPU)
    model.save_pretrained(tmp_path)
    subject = find_subject(str(tmp_path), size=64)
    loaded = subject.load(torch.bfloat16, CPU)
    name, weight = next(iter(model.named_parameters()))
    assert torch.equal(loaded.get_parameter(name), weight)
    assert {p.is_meta for p in subject.empty().parameters()} == {True}


def test_bad_models_and_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(CheckpointError, match="_class_name"):
        find_subject(str(tmp_path))
    with pytest.raises(ConfigError, match="Unknown model: 'sdxl'.*z-image, qwen-image, flux, wan, embedded"):
        find_subject("sdxl")
    with pytest.raises(ConfigError, match="1 to 60 layers, not 61"):
        find_subject("qwen-image", layers=61)
    with pytest.raises(ConfigError, match="embedded is measured whole"):
        find_subject("embedded", layers=2)
    with pytest.raises(ConfigError, match="multiple of 16 pixels, not 500"):
        find_subject("flux", size=500)
    with pytest.raises(ConfigError, match="one more than a multiple of 4, not 8"):
        find_subject("wan", num_frames=8)
    model = random_transformer("ZImageTransformer2DModel", SMALL["ZImageTransformer2DModel"], torch.bfloat16, CPU)
    with pytest.raises(ConfigError, match="makes pictures"):
        step_inputs(model, Workload(height=32, width=32, text_tokens=8, num_frames=5), torch.bfloat16)
    with pytest.raises(UnsupportedError, match="inputs of Linear are not known"):
        step_inputs(nn.Linear(1, 1), Workload(height=32, width=32, text_tokens=8), torch.bfloat16)


def test_copies_share_weights_and_nothing_else() -> None:
    model = random_transformer("ZImageTransformer2DModel", SMALL["ZImageTransformer2DModel"], torch.bfloat16, CPU)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copied, wide = share(model), share(model, torch.float32)
    name = "layers.0.attention.to_q.weight"
    assert copied.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()
    assert wide.get_parameter(name).dtype == torch.float32
    quantize_model(copied, "int8")
    assert dict(copied.named_parameters())[name].dtype != torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert type(parameter) is nn.Parameter
