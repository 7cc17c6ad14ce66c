"""Hugging Face transformers: the token mixers of Qwen3-Next and Qwen3.5 on these operators.

``apply()`` replaces one place for each family that the installed version has: ``forward`` of its Gated Delta Net class,
looked up by every module at its call, so models built before and after it are served alike. ``restore()`` puts the
library's function back. ``report()`` says what runs in each place. transformers is imported by ``apply()``, not here.

The library's cache stays in use and stays readable by its own code: the conv state ``[B, D, W]`` and the recurrent
state ``[B, HV, K, V]``. The latter is a transposed view of ``[B, HV, V, K]``, which the decode kernel updates in place;
a state in another layout (the library's own prefill leaves one, and so does the reordering of a beam search) is copied
there and back at each token. Of a conv state, decode keeps up only the last W - 1 columns: nothing reads the first.
"""

from __future__ import annotations

import collections
import functools
import gc
import importlib
import inspect
import threading
import types
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
_NORM = ("weight", "variance_epsilon", "activation")
_FUSED = ("in_proj_qkvz", "in_proj_ba")
_SPLIT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

PREFILL = "causal_conv1d, chunk_gated_delta_rule, layer_norm_gated"
DECODE = "decode_step"

#: Class -> the library's function and the one in its place.
_replaced: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}
#: By a class's name: how often what ran, and what a compiler has traced, since ``apply()``; the reasons told.
_calls: dict[str, collections.Counter[str]] = {}
_traced: dict[str, set[str]] = {}
_told: set[str] = set()
_lock = threading.Lock()


def apply() -> None:
    """Make transformers' Qwen3-Next and Qwen3.5 models, dense and MoE, use the operators; again: no effect.

    Prefill, its continuation from a cache, and single cached tokens are covered, with left padding as the library
    passes it (an attention mask ``[B, T]``) and packed sequences (``cu_seq_lens_q``), in bf16 and fp16, and in fp32 on
    a CPU or for single cached tokens. For all else the library's own code runs, with one warning for each reason: where
    a gradient is required, in a cache that records its past, under ``torch.export``, and for sizes without a kernel.

    On a CPU the operators run in PyTorch, for their results and not for speed.

    Models of any thread are served, built before or after, compiled or spread over devices by accelerate too. Layers
    that the ``kernels`` package has replaced (``use_kernels=True``) keep what it put there: :func:`report` does not
    count them.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: the installed version lacks the classes or has changed them; nothing is replaced.
    """
    with _lock:
        if _replaced:
            return
        found = _classes()
        # weights that are read without a call of their module are loaded where accelerate has offloaded them
        mixer = _accelerate().force_accelerate_hooks(["conv1d", "norm"])(_mixer)
        pairs = {}
        for cls in found:
            original = vars(cls)["forward"]
            pairs[cls] = original, _replacement(cls.__name__, original, mixer)
            _calls[cls.__name__], _traced[cls.__name__] = collections.Counter(), set()
        _replaced.update(pairs)
        _set(pairs)


def restore() -> None:
    """Undo :func:`apply` exactly; without it, or again: no effect.

    Raises:
        RuntimeError: other code has since replaced one of the functions again; nothing is restored.
    """
    with _lock:
        for cls, (_, ours) in _replaced.items():
            if vars(cls).get("forward") is not ours:
                raise RuntimeError(f"{cls.__name__}.forward must be the one that apply() set, got {cls.forward!r}")
        _set({cls: (ours, original) for cls, (original, ours) in _replaced.items()})
        for record in (_replaced, _calls, _traced, _told):
            record.clear()


def report() -> str:
    """What runs in each replaced place, and how often it ran since :func:`apply`; for compiled code, what was traced.

    A place that other code has replaced since then says so.
    """
    with _lock:
        lines = []
        for cls, (_, ours) in _replaced.items():
            now = vars(cls).get("forward")
            what = "gdn_kernels" if now is ours else f"replaced since apply() by {now!r}"
            lines.append(f"{cls.__module__}.{cls.__name__}.forward: {what}")
            calls = _calls[cls.__name__]
            ran = [f"  {calls[what]} x {what}" for what in sorted(calls)]
            ran += [f"  compiled: {what}" for what in sorted(_traced[cls.__name__])]
            lines += ran or ["  not called yet"]
    return "\n".join(lines) or "nothing is replaced: gdn_kernels.integrations.transformers.apply() was not called"


