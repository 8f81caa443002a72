"""Put the tables of the committed results into ``docs/performance.md``.

    python -m benchmarks.performance_page

A pair of comments, ``<!-- table: FILE -->`` and ``<!-- end of table -->``, stands where the table of
``benchmarks/results/FILE`` goes. A result that isn't there is written as not measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_kernel_model, gpu_model, memory_plan

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (?P<file>[\w.]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
KINDS = ("linear", "attention", "other")


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *map(line, rows)])


def about(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    load = f", load {machine['load_average'][0]}" if machine["load_average"] else ""
    flags = ", ".join(machine["flags"])
    held = ", ".join(f"{name}={value}" for name, value in machine.get("held_to", {}).items())
    return (
        f"{machine['cpu']} ({flags}){' held to ' if held else ''}{held}, {machine['threads']} threads{load}, "
        f"commit {machine['commit']}, {found['date']}."
    )


def steps(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.transformer_step``."""
    baselines = list(found["results"][0]["speedup"])
    heads = [
        "variant",
        "allocator",
        "ms",
        "spread",
        "weights MB",
        "error",
        *(name.replace("_", " ") for name in baselines),
    ]
    rows = [
        [
            f"{row['variant']}{' ' + row['version'] if 'version' in row else ''}",
            row["allocator"],
            f"{row['median_ms']:,.0f}",
            f"{row['spread']:.2f}",
            f"{row['weight_bytes'] / 1e6:,.0f}",
            f"{row['relative_error']:.4f}",
            *(f"{row['speedup'][name]:.2f}" for name in baselines),
        ]
        for row in found["results"]
    ]
    head = f"{found['model']}, {found['layers']} layers, {found['size']}x{found['size']}: {found['tokens']:,} tokens;"
    return f"{head} activations in {found['dtype']}. {about(found)}\n\n{grid(heads, rows)}"


