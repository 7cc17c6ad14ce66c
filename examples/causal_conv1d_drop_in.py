"""A causal-conv1d caller on this package: only the import differs. CPU or GPU.

A short convolution as Gated Delta Net and Mamba layers have it: a prompt, then a token at a time, against torch.
"""

import torch
import torch.nn.functional as F

# was: from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from gdn_kernels.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    B, L, D, W, new = 2, 64, 512, 4, 4
    # [B, D, L] as the transpose of a projection has it: read as it is, without a copy.
    prompt, tokens = (torch.randn(B, n, D, device=device, dtype=dtype).transpose(1, 2) for n in (L, new))
    weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((D, W), (D,)))

    y, state = causal_conv1d_fn(prompt, weight, bias, return_final_states=True, activation="silu")
    print(f"prompt on {device}: y {tuple(y.shape)}, state {tuple(state.shape)}")
    steps = [causal_conv1d_update(tokens[..., t], state, weight, bias, activation="silu") for t in range(new)]
    print(f"{new} tokens, one at a time: {tuple(steps[0].shape)} each, the state in place")

    padded, taps = F.pad(torch.cat([prompt, tokens], -1).float(), (W - 1, 0)), weight.float()[:, None]
    expected = F.silu(F.conv1d(padded, taps, bias.float(), groups=D))
    off = (torch.cat([y, torch.stack(steps, -1)], -1) - expected).abs().max().item() / expected.abs().max().item()
    print(f"against torch.nn.functional.conv1d: {off:.1e} of the largest output")
    assert off < (1e-2 if dtype is torch.bfloat16 else 1e-5)

    try:
        causal_conv1d_update(tokens[..., 0], state, weight, cache_seqlens=torch.zeros(B, dtype=torch.int32))
    except NotImplementedError as error:
        print("what is not built says so:", error)


if __name__ == "__main__":
    main()
