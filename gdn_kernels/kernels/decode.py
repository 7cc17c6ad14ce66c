"""``packed_decode`` on a GPU: one token a sequence, gate, sigmoid, l2norm and recurrence in one launch.

The kernel is the recurrent one with a single token and raw gates; q, k and v are column views of ``mixed_qkv``, read in
place by their strides. So decode has the bits of a verification of one token.
"""

from gdn_kernels import launch
from gdn_kernels.kernels.recurrent import launch_recurrent


def packed_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, **options):
    out = launch.empty(mixed_qkv, mixed_qkv.shape[0], *state.shape[1:3])
    packed_decode_out(mixed_qkv, a, b, A_log, dt_bias, state, out, state_indices, **options)
    return out


def packed_decode_out(
    mixed_qkv,
    a,
    b,
    A_log,
    dt_bias,
    state,
    out,
    state_indices,
    *,
    num_k_heads,
    scale=None,
    use_qk_l2norm=True,
    pad_slot_id=-1,
    rounding_seed=None,
):
    HV, V, K = state.shape[1:]
    keys = num_k_heads * K
    q, k, v = mixed_qkv.unsqueeze(1).split((keys, keys, HV * V), dim=-1)
    launch_recurrent(
        launch.view(q.unflatten(-1, (num_k_heads, K)), mixed_qkv),
        launch.view(k.unflatten(-1, (num_k_heads, K)), mixed_qkv),
        launch.view(v.unflatten(-1, (HV, V)), mixed_qkv),
        launch.view(a.unsqueeze(1), a),
        launch.view(b.unsqueeze(1), b),
        out,
        state,
        state,
        cu_seqlens=None,
        read=state_indices,
        write=None,
        has_initial_state=None,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        beta_scale=1.0,
        pad_slot_id=pad_slot_id,
        is_one_token=True,
        rounding_seed=rounding_seed,
    )
