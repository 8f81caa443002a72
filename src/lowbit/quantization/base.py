"""The two contracts of a quantization method: its configuration and what it does to a linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import CheckpointError, ConfigError, expected_one_of
from lowbit.models.patterns import check_syntax, matches_any
from lowbit.ops.dispatch import AUTO, Implementation, Problem
from lowbit.ops.weight_format import Prepared, WeightFormat
from lowbit.quantization.tensors import Along, TensorSpec, cut_step

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear


# Last parts of the names of tensors that only quantized checkpoints have.
QUANTIZED_SUFFIXES = (".weight_scale", ".weight_scale_inv", ".qweight")


class MethodName(str):
    """A method's name that also answers to ``.value``, as the enumerations of diffusers and transformers do."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain string."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(ABC):
    """How to quantize one component.

    Attributes:
        ignored_layers: patterns of layers to keep as they are, see ``lowbit.models.patterns``.
        weight_only_layers: patterns of layers whose weights alone are quantized, for layers that see few rows, such as
            modulation; ``None``: those of the model's family (``lowbit.models``), of a quantized checkpoint none.
            ``ignored_layers`` goes first.
        kernel: implementation to compute with: ``"auto"`` or a name that ``lowbit info`` lists. A choice of this run,
            not part of a checkpoint.
    """

    ignored_layers: list[str] | None = None
    weight_only_layers: list[str] | None = None
    kernel: str = AUTO

    # What other names of an option mean, when reading.
    aliases: ClassVar[Mapping[str, str]] = {"modules_to_not_convert": "ignored_layers"}
    # Options that say how to run rather than what the checkpoint is.
    runtime_options: ClassVar[frozenset[str]] = frozenset({"kernel"})

    def __post_init__(self) -> None:
        for option in ("ignored_layers", "weight_only_layers"):
            layers = [] if getattr(self, option) is None else getattr(self, option)
            if not isinstance(layers, list | tuple | set) or not all(isinstance(layer, str) for layer in layers):
                raise ConfigError(f"{option} must be a list of layer names or patterns, not {layers!r}")
            check_syntax(option, layers)
        if not isinstance(self.kernel, str):
            raise ConfigError(f"kernel must be a name, not {self.kernel!r}")
        # A normalization at construction, so that everyone after sees a list of their own.
        object.__setattr__(self, "ignored_layers", list(self.ignored_layers or []))
        if self.weight_only_layers is not None:
            object.__setattr__(self, "weight_only_layers", list(self.weight_only_layers))

    @classmethod
    @abstractmethod
    def get_name(cls) -> str:
        """Return the method's name as the user spells it."""

    @property
    @abstractmethod
    def is_serialized(self) -> bool:
        """Whether the checkpoint's tensors are already quantized."""

    @abstractmethod
    def linear_method(self) -> LinearMethod:
        """Return what this configuration does to a linear layer."""

    def weight_only_method(self) -> LinearMethod | None:
        """Return what this configuration does to a layer of ``weight_only_layers``: it leaves activations alone.

        ``None`` for a method without such a kind: it keeps these layers.
        """
        return None

    @abstractmethod
    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration of a checkpoint written from a model that was quantized with this one.

        Args:
            ignored_layers: full names of the linear layers that were kept as they are.
        """

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a checkpoint's ``quantization_config`` with this method's name is meant for lowbit.

        Asked where the library that loads has a method of the same name. The mark of the checkpoints that lowbit and
        vLLM-Omni write is ``is_checkpoint_<method>_serialized``.
        """
        return f"is_checkpoint_{cls.get_name()}_serialized" in config

    @property
    def needs_calibration(self) -> bool:
        """Whether weights can be quantized only after the unquantized model has been watched."""
        return False

    @property
    def weights_from(self) -> str | None:
        """Where the component's weights are, if not in its own folder: as the user wrote it."""
        return None

    @property
    def quant_method(self) -> MethodName:
        """The name, under the attribute diffusers and transformers look for."""
        return MethodName(self.get_name())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a dictionary such as a checkpoint's ``quantization_config``.

        Raises:
            ConfigError: an option that does not exist, or a value that is not allowed.
        """
        return cls(**cls._options(config))

    @classmethod
    def _options(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments for the constructor from a dictionary with aliases and the method's name."""
        options: dict[str, Any] = {}
        known = {item.name for item in fields(cls)}
        for key, value in config.items():
            if key in ("method", "quant_method"):
                continue
            name = cls.aliases.get(key, key)
            if name not in known:
                raise ConfigError(
                    f"Unknown option {key!r} for quantization method {cls.get_name()!r}."
                    f" {expected_one_of(sorted(known))}"
                )
            if name in options and options[name] != value:
                raise ConfigError(f"Options {name!r} and its other name contradict each other: {config}")
            options[name] = value
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint's ``config.json`` holds: ``quant_method`` and every option that is not at rest."""
        values = asdict(self)
        defaults = {
            item.name: item.default if item.default_factory is MISSING else item.default_factory()
            for item in fields(self)
        }
        kept = {
            name: value
            for name, value in values.items()
            if name not in self.runtime_options and value not in (None, []) and value != defaults[name]
        }
        return {"quant_method": self.get_name(), **kept}

    def is_ignored(self, name: str) -> bool:
        """Tell whether ``ignored_layers`` keeps the layer with this full name."""
        return matches_any(self.ignored_layers or (), name)

    def of_checkpoint(self, tensor_names: Collection[str]) -> Self:
        """Return the configuration for a checkpoint with these tensors, which may say more than what it was read from.

        ``weight_scale`` or ``qweight`` tensors make it one of a quantized checkpoint: some writers leave that out.
        """
        if self.is_serialized or not any(name.endswith(QUANTIZED_SUFFIXES) for name in tensor_names):
            return self
        return self.as_serialized(self.ignored_layers or [])

    def stored_tensors(self, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the state dict of a model as ``save_pretrained`` is to write it: as it is, if nothing else is said."""
        return state_dict

    def without_prefix(self, prefix: str) -> Self:
        """Return the configuration for a model whose layers' names lack ``prefix``."""
        layers = (self.ignored_layers or (), self.weight_only_layers or ())
        ignored, weight_only = ([name.removeprefix(prefix) for name in names] for names in layers)
        return replace(self, ignored_layers=ignored, weight_only_layers=weight_only)

    def kept_reason(self, name: str) -> str:
        """Return why ``get_quant_method`` leaves the linear layer of this full name as it is."""
        return "ignored_layers"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``, whose full name is ``prefix``; ``None`` to leave it as it is."""
        if not isinstance(layer, torch.nn.Linear) or self.is_ignored(prefix):
            return None
        if matches_any(self.weight_only_layers or (), prefix):
            return self.weight_only_method()
        return self.linear_method()


class LinearMethod(ABC):
    """What a quantization method does to a linear layer.

    Attributes:
        name: of the method.
        weight_only: it leaves activations alone.
        family: of operators, a module in ``lowbit.ops``.
        table: the family's implementations.
        activation_scheme: ``"dynamic"``, ``"static"`` (by ``input_scale``), or ``"none"`` for weights alone.
        block_size: (output, input channels) of a weight block with one scale, ``None`` for other granularities.
        optional: tensors that a checkpoint may lack; the layer then does without.
        all_or_none: of those, what a writer gives to every layer of this method or to none: where some layers have it,
            it is missing in the others.
        stored_names: parameter -> the checkpoint's name of its tensor, where they differ.
    """

    name: str
    weight_only: ClassVar[bool] = False
    family: str
    table: Sequence[Implementation]
    activation_scheme: str = "dynamic"
    block_size: tuple[int, int] | None = None
    optional: frozenset[str] = frozenset()
    all_or_none: frozenset[str] = frozenset()
    stored_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, kernel: str = AUTO) -> None:
        self.kernel = kernel

    @property
    def weight_format(self) -> str:
        """What the family's kernels call the weight's format, where they know several."""
        return self.name

    @property
    def is_kernel_alone(self) -> bool:
        """Whether ``apply`` is the kernel's ``linear`` of x and bias, with a scale per token and per channel."""
        return False

    @property
    def format(self) -> WeightFormat:
        """What the layer's weight is to a kernel; weight-only where activations are not quantized."""
        activation = None if self.activation_scheme == "none" else self.activation_scheme
        return WeightFormat(self.weight_format, self.block_size, activation)

    @abstractmethod
    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return what the tensors of a layer of N output and K input features are, ``weight`` first."""

    def create_weights(self, layer: QuantizedLinear) -> None:
        """Register the tensors of ``specs``, empty, on the layer's device."""
        for spec in self.specs(layer.out_features, layer.in_features):
            layer.register_quantized(spec.name, spec.shape(layer.out_features, layer.in_features), spec.dtype)

    def cut_step(self, out_features: int, in_features: int, along: Along) -> int:
        """Return the number of channels at whose multiples a layer of N output and K input features can be cut."""
        return cut_step(self.specs(out_features, in_features), along)

    @abstractmethod
    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize a weight [N, K] of any floating dtype to the checkpoint's tensors."""

    @abstractmethod
    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the float32 weight [N, K] that the layer's checkpoint tensors stand for."""

    @abstractmethod
    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the layer's tensors by what they are to a kernel, in the layout they are in."""

    def facts(self, layer: QuantizedLinear) -> Any:
        """Return what ``apply`` and ``tensors`` need to know of the layer's values, once for each kernel it takes.

        Raises:
            CheckpointError: the tensors do not fit each other.
        """
        return None

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute the layer, which has a kernel, for x [..., K]; returns [..., N] in ``x.dtype``."""
        return layer.multiply(x, bias)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a checkpoint's tensor to the shape and dtype that ``specs`` gives ``name``.

        Raises:
            CheckpointError: it can't be; names the tensor, what was found and what would be right.
        """
        shape, dtype = layer.expected[name]
        check_tensor(f"{layer.prefix}.{layer.stored_name(name)}", tensor, shape, (dtype,), self.name)
        return tensor

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo ``canonical_tensor`` for the parameter ``name``, where the checkpoint's layout differs.

        Of a tensor on the meta device only shape and dtype.
        """
        return tensor

    def smooth_input(self, layer: QuantizedLinear, mul_scale: torch.Tensor) -> None:
        """Let ``layer``, whose weight was divided by ``mul_scale`` [K], multiply its input by it."""
        layer.replace_tensor("mul_scale", mul_scale)

    def input_scale_of(self, absmax: float) -> float:
        """Return the ``input_scale`` of static activations whose largest magnitude is ``absmax``."""
        raise NotImplementedError(f"{self.name} has no static activations")

    def problem(self, layer: QuantizedLinear, device: torch.device) -> Problem:
        """Return what ``layer`` asks of an implementation on ``device``; no kernel computes in float64."""
        dtype = torch.float32 if layer.compute_dtype == torch.float64 else layer.compute_dtype
        return Problem(device, dtype, layer.out_features, layer.in_features, self.format)

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Return why this method can't take a linear layer of this shape, or ``None``."""
        return None


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], method: str
) -> None:
    """Raise ``CheckpointError`` unless a checkpoint's tensor ``name`` has ``shape`` and one of ``dtypes``."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        found, *needed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise CheckpointError(
            f"{name}: found {found} {list(tensor.shape)}, {method} needs {' or '.join(needed)} {list(shape)}"
        )
