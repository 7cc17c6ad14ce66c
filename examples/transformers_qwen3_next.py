"""Qwen3-Next of transformers on these operators: a small model of random weights, with and without ``apply()``.

    pip install -e '.[clients]' && python examples/transformers_qwen3_next.py

For a real model only the two ``gdn.`` lines are needed: ``gdn.apply()`` before or after ``from_pretrained``, and
``print(gdn.report())`` to see what ran. On a CPU the operators run in PyTorch, for their results, not for speed.
"""

import sys
import warnings

import torch

if not torch.cuda.is_available():
    # FLA's kernels need a GPU, and transformers takes them wherever it can import them; its own code is compared here
    sys.modules["fla"] = None

from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import gdn_kernels.integrations.transformers as gdn


def main() -> None:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,  # three Gated Delta Net layers, then one of attention
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,  # the operators have head sizes of 64, 128 and 256
        linear_value_head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = Qwen3NextForCausalLM(config).to(device, dtype).eval()

    # Two prompts, the second one shorter: padded on the left.
    tokens = torch.randint(1, config.vocab_size, (2, 100), device=device)
    mask = torch.ones_like(tokens)
    tokens[1, :37], mask[1, :37] = 0, 0

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits[:, -1].float()
        return logits, model.generate(tokens, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, 100:]

    expected_logits, expected = run()
    gdn.apply()
    logits, generated = run()
    print(gdn.report())
    off = (logits - expected_logits).abs().max().item()
    print(f"largest difference of the logits on {device}: {off:.1e}, of {expected_logits.abs().max().item():.2f}")
    print("equal greedy tokens:", (generated == expected).sum().item(), "of", expected.numel())
    assert off < (5e-2 if dtype is torch.bfloat16 else 1e-4)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(tokens, attention_mask=mask)  # without torch.no_grad(): for training
    print("what is not built says so:", next(w.message for w in told if "gdn_kernels" in str(w.message)))
    gdn.restore()


if __name__ == "__main__":
    main()
