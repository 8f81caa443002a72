from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit

PACKAGES = ("checkpoints", "compat", "hosts")

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


def run(code: str, *arguments: str) -> None:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_every_import_order(order: str) -> None:
    run("\n".join([*ORDERS[order], CHECK]))


FORKED = """
import os, sys
import diffusers, torch, transformers
from importlib import import_module

for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        import_module(name)
        os._exit(0)  # an exception ends it with another status
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_may_be_the_first_that_is_imported() -> None:
    folder = Path(lowbit.__file__).parent
    files = [file.relative_to(folder.parent) for package in PACKAGES for file in (folder / package).rglob("*.py")]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert {"lowbit.hosts.diffusers", "lowbit.checkpoints.gguf.read"} <= set(names)
    run(FORKED, *names)
