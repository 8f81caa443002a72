"""The search for the cheapest recipe that meets a gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import ConfigError
from lowbit.evaluation.comparison import Plan, compare, figures
from lowbit.evaluation.gates import parse_gate
from lowbit.evaluation.recording import Side, Task
from lowbit.evaluation.sensitivity import LayerDamage
from lowbit.evaluation.tuning import Budget, by_worth, exact_pattern, linear_bytes, parse_budget, recipe, search, tune
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.models.patterns import matches

HARSH: dict[str, Any] = {"method": "int8", "activation_bits": 4, "ignored_layers": [r"re:(?!layers\.3)"]}
PARAMS = OmniDiffusionSamplingParams(num_inference_steps=3, height=64, width=64)
TASK = Task(prompts=("a red circle",), params=PARAMS)
VERIFICATION = Task(prompts=("a large blue square above a small green star",), params=PARAMS)
SIDE = Side(name="reference", device="cpu")


def test_a_recipe_meets_its_gate_when_run_by_itself(tmp_path: Path) -> None:
    gate = parse_gate("psnr_db>=38")
    budget = Budget(trials=5)
    spec, proof = tune(
        SIDE, [HARSH, {**HARSH, "activation_bits": 8}], TASK, VERIFICATION, gate, tmp_path / "work", budget, print
    )
    assert proof.ok
    assert spec["method"] == "int8"
    (tmp_path / "again").mkdir()
    candidate = Side(name="candidate", device="cpu", quantization_config=json.loads(json.dumps(spec)))
    again = compare(Plan(reference=SIDE, candidate=candidate, task=VERIFICATION, gate=gate), tmp_path / "again")
    assert again.ok
    assert figures(again.result)["psnr_db"] == figures(proof.result)["psnr_db"]


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    gate = parse_gate("psnr_db>=38")
    first = search(SIDE, [HARSH], TASK, gate, tmp_path, Budget(trials=3), lambda _: None)
    assert first.best is not None
    lines: list[str] = []
    again = search(SIDE, [HARSH], TASK, gate, tmp_path, Budget(trials=1), lines.append)
    assert again.trials[: len(first.trials)] == first.trials
    assert len(again.trials) - len(first.trials) == len(lines) <= 1
    with pytest.raises(ConfigError, match=r"other settings \(gate\)"):
        search(SIDE, [HARSH], TASK, parse_gate("psnr_db>=39"), tmp_path, None, lines.append)


def test_a_gate_out_of_reach_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No recipe meets psnr_db>=200.*most damaging"):
        tune(SIDE, [HARSH], TASK, VERIFICATION, parse_gate("psnr_db>=200"), tmp_path, None, print)


def test_prompts_of_the_search_can_not_verify(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both have 'a red circle'"):
        tune(SIDE, [HARSH], TASK, TASK, parse_gate("smoke"), tmp_path)


def test_worth_is_squared_damage_per_byte() -> None:
    layers = [LayerDamage("a", 0.1, 200, 100), LayerDamage("b", 0.2, 2000, 1000), LayerDamage("c", 0.0, 2, 1)]
    assert [layer.name for layer in by_worth(layers)] == ["a", "b", "c"]
    assert linear_bytes(layers, {"b"}) == 100 + 2000 + 1


def test_recipes_name_their_layers_exactly() -> None:
    names = ["transformer.proj_out", "transformer.blocks.0.proj_out", "transformer.blocks.1.to_q"]
    found = recipe(HARSH, ["transformer.proj_out", "transformer.blocks.1.to_q"], names)
    assert found["method"] == "int8"
    assert found["activation_bits"] == 4
    assert found["ignored_layers"] == [*HARSH["ignored_layers"], "re:^proj_out$", "blocks.1.to_q"]
    both = recipe("int8", ["transformer_2.a"], ["transformer.a", "transformer_2.a"])
    assert both["transformer_2"]["ignored_layers"] == ["a"]
    assert "ignored_layers" not in both["transformer"]
    for name in ("proj_out", "blocks.0.proj_out"):
        pattern = exact_pattern(name, ["proj_out", "blocks.0.proj_out"])
        assert [other for other in ("proj_out", "blocks.0.proj_out") if matches(pattern, other)] == [name]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40", Budget(trials=40)),
        ("90s", Budget(seconds=90)),
        ("30m", Budget(seconds=1800)),
        ("2h", Budget(seconds=7200)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "soon", "1d", "-3"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        parse_budget(text)
