"""A linear layer whose weight is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lowbit.ops.dispatch import Implementation
from lowbit.quantization.autograd import StraightThroughLinear, needs_gradient
from lowbit.quantization.base import LinearMethod


class QuantizedLinear(nn.Linear):
    """An ``nn.Linear`` whose parameters are those of a quantized checkpoint and whose method computes it.

    Being an ``nn.Linear``, LoRA, hooks and ``torch.compile`` treat it as one. ``state_dict`` holds the checkpoint's
    tensors whatever layout the kernel reads. ``to(dtype)`` leaves quantized tensors and scales alone. Wherever the
    weight is at the next use, by ``to(device)`` or moved by others, the layer takes a kernel of that device.

    Attributes:
        prefix: full name in the model, for messages.
        method: what computes it.
        compute_dtype: of the activations it expects.
        implementation: the table's entry of its kernel, ``None`` before the first use on a device.
        kernel: the module of that implementation.
        kernel_device: that the kernel was chosen for.
        is_packed: the weight is in the kernel's layout.
        has_own_layout: the kernel's layout is not the checkpoint's.
        is_offloaded: others (hooks that offload) put the parameters in place and take them away: they stay in the
            checkpoint's layout, and a kernel with another one packs at every use.
        expected: shape and dtype of each of the checkpoint's tensors.
        owns_weight: nothing else uses the memory of the weight, so that packing may overwrite it.
        awaits_unquantized: it has a placeholder for the unquantized weight that it is to quantize.
        awaits_tensors: those of the checkpoint are still arriving. A state dict then tells shapes and dtypes only of
            tensors that would have to be converted: loaders ask for it before every file.
        is_smoothed: its input is to be multiplied by ``mul_scale``.
        is_symmetric: its zero points are all the middle of the codes.
        rotation_matrix: each group of its input's channels is to be multiplied by, ``None`` for nothing.
        has_channel_scales: its result is to be multiplied by a scale per channel.
    """

    is_smoothed: bool
    has_channel_scales: bool
    is_symmetric: bool
    rotation_matrix: torch.Tensor | None

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
        self.implementation: Implementation | None = None
        self.kernel: ModuleType | None = None
        self.kernel_device: torch.device | None = None
        self.is_packed = self.is_offloaded = self.has_own_layout = False
        self.packed_layout = torch.strided
        self.owns_weight = False
        self.awaits_unquantized = self.awaits_tensors = False
        self.is_smoothed = False
        self.is_symmetric = False
        self.rotation_matrix = None
        self.has_channel_scales = False
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
        self.awaits_unquantized = True

    def expect_stored(self) -> None:
        """Show the parameters under the checkpoint's names, too: diffusers and transformers look there to load."""
        for name, stored in self.method.stored_names.items():
            self.__dict__[stored] = self._parameters[name]

    def forget_stored(self) -> None:
        """Undo ``expect_stored``: peft takes a layer with a ``qweight`` for one of another library's."""
        for stored in self.method.stored_names.values():
            self.__dict__.pop(stored, None)

    def stored_name(self, name: str) -> str:
        """Return what ``state_dict``, as the checkpoint, calls the parameter ``name``."""
        return name if self.awaits_unquantized else self.method.stored_names.get(name, name)

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
        self.owns_weight, self.awaits_unquantized = True, False

    def process_weights_after_loading(self) -> None:
        """Choose the kernel and bring the weight to its layout, if that has not been done for this device."""
        if self.kernel is None:
            self.method.process_weights_after_loading(self)

    def take_kernel(self, implementation: Implementation) -> None:
        """Compute with ``implementation`` from now on, and bring the weight to its layout unless others move it."""
        kernel, weight = implementation.load(), self.get_parameter("weight").data
        if not self.is_offloaded:
            packed = kernel.pack_weight(weight, overwrite=self.owns_weight)
            if packed is not weight:
                self.replace_tensor("weight", packed)
            self.is_packed, self.packed_layout = True, packed.layout
            self.has_own_layout = packed is not weight
        self.implementation, self.kernel, self.kernel_device = implementation, kernel, weight.device

    def leave_kernel(self) -> None:
        """Bring the weight back to the checkpoint's layout, and choose a kernel anew at the next use."""
        if self.is_packed:
            weight = self.get_parameter("weight").data
            unpacked = weight if self._is_canonical(weight) else self._unpacked()
            if unpacked is not weight:
                self.replace_tensor("weight", unpacked)
        self.implementation = self.kernel = self.kernel_device = None
        self.is_packed, self.packed_layout = False, torch.strided

    def let_others_move(self) -> None:
        """Keep the parameters in the checkpoint's layout from now on, whatever the kernel: see ``is_offloaded``."""
        self.method.restore_weights(self)
        self.is_offloaded = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] in ``x.dtype``."""
        # Nobody moves weights of a compiled model behind its back, and tracing shows them in other layouts.
        if self.kernel is None or (not torch.compiler.is_compiling() and self._is_moved()):
            self.owns_weight = self.owns_weight and self.kernel is None  # what others put here may be theirs
            self.method.restore_weights(self)
            self.method.process_weights_after_loading(self)
        bias = self._parameters["bias"]
        if needs_gradient(x, bias):
            result: torch.Tensor = StraightThroughLinear.apply(x, bias, self)  # type: ignore[no-untyped-call]
            return result
        return self.compute(x, bias)

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] by the kernel; autograd records nothing of use."""
        return self._compute_offloaded(x, bias) if self.is_offloaded else self.method.apply(self, x, bias)

    @torch.no_grad()
    def dequantized(self) -> torch.Tensor:
        """Return the float32 weight [N, K] for the input as it enters the layer, whatever layout the kernel reads."""
        return self.method.dequantize_weight(self.canonical())

    def canonical(self) -> QuantizedLinear:
        """Return this layer, or a view of it, with its tensors in the checkpoint's layout."""
        if not (self.is_packed and self.has_own_layout):
            return self
        view = QuantizedLinear.__new__(QuantizedLinear)
        view.__dict__.update(self.__getstate__())
        return view

    def plain_kernel(self) -> ModuleType | None:
        """Return the kernel, where calling the layer does nothing else than to compute with it; else ``None``."""
        is_wrapped = "forward" in self.__dict__ or self._forward_hooks or self._forward_pre_hooks
        if self.kernel is None or self.is_offloaded or is_wrapped or self._is_moved():
            return None
        return self.kernel

    def _is_moved(self) -> bool:
        if torch.compiler.is_compiling():  # tracing sees packed weights as strided; moving them traces anew
            return False
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.device != self.kernel_device or weight.layout != self.packed_layout

    def _is_canonical(self, weight: torch.Tensor) -> bool:
        # A kernel whose layout is not the checkpoint's packs to another shape, dtype or kind of tensor.
        return weight.layout == torch.strided and (tuple(weight.shape), weight.dtype) == self.expected["weight"]

    def _compute_offloaded(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute with a weight packed for this use alone; what others put in place stays as it is."""
        assert self.kernel is not None
        parameter = self._parameters["weight"]
        assert parameter is not None
        weight = parameter.data
        packed = self.kernel.pack_weight(weight)
        if packed is weight:
            return self.method.apply(self, x, bias)
        self.replace_tensor("weight", packed)
        try:
            return self.method.apply(self, x, bias)
        finally:
            self._parameters["weight"] = parameter

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
        if target != weight.device:
            self.method.restore_weights(self)
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
        anew = {"implementation": None, "kernel": None, "kernel_device": None}
        state = {**self.__dict__, **anew, "is_packed": False, "packed_layout": torch.strided}
        if self.is_packed:
            weight = nn.Parameter(self._unpacked(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def _unpacked(self) -> torch.Tensor:
        assert self.kernel is not None
        unpacked: torch.Tensor = self.kernel.unpack_weight(self.get_parameter("weight").data)
        return unpacked

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[prefix + "weight"] = self._unpacked()
        if not self.awaits_unquantized and self.method.stored_names:
            for name in self.quantized_names:
                tensor = destination.pop(prefix + name)
                tensor = tensor.to("meta") if self.awaits_tensors else tensor
                destination[prefix + self.stored_name(name)] = self.method.stored_tensor(self, name, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.method.restore_weights(self)
        if self.method.stored_names:
            state_dict = dict(state_dict)
            for name in self.quantized_names:
                tensor = state_dict.pop(prefix + self.stored_name(name), None)
                if tensor is not None:
                    state_dict[prefix + name] = self.method.canonical_tensor(self, name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