def _set(pairs: dict[type, tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """In each class its second function for its first, and in each module that holds the first one bound, as accelerate
    leaves it in the modules that it hooks."""
    for cls, (_, new) in pairs.items():
        cls.forward = new
    # by type(): isinstance would ask every proxy in the process for its class
    for module in (found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)):
        for old, new in (pairs[cls] for cls in type(module).__mro__ if cls in pairs):
            for name in ("forward", "_old_forward"):
                if getattr(vars(module).get(name), "__func__", None) is old:
                    vars(module)[name] = types.MethodType(new, module)


# ---------------------------------------------------------------------------------------------------------------
# Finding the places
# ---------------------------------------------------------------------------------------------------------------


def _accelerate() -> Any:
    return importlib.import_module("transformers.integrations.accelerate")


def _classes() -> list[type]:
    """The mixer classes of the installed version, each of the form that :func:`_mixer` serves."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"transformers must be installed, {VERSIONS}: pip install 'transformers>=5.17'") from error
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
            norm = name.replace("GatedDeltaNet", "RMSNormGated")
            wrong += [f"{norm} has no {part}" for part in _NORM if part not in _named(getattr(module, norm, None))]
    if not hasattr(_accelerate(), "force_accelerate_hooks"):
        wrong.append(f"{_accelerate().__name__} has no force_accelerate_hooks")
    states = getattr(importlib.import_module("transformers.cache_utils"), "LinearAttentionCacheLayerMixin", None)
    if not {"number_of_states", "has_previous_state", "conv_states", "recurrent_states"} <= _named(states):
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
    names = _named(cls)
    projections = _FUSED if _FUSED[0] in names else _SPLIT
    missing = [name for name in (*_SIZES, *_WEIGHTS, *projections) if name not in names]
    return wrong + [f"has no {name}" for name in missing]


def _named(cls: type | None) -> set[str]:
    """The arguments of a class's constructor and what it names: the attributes that it sets."""
    code = getattr(inspect.unwrap(cls.__init__), "__code__", None) if cls is not None else None
    return set() if code is None else {*code.co_names, *code.co_varnames}


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
            _note(name, f"transformers' own code: {reason}", torch.compiler.is_compiling())
            _tell(name, reason)
            return original(self, hidden_states, cache, attention_mask, **kwargs)
        return mixer(self, name, hidden_states, cache, attention_mask, kwargs.get("cu_seq_lens_q"))

    return forward


# A compiler calls these three as it traces, and leaves nothing of them in its code.
@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return torch.compiler.is_exporting()  # traced itself, it is True for every compilation of torch 2.11


@torch.compiler.assume_constant_result
def _note(name: str, what: str, traced: bool) -> None:
    with _lock:
        if name not in _calls:
            return  # restored by another thread since this call began
        if traced:
            _traced[name].add(what)
        else:
            _calls[name][what] += 1


@torch.compiler.assume_constant_result
def _tell(name: str, reason: str) -> None:
    with _lock:
        told = reason in _told
        _told.add(reason)
    if not told:
        warnings.warn(f"{name} runs transformers' own code, not gdn_kernels: {reason}", RuntimeWarning, stacklevel=3)


def _states(mixer: Any, cache: Any) -> Any:
    """The cache's layer of the mixer; None where it holds no states of linear attention."""
    layer = cache.layers[mixer.layer_idx] if mixer.layer_idx < len(cache.layers) else None
    return layer if hasattr(layer, "has_previous_state") else None


def _decodes(mixer: Any, hidden_states: torch.Tensor, cache: Any) -> bool:
    """A single token after a cached state."""
    return cache is not None and hidden_states.shape[1] == 1 and _states(mixer, cache).has_previous_state[0]


def _uncovered(mixer: Any, hidden_states: torch.Tensor, cache: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the library's own code must run; None where the operators can."""
    if _exporting():
        return "torch.export is tracing"
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(parameter.requires_grad for parameter in mixer.parameters())
    ):
        return "a gradient is required and the delta rule has no backward; call the model under torch.no_grad()"
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # of the projections
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
    if cache is not None and _states(mixer, cache) is None:
        return "the cache has no states of linear attention for this layer"
    if cache is not None and getattr(_states(mixer, cache), "record_past", False):
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
    fused = hasattr(self, "in_proj_qkvz")
    if fused:
        mixed_qkv, z, b, a = split_qkvz_ba(
            self.in_proj_qkvz(hidden_states).flatten(0, 1),
            self.in_proj_ba(hidden_states).flatten(0, 1),
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
        )
    else:
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        mixed_qkv, z, b, a = (projection(hidden_states).flatten(0, 1) for projection in projections)
        z = z.unflatten(-1, (self.num_v_heads, self.head_v_dim))
    decodes = _decodes(self, hidden_states, cache)
    steps = ("split_qkvz_ba, " if fused else "") + (DECODE if decodes else PREFILL)
    what = f"{'one cached token' if decodes else 'prefill'} on {hidden_states.device.type}: {steps}"
    _note(name, what, torch.compiler.is_compiling())
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
    offsets = packed
    if offsets is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=mixed_qkv.device) * tokens
    states = None if cache is None else _states(self, cache)
    if states is not None and states.has_previous_state[0]:
        window = states.conv_states[0][:, :, -columns:].clone()
        initial = states.recurrent_states[0].transpose(2, 3).contiguous()
    else:
        window = mixed_qkv.new_zeros(offsets.shape[0] - 1, columns, mixed_qkv.shape[1]).transpose(1, 2)
        initial = None
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
        # as many of the last columns as the cache keeps, so that it joins no more to those that it has
        last = mixed_qkv.unflatten(0, shape)[:, -self.conv_kernel_size :].transpose(1, 2)
        cache.update_conv_state(last, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
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
