"""What other libraries see as the ``weight`` of a quantized layer.

Models cast their input to ``layer.weight.dtype`` (T5, NLLB, Qwen2-VL, Z-Image...) or ask for its device or shape, and
peft puts adapters where and in what the weight is. The codes would answer with int8 [N, K / 2], say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import UnsupportedError

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


class WeightView:
    """Shape, dtype and device of the weight [N, K] of an ``nn.Linear`` in the compute dtype; it holds no numbers.

    Computing with it, and what a tensor has beyond those facts, is an error that says where codes and numbers are.
    """

    requires_grad = is_leaf = False
    grad = None
    ndim = 2
    layout = torch.strided

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        """N output and K input features."""
        return torch.Size((self._layer.out_features, self._layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that the layer expects."""
        return self._layer.compute_dtype

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self._layer.get_parameter("weight").device

    @property
    def is_meta(self) -> bool:
        """Whether the codes have no data."""
        return self._layer.get_parameter("weight").is_meta

    @property
    def data(self) -> WeightView:
        """The view itself."""
        return self

    @data.setter
    def data(self, values: object) -> None:
        raise UnsupportedError(self._why("can't be replaced"))

    def detach(self) -> WeightView:
        """Return the view itself."""
        return self

    def dim(self) -> int:
        """Return 2."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or its extent along ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return N * K."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Return the bytes of an element in the compute dtype."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Return ``True``."""
        return True

    def is_complex(self) -> bool:
        """Return ``False``."""
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self._why(f"has no {name!r}"))

    def __repr__(self) -> str:
        return f"WeightView({list(self.shape)}, {self.dtype}, {self.device}, method={self._layer.method.name})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Refuse to be computed with."""
        values = [*arguments, *(options or {}).values()]
        flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
        view = next(part for part in flat if isinstance(part, WeightView))
        raise UnsupportedError(view._why(f"can't be given to {getattr(function, '__name__', function)}"))

    def _why(self, what: str) -> str:
        name = f"{self._layer.prefix}.weight" if self._layer.prefix else "weight"
        return (
            f"{name} {what}: the layer is quantized ({self._layer.method.name}). dequantized() returns its float32"
            " numbers, get_parameter('weight') its codes"
        )
