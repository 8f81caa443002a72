"""``lowbit bench``: what quantization brings on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.models.published import published_transformer

if TYPE_CHECKING:
    import torch

    from lowbit.bench.transformers import Subject

EXAMPLES = """Examples:

  lowbit bench --methods bf16,int8                                  # the embedded model

  lowbit bench --model z-image --size 512 --layers 2 --methods bf16,int8,fp8 --peers torchao --mode both

  lowbit bench --model ./z-image --methods bf16,int8 --output-json bench.json

  lowbit bench --shapes qwen-image --size 1024 --methods bf16,int8  # before any download

  lowbit bench --shapes Tongyi-MAI/Z-Image-Turbo --methods bf16,int8,fp8
"""
DEFAULT_LAYERS = 2
SHAPE_BUDGET = 2.0  # seconds


class Mode(str, Enum):
    """How to run the transformer's blocks."""

    eager = "eager"
    compiled = "compiled"
    both = "both"


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="z-image, qwen-image, flux, wan: published width, random weights; or a folder or Hub id. Default: the"
            " embedded model.",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Instead of a step, time each linear shape of this model, and predict its step: no weights."),
    ] = None,
    methods: Annotated[str, typer.Option(help="bf16, fp16, fp32 and quantization methods, by commas.")] = "bf16,int8",
    peers: Annotated[
        str | None, typer.Option(help="Other libraries, by commas: torchao, torchao-fp8, sdnq, gguf, quanto.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels. Default: 512, or the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    num_frames: Annotated[int | None, typer.Option(help="Of a video. Default: as published.")] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help=f"Blocks of a published shape. Default: {DEFAULT_LAYERS}; all with --shapes."),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Whether to compile the blocks.")] = Mode.eager,
    repetitions: Annotated[int, typer.Option(min=2, help="Rounds, in alternation.")] = 5,
    budget: Annotated[float, typer.Option(min=0, help="Seconds; two rounds are made in any case.")] = 60.0,
    keep_freed_memory: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Also time with freed memory kept in the process, all alike.")
    ] = False,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    output_json: Annotated[str | None, typer.Option(help="File to write the result to.")] = None,
) -> None:
    """Time one denoising step in several precisions and libraries, side by side on this machine.

    With --shapes nothing is downloaded and no model is made: each distinct linear layer is timed by itself, compared
    with the fastest matrix product this machine makes, and the times are added up to a step.
    """
    from lowbit.bench.steps import check_precisions
    from lowbit.bench.transformers import find_subject
    from lowbit.engine.config import parse_device, parse_dtype
    from lowbit.evaluation import comparison

    if shapes is not None and model is not None:
        raise ConfigError("--shapes names the model by itself: leave out --model")
    names, others = _names(methods, "--methods"), _names(peers, "--peers") if peers else []
    check_precisions([*names, *others])
    path = comparison.check_output_file(output_json, "--output-json") if output_json else None
    chosen = parse_device(device)
    if shapes is not None:
        if others or mode is not Mode.eager or keep_freed_memory:
            raise ConfigError("--shapes takes neither --peers nor --mode nor --keep-freed-memory")
        subject = find_subject(shapes, size=size, layers=layers, batch=batch, num_frames=num_frames)
        found = _shapes(subject, names, chosen, repetitions, min(budget, SHAPE_BUDGET))
    else:
        layers = layers or (DEFAULT_LAYERS if published_transformer(model or "") else None)
        subject = find_subject(model, size=size, layers=layers, batch=batch, num_frames=num_frames)
        variants = _with_mode([*names, *others], mode)
        timing = {"repetitions": repetitions, "budget": budget, "keep": keep_freed_memory}
        found = _steps(subject, variants, parse_dtype(dtype), chosen, timing)
    if path:
        from lowbit.bench.machine import write_results

        write_results(path, found)
        typer.echo(f"wrote {path}")


