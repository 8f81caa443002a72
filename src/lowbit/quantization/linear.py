"""A linear layer whose weight is quantized."""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import has_hooks
from lowbit.errors import UnsupportedError
from lowbit.ops.dispatch import INPUT_DTYPES, Implementation, Kernel, select, taken_dtypes
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.autograd import StraightThroughLinear, needs_gradient
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.weight_view import WeightView

# Held while a layer takes a kernel: of requests that use a new layer at once, one binds it and the others wait.
_BINDING = threading.RLock()


class State(enum.Enum):
    """Where a layer's tensors are on their way from a checkpoint to a kernel."""

    AWAITING_WEIGHT = enum.auto()
    """It has a placeholder for the unquantized weight that it is to quantize."""
    AWAITING_TENSORS = enum.auto()
    """Those of the checkpoint are arriving. Of tensors to be converted a state dict then tells shapes and dtypes only:
    loaders ask for it before every file."""
    CANONICAL = enum.auto()
    """All tensors are in the checkpoint's layout."""
    BOUND = enum.auto()
    """The weight is in the layout of the kernel that ``binding`` names."""
    EXTERNAL = enum.auto()
    """Others (hooks that offload) put the parameters in place and take them away: they stay in the checkpoint's layout,
    and a kernel with another one packs at every use."""


@dataclass(frozen=True)
class Binding:
    """A layer's kernel.

    Attributes:
        implementation: the table's entry.
        kernel: its module.
        device: that it was chosen for.
        layout: of the packed weight.
        is_packed: its layout is not the checkpoint's.
        facts: what the method saw in the tensors, see ``LinearMethod.facts``.
        input_dtypes: of activations that the kernel takes; others are computed in float32 or refused.
    """

    implementation: Implementation
    kernel: Kernel
    device: torch.device
    layout: torch.layout
    is_packed: bool
    facts: Any
    input_dtypes: frozenset[torch.dtype] = frozenset(INPUT_DTYPES)


