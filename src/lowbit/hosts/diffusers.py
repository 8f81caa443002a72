"""lowbit as a quantizer of diffusers: ``from_pretrained`` of model classes and of pipelines, ``save_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging as diffusers_logging
from torch import nn

from lowbit.checkpoints import component as loading
from lowbit.checkpoints.checks import check_tensors, read_headers, refuse_pickles
from lowbit.compat.parts.modules import float32_modules, ignored_keys, set_config
from lowbit.errors import CheckpointError, ConfigError
from lowbit.hosts import registration
from lowbit.hosts import routing as dispatch
from lowbit.ops.cpu.memory import MappedTensors
from lowbit.quantization import plan as quantization_plan
from lowbit.quantization.base import QuantizationConfig


def register(auto: ModuleType) -> None:
    """Register with diffusers; ``auto`` is ``diffusers.quantizers.auto``."""
    factory = auto.DiffusersAutoQuantizer
    dispatch.connect(auto, factory, factory, LowbitDiffusersQuantizer)
    if attach not in quantization_plan.AFTER_QUANTIZING:
        quantization_plan.AFTER_QUANTIZING.append(attach)
        quantization_plan.KEPT_BY_HOSTS.append(kept_in_memory)


def attach(model: Any) -> None:
    """Make a diffusers model that was quantized in memory savable: give it its quantizer and ``quantization_config``.

    Other models are left alone.
    """
    if _is_diffusers(model):
        model.hf_quantizer = LowbitDiffusersQuantizer(model.lowbit_config, pre_quantized=False)
        model.register_to_config(quantization_config=loading.serialized_config(model))


def kept_in_memory(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers that a diffusers model itself wants in float32, nothing of others."""
    return {"float32 module": float32_modules(model)} if _is_diffusers(model) else {}


def _is_diffusers(model: Any) -> bool:
    """Tell whether ``model`` is one of diffusers'."""
    return isinstance(model, ConfigMixin) and hasattr(model, "save_pretrained")


class LowbitDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Quantizes a model's tensors while diffusers loads them, or reads those that are quantized already.

    diffusers maps a shard and offers its tensors one by one; each is quantized and its source is let go before the
    next, so that no more than the quantized model and one tensor are ever held.
    """

    # Asked for by diffusers, which drops the model's float32 modules otherwise.
    use_keep_in_fp32_modules = True
    quantization_config: QuantizationConfig

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype = torch.float32
        self.loaded_keys: list[str] = []
        self.files: list[str] = []
        self.preparation: loading.Preparation | None = None
        self.progress: Any = None
        self.shard: MappedTensors | None = None

    # What diffusers asks, in the order in which it asks.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that can't work."""
        loading.check_device_map(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Take the dtype of the model; without one diffusers makes a float32 model, and so does lowbit."""
        self.dtype = torch_dtype or torch.float32
        if self.dtype not in loading.COMPUTE_DTYPES:
            raise ConfigError(f"torch_dtype must be bfloat16, float16 or float32, not {torch_dtype}")
        return self.dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Take note of what the checkpoint holds."""
        refuse_pickles(checkpoint_files)
        self.loaded_keys, self.files = list(loaded_keys), list(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Replace the linear layers and check the checkpoint's tensors against the result."""
        config = self.quantization_config.of_checkpoint(self.loaded_keys)
        self.quantization_config, self.pre_quantized = config, config.is_serialized
        self.preparation = loading.prepare(
            model,
            config,
            self.dtype,
            device=loading.first_device(device_map),
            kept={"float32 module": keep_in_fp32_modules or ()},
        )
        headers = read_headers(self.files)
        if self.files:
            ignored = ignored_keys(model)
            check_tensors(model, self.preparation, headers, self.loaded_keys, ignored)
        if not config.is_serialized:
            self.progress = diffusers_logging.tqdm(
                total=sum(loading.weight_bytes(layer, headers) for layer in self.preparation.layers.values()),
                desc=f"Quantizing to {config.get_name()}",
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,  # where there is no terminal
            )

    @property
    def supports_parallel_loading(self) -> bool:
        """Only of quantized checkpoints: threads that quantize would hold several unquantized tensors at once."""
        return self.quantization_config.is_serialized

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Drop the tensors that quantizing makes."""
        assert self.preparation is not None
        missing = [name for name in missing_keys if not self.preparation.may_be_absent(name)]
        if missing:
            # On the meta device they would stay without values.
            raise CheckpointError(
                f"{type(model).__name__}: {len(missing)} tensors are missing: {', '.join(sorted(missing))}"
            )
        return missing

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: Mapping[str, Any], **kwargs: Any
    ) -> bool:
        """Tell whether the tensor is quantized data or is to become such."""
        assert self.preparation is not None
        return self.preparation.find(param_name) is not None

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: Mapping[str, torch.Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize one tensor on its device, or take it as it is in the file."""
        found = self.preparation.find(param_name) if self.preparation is not None else None
        assert found is not None
        layer, name = found
        if self.pre_quantized:
            # param_value was cast to the model's dtype, which is less than a float32 scale needs.
            try:
                layer.load_tensor(name, state_dict[param_name].to(target_device))
            except CheckpointError as error:
                raise CheckpointError(f"{', '.join(self.files)}: {error}") from error
            return
        layer.load_unquantized(param_value.to(target_device))
        if self.shard is None or self.shard.tensors is not state_dict:
            self.shard = MappedTensors(state_dict, self.files)
        self.shard.release(param_name)
        if self.progress is not None:
            self.progress.update(state_dict[param_name].nbytes)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Check that all arrived, pack for the kernels, and leave the manifest and what saving needs."""
        assert self.preparation is not None
        if self.progress is not None:
            self.progress.close()
        loading.drop_absent(self.preparation.layers.values())
        loading.check_loaded(model)
        loading.finish(model, self.preparation, self.files)
        model.register_to_config(quantization_config=loading.serialized_config(model))  # type: ignore[operator]
        self.preparation = self.progress = self.shard = None

    # What diffusers asks of a loaded model.

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the checkpoint's tensors, which ``state_dict`` of the quantized layers gives as they are.

        Raises:
            ConfigError: to be saved as a pickle, or before calibration.
        """
        if not safe_serialization:
            raise ConfigError("lowbit saves safetensors only: use safe_serialization=True")
        loading.check_saveable(state_dict)
        return dict(self.quantization_config.stored_tensors(state_dict)), {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        loading.dequantize(model)
        config: Any = model.config
        kept = {name: value for name, value in config.items() if name != "quantization_config"}
        set_config(model, FrozenDict(kept))
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: yes, gradients pass through the dequantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works: yes."""
        return True


# Where this module is imported first, it brings the library's, which can't be registered with before here.
registration.install()
