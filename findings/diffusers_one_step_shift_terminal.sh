#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0 (CPU build): one denoising step under `shift_terminal` has the sigma NaN.
#
# FlowMatchEulerDiscreteScheduler stretches a schedule so that its last sigma is `shift_terminal` (0.02 in Qwen-Image's
# scheduler_config.json, 0.1 in LTX-Video's). The stretch divides by (1 - last sigma); with one step the last sigma is the
# first one, 1, and the result 0 / 0. Nothing is raised: the latents become NaN and the picture black. Two steps and more
# are right. Expected by a good guess: sigmas 1 and 0, as without `shift_terminal`. Fails if the first sigma is a number.
# Seen: tensor([nan, 0.]) for 1 step and for sigmas=[1.0], tensor([1.0000, 0.0200, 0.0000]) for 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1
"$work/venv/bin/python" - <<'PY'
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler


def sigmas(**given):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(mu=0.8, **given)
    return scheduler.sigmas


one, given, two = sigmas(num_inference_steps=1), sigmas(sigmas=[1.0]), sigmas(num_inference_steps=2)
print(f"diffusers {diffusers.__version__}: 1 step {one}, sigmas=[1.0] {given}, 2 steps {two}")
assert not two.isnan().any()
raise SystemExit(0 if one.isnan().any() and given.isnan().any() else "one step is right now: the finding is out of date")
PY
