"""SVDQuant: a low-rank product in 16 bits beside a 4-bit W4A4 product of what it leaves of the weight.

Tensors and formula are in ``lowbit.ops.svdquant``; on disk they are as vLLM-Omni has them, row-major. nunchaku's files
hold the same in its kernels' order and are read by ``lowbit.checkpoints.nunchaku.read``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import CheckpointError, ConfigError
from lowbit.ops import nvfp4, w4a4
from lowbit.ops.dispatch import AUTO, Implementation
from lowbit.ops.fp8 import E4M3
from lowbit.ops.svdquant import low_rank_factors, product_operator, svdquant_dequantize
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.scales import finite_and_positive, quantize_by_rows
from lowbit.quantization.tensors import K, N, TensorSpec, fixed, groups
from lowbit.quantization.transforms import check_transforms

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Precision:
    """What the 4-bit product is made of.

    Attributes:
        family: of operators.
        table: the family's implementations.
        group_size: inputs with one scale.
        scale_dtype: of the scales.
    """

    family: str
    table: Sequence[Implementation]
    group_size: int
    scale_dtype: torch.dtype


PRECISIONS: Mapping[str, Precision] = {
    "nvfp4": Precision("nvfp4", nvfp4.IMPLEMENTATIONS, nvfp4.GROUP_SIZE, E4M3),
    "int4": Precision("w4a4", w4a4.IMPLEMENTATIONS, w4a4.GROUP_SIZE, torch.bfloat16),
}
# Tensors that only quantized layers have; a layer that lacks some is broken, not unquantized.
_SUFFIXES = (".qweight", ".wscales", ".smooth_factor", ".proj_down", ".proj_up")


@dataclass(frozen=True, kw_only=True)
class SvdQuantConfig(QuantizationConfig):
    """Configuration of ``svdquant``.

    Attributes:
        rank: of the low-rank product.
        precision: ``"nvfp4"`` or ``"int4"``.
        smoothing: 0 to 1, as of ``int8``.
        svdquant_model: nunchaku's file that the weights come from: a local file or ``owner/repo/file.safetensors``.
            Other components come from the base model.
        quantized_layers: of weights that are quantized already: layer -> its rank, ``None`` for ``rank``; found in the
            checkpoint.
        is_checkpoint_svdquant_serialized: the checkpoint's weights are quantized already; not written, as vLLM-Omni
            refuses other keys than its own, but told by ``quant_method`` beside ``modules_to_not_convert``.
    """

    rank: int = 32
    precision: str = "nvfp4"
    smoothing: float | None = None
    svdquant_model: str | None = None
    quantized_layers: dict[str, int | None] | None = None
    is_checkpoint_svdquant_serialized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"svdquant: rank must be a whole number above 0, not {self.rank!r}")
        if self.precision not in tuple(PRECISIONS):  # which anything can be looked for in
            raise ConfigError(f"svdquant: precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        check_transforms(self.smoothing, None)
        if self.svdquant_model is not None and not (isinstance(self.svdquant_model, str) and self.svdquant_model):
            raise ConfigError(f"svdquant_model must be a file or a name on the Hub, not {self.svdquant_model!r}")
        if self.svdquant_model is not None and self.smoothing is not None:
            raise ConfigError("svdquant: smoothing is found before quantizing; svdquant_model is quantized already")

    @classmethod
    def get_name(cls) -> str:
        """Return ``"svdquant"``."""
        return "svdquant"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """No other library has a method of this name."""
        return True

    @classmethod
    def _options(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # vLLM-Omni's option; like there, only its value at rest is read.
        if config.get("act_unsigned", False) is not False:
            raise ConfigError(f"svdquant: act_unsigned={config['act_unsigned']!r} is not supported; leave it out")
        options = super()._options({name: value for name, value in config.items() if name != "act_unsigned"})
        if "quant_method" in config and "modules_to_not_convert" in config:
            options.setdefault("is_checkpoint_svdquant_serialized", True)
        return options

    @property
    def is_serialized(self) -> bool:
        """Whether the weights are quantized already, in the checkpoint or in ``svdquant_model``."""
        is_known = self.quantized_layers is not None or self.svdquant_model is not None
        return is_known or self.is_checkpoint_svdquant_serialized

    @property
    def weights_from(self) -> str | None:
        """The file that ``svdquant_model`` names."""
        return self.svdquant_model

    @property
    def needs_calibration(self) -> bool:
        """Whether smoothing is still to be found."""
        return self.smoothing is not None and not self.is_serialized

    def of_checkpoint(self, tensor_names: Collection[str]) -> Self:
        """Take the layers that have a tensor of SVDQuant's as those that are quantized.

        vLLM-Omni's ``modules_to_not_convert`` are parts of names, so that they can't tell one layer from another.
        """
        layers = [name.rpartition(".")[0] for name in tensor_names if name.endswith(_SUFFIXES)]
        return replace(self, quantized_layers=dict.fromkeys(layers), smoothing=None) if layers else self

    def without_prefix(self, prefix: str) -> Self:
        """Return the configuration for a model whose layers' names lack ``prefix``."""
        ranks = self.quantized_layers
        layers = ranks and {name.removeprefix(prefix): rank for name, rank in ranks.items()}
        return replace(super().without_prefix(prefix), quantized_layers=layers)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``; of a checkpoint, its tensors have said which layers are quantized."""
        if self.quantized_layers is None:
            return super().get_quant_method(layer, prefix)
        is_taken = prefix in self.quantized_layers and not (self.svdquant_model and self.is_ignored(prefix))
        if not is_taken or not isinstance(layer, torch.nn.Linear):
            return None
        return SvdQuantLinearMethod(self.precision, self.quantized_layers[prefix] or self.rank, self.kernel)

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        return "ignored_layers" if self.is_ignored(name) else "not quantized in the checkpoint"

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's precision, rank and kernel."""
        return SvdQuantLinearMethod(self.precision, self.rank, self.kernel)

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        return replace(
            self,
            svdquant_model=None,
            smoothing=None,
            quantized_layers=None,
            is_checkpoint_svdquant_serialized=True,
            ignored_layers=list(ignored_layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: vLLM-Omni's keys, and no others, which it refuses."""
        return {
            "quant_method": self.get_name(),
            "rank": self.rank,
            "precision": self.precision,
            "modules_to_not_convert": list(self.ignored_layers or ()),
        }


@dataclass(frozen=True)
class Factors:
    """What there is to multiply with in a layer.

    Attributes:
        is_smoothed: its input by ``smooth_factor``.
        has_channel_scales: the result by ``wcscales``.
    """

    is_smoothed: bool
    has_channel_scales: bool


class SvdQuantLinearMethod(LinearMethod):
    """SVDQuant of a linear layer.

    Attributes:
        precision: name of the precision.
        rank: of layers quantized here; a checkpoint's layers may have others.
    """

    stored_names: ClassVar[Mapping[str, str]] = {"weight": "qweight"}

    def __init__(self, precision: str = "nvfp4", rank: int = 32, kernel: str = AUTO) -> None:
        super().__init__(kernel)
        self.precision, self.rank = precision, rank
        self.kind = PRECISIONS[precision]
        self.name = f"svdquant {precision}"
        self.family, self.table = self.kind.family, self.kind.table
        is_nvfp4 = precision == "nvfp4"
        self.optional = frozenset({"wcscales", "wtscale"} if is_nvfp4 else ())
        self.all_or_none = frozenset({"wtscale"} if is_nvfp4 else ())  # nunchaku writes wcscales for some layers only

    @property
    def weight_format(self) -> str:
        """The precision."""
        return self.precision

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return the weight, its scales (transposed: [N, groups]), the smoothing and the two factors."""
        rank = fixed(min(self.rank, out_features, in_features))
        nvfp4_scales = (TensorSpec("wcscales", torch.bfloat16, (N,)), TensorSpec("wtscale", torch.float32))
        return (
            TensorSpec("weight", torch.uint8, (N, groups(K, 2))),
            TensorSpec("wscales", self.kind.scale_dtype, (N, groups(K, self.kind.group_size))),
            TensorSpec("smooth_factor", torch.bfloat16, (K,)),
            TensorSpec("proj_down", torch.bfloat16, (K, rank)),
            TensorSpec("proj_up", torch.bfloat16, (N, rank)),
            *(nvfp4_scales if self.precision == "nvfp4" else ()),
        )

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse layers whose inputs are not whole groups."""
        size = self.kind.group_size
        return f"input features are no multiple of {size}" if layer.in_features % size else None

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept the 16-bit tensors in any floating dtype, which they keep, and factors of any rank.

        Raises:
            CheckpointError: another shape or dtype, or scales that make no sense.
        """
        shape, dtype = layer.expected[name]
        if name == "weight" and tensor.dtype == torch.int8:
            tensor = tensor.view(torch.uint8)
        elif name == "wscales" and tensor.ndim == 2:
            tensor = tensor.t().contiguous()
        elif name == "wtscale" and tensor.numel() == 1:
            tensor = tensor.float().reshape(())
        if tensor.is_floating_point() and dtype == torch.bfloat16:
            dtype = tensor.dtype
        if name in ("proj_down", "proj_up") and tensor.ndim == 2 and tensor.shape[1]:
            shape = (shape[0], tensor.shape[1])
        layer.expected[name] = (shape, dtype)
        tensor = super().canonical_tensor(layer, name, tensor)
        if name in ("smooth_factor", "wtscale"):
            return finite_and_positive(layer, name, tensor)
        return tensor if name == "weight" else _finite(layer, name, tensor)

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in the layout of the checkpoint."""
        if name == "weight" and tensor.dtype == torch.uint8:
            return tensor.view(torch.int8)
        if name == "wtscale":
            return tensor.to(torch.bfloat16).reshape(1)
        return tensor.t().contiguous() if name == "wscales" else tensor

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K]: factors in BF16, then what is left of the weight."""
        down, up = (factor.to(torch.bfloat16) for factor in low_rank_factors(weight, self.rank))
        left = weight.float() - up.float() @ down.float().t()
        ones = torch.ones(weight.shape[1], dtype=torch.bfloat16, device=weight.device)
        tensors = {"smooth_factor": ones, "proj_down": down, "proj_up": up}
        if self.precision == "int4":
            codes, scale = quantize_by_rows(left, w4a4.quantize_weight)
            return {"weight": codes, "wscales": scale, **tensors}
        global_scale = nvfp4.global_scale_of(left.abs().amax(), nvfp4.SEARCHED_SCALE_MAX)
        global_scale = global_scale.to(torch.bfloat16).float()  # as it is stored
        packed, scale = quantize_by_rows(left, lambda rows: nvfp4.quantize_nvfp4(rows, global_scale, search=True))
        channels = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
        return {"weight": packed, "wscales": scale, **tensors, "wcscales": channels, "wtscale": global_scale}

    def smooth_input(self, layer: QuantizedLinear, mul_scale: torch.Tensor) -> None:
        """Divide the 4-bit product's input; the low-rank product's, which comes as it is, gets the scale in a factor.

        Both are exact: ``mul_scale`` holds powers of two.
        """
        down = layer.get_parameter("proj_down").data
        layer.replace_tensor("smooth_factor", (1 / mul_scale).to(torch.bfloat16))
        layer.replace_tensor("proj_down", (down.float() * mul_scale.unsqueeze(1)).to(down.dtype))

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the weight for the input as it comes, both parts."""
        names = [name for name in layer.quantized_names if name != "weight"]
        tensors = {name: self.stored_tensor(layer, name, layer.get_parameter(name).data) for name in names}
        if "wtscale" in tensors:  # in float32, as it is multiplied with
            tensors["wtscale"] = layer.get_parameter("wtscale").data
        return svdquant_dequantize(layer.get_parameter("weight").data, **tensors)

    def facts(self, layer: QuantizedLinear) -> Factors:
        """Return which of the scales there is to multiply with.

        Raises:
            CheckpointError: the factors have different ranks.
        """
        down, up = layer.get_parameter("proj_down"), layer.get_parameter("proj_up")
        if down.shape[1] != up.shape[1]:
            raise CheckpointError(
                f"{layer.prefix}: proj_down {list(down.shape)} and proj_up {list(up.shape)} have different ranks"
            )
        if down.is_meta:
            return Factors(False, False)  # there is nothing to see
        has_channel_scales = "wcscales" in layer.quantized_names
        return Factors(
            bool((layer.get_parameter("smooth_factor") != 1).any()),
            has_channel_scales and bool((layer.get_parameter("wcscales") != 1).any()),
        )

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return those of the 4-bit product."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("wscales")
        return Prepared(weight, scale, outer_scale=self._global_scale(layer), format=self.format)

    def _global_scale(self, layer: QuantizedLinear) -> torch.Tensor | None:
        if self.precision == "int4":
            return None
        if "wtscale" in layer.quantized_names:
            return layer.get_parameter("wtscale")
        return torch.ones((), device=layer.get_parameter("wscales").device)

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute both products and add them and the bias."""
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        result = self._multiply_rows(layer, rows, bias)
        return result if x.ndim == 2 else result.view(*x.shape[:-1], result.shape[-1])

    def _multiply_rows(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bound = layer.bound
        factors: Factors = bound.facts
        smoothed = (x / layer.get_parameter("smooth_factor")).to(x.dtype) if factors.is_smoothed else x
        down, up = (_in_dtype(layer.get_parameter(name), x.dtype) for name in ("proj_down", "proj_up"))
        if "low_rank" in bound.implementation.capabilities and not factors.has_channel_scales:
            tensors = layer.prepared()
            result: torch.Tensor = product_operator(
                smoothed, tensors.weight, tensors.scale, tensors.outer_scale, x, down, up, bias
            )
            return result
        result = layer.multiply(smoothed, None)
        if factors.has_channel_scales:
            result = result * layer.get_parameter("wcscales").to(x.dtype)
        result.addmm_(x @ down, up.t())  # nobody else's: added to in place
        return result if bias is None else result.add_(bias)


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _finite(layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` if all of it is finite; raises ``CheckpointError``."""
    if not tensor.is_meta:
        wrong = int((~torch.isfinite(tensor.float())).sum())
        if wrong:
            raise CheckpointError(f"{layer.prefix}.{name}: {wrong} of {tensor.numel()} values are not finite")
    return tensor
