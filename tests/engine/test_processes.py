"""A child of fork answers or refuses; it does not wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The parent generates on two threads; the child, forked then, does what is formatted in.
CODE = """
import os, sys, torch
from lowbit import Omni
torch.set_num_threads(2)
if {first!r}:
    omni = Omni(quantization="int8", device="cpu")
    omni.generate("a red star", num_inference_steps=1, progress=False)
child = os.fork()
if child == 0:
    try:
        {then}
        omni = omni if {first!r} else Omni(quantization="int8", device="cpu")
        omni.generate("a red star", num_inference_steps=1, progress=False)
        print("answered")
    except Exception as error:
        print(type(error).__name__, error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("first", "then", "answer"),
    [
        (True, "pass", "UnsupportedError This process was forked from one that had computed on several threads"),
        (True, "torch.set_num_threads(1)", "answered"),
        (False, "pass", "answered"),
    ],
)
def test_a_child_answers_or_refuses(first: bool, then: str, answer: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(first=first, then=then)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert result.stdout.startswith(answer), result.stderr
    assert "spawn" in result.stdout or answer == "answered"
