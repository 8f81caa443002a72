"""Running ``lowbit`` commands."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from lowbit.cli.main import main


def spawned(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own, which takes seconds to import everything."""
    code = "from lowbit.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def lowbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process; return what ``spawned`` would."""
    before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    status: object = 0
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", ["lowbit", *arguments]), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
    code = status if isinstance(status, int) else int(status is not None)
    return subprocess.CompletedProcess([*arguments], code, out.getvalue(), err.getvalue())
