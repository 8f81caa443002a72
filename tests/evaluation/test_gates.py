import math

import pytest

from lowbit.errors import ConfigError
from lowbit.evaluation.gates import Condition, judge, parse_gate


def test_conditions_and_presets() -> None:
    assert parse_gate("psnr_db>=25, mae <= 6,max_peak_memory_ratio<0.95") == (
        Condition("psnr_db", ">=", 25.0),
        Condition("mae", "<=", 6.0),
        Condition("max_peak_memory_ratio", "<", 0.95),
    )
    thresholds = {condition.metric: condition.bound for condition in parse_gate("smoke")}
    assert thresholds == {"psnr_db": 20.0, "mae": 12.0, "cosine_similarity": 0.98, "relative_l2": 0.2}
    thresholds = {condition.metric: condition.bound for condition in parse_gate("strict")}
    assert thresholds == {"psnr_db": 25.0, "mae": 6.0, "cosine_similarity": 0.995, "relative_l2": 0.08}
    assert len(parse_gate("strict,max_abs<=90")) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr>=25", "did you mean psnr_db"),
        ("psnr_db=25", "is no condition"),
        ("psnr_db>=", "is no condition"),
        ("", "is no condition"),
        ("psnr_db>=1.2.3", "is no number"),
        ("lenient", "is no condition"),
    ],
)
def test_what_is_no_gate(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_gate(text)


def test_a_figure_that_will_not_be_there_is_an_error_before_and_after() -> None:
    with pytest.raises(ConfigError, match="nothing called 'ssim' is computed"):
        parse_gate("ssim>=0.9", known=("psnr_db",))
    with pytest.raises(ConfigError, match="mae was not computed"):
        judge(parse_gate("mae<=6"), {"psnr_db": 30.0})


@pytest.mark.parametrize(
    ("text", "found", "ok"),
    [
        ("psnr_db>=25", 25.0, True),
        ("psnr_db>25", 25.0, False),
        ("psnr_db>=25", math.inf, True),
        ("mae<=6", 6.0, True),
        ("mae<6", 6.0, False),
        ("mae<=6", math.nan, False),
        ("relative_l2<=0.2", math.inf, False),
    ],
)
def test_verdicts(text: str, found: float, ok: bool) -> None:
    (condition,) = parse_gate(text)
    (verdict,) = judge([condition], {condition.metric: found})
    assert verdict.ok is ok
    assert ("pass" in str(verdict)) is ok
    assert str(condition) in str(verdict)