def whole(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.whole_model``."""
    heads = ["method", "step s", "first step s", "weights GB", "peak GB making", "peak GB computing", "over bf16"]
    rows = [
        [
            run["method"],
            f"{run['step']['median_ms'] / 1e3:.2f}",
            f"{run['first_step_seconds']:.2f}",
            *(f"{run[name] / 1e9:.2f}" for name in ("weight_bytes", "peak_bytes_making", "peak_bytes_step")),
            f"{run['speedup_over_bf16']:.2f}" if "speedup_over_bf16" in run else "",
        ]
        for run in found["runs"]
    ]
    head = f"{found['runs'][0]['parameters'] / 1e9:.2f} B parameters, {found['runs'][0]['tokens']:,} tokens."
    return f"{head} {about(found)}\n\n{grid(heads, rows)}"


def shapes(found: Mapping[str, Any]) -> str:
    """Return the tables of ``lowbit bench --shapes``."""
    limits = [
        f"{kind} {limit['operations_per_second'] / 1e12:.3g} TOP/s ({limit['by']})"
        for kind, limit in found["limits"].items()
    ]
    methods = list(found["prediction"])
    heads = ["M x K x N", "layers", *(f"{m} ms, of limit" for m in methods)]
    rows = [
        [
            f"{row['rows']} x {row['in_features']} x {row['out_features']}",
            str(row["count"]),
            *(
                f"{1e3 * row['seconds'][m]:.2f}, {row['of_limit'][m]:.0%}" if m in row["seconds"] else "as it is"
                for m in methods
            ),
        ]
        for row in found["shapes"]
    ]
    predicted = [
        [m, *(f"{row[name]:.2f}" for name in ("linear_seconds", "attention_seconds", "seconds", "speedup"))]
        for m, row in found["prediction"].items()
    ]
    step = grid(["predicted step", "linear s", "attention s", "sum s", "speedup"], predicted)
    return f"Limits: {', '.join(limits)}. {about(found)}\n\n{grid(heads, rows)}\n\n{step}"


def growth(found: Mapping[str, Any]) -> str:
    """Return the tables of ``benchmarks.growth``."""
    titles = {
        "tokens": "A step's time with tokens (one layer)",
        "layers": "A step's time with layers (256 tokens)",
        "batch": "A step's time with batch (one layer, 256 tokens each)",
        "loading": "Loading in Int8 with bytes",
    }
    texts = [
        f"### {title}\n\n{loading_growth(found[part]) if part == 'loading' else step_growth(part, found[part])}"
        for part, title in titles.items()
        if part in found
    ]
    return "\n\n".join([about(found), *texts])


def step_growth(name: str, found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    precisions = list(rows[0]["ms"])
    heads = [name, *(f"{p} ms" for p in precisions), *(f"{p}: {', '.join(KINDS)}" for p in ("int8", "fp32"))]
    cells = [
        [
            f"{row[name]:,}",
            *(f"{row['ms'][p]:,.0f}" if p in row["ms"] else "" for p in precisions),
            *(", ".join(f"{row['shares'][p][kind]:.0%}" for kind in KINDS) for p in ("int8", "fp32")),
        ]
        for row in rows
    ]
    for kind, title in (("fitted", "exponent"), ("last", "between the last two")):
        fits = [f"{found['exponents'][p][kind]:.2f}" if p in found["exponents"] else "" for p in precisions]
        cells.append([title, *fits, "", ""])
    return grid(heads, cells)


def loading_growth(found: Mapping[str, Any]) -> str:
    heads = ["checkpoint GB", "load s", "GB/s", "model GB", "peak GB", "peak over model MB"]
    cells = []
    for row in found["rows"]:
        size, seconds = row["checkpoint_bytes"] / 1e9, row["load_seconds"]
        over = (row["peak_bytes"] - row["model_bytes"]) / 1e6
        held = [f"{row['model_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{over:,.0f}"]
        cells.append([f"{size:.2f}", f"{seconds:.2f}", f"{size / seconds:.2f}", *held])
    time, memory = found["exponents"]["load_seconds"], found["exponents"]["peak_bytes"]
    cells.append(["exponent", f"{time['fitted']:.2f}", "", "", f"{memory['fitted']:.2f} with the model's", ""])
    return grid(heads, cells)


def loading(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.load_memory``."""
    heads = ["loaded as", "load s", "BF16 GB/s", "weights GB", "peak anonymous over them MB", "to the end of a step s"]
    cells = []
    for run in found["runs"]:
        converts = run["method"] in ("int8", "fp8")
        cells.append(
            [
                run["method"],
                f"{run['load_seconds']:.2f}",
                f"{run['bf16_gb_converted_per_second']:.2f}" if converts else "",
                f"{run['model_bytes'] / 1e9:.2f}" if "model_bytes" in run else "",
                f"{run['peak_over_model_bytes'] / 1e6:,.0f}" if converts else "",
                f"{run['seconds_to_end_of_first_step']:.1f}" if "seconds_to_end_of_first_step" in run else "",
            ]
        )
    return f"A checkpoint of {found['checkpoint_bytes'] / 1e9:.1f} GB in BF16. {about(found)}\n\n{grid(heads, cells)}"


def attentions(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.attention``."""
    names = list(found["results"][0]["times"])
    titles = [name.replace("_", " ") for name in names]
    heads = ["tokens", *(f"{title} ms" for title in titles), *(f"{title} error" for title in titles)]
    rows = [
        [
            f"{row['tokens']:,}",
            *(f"{row['times'][name]['median_ms']:,.0f}" for name in names),
            *(f"{row['relative_error'][name]:.2g}" for name in names),
        ]
        for row in found["results"]
    ]
    first = found["results"][0]
    return f"{first['heads']} heads of {first['head_dim']}. {about(found)}\n\n{grid(heads, rows)}"


def methods(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.linear_methods``."""
    ways = list(found["results"][0]["speedup"])
    heads = ["method", "kernel", "bytes of BF16", "M x K x N", "ms", *(f"over {way}" for way in ways)]
    rows = [
        [
            row["method"],
            row["kernel"],
            f"{row['bytes_of_bf16']:.0%}",
            f"{row['m']} x {row['k']} x {row['n']}",
            f"{row['times']['quantized']['median_ms']:.2f}",
            *(f"{row['speedup'][way]:.2f}" for way in ways),
        ]
        for row in found["results"]
    ]
    return f"{about(found)}\n\n{grid(heads, rows)}"


def few_rows(found: Mapping[str, Any]) -> str:
    """Return a table of ``benchmarks.linear_methods`` with a column for each number of rows."""
    counts = sorted({row["m"] for row in found["results"]})
    over_bf16 = {(row["method"], row["m"]): row["speedup"]["bf16"] for row in found["results"]}
    shares = {row["method"]: row["bytes_of_bf16"] for row in found["results"]}
    heads = ["method", "half the ratio of the bytes", *(f"over bf16, {count} rows" for count in counts)]
    rows = [
        [method, f"{0.5 / share:.2f}", *(f"{over_bf16[method, count]:.2f}" for count in counts)]
        for method, share in shares.items()
    ]
    first = found["results"][0]
    return f"{first['k']} x {first['n']}. {about(found)}\n\n{grid(heads, rows)}"


def weight_only(found: Mapping[str, Any]) -> str:
    """Return the table of ``benchmarks.weight_only``: time per token, and what part of the limits it is."""
    kinds = [name for name in found["results"][0] if name not in ("shape", "m", "bandwidth_gb_per_second")]
    shares = ("bandwidth", "reading", "limit")
    heads = [
        "rows",
        "in x out",
        "memory GB/s",
        *(f"{kind} us per row, of the bandwidth, of reading, of the limit" for kind in kinds),
    ]
    rows = [
        [
            str(row["m"]),
            row["shape"],
            f"{row['bandwidth_gb_per_second']:.1f}",
            *(
                ", ".join([f"{cell['us_per_token']:,.0f}", *(f"{cell['share_of_' + share]:.0%}" for share in shares)])
                for cell in (row[kind] for kind in kinds)
            ),
        ]
        for row in found["results"]
    ]
    return f"{about(found)}\n\n{grid(heads, rows)}"


TABLES: Mapping[str, Callable[[Any], str]] = {
    "transformer_step": steps,
    "whole_model": whole,
    "shapes": shapes,
    "growth": growth,
    "gpu_kernel_model": lambda found: gpu_kernel_model.table(found["rows"]),
    "gpu_model": lambda found: gpu_model.table(found["rows"]),
    "memory_plan": memory_plan.table,
    "load_memory": loading,
    "attention": attentions,
    "linear_methods_few_rows": few_rows,
    "linear_methods": methods,
    "weight_only": weight_only,
}


def table(file: str, results: Path) -> str:
    """Return the table of a result's file."""
    path = results / file
    if not path.exists():
        return f"Not measured (`benchmarks/results/{file}` is missing)."
    make = next(TABLES[prefix] for prefix in TABLES if file.startswith(prefix))
    return make(json.loads(path.read_text()))


def fill_in(page: str, results: Path) -> str:
    """Return the page with every table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found['file'], results)}\n\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    options = parser.parse_args()
    options.page.write_text(fill_in(options.page.read_text(), options.results))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
