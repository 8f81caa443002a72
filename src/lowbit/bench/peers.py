"""Other libraries' 8 bits, applied to the same layers as lowbit's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.bench.machine import version
from lowbit.errors import ConfigError, expected_one_of
from lowbit.hosts.other_quantizers import is_plain


@dataclass(frozen=True)
class Peer:
    """Another library's method.

    Attributes:
        what: the method, in its library's words.
        module: what to import to see whether it is there.
        packages: distributions to install, the one whose version counts first.
        quantize: called with a model, the names of the layers to quantize and the activations' dtype; works in place.
        detail: tells how the method computes here, once it was used.
    """

    what: str
    module: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, Sequence[str], torch.dtype], None]
    detail: Callable[[], str] = str

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        top = self.module.split(".", maxsplit=1)[0]
        return importlib.util.find_spec(top) is not None and importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        """The installed version."""
        return version(self.packages[0])


def _torchao_int8(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen = set(names)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)


def _torchao_fp8(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chosen = set(names)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, filter_fn=lambda _, name: name in chosen)


def _quanto(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, include=list(names))  # what diffusers' integration of quanto does
    freeze(model)


def _sdnq(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    from sdnq import sdnq_post_load_quant

    chosen = set(names)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sdnq_post_load_quant(
        model,
        weights_dtype="int8",
        use_quantized_matmul=True,
        add_skip_keys=False,
        minimum_allowed_numel=1,
        minimum_allowed_channel_size=1,
        # a leading dot makes it the beginning of a parameter's full name
        modules_to_not_convert=[f".{name}." for name in linear if name not in chosen],
        torch_dtype=dtype,
    )


def _sdnq_detail() -> str:
    from sdnq import kernel_wrappers

    return "OpenVINO products" if kernel_wrappers.use_openvino_mm else "products of PyTorch"


def _gguf(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        blocks = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().float().cpu().numpy(), kind))
        with torch.device("meta"):
            layer = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype)
        layer.weight = GGUFParameter(blocks.to(linear.weight.device), quant_type=kind)
        layer.bias = linear.bias
        layer.source_cls = nn.Linear
        model.set_submodule(name, layer.requires_grad_(False))


PEERS: Mapping[str, Peer] = {
    "torchao": Peer("Int8DynamicActivationInt8Weight", "torchao", ("torchao",), _torchao_int8),
    "torchao-fp8": Peer("Float8DynamicActivationFloat8Weight, per row", "torchao", ("torchao",), _torchao_fp8),
    "quanto": Peer("int8 weights", "optimum.quanto", ("optimum-quanto",), _quanto),
    "sdnq": Peer("int8, quantized matmul", "sdnq", ("sdnq", "openvino"), _sdnq, _sdnq_detail),
    "gguf": Peer("Q8_0 in diffusers' GGUFLinear", "gguf", ("gguf",), _gguf),
}


def check_peers(names: Sequence[str]) -> None:
    """Find out whether peers can take part.

    Raises:
        ConfigError: an unknown name, or one whose library isn't installed: says what to install.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ConfigError(f"Unknown peers: {', '.join(unknown)}. {expected_one_of(PEERS)}")
    missing = {name: PEERS[name] for name in names if not PEERS[name].installed}
    if missing:
        packages = " ".join(sorted({package for peer in missing.values() for package in peer.packages}))
        raise ConfigError(f"Not installed: {', '.join(missing)}. To measure beside them: pip install {packages}")


def quantize_with_peer(peer: str, model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Quantize ``model`` in place with another library.

    Args:
        peer: a name of ``PEERS``.
        model: modules of one's own (see ``share``).
        names: of the linear layers to quantize.
        dtype: of the activations.

    Raises:
        RuntimeError: the library quantized other layers than those.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    PEERS[peer].quantize(model, names, dtype)
    quantized = {name for name in linear if not is_plain(model.get_submodule(name))}
    if quantized != set(names):
        wrong = sorted(quantized ^ set(names))
        raise RuntimeError(f"{peer} quantized {len(quantized)} layers instead of {len(names)}; they differ in {wrong}")
