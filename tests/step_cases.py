"""Inputs of the decode step for tests, the step on them, and the separate operators in sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class Step:
    """The arguments of one call by their names."""

    arguments: dict[str, torch.Tensor | None]
    options: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def pools(self) -> list[torch.Tensor]:
        return [self.conv_state, self.state]

    def map(self, change) -> Step:
        return Step({name: None if x is None else change(x) for name, x in self.arguments.items()}, self.options)

    def clone(self) -> Step:
        """The same arguments, with pools of their own."""
        pools = {name: self.arguments[name].clone() for name in ("conv_state", "state")}
        return Step({**self.arguments, **pools}, self.options)

    def double(self) -> Step:
        return self.map(lambda x: x.double().cpu() if x.is_floating_point() else x.cpu())

    def run(self, module: Any, fp8: bool = False) -> list[torch.Tensor]:
        found = getattr(module, "decode_step_fp8" if fp8 else "decode_step")(*self.arguments.values(), **self.options)
        return list(found) if fp8 else [found]

    def in_sequence(self, conv: Any, decode: Any, norm: Any, fp8: bool = False) -> list[torch.Tensor]:
        """The same by causal_conv1d_update, packed_decode and the norm of these modules."""
        options = {"pad_slot_id": -1, "conv_activation": "silu", "norm_activation": "silu", **self.options}
        x = conv.causal_conv1d_update(
            self.mixed_qkv,
            self.conv_weight,
            self.conv_bias,
            self.conv_state,
            state_indices=self.state_indices,
            activation=options["conv_activation"],
            pad_slot_id=options["pad_slot_id"],
        )
        o = decode.packed_decode(
            x,
            self.a,
            self.b,
            self.A_log,
            self.dt_bias,
            self.state,
            self.state_indices,
            num_k_heads=options["num_k_heads"],
            pad_slot_id=options["pad_slot_id"],
            **{name: options[name] for name in ("scale", "use_qk_l2norm", "rounding_seed") if name in options},
        )
        found = getattr(norm, "layer_norm_gated_fp8" if fp8 else "layer_norm_gated")(
            o,
            self.norm_weight,
            None,
            self.z,
            norm_before_gate=options["norm_before_gate"],
            activation=options["norm_activation"],
            **{name: options[name] for name in ("eps",) if name in options},
        )
        return list(found) if fp8 else [found]


def make(
    *,
    H: int = 2,
    HV: int = 4,
    K: int = 64,
    V: int = 64,
    W: int = 4,
    rows: int = 3,
    slots: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    conv_dtype: torch.dtype | None = None,
    layout: str = "channel",
    bias: bool = False,
    wide_z: bool = True,
    rounded: bool = False,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Step:
    """``rows`` tokens in slots of a pool of two more; the second is padding unless ``slots`` are given. Padding is NaN.

    mixed_qkv, a and b are column views; z is one too with ``wide_z``. ``layout``: the conv pool's last dimension in
    memory, ``channel`` or ``time``. ``rounded``: with a rounding seed.
    """
    random = torch.Generator(device).manual_seed(seed)
    if rounded:
        options["rounding_seed"] = torch.tensor([1234567890123], device=device)

    def normal(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device).to(like)

    if slots is None:
        order = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(seed)).tolist()
        slots = tuple(-1 if row == 1 else slot for row, slot in enumerate(order[:rows]))
    D, values = 2 * H * K + HV * V, HV * V
    wide, gates = normal(rows, D + values + 16), normal(rows, 2 * HV + 3)
    z = wide[:, D : D + values] if wide_z else normal(rows, values)
    pad = options.get("pad_slot_id", -1)
    padding = [row for row, slot in enumerate(slots) if not 0 <= slot < rows + 2 or slot == pad]
    wide[padding, :D], gates[padding] = torch.nan, torch.nan
    conv_dtype = conv_dtype or dtype
    pool = (
        normal(rows + 2, W - 1, D, like=conv_dtype).transpose(1, 2)
        if layout == "channel"
        else normal(rows + 2, D, W - 1, like=conv_dtype)
    )
    arguments = {
        "mixed_qkv": wide[:, :D],
        "a": gates[:, :HV],
        "b": gates[:, HV : 2 * HV],
        "z": z.unflatten(1, (HV, V)),
        "conv_weight": normal(D, W),
        "conv_bias": normal(D) if bias else None,
        "conv_state": pool,
        "A_log": 0.5 * normal(HV, like=torch.float32),
        "dt_bias": normal(HV),
        "state": normal(rows + 2, HV, V, K, like=state_dtype),
        "norm_weight": normal(V),
        "state_indices": torch.tensor(slots, dtype=torch.int32, device=device),
    }
    return Step(arguments, {"num_k_heads": H, "norm_before_gate": True, **options})


#: What differs from the plain call, by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "time-last-conv-pool": {"layout": "time"},
    "fp32-conv-pool": {"dtype": torch.bfloat16, "conv_dtype": torch.float32},
    "bias-no-conv-activation": {"bias": True, "conv_activation": None},
    "width-2": {"W": 2},
    "width-3-bias": {"W": 3, "bias": True},
    "gate-first-sigmoid": {"norm_before_gate": False, "norm_activation": "sigmoid"},
    "contiguous-z-eps": {"wide_z": False, "eps": 1e-2},
    "no-l2norm-scale": {"use_qk_l2norm": False, "scale": 0.01},
    "rounded-states": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "rounded": True},
    "null-slot": {"slots": (0, 3, 1), "pad_slot_id": 0},
}
