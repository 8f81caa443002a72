"""The parts of the benchmark scripts that can be wrong without being seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import growth, performance_page, transformer_step
from benchmarks.timing import machine
from benchmarks.whole_model import make_model
from lowbit.bench.peers import PEERS
from lowbit.bench.steps import check_precisions
from lowbit.bench.transformers import random_transformer
from lowbit.errors import ConfigError
from lowbit.quantization.plan import quantize_model
from tests.support.bench_models import SMALL

ROWS = [
    {
        "tokens": tokens,
        "ms": {"int8": 3 * tokens**1.5, "fp32": 5.0 * tokens},
        "shares": {name: {"linear": 0.5, "attention": 0.3, "other": 0.2} for name in ("int8", "fp32")},
    }
    for tokens in (256, 512, 2048)
]


def test_exponents_of_power_laws_are_found() -> None:
    found = growth.with_exponents("tokens", ROWS)["exponents"]
    assert found == {"int8": {"fitted": 1.5, "last": 1.5}, "fp32": {"fitted": 1.0, "last": 1.0}}
    bent = growth.exponents([(1, 1), (2, 2), (4, 8)])
    assert bent == {"fitted": 1.5, "last": 2.0}


def test_the_workloads_have_the_tokens_they_are_named_after() -> None:
    for tokens in growth.PATCHES:
        work = growth.workload(tokens)
        assert work.image_tokens + work.text_tokens == tokens


def test_tables_go_where_the_page_marks_them(tmp_path: Path) -> None:
    marks = "<!-- table: {} -->\nold\n<!-- end of table -->\n"
    page = f"before\n{marks.format('growth.json')}between\n{marks.format('whole_model.json')}after\n"
    result = {"date": "today", "machine": machine(), "tokens": growth.with_exponents("tokens", ROWS)}
    (tmp_path / "growth.json").write_text(json.dumps(result))
    once = performance_page.fill_in(page, tmp_path)
    assert performance_page.fill_in(once, tmp_path) == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert once.count("| 2,048 |") == 1
    assert "50%, 30%, 20%" in once
    assert "Not measured (`benchmarks/results/whole_model.json` is missing)" in once


def test_the_page_of_the_docs_is_made_from_the_committed_results() -> None:
    page = (performance_page.ROOT / "docs" / "performance.md").read_text()
    assert performance_page.MARKED.search(page)
    assert performance_page.fill_in(page, performance_page.ROOT / "benchmarks" / "results") == page


def test_a_steps_time_is_divided_by_kind() -> None:
    shares = growth.profile(lambda: torch.randn(300, 300) @ torch.randn(300, 300))
    assert sum(shares.values()) == pytest.approx(1, abs=0.002)
    assert shares["linear"] > 0
    assert growth.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert growth.kind_of("lowbit::int8_native_linears") == "linear"
    assert growth.kind_of("lowbit::gate") == "other"


def test_a_model_quantized_weight_by_weight_is_the_one_quantized_whole() -> None:
    config = SMALL["ZImageTransformer2DModel"]
    model, kernels = make_model("ZImageTransformer2DModel", config, "int8")
    whole = random_transformer("ZImageTransformer2DModel", config, torch.bfloat16, torch.device("cpu"))
    manifest = quantize_model(whole, "int8")
    assert sum(kernels.values()) == len(manifest.quantized)
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_variants_of_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("torchao", "no_such_library.quantization"), ("sdnq", "json"), ("quanto", "json")):
        monkeypatch.setitem(PEERS, name, replace(PEERS[name], module=module))
    present, missing = transformer_step.installed(transformer_step.VARIANTS)
    assert missing == ["torchao", "torchao-compiled"]
    assert {"bf16", "fp32", "int8-compiled", "sdnq", "sdnq-compiled", "quanto"} <= set(present)
    check_precisions(present)
    with pytest.raises(ConfigError, match="torchao"):
        check_precisions(missing)
    with pytest.raises(ConfigError, match="int9"):
        check_precisions([*present, "int9"])
