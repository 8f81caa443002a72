#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1: asymmetric int4 checkpoints that the package wrote do not load.
#
# The package packs zero points along the output channels (`weight_zero_point` int32 [N * bits / 32, groups]) when it
# compresses a model, and `save_pretrained` writes them so. `from_pretrained` makes room for unpacked ones [N, groups] and
# raises a mismatch of shapes. Symmetric int4 of the same model reads back. Expected by a good guess: what `compress_model`
# and `save_pretrained` write, `from_pretrained` of the same versions reads. lowbit reads both.
# Seen: "symmetric: reads back", "asymmetric: RuntimeError". Fails if the asymmetric one reads back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0 compressed-tensors==0.20.1 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY' 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32}
LAYER = "model.layers.0.self_attn.q_proj"


def reads_back(symmetric):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=2, num_key_value_heads=2, **SIZES)).to(torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    group = {"targets": [LAYER], "weights": weights}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}))
    layer = model.get_submodule(LAYER)
    groups = layer.weight.data.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), layer.quantization_scheme.weights)
    layer.weight_scale.data.copy_(scale)
    if not symmetric:
        layer.weight_zero_point.data.copy_(zero)
    layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = f"symmetric-{symmetric}"
    model.save_pretrained(folder)
    compressor.update_config(folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return type(error).__name__
    return "reads back"


found = {"symmetric": reads_back(True), "asymmetric": reads_back(False)}
print(f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}: {found}")
assert found["symmetric"] == "reads back", found
raise SystemExit(0 if found["asymmetric"] == "RuntimeError" else "the asymmetric one reads back: the finding is out of date")
PY
