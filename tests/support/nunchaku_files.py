"""Files in nunchaku's layout, packed by our own packer from its definition, and the small transformers they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from lowbit.checkpoints.external import load_component
from lowbit.models.nunchaku_names import LAYOUTS
from lowbit.models.reference_names import names_of
from lowbit.ops.e2m1 import E2M1_VALUES
from lowbit.quantization import SvdQuantConfig
from tests.support import nunchaku_packer as packer
from tests.support.models import FAMILIES, save

RANK = 16
SHIFT = 0.171875


def z_image() -> ZImageTransformer2DModel:
    # As wide as makes all layers whole groups of 64; not whole tiles of 128, so that padding is met.
    return ZImageTransformer2DModel(
        in_channels=16,
        dim=192,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "z-image": z_image,
    "qwen-image": FAMILIES["qwen-image"].make,
    "flux": FAMILIES["flux"].make,
}


class Written:
    """A random model, and a file in nunchaku's layout with the weights that it is to have.

    Attributes:
        expected: the model's tensors in float64, of layers in 4 bits what they stand for.
        codes: the bytes of a W4A4 layer's weight, row-major.
    """

    def __init__(self, name: str, precision: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(1)
        self.precision = precision
        self.model = MAKERS[name]()
        self.class_name = type(self.model).__name__
        self.layout = LAYOUTS[self.class_name]
        self.source = str(save(self.model, folder / "transformer", torch.float32).parent)
        self.path = folder / f"svdq-{precision}.safetensors"
        self.expected = {key: tensor.double() for key, tensor in self.model.state_dict().items()}
        self.codes: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._fill()
        self.metadata = {
            "model_class": self.layout.class_names[0],
            "quantization_config": json.dumps(
                {"method": "svdquant", "weight": {"dtype": "int4" if precision == "int4" else "fp4_e2m1_all"}}
            ),
        }
        self.save()

    def save(self) -> None:
        save_file(self.tensors, self.path, self.metadata)

    def _fill(self) -> None:
        linear = {key: layer for key, layer in self.model.named_modules() if type(layer) is nn.Linear}
        done: set[str] = set()
        for layer, module in linear.items():
            joined = names_of(layer, self.layout.joined)
            if joined:
                self._joined(layer, joined, module)
                done.add(layer)
        sources: dict[str, list[str]] = {}
        for layer in linear:
            for pattern, targets in self.layout.layers.items():
                hit = next((n for target in targets if (n := names_of(layer, {target: (pattern,)}))), ())
                if hit:
                    sources.setdefault(hit[0], [])
        for source in sources:
            sources[source] = list(names_of(source, self.layout.layers))
        for layer in linear:
            identity = any(part in layer for part in ("attn.", "attention.", "ff.", "mlp.")) and not any(
                layer in targets for targets in sources.values()
            )
            if (identity and layer not in done) or names_of(layer, dict.fromkeys(self.layout.modulation, ("",))):
                sources[layer] = [layer]
        for source, names in sources.items():
            present = [target for target in names if target in linear]
            parts = next((n for p, n in self.layout.modulation.items() if names_of(source, {p: ("",)})), 0)
            if parts:
                self._modulation(source, linear[source], parts)
            elif present and all(target in linear for target in names):
                self._fused(source, [(target, linear[target]) for target in names])
            elif present:
                raise AssertionError(source)
            done.update(names)
        plain = {key: tensor for key, tensor in self.model.state_dict().items() if key.rpartition(".")[0] not in done}
        for key, tensor in plain.items():
            layer, dot, parameter = key.rpartition(".")
            name = next((n[0] for p, t in self.layout.layers.items() if (n := names_of(layer, {t[0]: (p,)}))), layer)
            self.tensors[f"{name}{dot}{parameter}"] = tensor

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _w4a4(
        self, source: str, rows: int, columns: int, has_bias: bool, channel_scales: bool = False
    ) -> dict[str, Any]:
        """Write a layer; return its dense weight and bias in float64 and its codes."""
        codes = torch.randint(0, 16, (rows, columns), generator=self.generator)
        smooth = (0.5 + torch.rand(columns, generator=self.generator)).bfloat16()
        down, up = (0.1 * self._random(RANK, columns)).bfloat16(), (0.1 * self._random(rows, RANK)).bfloat16()
        put = self.tensors.__setitem__
        group = 64 if self.precision == "int4" else 16
        scale = 0.01 + 0.01 * torch.rand(rows, columns // group, generator=self.generator)
        if self.precision == "int4":
            values = torch.where(codes >= 8, codes - 16, codes).double()
            scale = scale.bfloat16()
            put(f"{source}.wscales", packer.pack_scale(scale))
        else:
            values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)[codes]
            scale = (10 * scale).to(torch.float8_e4m3fn)
            put(f"{source}.wscales", packer.pack_micro_scale(scale))
        main = values * scale.double().repeat_interleave(group, dim=1)
        if self.precision == "nvfp4":
            wtscale = (0.05 + 0.1 * torch.rand(1, generator=self.generator)).bfloat16()
            put(f"{source}.wtscale", wtscale)
            main = main * wtscale.double()
            if channel_scales:
                wcscales = (0.5 + torch.rand(rows, generator=self.generator)).bfloat16()
                put(f"{source}.wcscales", packer.pack_scale(wcscales))
                main = main * wcscales.double()[:, None]
        put(f"{source}.qweight", packer.pack_weight(codes))
        put(f"{source}.smooth_factor", packer.pack_scale(smooth))
        put(f"{source}.smooth_factor_orig", packer.pack_scale(smooth))
        put(f"{source}.proj_down", packer.pack_low_rank(down, down=True))
        put(f"{source}.proj_up", packer.pack_low_rank(up, down=False))
        smoothed = main / smooth.double()
        bias = None
        if has_bias:
            stored = self._random(rows).bfloat16()
            put(f"{source}.bias", packer.pack_scale(stored))
            shifted = self.precision == "int4" and names_of(source, dict.fromkeys(self.layout.after_gelu, ("",)))
            bias = stored.double() + (SHIFT * smoothed.sum(dim=1) if shifted else 0)
        low, high = codes[:, 0::2], codes[:, 1::2]
        return {
            "weight": smoothed + up.double() @ down.double(),
            "bias": bias,
            "codes": (low | high << 4).to(torch.uint8),
        }

    def _fused(self, source: str, targets: list[tuple[str, nn.Linear]]) -> None:
        linear = targets[0][1]
        rows = [layer.out_features for _, layer in targets]
        made = self._w4a4(source, sum(rows), linear.in_features, linear.bias is not None, len(targets) > 1)
        first = 0
        for (target, _), height in zip(targets, rows, strict=True):
            part = slice(first, first + height)
            self.expected[f"{target}.weight"] = made["weight"][part]
            if made["bias"] is not None:
                self.expected[f"{target}.bias"] = made["bias"][part]
            self.codes[target] = made["codes"][part]
            first += height

    def _joined(self, layer: str, sources: tuple[str, ...], linear: nn.Linear) -> None:
        widths = (linear.out_features, linear.in_features - linear.out_features)
        made = [
            self._w4a4(source, linear.out_features, width, has_bias=True)
            for source, width in zip(sources, widths, strict=True)
        ]
        self.expected[f"{layer}.weight"] = torch.cat([each["weight"] for each in made], dim=1)
        self.expected[f"{layer}.bias"] = made[0]["bias"] + made[1]["bias"]
        self.codes[layer] = torch.cat([each["codes"] for each in made], dim=1)

    def _modulation(self, layer: str, linear: nn.Linear, parts: int) -> None:
        rows, columns = linear.out_features, linear.in_features
        codes = torch.randint(0, 16, (rows, columns), generator=self.generator)
        scale = (0.01 + 0.01 * torch.rand(columns // 64, rows, generator=self.generator)).bfloat16()
        zero = (-7 * scale.float()).bfloat16()
        bias = self._random(rows).bfloat16()
        self.tensors[f"{layer}.qweight"] = packer.pack_awq(codes)
        self.tensors[f"{layer}.wscales"], self.tensors[f"{layer}.wzeros"] = scale, zero
        self.tensors[f"{layer}.bias"] = bias
        scales, zeros = (each.double().t().repeat_interleave(64, dim=1) for each in (scale, zero))
        weight = codes.double() * scales + zeros
        added = torch.zeros(parts, dtype=torch.float64)
        added[1] = added[-2] = 1
        self.expected[f"{layer}.weight"] = torch.cat([weight[p::parts] for p in range(parts)])
        self.expected[f"{layer}.bias"] = torch.cat([bias.double()[p::parts] - added[p] for p in range(parts)])

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        config = SvdQuantConfig(svdquant_model=str(self.path), **options)
        return load_component(self.source, "transformer", "diffusers", self.class_name, config, dtype=dtype)
