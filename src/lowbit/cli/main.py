"""The ``lowbit`` command.

Nothing of weight is imported at the top: ``main`` imports after it has prepared for Ctrl-C, and a command's module,
with torch, only when that command is to run.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line with this process's arguments and end the process with an exit status of ``cli.status``."""
    try:
        from lowbit.cli import interrupt

        with interrupt.at_once():
            from lowbit.cli.app import run

            status = run(sys.argv[1:])
        if status == interrupt.STATUS:
            interrupt.leave()
    except KeyboardInterrupt:  # before ``at_once``, or after it
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(130)
    sys.exit(status)


if __name__ == "__main__":
    main()
