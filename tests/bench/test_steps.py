"""Steps in several precisions: the same layers, the same inputs, truly compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowbit.bench import peers
from lowbit.bench.compilation import compilation_allowed, compile_blocks, nothing_new_compiled, warm_up
from lowbit.bench.inputs import Workload, step_inputs
from lowbit.bench.peers import PEERS, Peer, check_peers, quantize_with_peer
from lowbit.bench.steps import (
    DEFAULT_ALLOCATOR,
    KEPT_ALLOCATOR,
    check_precisions,
    make_variants,
    table,
    time_variants,
)
from lowbit.bench.timing import alternate
from lowbit.bench.transformers import random_transformer, share
from lowbit.errors import ConfigError
from lowbit.quantization.plan import quantize_model, quantized_layers
from tests.support.bench_models import SMALL

CPU = torch.device("cpu")
WORK = Workload(height=32, width=32, text_tokens=8)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return random_transformer("ZImageTransformer2DModel", SMALL["ZImageTransformer2DModel"], torch.bfloat16, CPU)


def test_variants_compute_the_same_step_and_are_timed_with_ratios(base: nn.Module) -> None:
    names = ["fp32", "bf16", "int8"]
    variants = make_variants(base, names, WORK, torch.bfloat16)
    assert [variant.name for variant in variants] == names
    assert variants[0].weight_bytes > 1.9 * variants[1].weight_bytes
    assert variants[1].weight_bytes > variants[2].weight_bytes
    rows = time_variants(variants, repetitions=2, progress=False)
    by_name = {row["variant"]: row for row in rows}
    assert by_name["fp32"]["relative_error"] == 0
    assert 0 < by_name["bf16"]["relative_error"] < 0.03
    assert 0 < by_name["int8"]["relative_error"] < 0.05
    for row in rows:
        assert row["repetitions"] == 2
        expected = by_name["bf16"]["median_ms"] / row["median_ms"]
        assert row["speedup"]["over_bf16"] == pytest.approx(expected, abs=1e-3)
        assert row["variant"] in table(rows)
    assert sum(by_name["int8"]["kernels"].values()) == len(peers_layers(base))


def peers_layers(model: nn.Module) -> list[str]:
    copied = share(model)
    quantize_model(copied, "int8")
    return list(quantized_layers(copied))


def test_the_systems_allocator_settings_come_first(base: nn.Module) -> None:
    variants = make_variants(base, ["bf16"], WORK, torch.bfloat16)
    with pytest.raises(ConfigError, match="must come first"):
        time_variants(variants, repetitions=2, allocators=(KEPT_ALLOCATOR, DEFAULT_ALLOCATOR))


def test_unknown_and_missing_methods_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Unknown methods: int3. Expected one of: bf16,.*int8,.*torchao"):
        check_precisions(["bf16", "int3"])
    absent = Peer("nothing", "no_such_library.part", ("no-such-library",), lambda *_: None)
    monkeypatch.setattr(peers, "PEERS", {"absent": absent})
    with pytest.raises(ConfigError, match="Not installed: absent.*pip install no-such-library"):
        check_peers(["absent"])


def test_a_peer_that_quantizes_other_layers_is_found_out(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_one(model: nn.Module, names: Any, dtype: torch.dtype) -> None:
        quantize_model(model, "int8", ignored_layers=[names[0]])

    monkeypatch.setattr(peers, "PEERS", {"lazy": Peer("", "torch", ("torch",), all_but_one)})
    names = peers_layers(base)
    with pytest.raises(RuntimeError, match=names[0]):
        quantize_with_peer("lazy", share(base), names, torch.bfloat16)


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "torchao-fp8"])
def test_peers_quantize_the_same_layers(base: nn.Module, peer: str) -> None:
    if not PEERS[peer].installed:
        pytest.skip(f"{peer} is not installed")
    variants = make_variants(base, ["fp32", peer], WORK, torch.bfloat16)
    row = time_variants(variants, repetitions=2, progress=False)[1]
    assert row["layers"] == len(peers_layers(base))
    assert row["version"] == PEERS[peer].version
    assert row["relative_error"] < 0.05
    assert {type(parameter) for parameter in base.parameters()} == {nn.Parameter}


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x * 2


class Blocks(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, *breaks: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(one) for one in breaks])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_compiled_blocks_are_counted_and_never_half_eager() -> None:
    torch._dynamo.reset()
    model = Blocks(False, False)
    assert compile_blocks(model) == 2
    with compilation_allowed():
        result, found = warm_up(lambda: model(torch.ones(3)), 2)
        assert torch.equal(result, torch.full((3,), 4.0))
        assert found == {"compiled_blocks": 2, "graphs": 1, "graph_breaks": 0, "late_graphs": 0}
        with nothing_new_compiled():
            model(torch.ones(3))
            with pytest.raises(RuntimeError, match="recompile"):
                model(torch.ones(4))
        broken = Blocks(True)
        compile_blocks(broken)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            broken(torch.ones(3))
    torch._dynamo.reset()


def test_passing_the_recompilation_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.bench.compilation.RECOMPILE_LIMIT", 2)
    torch._dynamo.reset()
    model = Blocks(False)
    compile_blocks(model)
    with compilation_allowed():
        model(torch.ones(1, 2))
        model(torch.ones(1, 3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(torch.ones(1, 4))
    torch._dynamo.reset()


def test_warm_up_demands_a_graph_of_compiled_blocks() -> None:
    with pytest.raises(RuntimeError, match="no graph"):
        warm_up(lambda: None, 1)


def test_alternation_reverses_and_stops_at_its_budget() -> None:
    calls: list[str] = []
    cases = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = alternate(cases, repetitions=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in seconds.values()] == [3, 3]
    calls.clear()
    alternate(cases, repetitions=9, warmup=0, budget=0)
    assert "".join(calls) == "abba"


def test_inputs_are_the_same_for_every_dtype(base: nn.Module) -> None:
    half, full = (step_inputs(base, WORK, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(half["x"][0], full["x"][0].bfloat16())
