"""What a load did: which layers took which method and kernel, which were kept and why, and the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """One linear layer.

    Attributes:
        name: full name in its component.
        method: that quantized it, ``None`` when it was kept.
        kernel: implementation that computes it, ``None`` when kept.
        reason: why it was kept, empty otherwise.
        bytes_before: of its weight in the precision asked for.
        bytes_after: of its quantized tensors, or of the weight kept.
    """

    name: str
    method: str | None
    kernel: str | None
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Manifest:
    """The linear layers of one component after loading.

    Attributes:
        component: its name in the pipeline, or the class of a lone model.
        layers: every linear layer.
        other_bytes: bytes of all parameters and buffers outside linear weights (norms, biases, embeddings).
        notes: on what the layers do not tell.
        bytes_on_disk: of the files that it was loaded from; ``None`` for a model that was quantized in memory.
    """

    component: str
    layers: Sequence[LayerRecord]
    other_bytes: int = 0
    notes: Sequence[str] = field(default_factory=tuple)
    bytes_on_disk: int | None = None

    @property
    def quantized(self) -> list[LayerRecord]:
        """The layers that took a method."""
        return [layer for layer in self.layers if layer.method is not None]

    @property
    def kept(self) -> list[LayerRecord]:
        """The layers left as they were."""
        return [layer for layer in self.layers if layer.method is None]

    @property
    def bytes_before(self) -> int:
        """Bytes of the component without quantization."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the component as loaded."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def by_kernel(self) -> Mapping[tuple[str, str], int]:
        """Count quantized layers by (method, kernel)."""
        return Counter((layer.method or "", layer.kernel or "") for layer in self.quantized)

    def by_reason(self) -> Mapping[str, int]:
        """Count kept layers by reason."""
        return Counter(layer.reason for layer in self.kept)

    def summary(self) -> str:
        """Return one line: methods with kernels and counts, what was kept and why, bytes before, after and on disk."""
        used = [
            f"{count} layers {method}{f' ({kernel})' if kernel else ''}"
            for (method, kernel), count in self.by_kernel().items()
        ]
        kept = [f"{count} {reason}" for reason, count in self.by_reason().items()]
        parts = [*used, f"{len(self.kept)} kept: {', '.join(kept)}" if kept else ""]
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        sizes = f"{before:,.1f} MB -> {after:,.1f} MB ({after / before:.0%})" if before else "empty"
        if self.bytes_on_disk is not None:
            sizes += f", {self.bytes_on_disk / 1e6:,.1f} MB on disk"
        return f"{self.component}: {'; '.join(part for part in parts if part)}; {sizes}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "component": self.component,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_on_disk": self.bytes_on_disk,
            "layers": [asdict(layer) for layer in self.layers],
        }