def _names(text: str, option: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{option}: give different names separated by commas, not {text!r}")
    return names


def _with_mode(names: list[str], mode: Mode) -> list[str]:
    endings = {Mode.eager: ("",), Mode.compiled: ("-compiled",), Mode.both: ("", "-compiled")}[mode]
    return [name + ending for name in names for ending in endings]


def _describe(subject: Subject) -> dict[str, Any]:
    work = subject.workload
    return {
        "model": subject.name,
        "class": subject.class_name,
        "weights": "random" if subject.source is None else "real",
        "height": work.height,
        "width": work.width,
        "num_frames": work.num_frames,
        "batch": work.batch,
        "image_tokens": work.image_tokens,
        "text_tokens": work.text_tokens,
    }


def _steps(
    subject: Subject, variants: list[str], dtype: torch.dtype, device: torch.device, timing: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from lowbit.bench import steps

    base = subject.load(torch.bfloat16 if subject.source is None else dtype, device)
    about = {**_describe(subject), "parameters": sum(tensor.numel() for tensor in base.parameters())}
    typer.echo(_title(subject, f"{about['parameters'] / 1e9:.2f} B parameters, {about['weights']} weights, {device}"))
    built = steps.make_variants(base, variants, subject.workload, dtype, lambda text: typer.echo(text, err=True))
    allocators = [steps.DEFAULT_ALLOCATOR, *([steps.KEPT_ALLOCATOR] if timing["keep"] else [])]
    rows = steps.time_variants(built, repetitions=timing["repetitions"], budget=timing["budget"], allocators=allocators)
    typer.echo(steps.table(rows))
    return {**about, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "results": rows}


def _title(subject: Subject, rest: str) -> str:
    work = subject.workload
    tokens = f"{work.image_tokens + work.text_tokens:,} tokens"
    frames = f", {work.num_frames} frames" if work.num_frames > 1 else ""
    return f"{subject.name} at {work.width}x{work.height}{frames}, batch {work.batch}: {tokens}; {rest}"


def _shapes(
    subject: Subject, methods: list[str], device: torch.device, repetitions: int, budget: float
) -> dict[str, Any]:
    from lowbit.bench.shapes import measure_shapes

    found = measure_shapes(subject, methods, device, repetitions=repetitions, budget=budget)
    share = found["quantized_weights"] / found["weights"]
    weights = f"{found['weights'] / 1e9:.2f} B weights in linear layers, {share:.1%} of them quantized; {device}"
    typer.echo(_title(subject, weights))
    for kind, limit in found["limits"].items():
        rate = limit["operations_per_second"] / 1e12
        typer.echo(f"limit of {kind}: {rate:.3g} TOP/s ({limit['by']}, {'x'.join(map(str, limit['size']))})")
    _show_shapes(found["shapes"], list(found["prediction"]))
    _show_prediction(found["prediction"])
    return {**_describe(subject), "device": str(device), **found}


def _show_shapes(rows: list[dict[str, Any]], methods: list[str]) -> None:
    heads = "".join(f" {f'{method} ms':>12} {'of limit':>9}" for method in methods)
    typer.echo(f"{'M':>6} {'K':>6} {'N':>6} {'count':>6}{heads}  layer")
    for row in rows:
        cells = "".join(_cell(row, method) for method in methods)
        name = row["name"] + (f" (kept: {row['kept']})" if row["kept"] else "")
        typer.echo(f"{row['rows']:6} {row['in_features']:6} {row['out_features']:6} {row['count']:6}{cells}  {name}")


def _cell(row: dict[str, Any], method: str) -> str:
    if method not in row["seconds"]:
        return f" {'as it is':>12} {'':>9}"
    return f" {1e3 * row['seconds'][method]:12.3f} {row['of_limit'][method]:9.0%}"


def _show_prediction(prediction: Mapping[str, Mapping[str, float]]) -> None:
    typer.echo(f"{'a step':12} {'linear s':>10} {'attention s':>12} {'sum s':>10} {'speedup':>8}")
    for method, row in prediction.items():
        times = f"{row['linear_seconds']:10.4g} {row['attention_seconds']:12.4g} {row['seconds']:10.4g}"
        typer.echo(f"{method:12} {times} {row['speedup']:7.2f}x")
    typer.echo("Norms, modulation and other elementwise work come on top, alike for all; compiling makes it less.")
