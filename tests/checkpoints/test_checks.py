from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from lowbit.checkpoints.checks import read_headers, weight_files
from lowbit.errors import CheckpointError
from lowbit.hosts.preflight import check_component
from lowbit.quantization import Int8Config
from tests.support.models import Family, save

BF16 = torch.bfloat16
NAME = "diffusion_pytorch_model.safetensors"


def edit(folder: Path, drop: list[str], add: dict[str, torch.Tensor]) -> None:
    content = load_file(folder / NAME)
    content = {name: tensor.clone() for name, tensor in content.items() if name not in drop}
    save_file({**content, **add}, folder / NAME, metadata={"format": "pt"})


def load(folder: Path) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=BF16, quantization_config=Int8Config())


def test_a_good_checkpoint_passes(checkpoint: Path) -> None:
    check_component(checkpoint)
    check_component(checkpoint, Int8Config())


@pytest.mark.parametrize("loader", ["preflight", "from_pretrained"])
def test_all_wrong_tensors_are_in_one_message(checkpoint: Path, loader: str) -> None:
    missing = ["layers.0.attention.to_q.weight", "layers.1.attention_norm1.weight"]
    wrong = {"layers.0.attention.to_k.weight": torch.zeros(3, 64, dtype=BF16), "cap_embedder.1.bias": torch.zeros(7)}
    edit(checkpoint, missing, {"surplus.weight": torch.zeros(2), **wrong})
    with pytest.raises(CheckpointError) as error:
        check_component(checkpoint, Int8Config()) if loader == "preflight" else load(checkpoint)
    message = str(error.value)
    assert f"2 missing: {', '.join(missing)}" in message
    assert "1 unexpected: surplus.weight" in message
    assert "2 wrong:" in message
    assert f"layers.0.attention.to_k.weight: found BF16 [3, 64], needs [64, 64] ({NAME})" in message
    assert "cap_embedder.1.bias: found F32 [7], needs [64]" in message
    assert str(checkpoint) in message


@pytest.mark.parametrize("loader", ["preflight", "from_pretrained"])
def test_a_broken_quantized_checkpoint(checkpoint: Path, tmp_path: Path, loader: str) -> None:
    saved = tmp_path / "int8"
    load(checkpoint).save_pretrained(saved)
    check_component(saved)
    wrong = {"layers.0.attention.to_k.weight": torch.zeros(64, 64, dtype=BF16)}
    edit(saved, ["layers.0.attention.to_q.weight_scale"], wrong)
    with pytest.raises(CheckpointError) as error:
        check_component(saved) if loader == "preflight" else ZImageTransformer2DModel.from_pretrained(saved)
    assert "1 missing: layers.0.attention.to_q.weight_scale" in str(error.value)
    assert "to_k.weight: found bfloat16 [64, 64], int8 needs int8 [64, 64]" in str(error.value)


def test_a_serialized_config_for_unquantized_tensors(checkpoint: Path) -> None:
    config = Int8Config(is_checkpoint_int8_serialized=True, ignored_layers=["*embed*", "*modulation*", "*final*"])
    with pytest.raises(CheckpointError, match=r"28 missing: .*weight_scale") as error:
        check_component(checkpoint, config)
    assert "28 wrong" in str(error.value)


@pytest.mark.parametrize("cut", [100, 10**9])
def test_a_truncated_file(checkpoint: Path, cut: int) -> None:
    content = (checkpoint / NAME).read_bytes()
    (checkpoint / NAME).write_bytes(content[: max(len(content) - cut, 20)])
    with pytest.raises(CheckpointError, match=rf"{NAME} \([\d,]+ bytes\): not a whole safetensors file"):
        check_component(checkpoint)


def test_a_header_that_promises_too_much(checkpoint: Path) -> None:
    content = (checkpoint / NAME).read_bytes()
    (checkpoint / NAME).write_bytes((2**62).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_headers([checkpoint / NAME])


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**64 - 1], [2**57, 0]])
def test_shapes_that_no_memory_holds(shape: list[int], checkpoint: Path) -> None:
    header = json.dumps({"surplus.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (checkpoint / NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=rf"{NAME}: surplus.weight can't have the shape \[{shape[0]}, "):
        check_component(checkpoint)


def test_json_in_json_in_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json: can't be read as JSON"):
        check_component(checkpoint)


def test_pickles_are_refused(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / NAME), checkpoint / "diffusion_pytorch_model.bin")
    (checkpoint / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin: refused, only safetensors are read"):
        check_component(checkpoint)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin: refused, only safetensors are read"):
        load(checkpoint)


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"no weights; looked for diffusion_pytorch_model.safetensors"):
        check_component(checkpoint)


def test_shards_and_their_index(tmp_path: Path, z_family: Family) -> None:
    folder = save(z_family.make(), tmp_path / "sharded", max_shard_size="200KB")
    check_component(folder, Int8Config())
    shards = weight_files(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shards[1].unlink()
    with pytest.raises(
        CheckpointError, match=rf"{index.name}: 1 of {len(shards)} shards are missing: {shards[1].name}"
    ):
        check_component(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        check_component(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="can't be read as JSON"):
        check_component(folder)


def test_variants(tmp_path: Path, z_family: Family) -> None:
    model = z_family.make()
    single = save(model, tmp_path / "single", variant="fp16")
    sharded = save(model, tmp_path / "sharded", variant="fp16", max_shard_size="200KB")
    assert [file.name for file in weight_files(single, "fp16")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert len(weight_files(sharded, "fp16")) > 3
    check_component(sharded, Int8Config(), variant="fp16")
    with pytest.raises(CheckpointError, match="no weights"):
        weight_files(single)
    plain = save(model, tmp_path / "plain")
    assert [file.name for file in weight_files(plain, "fp16")] == [NAME], "components without the variant"
