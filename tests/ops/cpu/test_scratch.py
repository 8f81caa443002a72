"""Scratch memory of the native helper: kept between calls, freed on request, and an error where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowbit.ops.cpu import helper
from tests.ops.cpu import emulated

# Attention keeps a workspace; with the emulated library it runs on every CPU.
PROGRAM = """
import resource, threading, torch
from lowbit.ops.cpu import helper, native
torch.set_num_threads(2)

def attend(keys):
    x = torch.randn(1, keys, 2, 64, generator=torch.Generator().manual_seed(0))
    output = torch.empty_like(x)
    native.attention(x, x, x, None, output, 0.1, False, "float32")
    return output
"""
RELEASE = """
first = attend(300)
held = helper.scratch_size()
assert held > 300 * 64 * 4, held
assert torch.equal(attend(300), first)
assert helper.scratch_size() == held
assert helper.release_scratch() == held
assert helper.scratch_size() == 0
assert torch.equal(attend(300), first)
"""
THREADS = """
expected = {keys: attend(keys) for keys in (100, 300)}
wrong = []
def work(keys):
    for _ in range(10):
        if not torch.equal(attend(keys), expected[keys]):
            wrong.append(keys)
threads = [threading.Thread(target=work, args=(keys,)) for keys in (100, 300, 300)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    helper.release_scratch()
for thread in threads:
    thread.join()
assert not wrong
helper.release_scratch()
assert helper.scratch_size() == 0
"""
EXHAUSTED = """
attend(10)
x = torch.empty(1, 100_000, 1, 256)
output = torch.empty_like(x)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * 4096 + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    native.attention(x, x, x, None, output, 0.1, False, "float32")
except MemoryError as error:
    message = str(error)
else:
    raise AssertionError("no error")
assert message.startswith("attention: cannot allocate ") and "bytes of scratch memory" in message, message
attend(10)
"""


@pytest.mark.parametrize("part", [RELEASE, THREADS, EXHAUSTED], ids=["release", "threads", "exhausted"])
def test_scratch(part: str) -> None:
    library = emulated.library()
    if isinstance(library, str):
        pytest.skip(library)
    environment = {**os.environ, helper.LIBRARY_VARIABLE: str(library)}
    command = [sys.executable, "-c", PROGRAM + part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_the_helper_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_NATIVE", "0")
    helper.reload()
    assert (helper.scratch_size(), helper.release_scratch()) == (0, 0)
    monkeypatch.undo()
    helper.reload()
