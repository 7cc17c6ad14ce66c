"""Compile cases of the decode step: value heads a key head, head sizes, dtypes, conv layouts, the e4m3 variant."""

from __future__ import annotations

import step_cases
import torch
from compile_cases import COMPILE_CASES, SPILL_BUDGET, case, sweep

from gdn_kernels.kernels import step

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def run(fp8: bool = False, **options) -> None:
    step_cases.make(**{"dtype": torch.bfloat16, "K": 128, "V": 128, **options}).run(step, fp8)


@sweep("decode-step")
def decode_step(N: int) -> None:
    run(H=1, HV=2, rows=N)


# Value heads a key head, and head sizes: of each the two ends and what differs between them, in one state dtype.
for ratio, state_dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16), (4, torch.float32)):
    case(f"decode-step-r{ratio}-{SHORT[state_dtype]}")(
        lambda ratio=ratio, state_dtype=state_dtype: run(HV=2 * ratio, state_dtype=state_dtype)
    )
for K, V, state_dtype in ((64, 64, torch.bfloat16), (128, 256, torch.float32), (256, 256, torch.bfloat16)):
    case(f"decode-step-{SHORT[state_dtype]}-{K}x{V}")(
        lambda K=K, V=V, state_dtype=state_dtype: run(K=K, V=V, state_dtype=state_dtype)
    )
case("decode-step-rounded-bf16")(lambda: run(state_dtype=torch.bfloat16, rounded=True))
case("decode-step-fp8", fp8=True)(lambda: run(fp8=True))
case("decode-step-time-last-gate-first")(lambda: run(layout="time", norm_before_gate=False, bias=True))

# All 128 registers are taken: up to four more on sm_120, and with four heads, two of them in flight, a few with Triton
# 3.9.0; AMD spills scalars.
for name in [name for name in COMPILE_CASES if name.startswith("decode-step-")]:
    SPILL_BUDGET[name, 120] = 16
# Two more as Triton 3.9.0 has it assembled (--regAllocOptLevel=2).
SPILL_BUDGET["decode-step-fp32-128x256", 90] = 16
for arch in ("*", 120):
    SPILL_BUDGET["decode-step-r4-fp32", arch] = 96
