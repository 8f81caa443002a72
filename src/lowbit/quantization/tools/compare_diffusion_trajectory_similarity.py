"""``python -m lowbit.quantization.tools.compare_diffusion_trajectory_similarity`` is ``lowbit compare``."""

import sys


def main() -> None:
    """Run ``lowbit compare`` with this process's arguments."""
    from lowbit.cli.main import main as run

    sys.argv[1:1] = ["compare"]
    run()


if __name__ == "__main__":
    main()
