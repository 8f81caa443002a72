"""Where kernels run: on the GPU if there is one, in Triton's interpreter if not.

The interpreter replaces the compiler when a kernel is decorated, at import, if TRITON_INTERPRET is set then. This
process must stay without it, as other tests here compile. So the tests of a file that use the ``device`` fixture run in
a child process that has the variable set, and each is reported here as it went there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

Outcomes = dict[str, tuple[str, str]]
_outcomes = pytest.StashKey[dict[Path, Outcomes]]()


@pytest.fixture
def device() -> torch.device:
    """Return where this process can run kernels."""
    return torch.device("cuda" if ON_GPU else "cpu")


def _needs_interpreter(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) and not (ON_GPU or INTERPRETED)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Report what the child process found, in place of running the test here."""
    if not _needs_interpreter(pyfuncitem):
        return None
    outcomes = pyfuncitem.config.stash.setdefault(_outcomes, {})
    if pyfuncitem.path not in outcomes:
        outcomes[pyfuncitem.path] = _run_in_interpreter(pyfuncitem.session, pyfuncitem.path)
    kind, text = outcomes[pyfuncitem.path][pyfuncitem.name]
    if kind == "skipped":
        pytest.skip(text)
    if kind:
        pytest.fail(text, pytrace=False)
    return True


def _run_in_interpreter(session: pytest.Session, path: Path) -> Outcomes:
    """Run the tests of a file that need it with TRITON_INTERPRET set; return kind ("" for passed) and text of each."""
    root = session.config.rootpath
    tests = [item.nodeid for item in session.items if item.path == path and _needs_interpreter(item)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            pytest.fail(f"The interpreter's process did not report:\n{child.stdout}\n{child.stderr}", pytrace=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {case.get("name", ""): _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return kind, found.text or found.get("message") or ""
    return "", ""
