"""Compare the recipe that the search finds with what one would choose without it, at equal bytes.

    python -m benchmarks.tune_embedded --output benchmarks/results/tune_embedded.json

The method is Int8 with activations at 4 bits, emulated: harsh enough that the choice of layers matters. The recipe is
searched on six prompts; then it, "first and last blocks in BF16" and random choices, each with as many bytes or more
kept, are drawn on six other prompts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import write
from lowbit.evaluation.gates import parse_gate
from lowbit.evaluation.prompts import validation_prompts
from lowbit.evaluation.recording import Side, Task, in_process
from lowbit.evaluation.sensitivity import LayerDamage
from lowbit.evaluation.tuning import Bench, Budget, Search, linear_bytes, search
from lowbit.inputs.data import OmniDiffusionSamplingParams

METHOD = {"method": "int8", "activation_bits": 4}
PROMPTS = validation_prompts(None)
PARAMS = OmniDiffusionSamplingParams()
SEARCHED = Task(prompts=PROMPTS[:6], params=PARAMS)
HELD_OUT = Task(prompts=PROMPTS[6:], params=PARAMS)
SIDE = Side(name="reference", device="cpu")


def outer_blocks_first(layers: Sequence[LayerDamage]) -> list[str]:
    """Return layers from the outermost blocks of the main list inwards: first, last, second, last but one..."""
    names = [layer.name for layer in layers]
    count = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("transformer.layers."))
    order = sorted(range(count), key=lambda index: (min(index, count - 1 - index), index))
    inner = [name for index in order for name in names if name.startswith(f"transformer.layers.{index}.")]
    return inner + [name for name in names if name not in inner]


def kept_up_to(layers: Sequence[LayerDamage], order: Iterable[str], size: int) -> list[str]:
    """Return the shortest beginning of ``order`` that makes the model at least ``size`` bytes: never fewer bytes."""
    kept: list[str] = []
    for name in order:
        if linear_bytes(layers, kept) >= size:
            break
        kept.append(name)
    return kept


def held_out_figures(recipes: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Draw the held-out prompts with every recipe."""
    bench = Bench(SIDE.load(), HELD_OUT)
    bench.take(METHOD)
    found = {}
    for name, kept in recipes.items():
        figures, seconds = bench.figures(kept)
        found[name] = {"psnr_db": figures["psnr_db"], "worst_psnr_db": figures["worst_psnr_db"], "seconds": seconds}
        print(f"{name:24} keeps {len(kept):3}  psnr_db {figures['psnr_db']:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", default="psnr_db>=54")
    parser.add_argument("--trials", type=int, default=40, help="budget of the search")
    parser.add_argument("--random", type=int, default=20, help="random choices")
    parser.add_argument("--work-dir", type=Path, default=None, help="keep the search's state here and resume from it")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    work = options.work_dir or Path(tempfile.mkdtemp(prefix="lowbit-tune-"))
    work.mkdir(parents=True, exist_ok=True)
    gate = parse_gate(options.gate)
    found: Search = in_process(search, SIDE, [METHOD], SEARCHED, gate, work, Budget(trials=options.trials), print)
    assert found.best is not None, "no recipe meets the gate"
    layers, size = found.layers[0], found.best.linear_bytes
    names = [layer.name for layer in layers]
    rng = random.Random(0)
    recipes: dict[str, list[str]] = {"nothing kept": [], "searched": list(found.best.kept)}
    recipes["outer blocks"] = kept_up_to(layers, outer_blocks_first(layers), size)
    for index in range(options.random):
        recipes[f"random {index}"] = kept_up_to(layers, rng.sample(names, len(names)), size)
    figures = in_process(held_out_figures, recipes)
    rows: list[dict[str, Any]] = [
        {"recipe": name, "kept": len(kept), "linear_bytes": linear_bytes(layers, kept), **figures[name]}
        for name, kept in recipes.items()
    ]
    best_random = max(row["psnr_db"] for row in rows if row["recipe"].startswith("random"))
    print(
        f"searched {figures['searched']['psnr_db']:.2f} dB, outer blocks {figures['outer blocks']['psnr_db']:.2f} dB,"
    )
    print(f"best of {options.random} random {best_random:.2f} dB, with {size:,} bytes or more")
    if options.output is not None:
        settings = {"gate": options.gate, "method": METHOD, "trials": len(found.trials), "kept": found.best.kept}
        write(options.output, {**settings, "results": rows})


if __name__ == "__main__":
    main()
