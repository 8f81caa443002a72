from __future__ import annotations

import subprocess
import sys

import pytest

# Each line is one import; afterwards both libraries must know lowbit, whichever came first.
ORDERS = {
    "lowbit first": ["import lowbit", "import diffusers.quantizers.auto", "import transformers.quantizers.auto"],
    "lowbit last": ["import diffusers.quantizers.auto", "import transformers.quantizers.auto", "import lowbit"],
    "a submodule between": [
        "import transformers.quantizers.auto",
        "from lowbit.quantization import Int8Config",
        "import diffusers.quantizers.auto",
    ],
}

CHECK = """
import importlib, sys
from diffusers.quantizers import auto as d
from transformers.quantizers import auto as t
from lowbit.quantization import Fp8Config, Int8Config
from lowbit.hosts import registration

def check():
    for config in (Int8Config(), Fp8Config()):
        for factory in (d.DiffusersAutoQuantizer, t.AutoHfQuantizer):
            quantizer = factory.from_config(config, pre_quantized=False)
            assert type(quantizer).__name__.startswith("Lowbit"), quantizer
    assert t.AUTO_QUANTIZER_MAPPING["fp8"].__name__ == "FineGrainedFP8HfQuantizer"

check()
registration.install()
check()
importlib.reload(d)
importlib.reload(t)
check()
assert sum(type(finder).__module__ == "lowbit.hosts.registration" for finder in sys.meta_path) == 1
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_every_import_order(order: str) -> None:
    run("\n".join([*ORDERS[order], CHECK]))


@pytest.mark.parametrize("module", ["diffusers", "transformers", "inspect"])
def test_every_module_of_ours_may_be_first(module: str) -> None:
    run(f"import lowbit.hosts.{module}\n{CHECK}")


def test_importing_lowbit_is_light() -> None:
    run(
        "import sys, lowbit\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
