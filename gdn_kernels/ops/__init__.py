"""The operators: one file a family, each with schema, fake, CPU and GPU implementation, and the public function."""

from gdn_kernels.ops.chunk import (
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_paged,
    chunk_gated_delta_rule_paged_checkpoints,
)
from gdn_kernels.ops.conv import causal_conv1d, causal_conv1d_update, causal_conv1d_verify
from gdn_kernels.ops.decode import packed_decode, packed_decode_out
from gdn_kernels.ops.gating import gating
from gdn_kernels.ops.norm import l2norm, layer_norm_gated, layer_norm_gated_fp8, layer_norm_gated_out
from gdn_kernels.ops.recurrent import (
    recurrent_gated_delta_rule,
    recurrent_gated_delta_rule_paged,
    recurrent_gated_delta_rule_verify,
)
from gdn_kernels.ops.registry import OPERATORS
from gdn_kernels.ops.split import split_qkvz_ba
from gdn_kernels.ops.step import decode_step, decode_step_fp8

__all__ = [
    "OPERATORS",
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_verify",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_paged",
    "chunk_gated_delta_rule_paged_checkpoints",
    "decode_step",
    "decode_step_fp8",
    "gating",
    "l2norm",
    "layer_norm_gated",
    "layer_norm_gated_fp8",
    "layer_norm_gated_out",
    "packed_decode",
    "packed_decode_out",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_paged",
    "recurrent_gated_delta_rule_verify",
    "split_qkvz_ba",
]
