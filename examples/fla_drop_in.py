"""A flash-linear-attention caller on this package: only the import of its functions differs. CPU or GPU.

The core of a Gated Delta Net layer as FLA users write it: prefill, one token of decode from its state, the gated norm;
then the decoded token against a prefill of one token more.
"""

import torch

# was: from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
#      from fla.modules import FusedRMSNormGated
from gdn_kernels.integrations.fla import (
    FusedRMSNormGated,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    B, T, H, HV, K, V = 2, 256, 4, 8, 128, 128

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    q, k, v, a, b, z = (rand(B, T + 1, *shape) for shape in ((H, K), (H, K), (HV, V), (HV,), (HV,), (HV, V)))
    norm = FusedRMSNormGated(V, device=device, dtype=dtype)
    options = {
        "A_log": torch.zeros(HV, device=device),
        "dt_bias": torch.zeros(HV, device=device),
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": True,
    }

    prompt, token = ([x[:, part] for x in (q, k, v, a, b)] for part in (slice(0, T), slice(T, T + 1)))
    o, state = chunk_gated_delta_rule(*prompt, **options)
    print(f"prefill on {device}: o {tuple(o.shape)}, state {tuple(state.shape)} {state.dtype}")

    q1, k1, v1, a1, b1 = token
    o1, state = fused_recurrent_gated_delta_rule(q1, k1, v1, a1, beta=b1, initial_state=state, **options)
    y = norm(o1, z[:, T:])
    print(f"decode: o {tuple(o1.shape)}, after the gated norm {tuple(y.shape)}")

    whole, last = chunk_gated_delta_rule(q, k, v, a, b, **options)
    off = (whole[:, T:] - o1).abs().max().item() / whole.abs().max().item()
    print(f"decode against a prefill of {T + 1} tokens: {off:.1e} of the largest output")
    assert off < (2e-2 if dtype is torch.bfloat16 else 1e-4)

    try:
        chunk_gated_delta_rule(*prompt, chunk_size=32)
    except NotImplementedError as error:
        print("what is not built says so:", error)


if __name__ == "__main__":
    main()
