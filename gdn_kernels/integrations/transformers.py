"""Hugging Face transformers: the token mixers of Qwen3-Next and Qwen3.5 on these operators.

``apply()`` replaces one place for each family that the installed version has: ``forward`` of its Gated Delta Net class,
looked up by every module at its call, so models built before and after it are served alike. ``restore()`` puts the
library's function back. ``report()`` says what runs in each place.

The library's cache stays in use and stays readable by its own code: the conv state ``[B, D, W]`` and the recurrent
state ``[B, HV, K, V]``. The latter is a transposed view of ``[B, HV, V, K]``, which the decode kernel updates in place.
Only the last W - 1 columns of a conv state are kept up in decode: nothing reads the first.
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from gdn_kernels import contracts
from gdn_kernels.ops import (
    causal_conv1d,
    chunk_gated_delta_rule,
    decode_step,
    layer_norm_gated,
    split_qkvz_ba,
)

#: The class replaced in ``transformers.models.<family>.modeling_<family>``.
FAMILIES = {
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
}
VERSIONS = "5.17.0 to 5.24.0"

_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_kernel_size", "layer_idx", "activation")
_WEIGHTS = ("conv1d", "dt_bias", "A_log", "norm", "out_proj")
_FUSED = ("in_proj_qkvz", "in_proj_ba")
_SPLIT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

PREFILL = "causal_conv1d, chunk_gated_delta_rule, layer_norm_gated"
DECODE = "decode_step"

#: Class -> the library's function and the one in its place; what ran there, since ``apply()``; reasons told.
_replaced: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_calls: dict[str, collections.Counter[str]] = {}
_told: set[str] = set()


def apply() -> None:
    """Make transformers' Qwen3-Next and Qwen3.5 models, dense and MoE, use the operators; again: no effect.

    Prefill, its continuation from a cache, and single cached tokens are covered, with left padding as the library
    passes it (an attention mask ``[B, T]``) and packed sequences (``cu_seq_lens_q``), in bf16 and fp16, and in fp32 on
    a CPU or for single cached tokens. For all else the library's own code runs, with one warning for each reason: where
    a gradient is required, in a cache that records its past, under ``torch.export``, and for sizes without a kernel.

    Call it before a model is spread over several devices: accelerate keeps the function that it finds then.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: the installed version lacks the classes or has changed them; nothing is replaced.
    """
    if _replaced:
        return
    found = _classes()
    # weights that are read without a call of their module are loaded where accelerate has offloaded them
    mixer = _accelerate().force_accelerate_hooks(["conv1d", "norm"])(_mixer)
    for cls in found:
        original = vars(cls)["forward"]
        _calls[cls.__name__] = collections.Counter()
        _replaced[cls] = original, _replacement(cls.__name__, original, mixer)
    for cls, (_, ours) in _replaced.items():
        cls.forward = ours


def restore() -> None:
    """Undo :func:`apply` exactly; without it, or again: no effect.

    Raises:
        RuntimeError: other code has since replaced one of the functions again; nothing is restored.
    """
    for cls, (_, ours) in _replaced.items():
        if vars(cls).get("forward") is not ours:
            raise RuntimeError(f"{cls.__name__}.forward must be the one that apply() set, got {cls.forward!r}")
    for cls, (original, _) in _replaced.items():
        cls.forward = original
    _replaced.clear()
    _calls.clear()
    _told.clear()


def report() -> str:
    """What runs in each replaced place, and how often it ran since :func:`apply`; compiled calls are not counted."""
    if not _replaced:
        return "nothing is replaced: gdn_kernels.integrations.transformers.apply() was not called"
    lines = []
    for cls in _replaced:
        lines.append(f"{cls.__module__}.{cls.__name__}.forward: gdn_kernels")
        calls = _calls[cls.__name__]
        lines += [f"  {calls[what]} x {what}" for what in sorted(calls)] or ["  not called yet"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Finding the places
# ---------------------------------------------------------------------------------------------------------------


def _accelerate() -> Any:
    return importlib.import_module("transformers.integrations.accelerate")


def _classes() -> list[type]:
    """The mixer classes of the installed version, each of the form that :func:`_mixer` serves."""
    import transformers

    found, wrong = [], []
    for family, name in FAMILIES.items():
        path = f"transformers.models.{family}"
        try:
            module = importlib.import_module(f"{path}.modeling_{family}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(path):
                raise
            continue  # this version does not have the family
        cls = getattr(module, name, None)
        if cls is None:
            wrong.append(f"{module.__name__} has no {name}")
        else:
            found.append(cls)
            wrong += [f"{name} {difference}" for difference in _differences(cls)]
    if not hasattr(_accelerate(), "force_accelerate_hooks"):
        wrong.append(f"{_accelerate().__name__} has no force_accelerate_hooks")
    states = getattr(importlib.import_module("transformers.cache_utils"), "LinearAttentionCacheLayerMixin", None)
    if states is None or "number_of_states" not in inspect.signature(states).parameters:
        wrong.append("its cache has no numbered states of linear attention")
    if not found and not wrong:
        wrong.append(f"it has none of {', '.join(FAMILIES)}")
    if wrong:
        raise RuntimeError(
            f"transformers must be a version whose Gated Delta Net classes are known, {VERSIONS}, got "
            f"{transformers.__version__}: {'; '.join(wrong)}"
        )
    return found


def _differences(cls: type) -> list[str]:
    """How ``cls`` departs from what :func:`_mixer` reads of it."""
    if "forward" not in vars(cls):
        return ["has no forward of its own"]
    first = list(inspect.signature(cls.forward).parameters)[:4]
    wrong = []
    if first not in (["self", "hidden_states", cache, "attention_mask"] for cache in ("cache", "cache_params")):
        wrong.append(f"has a forward of {', '.join(first)}")
    names = inspect.unwrap(cls.__init__).__code__.co_names
    projections = _FUSED if _FUSED[0] in names else _SPLIT
    missing = [name for name in (*_SIZES, *_WEIGHTS, *projections) if name not in names]
    return wrong + [f"has no {name}" for name in missing]


# ---------------------------------------------------------------------------------------------------------------
# The mixer
# ---------------------------------------------------------------------------------------------------------------


def _replacement(name: str, original: Callable[..., Any], mixer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        *,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = cache_params if cache is None else cache  # its name before transformers 5.24
        reason = _uncovered(self, hidden_states, cache, kwargs)
        if reason is not None:
            _note(name, f"transformers' own code: {reason}")
            _tell(name, reason)
            return original(self, hidden_states, cache, attention_mask, **kwargs)
        return mixer(self, name, hidden_states, cache, attention_mask, kwargs.get("cu_seq_lens_q"))

    return forward


def _note(name: str, what: str) -> None:
    if not torch.compiler.is_compiling():
        _calls[name][what] += 1


def _tell(name: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        warnings.warn(f"{name} runs transformers' own code, not gdn_kernels: {reason}", RuntimeWarning, stacklevel=3)


def _decodes(mixer: Any, hidden_states: torch.Tensor, cache: Any) -> bool:
    """A single token after a cached state."""
    return cache is not None and hidden_states.shape[1] == 1 and cache.layers[mixer.layer_idx].has_previous_state[0]


def _uncovered(mixer: Any, hidden_states: torch.Tensor, cache: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the library's own code must run; None where the operators can."""
    if torch.compiler.is_exporting():
        return "torch.export is tracing"
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(parameter.requires_grad for parameter in mixer.parameters())
    ):
        return "a gradient is required and the delta rule has no backward; call the model under torch.no_grad()"
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if device not in ("cpu", "cuda"):
        return f"the device must be cpu or cuda, got {device}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the dtype must be bfloat16, float16 or float32, got {dtype}"
    for size in ("head_k_dim", "head_v_dim"):
        if getattr(mixer, size) not in contracts.HEAD_DIMS:
            return f"{size} must be one of {contracts.HEAD_DIMS}, got {getattr(mixer, size)}"
    if mixer.conv_kernel_size not in contracts.CONV_WIDTHS:
        return f"conv_kernel_size must be one of {contracts.CONV_WIDTHS}, got {mixer.conv_kernel_size}"
    if mixer.activation not in contracts.CONV_ACTIVATIONS or mixer.norm.activation not in contracts.ACTIVATIONS:
        return f"the activations must be silu, got {mixer.activation} and {mixer.norm.activation}"
    if mixer.num_v_heads > contracts.MAX_STEP_RATIO * mixer.num_k_heads:
        return f"num_v_heads must be at most {contracts.MAX_STEP_RATIO} * num_k_heads, got {mixer.num_v_heads}"
    packed = kwargs.get("cu_seq_lens_q")
    if packed is not None and (cache is not None or hidden_states.shape[0] != 1):
        return "packed sequences (cu_seq_lens_q) must come in a batch of 1 without a cache"
    if packed is None and kwargs.get("seq_idx") is not None:
        return "packed sequences must come with cu_seq_lens_q, got seq_idx alone"
    if cache is not None and cache.layers[mixer.layer_idx].record_past:
        return "the cache records past states (assisted generation)"
    if device == "cuda" and dtype is torch.float32 and not _decodes(mixer, hidden_states, cache):
        return "prefill on a GPU must be in bfloat16 or float16, got float32"
    return None


