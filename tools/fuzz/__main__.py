"""Feed mutated files to a reader: ``python -m tools.fuzz gguf --runs 20000``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lowbit"]):
    from tools.fuzz.targets import TARGETS


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--runs", type=int, default=20_000, help="mutated inputs (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    options = parser.parse_args()
    target = TARGETS[options.target]
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as corpus:
        seeds = target.prepare(Path(work))
        for index, seed in enumerate(seeds):
            (Path(corpus) / str(index)).write_bytes(seed)
        length = 2 * max(map(len, seeds))
        flags = [
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-max_len={length}",
            "-timeout=20",
            "-rss_limit_mb=2048",
        ]
        atheris.Setup([sys.argv[0], *flags, corpus], lambda data: target.run(Path(work), data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
