#!/usr/bin/env bash
# torch 2.13.0 (CPU build), x86-64 without AVX512: a BF16 conv2d runs in a naive GEMM, tens of times slower than FP32.
#
# oneDNN convolves BF16 only with AVX512 and newer. On a CPU with AVX2 alone torch 2.13.0 dispatches a BF16 conv2d to
# `_slow_conv2d_forward` (im2col and a scalar GEMM) without a word, while BF16 nn.Linear stays within a few times of FP32.
# Decoding with a BF16 VAE then takes longer than all denoising steps. Seen on an AMD EPYC with AVX2, one thread, 64
# channels of 64 x 64: 1,101 ms in BF16, 12.8 ms in FP32 (86 times); Linear 256 x 1024 x 1024: 52 ms and 21 ms (2.5 times).
# Expected by a good guess: FP32's time plus two casts. Fails if the BF16 convolution is less than 10 times FP32's time.
set -euo pipefail
if grep -qw avx512f /proc/cpuinfo; then
    echo "not applicable: this CPU has AVX512"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import statistics
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)


def milliseconds(dtype):
    layer, x = torch.nn.Conv2d(64, 64, 3, padding=1).to(dtype), torch.randn(1, 64, 64, 64).to(dtype)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            layer(x)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


float32, bfloat16 = milliseconds(torch.float32), milliseconds(torch.bfloat16)
print(f"torch {torch.__version__}: conv2d FP32 {float32:.1f} ms, BF16 {bfloat16:.1f} ms, {bfloat16 / float32:.0f} times")
raise SystemExit(0 if bfloat16 > 10 * float32 else "the BF16 convolution is no longer slow: the finding is out of date")
PY