def _mixer(
    self: Any,
    name: str,
    hidden_states: torch.Tensor,
    cache: Any,
    attention_mask: torch.Tensor | None,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """The mixer ``self`` of transformers, ``[B, T, hidden_size]`` to the same, on the operators. Writes the cache."""
    if attention_mask is not None:
        # padding enters the conv and the recurrence as zeros
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    batch, tokens, _ = hidden_states.shape
    rows = hidden_states.flatten(0, 1)
    fused = hasattr(self, "in_proj_qkvz")
    if fused:
        mixed_qkv, z, b, a = split_qkvz_ba(
            self.in_proj_qkvz(rows),
            self.in_proj_ba(rows),
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
        )
    else:
        mixed_qkv, b, a = self.in_proj_qkv(rows), self.in_proj_b(rows), self.in_proj_a(rows)
        z = self.in_proj_z(rows).unflatten(-1, (self.num_v_heads, self.head_v_dim))
    decodes = _decodes(self, hidden_states, cache)
    steps = ("split_qkvz_ba, " if fused else "") + (DECODE if decodes else PREFILL)
    _note(name, f"{'one cached token' if decodes else 'prefill'} on {rows.device.type}: {steps}")
    if decodes:
        core = _decode(self, mixed_qkv, a, b, z, cache)
    else:
        core = _prefill(self, mixed_qkv, a, b, z, (batch, tokens), cache, packed)
    return self.out_proj(core.reshape(batch, tokens, -1))


def _decode(
    self: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, z: torch.Tensor, cache: Any
) -> torch.Tensor:
    """One token for each sequence: ``[B, ...]`` to ``[B, HV, V]``."""
    states = cache.layers[self.layer_idx]
    state = states.recurrent_states[0].transpose(2, 3)
    in_place = state.is_contiguous()  # not after the library's own prefill or a beam search's reordering
    if not in_place:
        state = state.contiguous()
    core = decode_step(
        mixed_qkv,
        a,
        b,
        z,
        self.conv1d.weight.squeeze(1),
        self.conv1d.bias,
        states.conv_states[0][:, :, 1 - self.conv_kernel_size :],
        self.A_log,
        self.dt_bias,
        state,
        self.norm.weight,
        torch.arange(mixed_qkv.shape[0], device=mixed_qkv.device),
        num_k_heads=self.num_k_heads,
        norm_before_gate=True,
        eps=self.norm.variance_epsilon,
        conv_activation=self.activation,
        norm_activation=self.norm.activation,
    )
    if not in_place:
        cache.update_recurrent_state(state.transpose(2, 3), self.layer_idx)
    return core


def _prefill(
    self: Any,
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    shape: tuple[int, int],
    cache: Any,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """``shape`` is B, T: ``[B * T, ...]`` to ``[B * T, HV, V]``, from nothing or from the cache's states."""
    batch, tokens = shape
    columns = self.conv_kernel_size - 1
    window = initial = None
    if cache is not None:
        states = cache.layers[self.layer_idx]
        if states.has_previous_state[0]:
            window = states.conv_states[0][:, :, -columns:].clone()
            initial = states.recurrent_states[0].transpose(2, 3).contiguous()
        cache.update_conv_state(
            mixed_qkv.unflatten(0, shape).transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
        )
    offsets = packed
    if offsets is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=mixed_qkv.device) * tokens
    if window is None:
        window = mixed_qkv.new_zeros(offsets.shape[0] - 1, mixed_qkv.shape[1], columns)
    x = causal_conv1d(
        mixed_qkv, self.conv1d.weight.squeeze(1), self.conv1d.bias, window, offsets, activation=self.activation
    )
    keys, values = self.num_k_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
    q, k, v = x.unflatten(0, shape).split([keys, keys, values], dim=-1)
    o, final = chunk_gated_delta_rule(
        q.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        k.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
        a.unflatten(0, shape),
        b.unflatten(0, shape),
        initial_state=initial,
        cu_seqlens=packed,
        use_qk_l2norm=True,
        A_log=self.A_log,
        dt_bias=self.dt_bias,
    )
    if cache is not None:
        # the cache's first update allocates like this view, and so in the layout that decode updates in place
        cache.update_recurrent_state(final.transpose(2, 3), self.layer_idx)
    return layer_norm_gated(
        o.flatten(0, 1),
        self.norm.weight,
        None,
        z,
        norm_before_gate=True,
        eps=self.norm.variance_epsilon,
        activation=self.norm.activation,
    )
