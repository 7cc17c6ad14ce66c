"""Triton kernels for Gated Delta Net token mixers, as operators under ``torch.ops.gdn``.

Importing the package registers the operators. It needs no GPU, imports no Triton and reads no environment variable.
"""

__version__ = "0.12.0"

from gdn_kernels import graphs, launch, nn
from gdn_kernels.ops import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_verify,
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_paged,
    chunk_gated_delta_rule_paged_checkpoints,
    decode_step,
    decode_step_fp8,
    gating,
    l2norm,
    layer_norm_gated,
    layer_norm_gated_fp8,
    layer_norm_gated_out,
    packed_decode,
    packed_decode_out,
    recurrent_gated_delta_rule,
    recurrent_gated_delta_rule_paged,
    recurrent_gated_delta_rule_verify,
    split_qkvz_ba,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_verify",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_paged",
    "chunk_gated_delta_rule_paged_checkpoints",
    "decode_step",
    "decode_step_fp8",
    "gating",
    "graphs",
    "l2norm",
    "launch",
    "layer_norm_gated",
    "layer_norm_gated_fp8",
    "layer_norm_gated_out",
    "nn",
    "packed_decode",
    "packed_decode_out",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_paged",
    "recurrent_gated_delta_rule_verify",
    "split_qkvz_ba",
]