class QuantizedLinear(nn.Linear):
    """An ``nn.Linear`` whose parameters are those of a quantized checkpoint and whose method computes it.

    Being an ``nn.Linear``, LoRA, hooks and ``torch.compile`` treat it as one. ``state_dict`` holds the checkpoint's
    tensors whatever layout the kernel reads. ``to(dtype)`` leaves quantized tensors and scales alone. Wherever the
    weight is at the next use, by ``to(device)`` or moved by others, the layer takes a kernel of that device.

    Attributes:
        prefix: full name in the model, for messages.
        method: what computes it.
        compute_dtype: of the activations it expects.
        binding: its kernel, ``None`` before the first use on a device.
        state: of its tensors.
        expected: shape and dtype of each of the checkpoint's tensors.
        shows_codes: ``weight`` is the parameter, for who loads or moves it, not the ``WeightView`` that it is later.
        owns_weight: nothing else uses the memory of the weight, so that packing may overwrite it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        method: LinearMethod,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        prefix: str = "",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the unquantized weight
        self.in_features = in_features
        self.out_features = out_features
        self.method = method
        self.compute_dtype = dtype
        self.prefix = prefix
        self.binding: Binding | None = None
        self.state = State.CANONICAL
        self.owns_weight, self.shows_codes = False, True
        self.creation_device = torch.device(device or "cpu")
        self.expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        method.create_weights(self)
        self.quantized_names = tuple(self._parameters)
        empty_bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty_bias)

    @classmethod
    def like(cls, linear: nn.Linear, method: LinearMethod, prefix: str, dtype: torch.dtype) -> QuantizedLinear:
        """Return an empty quantized layer on the meta device with the shape of ``linear``."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            method,
            device="meta",
            dtype=dtype,
            prefix=prefix,
        )

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight as others see it: see ``WeightView``; while the layer is loaded or moved its parameter."""
        codes = self._parameters.get("weight")
        if codes is None:
            raise AttributeError("weight")
        return codes if self.shows_codes else WeightView(self)

    @contextmanager
    def showing_codes(self) -> Iterator[None]:
        """Let ``weight`` be the parameter for a while."""
        before, self.shows_codes = self.shows_codes, True
        try:
            yield
        finally:
            self.shows_codes = before

    def register_quantized(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Register an empty parameter of the checkpoint (called by the method's ``create_weights``)."""
        empty = torch.empty(shape, dtype=dtype, device=self.creation_device)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.expected[name] = (tuple(shape), dtype)

    def expect_unquantized(self) -> None:
        """Put a placeholder of the unquantized weight's shape and dtype in the place of the empty quantized one.

        diffusers and transformers hold a tensor of the file against the parameter it is for.
        """
        shape = (self.out_features, self.in_features)
        self.replace_tensor("weight", torch.empty(shape, dtype=self.compute_dtype, device="meta"))
        self.state = State.AWAITING_WEIGHT

    def expect_stored(self) -> None:
        """Show the parameters under the checkpoint's names, too: diffusers and transformers look there to load."""
        for name, stored in self.method.stored_names.items():
            if stored != name:
                self.__dict__[stored] = self._parameters[name]

    def forget_stored(self) -> None:
        """Undo ``expect_stored``: peft takes a layer with a ``qweight`` for one of another library's."""
        for stored in self.method.stored_names.values():
            self.__dict__.pop(stored, None)

    def stored_name(self, name: str) -> str:
        """Return what ``state_dict``, as the checkpoint, calls the parameter ``name``."""
        return name if self.state is State.AWAITING_WEIGHT else self.method.stored_names.get(name, name)

    def parameter_of(self, stored_name: str) -> str | None:
        """Return the quantized parameter that ``state_dict`` calls ``stored_name``, ``None`` if there is none."""
        return next((name for name in self.quantized_names if self.stored_name(name) == stored_name), None)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter ``target``, at once: ``nn.Module``'s own looks for modules within on the way.

        Raises:
            AttributeError: there is none.
        """
        parameter = self._parameters.get(target)
        if parameter is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}")
        return parameter

    def replace_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` under the parameter ``name``, as it is."""
        self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def hold_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the layer's own layout under the parameter ``name``, whatever extents it leaves open."""
        self.replace_tensor(name, tensor)
        self.expected[name] = (tuple(tensor.shape), tensor.dtype)

    def drop_tensor(self, name: str) -> None:
        """Do without a tensor that the checkpoint may lack."""
        del self._parameters[name]
        self.quantized_names = tuple(kept for kept in self.quantized_names if kept != name)

    def load_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Take a checkpoint's tensor for ``name``.

        Raises:
            CheckpointError: shape or dtype is not what the method reads.
        """
        self.replace_tensor(name, self.method.canonical_tensor(self, name, tensor))
        self.owns_weight = False

    def load_unquantized(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` [N, K] and take the result."""
        tensors = self.method.quantize_weight(weight)
        for name, tensor in tensors.items():
            self.replace_tensor(name, tensor)
        self.owns_weight = True
        if self.state is State.AWAITING_WEIGHT:
            self.state = State.AWAITING_TENSORS

    @property
    def implementation(self) -> Implementation | None:
        """The table's entry of its kernel, ``None`` before the first use on a device."""
        return None if self.binding is None else self.binding.implementation

    def process_weights_after_loading(self) -> Binding:
        """Choose the kernel and bring the weight to its layout, if that has not been done where the weight is now.

        Raises:
            UnsupportedError: no kernel can run the layer; lists every reason.
        """
        with _BINDING:
            binding = self.binding
            if binding is None or self._is_moved(binding):
                self.owns_weight = self.owns_weight and binding is None  # what others put here may be theirs
                self.leave_kernel()
                binding = self._take_kernel()
            return binding

    def _take_kernel(self) -> Binding:
        method, weight = self.method, self.get_parameter("weight").data
        implementation = select(method.family, method.table, method.problem(self, weight.device), method.kernel)
        kernel, facts = implementation.load(), method.facts(self)
        packed = weight
        if self.state is not State.EXTERNAL:
            packed = kernel.prepare(self._tensors(weight), overwrite=self.owns_weight).weight
            if packed is not weight:
                self.replace_tensor("weight", packed)
            self.state = State.BOUND
        dtypes = taken_dtypes(implementation, method.problem(self, weight.device))
        self.shows_codes, own = False, packed is not weight
        self.binding = Binding(implementation, kernel, weight.device, packed.layout, own, facts, dtypes)
        return self.binding

    def leave_kernel(self) -> None:
        """Bring the weight back to the checkpoint's layout, and choose a kernel anew at the next use."""
        if self.state is State.BOUND:
            weight = self.get_parameter("weight").data
            unpacked = weight if self._is_canonical(weight) else self._unpacked()
            if unpacked is not weight:
                self.replace_tensor("weight", unpacked)
            self.state = State.CANONICAL
        self.binding = None

    def arrive(self) -> None:
        """Take note that all tensors of the checkpoint are there."""
        if self.state in (State.AWAITING_WEIGHT, State.AWAITING_TENSORS):
            self.state = State.CANONICAL

    def let_others_move(self) -> None:
        """Keep the parameters in the checkpoint's layout from now on, whatever the kernel: see ``State.EXTERNAL``."""
        self.leave_kernel()
        self.state = State.EXTERNAL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] in ``x.dtype``: float64 as float32.

        Threads may share the layer: once it has a kernel, a call changes nothing.

        Raises:
            UnsupportedError: the kernel takes no activations of that dtype.
        """
        binding = self.binding
        # Nobody moves weights of a compiled model behind its back, and tracing shows them in other layouts.
        if binding is None or (not torch.compiler.is_compiling() and self._is_moved(binding)):
            self.process_weights_after_loading()
        bias = self._parameters["bias"]
        if needs_gradient(x, bias):
            result: torch.Tensor = StraightThroughLinear.apply(x, bias, self)  # type: ignore[no-untyped-call]
            return result
        return self.compute(x, bias)

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] by the kernel; autograd records nothing of use."""
        if x.dtype not in self.bound.input_dtypes:
            return self._compute_in_float32(x, bias)
        return self.method.apply(self, x, bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] by the kernel alone, without what the method does around it."""
        return self.bound.kernel.linear(x, self.prepared(), bias)

    @property
    def bound(self) -> Binding:
        """Its kernel, which it has since ``process_weights_after_loading`` or the first use."""
        assert self.binding is not None
        return self.binding

    def prepared(self) -> Prepared:
        """Return the tensors in the kernel's layout; of ``State.EXTERNAL`` packed for this use alone."""
        tensors = self.method.tensors(self)
        return self.bound.kernel.prepare(tensors) if self.state is State.EXTERNAL else tensors

    def _compute_in_float32(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x of a dtype that the kernel does not take; float32 holds all 16-bit values exactly."""
        binding = self.bound
        if not x.is_floating_point() or x.dtype.itemsize < 2 or torch.float32 not in binding.input_dtypes:
            taken = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in binding.input_dtypes))
            raise UnsupportedError(
                f"{self.prefix or type(self).__name__}: the kernel {binding.implementation.name!r} takes activations in"
                f" {taken}, not in {str(x.dtype).removeprefix('torch.')}: cast them, or the model with to(dtype)"
            )
        return self.compute(x.float(), None if bias is None else bias.float()).to(x.dtype)

    @torch.no_grad()
    def dequantized(self) -> torch.Tensor:
        """Return the float32 weight [N, K] for the input as it enters the layer, whatever layout the kernel reads."""
        return self.method.dequantize_weight(self.canonical())

    def canonical(self) -> QuantizedLinear:
        """Return this layer, or a view of it, with its tensors in the checkpoint's layout."""
        if self.binding is None or not self.binding.is_packed:
            return self
        view = QuantizedLinear.__new__(QuantizedLinear)
        view.__dict__.update(self.__getstate__())
        return view

    def plain_binding(self) -> Binding | None:
        """Return the binding, where calling the layer does nothing else than to compute with it; else ``None``."""
        binding = self.binding
        if binding is None or self.state is not State.BOUND or has_hooks(self) or self._is_moved(binding):
            return None
        return binding

    def _is_moved(self, binding: Binding) -> bool:
        if torch.compiler.is_compiling():  # tracing sees packed weights as strided; moving them traces anew
            return False
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.device != binding.device or weight.layout != binding.layout

    def _is_canonical(self, weight: torch.Tensor) -> bool:
        # A kernel whose layout is not the checkpoint's packs to another shape, dtype or kind of tensor.
        return weight.layout == torch.strided and (tuple(weight.shape), weight.dtype) == self.expected["weight"]

    def quantized_bytes(self) -> int:
        """Return the bytes of the quantized tensors, in the checkpoint's layout."""
        tensors = (self.expected[name] for name in self.quantized_names)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        kernel = self.implementation.name if self.implementation else "not chosen yet"
        return f"{super().extra_repr()}, method={self.method.name}, kernel={kernel}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        # Called by to(), cuda(), half()...: the quantized tensors follow to a device, never to another dtype.
        weight = self.get_parameter("weight")
        activations = fn(torch.empty(0, dtype=self.compute_dtype, device=weight.device))
        target = activations.device
        if target != weight.device or activations.dtype != self.compute_dtype:
            self.leave_kernel()
        quantized = {id(self._parameters[name]) for name in self.quantized_names}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in quantized:
                return fn(tensor)
            if target == tensor.device:
                return tensor.data
            return torch.empty_like(tensor, device=target) if tensor.is_meta else tensor.to(target)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = activations.dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the checkpoint's layout and choose their kernel anew.
        state = {**self.__dict__, "binding": None}
        if self.state is State.BOUND:
            state["state"] = State.CANONICAL
            weight = nn.Parameter(self._unpacked(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def _unpacked(self) -> torch.Tensor:
        return self.bound.kernel.restore(self._tensors(self.get_parameter("weight").data)).weight

    def _tensors(self, weight: torch.Tensor) -> Prepared:
        return self.method.tensors(self)._replace(weight=weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.state is State.BOUND:
            destination[prefix + "weight"] = self._unpacked()
        if self.state is not State.AWAITING_WEIGHT and self.method.stored_names:
            for name in self.quantized_names:
                tensor = destination.pop(prefix + name)
                tensor = tensor.to("meta") if self.state is State.AWAITING_TENSORS else tensor
                destination[prefix + self.stored_name(name)] = self.method.stored_tensor(self, name, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.leave_kernel()
        if self.method.stored_names:
            state_dict = dict(state_dict)
            for name in self.quantized_names:
                tensor = state_dict.pop(prefix + self.stored_name(name), None)
                if tensor is not None:
                    state_dict[prefix + name] = self.method.canonical_tensor(self, name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
