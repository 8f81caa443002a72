"""Every private part of another library that lowbit uses, and the versions in which it was seen.

The upper bounds in ``pyproject.toml`` are the next minor version after ``LAST``. ``scripts/compat`` reads the sources
of other versions for what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Library -> the first and the last version in which all its parts were found.
SEEN: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.15.0"),
    "diffusers": ("0.38.0", "0.42.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "accelerate": ("1.1.0", "1.15.0"),
    "peft": ("0.18.0", "0.21.2"),
}


@dataclass(frozen=True)
class Part:
    """A function, class or attribute.

    Attributes:
        path: ``module:qualified.name``.
        arguments: those that lowbit reads or gives, of a function.
        until: the last version that needs it, where a later one has something public instead.
    """

    path: str
    arguments: tuple[str, ...] = ()
    until: str | None = None

    @property
    def library(self) -> str:
        """The library's name."""
        return self.path.partition(".")[0].partition(":")[0]


_MODEL = "diffusers.models.modeling_utils:ModelMixin"
_PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
_FLUX_LOADER = "diffusers.loaders.lora_pipeline:FluxLoraLoaderMixin"
_PROCESSOR = "diffusers.models.transformers.transformer_flux:FluxAttnProcessor"
_REGISTRY = "diffusers.models.attention_dispatch:_AttentionBackendRegistry"
_STORED_AND_GIVEN = ("quantization_config", "quantization_config_from_args")
_SET_TENSOR = ("module", "tensor_name")

PARTS = (
    Part("torch.cpu:_is_vnni_supported", until="2.12"),
    Part("torch.cpu:_is_avx2_supported"),
    Part("torch.cpu:_is_avx512_bf16_supported"),
    Part("torch.cpu:_is_amx_tile_supported"),
    Part("torch.cpu:_is_amx_fp16_supported"),
    Part("torch._C:_after_autograd_keyset"),
    Part("torch:_int_mm"),
    Part("torch:_scaled_mm"),
    Part("torch._dynamo.utils:counters"),
    Part("torch._dynamo.config:recompile_limit"),
    Part("torch._dynamo.config:accumulated_recompile_limit"),
    Part("torch._dynamo.config:fail_on_recompile_limit_hit"),
    Part("torch.nn.modules.conv:Conv1d._conv_forward", ("input", "weight", "bias")),
    Part("torch.nn.modules.conv:Conv2d._conv_forward", ("input", "weight", "bias")),
    Part("torch.nn.modules.conv:Conv3d._conv_forward", ("input", "weight", "bias")),
    Part(f"{_MODEL}._keep_in_fp32_modules"),
    Part(f"{_MODEL}._keys_to_ignore_on_load_unexpected"),
    Part(f"{_MODEL}._fix_state_dict_keys_on_load", ("state_dict",)),
    Part(f"{_MODEL}._repeated_blocks"),
    Part(f"{_MODEL}._load_pretrained_model", ("model", "resolved_model_file", "hf_quantizer")),
    Part("diffusers.models.modeling_utils:get_parameter_dtype", ("parameter",)),
    Part(f"{_REGISTRY}.get_active_backend"),
    Part(f"{_REGISTRY}.register", ("backend",)),
    Part(f"{_PROCESSOR}._attention_backend"),
    Part(f"{_PROCESSOR}._parallel_config"),
    Part("diffusers.loaders.single_file_model:load_model_dict_into_meta", ("model", "state_dict", "hf_quantizer")),
    Part(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete:"
        "FlowMatchEulerDiscreteScheduler.stretch_shift_to_terminal",
        ("t",),
    ),
    Part("diffusers.loaders.peft:PeftAdapterMixin.fuse_lora"),
    Part(f"{_FLUX_LOADER}._calculate_module_shape", ("model", "base_module", "base_weight_param_name")),
    Part(f"{_FLUX_LOADER}._maybe_expand_lora_state_dict", ("transformer", "lora_state_dict")),
    Part("diffusers.loaders.lora_pipeline:_maybe_dequantize_weight_for_expanded_lora", ("model", "module")),
    Part("diffusers.hooks.group_offloading:ModuleGroup.__init__", ("modules",)),
    Part(
        "diffusers.models.transformers.transformer_qwenimage:QwenImageTransformerBlock._modulate",
        ("x", "mod_params", "index"),
    ),
    Part("diffusers.configuration_utils:ConfigMixin.config"),
    Part("diffusers.pipelines.pipeline_utils:DiffusionPipeline._execution_device"),
    Part("diffusers.quantizers.auto:DiffusersAutoQuantizer.from_dict", ("quantization_config_dict",)),
    Part("diffusers.quantizers.auto:DiffusersAutoQuantizer.from_config", ("quantization_config",)),
    Part("diffusers.quantizers.auto:DiffusersAutoQuantizer.merge_quantization_configs", _STORED_AND_GIVEN),
    Part(f"{_PRETRAINED}._keep_in_fp32_modules"),
    Part(f"{_PRETRAINED}._keep_in_fp32_modules_strict"),
    Part(f"{_PRETRAINED}._keys_to_ignore_on_load_unexpected"),
    Part(f"{_PRETRAINED}._keys_to_ignore_on_load_missing"),
    Part(f"{_PRETRAINED}._load_pretrained_model", ("model", "checkpoint_files", "load_config")),
    Part(f"{_PRETRAINED}.dtype"),
    Part("transformers.conversion_mapping:get_model_conversion_mapping", ("model",)),
    Part(
        "transformers.core_model_loading:rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    Part("transformers.core_model_loading:WeightConverter"),
    Part("transformers.core_model_loading:WeightRenaming"),
    Part("transformers.quantizers.auto:AutoQuantizationConfig.from_dict", ("quantization_config_dict",)),
    Part("transformers.quantizers.auto:AutoHfQuantizer.from_config", ("quantization_config",)),
    Part("transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs", _STORED_AND_GIVEN),
    Part("accelerate.hooks:AlignDevicesHook.init_hook", ("module",)),
    Part("accelerate.hooks:set_module_tensor_to_device", _SET_TENSOR),
    Part("accelerate.utils:set_module_tensor_to_device", _SET_TENSOR),
    Part("accelerate.utils.modeling:set_module_tensor_to_device", _SET_TENSOR),
    Part("peft.tuners.lora.layer:Linear.merge"),
    Part("peft.tuners.lora.dora:dequantize_module_weight", ("module",)),
    Part("peft.tuners.lycoris_utils:LycorisLayer.merge"),
)
PATHS = frozenset(part.path for part in PARTS)


def versions(library: str) -> str:
    """Return the versions that lowbit was seen with, for messages."""
    return " to ".join(SEEN[library])
