"""The plugins for SGLang and vLLM on stand-ins of the engines: choosing, the guard, other plugins, undoing, errors.

What the places compute is compared with the engines' real functions in ``tests/engines``.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import engine_stand_in
import pytest
import torch
from engine_stand_in import ENGINE, HookType

from gdn_kernels.integrations import __main__ as command
from gdn_kernels.integrations import _engines

ENGINES = ("sglang", "vllm")
both = pytest.mark.parametrize("engine", ENGINES)

# H, HV, K, V, conv width
H, HV, K, V, W = 1, 2, 64, 64, 4
D = 2 * H * K + HV * V


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(_engines.VARIABLE, raising=False)


def stand_in(engine: str, monkeypatch: Any, chosen: bool = False) -> tuple[Any, Any]:
    """The plugin and its engine; ``chosen``: the whitelist names it."""
    if engine == "sglang":
        return engine_stand_in.sglang(monkeypatch, "other, gdn_kernels" if chosen else "other")[:2]
    return engine_stand_in.vllm(monkeypatch, ["gdn_kernels"] if chosen else None)


def apply_hooks(engine: str) -> None:
    """What SGLang does once all plugins are loaded."""
    if engine == "sglang":
        sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()


def states(plugin: Any) -> set[str]:
    return {row["state"] for row in plugin.report()}


def place(plugin: Any, name: str) -> Any:
    (found,) = (place for place in plugin.places if place.path.endswith(name))
    return found


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


# Choosing ------------------------------------------------------------------------------------------------------


@both
def test_not_chosen_replaces_nothing(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    before = found.state()
    plugin.register()
    apply_hooks(engine)
    assert found.state() == before and states(plugin) == {"off"}


@both
@pytest.mark.parametrize("how", ["name", "variable"])
def test_chosen_replaces_every_place_and_every_import(engine, how, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch, chosen=how == "name")
    if how == "variable":
        monkeypatch.setenv(_engines.VARIABLE, "1")
    before = found.state()
    plugin.register()
    apply_hooks(engine)
    after = found.state()
    assert states(plugin) == {"replaced"}
    assert {path for path in before if not path.startswith("importer.__") and before[path] == after[path]} == set()


@both
def test_zero_does_not_choose_and_another_value_is_refused(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    before = found.state()
    monkeypatch.setenv(_engines.VARIABLE, "0")
    plugin.register()
    apply_hooks(engine)
    assert found.state() == before
    monkeypatch.setenv(_engines.VARIABLE, "yes")
    with pytest.raises(ValueError, match="GDN_KERNELS_ENGINE must be 0 or 1, got 'yes'"):
        plugin.register()


@both
def test_without_the_engine_one_runtime_error(engine, monkeypatch):
    plugin, _ = stand_in(engine, monkeypatch)
    for name in [name for name in sys.modules if name.partition(".")[0] == engine]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, engine, None)
    for call in (plugin.register, plugin.apply, plugin.examine):
        with pytest.raises(RuntimeError, match=f"must be installed for gdn_kernels.integrations.{engine}"):
            call()
    assert states(plugin) == {"off"}


@both
def test_entry_points_lead_to_register(engine):
    source = (Path(__file__).resolve().parent.parent / "setup.py").read_text(encoding="utf-8")
    group = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}[engine]
    assert f'"{group}": ["{_engines.ENTRY_POINT}=gdn_kernels.integrations.{engine}:register"]' in source


# The guard -----------------------------------------------------------------------------------------------------


@both
def test_another_signature_is_left_alone_with_one_warning(engine, monkeypatch, caplog):
    plugin, found = stand_in(engine, monkeypatch)
    path = (
        place(plugin, ".causal_conv1d_fn").path if engine == "vllm" else place(plugin, "triton.causal_conv1d_fn").path
    )
    other = engine_stand_in.function(path, inspect.signature(lambda x, weights, bias=None: None))
    found.add(path, other)
    with caplog.at_level(logging.WARNING):
        plugin.apply()
        plugin.apply()
    assert found.get(path) is other
    (warning,) = (record.getMessage() for record in caplog.records)
    expected = place(plugin, path).expected
    assert all(text in warning for text in (path, expected, "(x, weights, bias=None)", plugin.versions[0]))
    rows = {row["place"]: row for row in plugin.report()}
    assert rows[path]["state"] == "signature differs" and rows[path]["why"].endswith("(x, weights, bias=None)")
    assert {row["state"] for where, row in rows.items() if where != path} == {"replaced"}


@both
def test_another_default_counts_and_an_annotation_does_not(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    path = place(plugin, ".layernorm_fn").path
    kept = list(inspect.signature(found.get(path)).parameters.values())
    annotated = inspect.Signature([parameter.replace(annotation=int) for parameter in kept])
    found.add(path, engine_stand_in.function(path, annotated))
    assert plugin.examine()[path].state == "replaced"
    changed = [parameter.replace(default=1e-5) if parameter.name == "eps" else parameter for parameter in kept]
    found.add(path, engine_stand_in.function(path, inspect.Signature(changed)))
    assert plugin.examine()[path].state == "signature differs"


@both
def test_a_place_that_is_gone_is_absent(engine, monkeypatch, caplog):
    plugin, found = stand_in(engine, monkeypatch)
    path = place(plugin, ".layernorm_fn").path
    owner, name = found.owner(path)
    delattr(owner, name)
    plugin.apply()
    assert {row["place"]: row["state"] for row in plugin.report()}[path] == "absent"
    assert [path in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [True]


def test_what_an_adapter_relies_on_is_part_of_the_guard(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    path = place(plugin, "TritonGDNKernel.extend").path
    ((needed, parameter),) = place(plugin, "TritonGDNKernel.extend").needs
    found.add(needed, engine_stand_in.function(needed, inspect.signature(lambda self, h: None)))
    record = plugin.examine()[path]
    assert record.state == "signature differs" and record.why.endswith(f"without {parameter}")


# Other plugins -------------------------------------------------------------------------------------------------


def test_yields_a_place_of_sglang_unless_chosen_by_name(monkeypatch):
    plugin, found, registry = engine_stand_in.sglang(monkeypatch)
    path = place(plugin, ".fused_gdn_gating").path
    registry.source = types.SimpleNamespace(plugin_name="earlier")
    registry.register(path, lambda *args, **kwargs: "earlier", HookType.REPLACE)
    registry.source = None
    plugin.apply()
    row = {row["place"]: row for row in plugin.report()}[path]
    assert row["state"] == "yielded" and "earlier" in row["why"]
    assert found.get(path)() == "earlier"
    plugin.restore()

    plugin, found, registry = engine_stand_in.sglang(monkeypatch, "earlier,gdn_kernels")
    registry.register(path, lambda *args, **kwargs: "earlier", HookType.REPLACE)
    plugin.register()
    registry.apply_hooks()
    gates = torch.zeros(3, HV)
    g, _ = found.get(path)(torch.zeros(HV), gates, gates, torch.zeros(HV))
    assert g.shape == (1, 3, HV)


def test_a_later_plugin_of_sglang_is_reported(monkeypatch):
    plugin, found, registry = engine_stand_in.sglang(monkeypatch, "gdn_kernels")
    path = place(plugin, ".fused_gdn_gating").path
    plugin.register()
    registry.source = types.SimpleNamespace(plugin_name="later")
    registry.register(path, lambda *args, **kwargs: "later", HookType.REPLACE)
    registry.apply_hooks()
    row = {row["place"]: row for row in plugin.report()}[path]
    assert found.get(path)() == "later" and row["state"] == "overridden" and "later" in row["why"]


@pytest.mark.parametrize("keeps_the_name", [False, True], ids=["own-module", "wraps"])
def test_yields_a_place_of_vllm_unless_chosen_by_name(keeps_the_name, monkeypatch):
    def earlier(*args, **kwargs):
        return "earlier"

    for by_name in (False, True):
        plugin, found = engine_stand_in.vllm(monkeypatch)
        path = place(plugin, ".layernorm_fn").path
        earlier.__signature__ = inspect.signature(found.get(path))
        earlier.__module__ = "vllm.third_party" if keeps_the_name else "another_plugin"
        found.add(path, earlier)
        plugin.apply(by_name=by_name)
        state = {row["place"]: row["state"] for row in plugin.report()}[path]
        assert (state, found.get(path) is earlier) == (("replaced", False) if by_name else ("yielded", True))


# Undoing -------------------------------------------------------------------------------------------------------


@both
def test_restore_puts_back_exactly_what_was_there(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    before = found.state()
    plugin.apply()
    assert found.state() != before
    plugin.restore()
    assert found.state() == before and states(plugin) == {"restored"}
    plugin.apply()
    assert states(plugin) == {"replaced"}
    plugin.restore()
    assert found.state() == before


def test_restore_keeps_what_other_plugins_wrapped_around(monkeypatch):
    plugin, found, registry = engine_stand_in.sglang(monkeypatch)
    path = place(plugin, ".fused_gdn_gating").path
    registry.register(path, lambda original, *args, **kwargs: ("around", original(*args, **kwargs)), HookType.AROUND)
    plugin.apply()
    plugin.restore()
    assert found.get(path)(1) == ("around", (ENGINE, (1,), {}))


def test_the_snapshot_of_a_kernel_is_announced_while_it_is_there(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    kernel, _ = found.owner(place(plugin, "TritonGDNKernel.extend").path)
    plugin.apply()
    assert kernel.supports_track_state_snapshot is True
    plugin.restore()
    assert not hasattr(kernel, "supports_track_state_snapshot")


@both
def test_the_split_point_is_listed_as_the_engine_lists_its_own(engine, monkeypatch):
    plugin, _ = stand_in(engine, monkeypatch)
    if engine == "sglang":
        names = sys.modules["sglang.srt.compilation.compilation_config"].SPLIT_OPS
        ours = str(torch.ops.gdn.linear_attention_with_output)  # what SGLang compares with
    else:
        names = sys.modules["vllm.config.compilation"].CompilationConfig._attention_ops
        ours = "gdn::linear_attention_with_output"
    before = list(names)
    plugin.apply()
    assert names == [*before, ours]
    plugin.restore()
    assert names == before


# Calls ---------------------------------------------------------------------------------------------------------


def decode_arguments(slots: list[int], state_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows = len(slots)
    return {
        "mixed_qkv": rand(rows, D),
        "a": rand(rows, HV),
        "b": rand(rows, HV, seed=1),
        "A_log": rand(HV),
        "dt_bias": rand(HV, seed=1),
        "scale": K**-0.5,
        "initial_state": rand(6, HV, V, K).to(state_dtype),
        "out": torch.full((rows, 1, HV, V), torch.nan),
        "ssm_state_indices": torch.tensor(slots, dtype=torch.int32),
        "use_qk_l2norm_in_kernel": True,
    }


@both
def test_decode_writes_out_and_pool_and_knows_the_engines_null_slot(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    null = {"sglang": -1, "vllm": 0}[engine]
    arguments = decode_arguments([3, null, 5])
    before = arguments["initial_state"].clone()
    path = place(plugin, ".fused_recurrent_gated_delta_rule_packed_decode").path
    out, state = found.get(path)(**arguments)
    assert out is arguments["out"] and state is arguments["initial_state"]
    expected_state = before.clone()
    expected = torch.ops.gdn.packed_decode(
        *(arguments[name] for name in ("mixed_qkv", "a", "b", "A_log", "dt_bias")),
        expected_state,
        torch.tensor([3, -1, 5], dtype=torch.int32),
        num_k_heads=H,
    )
    assert torch.equal(out[:, 0], expected) and torch.equal(state, expected_state)
    assert not out[1].any() and torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    row = {row["place"]: row for row in plugin.report()}[path]
    assert row["calls"] == 1 and f"mixed_qkv float32 [3, {D}]" in row["shapes"]


class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@both
@pytest.mark.parametrize(
    "out, ran",
    [
        (torch.empty(2, 1, HV, V), ["packed_decode_out"]),
        (torch.empty(2, 1, HV, 2 * V)[..., :V], ["packed_decode", "unsqueeze", "copy_"]),
        (torch.empty(2, 1, HV, V, dtype=torch.float64), ["packed_decode", "unsqueeze", "copy_"]),
    ],
    ids=["written", "strided", "another-dtype"],
)
def test_decode_writes_the_engines_tensor_or_copies_into_it(out, ran, engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    arguments = {**decode_arguments([3, 5]), "out": out.fill_(torch.nan)}
    before = arguments["initial_state"].clone()
    with Dispatched() as dispatched:
        returned, _ = found.get(place(plugin, ".fused_recurrent_gated_delta_rule_packed_decode").path)(**arguments)
    names = ("mixed_qkv", "a", "b", "A_log", "dt_bias")
    slots = arguments["ssm_state_indices"]
    wanted = torch.ops.gdn.packed_decode(*(arguments[name] for name in names), before, slots, num_k_heads=H)
    assert returned is out and torch.equal(out[:, 0], wanted.to(out.dtype))
    assert torch.equal(arguments["initial_state"], before)
    # an operator that refuses is not dispatched to its end
    assert [name for name in dispatched.names if name != "packed_decode_out" or len(ran) == 1] == ran


def update_arguments(engine: str, tokens: int, rows: int = 3) -> dict[str, Any]:
    """What an engine gives its gated update for rows of ``tokens``, packed, the gates as columns of one tensor."""
    q, k, v = rand(1, rows * tokens, D).split([H * K, H * K, HV * V], dim=-1)
    gates = rand(rows * tokens, 2 * HV)
    arguments = {
        "A_log": rand(HV),
        "dt_bias": rand(HV, seed=1),
        "a": gates[:, HV:],
        "b": gates[:, :HV],
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "use_qk_l2norm_in_kernel": True,
        "cu_seqlens": torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32),
    }
    slots, pool = torch.tensor([3, 1, 5], dtype=torch.int32), rand(12, HV, V, K)
    if engine == "vllm":
        table = torch.arange(1, 1 + rows * tokens, dtype=torch.int32).view(rows, tokens)
        accepted = torch.tensor([1, tokens, 2], dtype=torch.int32)
        drafts = {"ssm_state_indices": table, "num_accepted_tokens": accepted}
        return {**arguments, "initial_state": pool, **({"ssm_state_indices": slots} if tokens == 1 else drafts)}
    arguments |= {"softplus_beta": 1.0, "softplus_threshold": 20.0}
    arguments |= {"initial_state_source": pool, "initial_state_indices": slots}
    if tokens == 1:
        return arguments
    buffer = torch.full((rows + 1, tokens, HV, V, K), torch.nan)
    return {
        **arguments,
        "disable_state_update": True,
        "intermediate_states_buffer": buffer,
        "intermediate_state_indices": torch.tensor([2, 0, 3], dtype=torch.int32),
        "cache_steps": tokens,
    }


@both
@pytest.mark.parametrize("tokens", [1, 4], ids=["decode", "drafts"])
def test_a_gated_update_is_one_operator_call_with_the_results_of_rows(tokens, engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    update = found.get(place(plugin, ".fused_sigmoid_gating_delta_rule_update").path)
    arguments = update_arguments(engine, tokens)
    rows = [
        x.reshape(3, tokens, *x.shape[-(1 if name in "ab" else 2) :]).contiguous()
        for name, x in ((name, arguments[name]) for name in ("q", "k", "v", "a", "b"))
    ]
    options = {"use_qk_l2norm": True, "A_log": arguments["A_log"], "dt_bias": arguments["dt_bias"]}
    if engine == "sglang" and tokens > 1:
        operator, buffer = "recurrent_gated_delta_rule_verify", arguments["intermediate_states_buffer"]
        wanted_buffer = buffer.clone()
        written, wanted_written = buffer, wanted_buffer
        indices = arguments["initial_state_indices"]
        pools = arguments["initial_state_source"], wanted_buffer
        options["intermediate_indices"] = arguments["intermediate_state_indices"]
    else:
        operator = "recurrent_gated_delta_rule_paged"
        written = arguments["initial_state" if engine == "vllm" else "initial_state_source"]
        wanted_written = written.clone()
        indices = arguments["ssm_state_indices" if engine == "vllm" else "initial_state_indices"]
        pools = (wanted_written,)
        if engine == "vllm":
            options |= {"num_accepted_tokens": arguments.get("num_accepted_tokens"), "pad_slot_id": 0}
    wanted = getattr(torch.ops.gdn, operator)(*rows, *pools, indices, **options)
    with Dispatched() as dispatched:
        o = update(**arguments)
    o = o[0] if engine == "vllm" else o
    assert dispatched.names == [operator]
    assert o.shape == arguments["v"].shape and torch.equal(o.view(wanted.shape), wanted)
    assert torch.equal(written.nan_to_num(), wanted_written.nan_to_num())


@both
def test_an_update_of_unequal_lengths_keeps_to_its_offsets(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    update = found.get(place(plugin, ".fused_sigmoid_gating_delta_rule_update").path)
    arguments = update_arguments(engine, 1, rows=4)
    arguments["cu_seqlens"] = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    name = "initial_state" if engine == "vllm" else "initial_state_source"
    slots = arguments["ssm_state_indices" if engine == "vllm" else "initial_state_indices"]
    pool, before = arguments[name], arguments[name].clone()
    o = update(**arguments)
    o = o[0] if engine == "vllm" else o
    wanted = torch.ops.gdn.recurrent_gated_delta_rule_paged(
        *(arguments[name] for name in ("q", "k", "v")),
        *(arguments[name].unsqueeze(0) for name in ("a", "b")),
        before,
        slots,
        cu_seqlens=arguments["cu_seqlens"],
        use_qk_l2norm=True,
        A_log=arguments["A_log"],
        dt_bias=arguments["dt_bias"],
    )
    assert torch.equal(o, wanted) and torch.equal(pool, before)


def conv_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "x": rand(3, D),
        "conv_state": rand(6, D, W - 1),
        "weight": rand(D, W),
        "activation": "silu",
        "conv_state_indices": torch.tensor([3, 1, 5], dtype=torch.int32),
        **changes,
    }


@both
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"conv_state": torch.zeros(6, D, W - 1, dtype=torch.int8)}, "a dtype that is not built"),
        ({"weight": torch.zeros(D, 5), "conv_state": torch.zeros(6, D, 4)}, "a width of 5|weight must have a width"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"conv_state_indices": torch.tensor([3.0, 1.0, 5.0])}, "conv_state_indices of float32|indices of float32"),
        ({"x": rand(3, D, 2)}, "a time-last x"),
        ({"conv_state": None}, "no conv state"),
    ],
    ids=["dtype", "width", "activation", "indices", "time-last", "no-state"],
)
def test_a_conv_that_an_operator_refuses_is_left_to_the_engine(change, reason, engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    for here in [place for place in plugin.places if place.path.endswith(".causal_conv1d_update")]:
        arguments = conv_arguments(**change)
        before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        assert found.get(here.path)(**arguments)[0] == ENGINE
        (left,) = ({row["place"]: row for row in plugin.report()}[here.path])["left"]
        assert re.match(reason, left)
        assert all(torch.equal(arguments[name], x) for name, x in before.items())


@both
def test_true_is_silu_to_a_conv_and_false_is_none(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    for here in [place for place in plugin.places if place.path.endswith(".causal_conv1d_update")]:
        for given, meant in ((True, "silu"), (False, None), ("swish", "silu"), (None, None)):
            arguments = conv_arguments(activation=given)
            x, pool, weight, slots = (arguments[n] for n in ("x", "conv_state", "weight", "conv_state_indices"))
            wanted = torch.ops.gdn.causal_conv1d_update(
                x, weight, None, pool.clone(), state_indices=slots, activation=meant
            )
            assert torch.equal(found.get(here.path)(**arguments), wanted), given


@both
def test_slot_zero_is_live_in_sglang_alone(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    arguments = decode_arguments([0])
    before = arguments["initial_state"].clone()
    found.get(place(plugin, ".fused_recurrent_gated_delta_rule_packed_decode").path)(**arguments)
    assert torch.equal(arguments["initial_state"], before) == (engine == "vllm")


@both
@pytest.mark.parametrize(
    "change, reason",
    [({"initial_state": torch.zeros(6, HV, V, K, dtype=torch.int8)}, "a state of int8"), ({}, "head size K must be")],
    ids=["quantised-state", "head-size"],
)
def test_a_case_that_is_not_built_is_left_to_the_engine_and_counted(engine, change, reason, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    arguments = decode_arguments([3])
    if not change:  # K = 32
        change = {"mixed_qkv": rand(1, 2 * H * 32 + HV * V), "initial_state": rand(6, HV, V, 32)}
    arguments.update(change)
    path = place(plugin, ".fused_recurrent_gated_delta_rule_packed_decode").path
    ran, args, kwargs = found.get(path)(**arguments)
    assert ran == ENGINE and args == () and all(kwargs[name] is value for name, value in arguments.items())
    row = {row["place"]: row for row in plugin.report()}[path]
    assert row["calls"] == 0 and sum(row["left"].values()) == 1 and next(iter(row["left"])).startswith(reason)
    assert reason in _engines.format_report(plugin.report())


@both
def test_kda_is_left_to_the_engine(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    path = place(plugin, ".fused_sigmoid_gating_delta_rule_update").path
    names = [name for name in inspect.signature(found.get(path)).parameters if name not in ("is_kda", "lower_bound")]
    assert found.get(path)(**dict.fromkeys(names), is_kda=True)[0] == ENGINE
    assert {row["place"]: row["left"] for row in plugin.report()}[path] == {"KDA": 1}


@both
def test_an_error_names_operator_place_and_shapes_and_leaves_the_state(engine, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    arguments = decode_arguments([3, 4])
    arguments["a"] = arguments["a"][:1]
    before = arguments["initial_state"].clone()
    path = place(plugin, ".fused_recurrent_gated_delta_rule_packed_decode").path
    with pytest.raises(ValueError) as raised:
        found.get(path)(**arguments)
    text = str(raised.value)
    wanted = ("a must have shape", "gdn::packed_decode", path, f"mixed_qkv float32 [2, {D}]", "a float32 [1, 2]")
    assert all(part in text for part in wanted), text
    assert isinstance(raised.value.__cause__, ValueError) and torch.equal(arguments["initial_state"], before)


def test_an_error_class_of_its_own_arguments_becomes_a_runtime_error():
    class Peculiar(Exception):
        def __init__(self, first, second):
            super().__init__(first, second)

    record = _engines.Record(_engines.Place("an.engine.function", lambda: None, ("gating",)), "replaced")
    error = _engines._with_place(record, Peculiar("one", "two"), "x")
    assert type(error) is RuntimeError and "Peculiar" in str(error) and "an.engine.function" in str(error)


# Places whose engine does more than call one operator ----------------------------------------------------------


def test_sglang_norm_of_the_fused_module_is_in_place(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    plugin.apply()
    x, g, weight = rand(6, V), rand(3, 2, V, seed=1), rand(V)
    expected = torch.ops.gdn.layer_norm_gated(x.view(3, 2, V), weight, None, g, norm_before_gate=True).view(6, V)
    y = found.get(place(plugin, "fused_norm_gate.rms_norm_gated").path)(x, g, weight, None)
    assert y is x and torch.equal(x, expected)


def extend(**changes: Any) -> dict[str, Any]:
    tokens, lengths = 200, torch.tensor([0, 130, 135, 200], dtype=torch.int32)
    q, k, v = rand(1, tokens, D).split([H * K, H * K, HV * V], dim=-1)
    return {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "g": -rand(1, tokens, HV).abs(),
        "beta": rand(1, tokens, HV, seed=1).sigmoid(),
        "ssm_states": rand(6, HV, V, K),
        "cache_indices": torch.tensor([4, -1, 2], dtype=torch.int32),
        "query_start_loc": lengths,
        **changes,
    }


def test_sglang_prefill_tracks_the_state_where_a_chunk_begins(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    plugin.apply()
    run = found.get(place(plugin, "TritonGDNKernel.extend").path)
    arguments = extend(
        track_state=torch.full((3, HV, V, K), 7.0),
        track_chunk_idx=torch.tensor([2, -1, 0], dtype=torch.int32),
        output=torch.empty(1, 200, HV, V),
    )
    before, track = arguments["ssm_states"].clone(), arguments["track_state"]
    o, last, h = run(object(), **arguments)
    assert o is arguments["output"] and last is None and h is None
    q, k, v, g, beta = (arguments[name][:, :128] for name in ("q", "k", "v", "g", "beta"))
    _, at_128 = torch.ops.gdn.recurrent_gated_delta_rule(
        q, k, v, g, beta, initial_state=before[4:5], use_qk_l2norm=True
    )
    torch.testing.assert_close(track[:1], at_128, rtol=0, atol=1e-5)
    assert torch.equal(track[1], torch.full_like(track[1], 7.0)) and torch.equal(track[2], before[2])
    assert not torch.equal(arguments["ssm_states"][4], before[4])

    again = extend()
    plain, _, _ = run(object(), **again, inplace_update=False)
    assert torch.equal(plain, o) and torch.equal(again["ssm_states"], before)


def test_sglang_prefill_left_to_the_engine_still_fills_the_tracked_state(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    path = place(plugin, "TritonGDNKernel.extend").path
    # chunks of 130, 5 and 65 tokens: rows 0 to 2, 3, 4 and 5
    h = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, HV, V, 32)
    seen = {}

    def engines_own(self, q, k, v, g, beta, *, inplace_update=True, **kwargs):
        seen.update(kwargs)
        return "o", None, h

    engines_own.__signature__ = inspect.signature(found.get(path))
    found.add(path, engines_own)
    plugin.apply()
    arguments = extend(
        q=rand(1, 200, H, 32),
        k=rand(1, 200, H, 32),
        ssm_states=rand(6, HV, V, 32),
        track_state=torch.full((3, HV, V, 32), -1.0),
        track_chunk_idx=torch.tensor([2, -1, 1], dtype=torch.int32),
    )
    o, _, _ = found.get(path)(object(), **arguments)
    assert o == "o" and "track_state" not in seen
    assert arguments["track_state"][:, 0, 0, 0].tolist() == [2.0, -1.0, 5.0]


def test_sglang_splits_are_views_unless_another_backend_is_there(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    plugin.apply()
    mixed = rand(5, D)
    split = found.get(place(plugin, ".fused_qkv_split_gdn_prefill").path)
    sizes = (H, H, HV, K, K, V)
    q, k, v = split(mixed, *sizes)
    assert (q.shape, k.shape, v.shape) == ((1, 5, H, K), (1, 5, H, K), (1, 5, HV, V))
    assert torch.equal(torch.cat([x.flatten(2) for x in (q, k, v)], -1)[0], mixed) and q.data_ptr() == mixed.data_ptr()
    found.module("sglang.srt.layers.attention.linear.kernels.gdn_cutedsl")
    assert split(mixed, *sizes)[0] == ENGINE


def test_sglang_prefill_stays_here_by_default(monkeypatch):
    plugin, found, _ = engine_stand_in.sglang(monkeypatch)
    plugin.apply()
    assert found.get(place(plugin, ".flashinfer_gdn_prefill_default").path)(object()) is None


@pytest.mark.parametrize("requested, active, wanted", [("auto", "flashinfer", "triton"), ("flashinfer",) * 3])
def test_vllm_prefill_stays_here_unless_another_backend_is_named(requested, active, wanted, monkeypatch):
    plugin, found = engine_stand_in.vllm(monkeypatch)
    path = place(plugin, "._resolve_gdn_prefill_backend").path
    own = engine_stand_in.function(path, inspect.signature(found.get(path)))
    resolve = types.FunctionType(
        (lambda vllm_config: vllm_config).__code__.replace(co_filename="/engines/vllm/x.py"), {}
    )
    resolve.__module__, resolve.__signature__ = "vllm.layer", inspect.signature(own)
    found.add(path, resolve)
    plugin.apply()
    assert found.get(path)((requested, active)) == (requested, wanted)


def test_vllm_conv_takes_uniform_drafts_and_leaves_ragged_ones(monkeypatch):
    plugin, found = engine_stand_in.vllm(monkeypatch)
    plugin.apply()
    update = found.get(place(plugin, ".causal_conv1d_update").path)
    table = torch.tensor([[3, 8], [0, 9], [5, 7]], dtype=torch.int32)
    pool, weight, x = rand(10, D, W), rand(D, W), rand(6, D)
    arguments = {
        "activation": "silu",
        "conv_state_indices": table[:, 0],
        "num_accepted_tokens": torch.tensor([1, 1, 2], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, 4, 6], dtype=torch.int32),
        "max_query_len": 2,
    }
    expected_pool = pool.clone()
    expected = torch.ops.gdn.causal_conv1d_update(
        x.view(3, 2, D),
        weight,
        None,
        expected_pool,
        state_indices=table[:, 0].contiguous(),
        num_accepted_tokens=arguments["num_accepted_tokens"],
        pad_slot_id=0,
    )
    y = update(x, pool, weight, **arguments)
    assert torch.equal(y.view(3, 2, D), expected) and torch.equal(pool, expected_pool) and not y[2:4].any()
    assert update(x[:5], pool, weight, **arguments)[0] == ENGINE


@pytest.mark.parametrize("decodes", [0, 2])
def test_vllm_prompts_run_on_the_pools_and_recycled_slots_do_not_leak(decodes, monkeypatch):
    plugin, found = engine_stand_in.vllm(monkeypatch)
    plugin.apply()
    path = place(plugin, "._forward_core").path
    prompts, padded = [70, 0, 5], 3
    tokens = decodes + sum(prompts)
    slots = torch.tensor([7, 8][:decodes] + [3, 0, 5], dtype=torch.int32)
    known = torch.tensor([True] * decodes + [True, False, False])
    offsets = torch.tensor([0, *torch.tensor([1] * decodes + prompts).cumsum(0)], dtype=torch.int32)
    metadata = types.SimpleNamespace(
        num_prefills=3,
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_actual_tokens=tokens,
        spec_sequence_masks=None,
        flashinfer_checkpoint_plan=None,
        has_initial_state=known,
        non_spec_state_indices_tensor=slots,
        non_spec_query_start_loc=offsets,
        prefill_state_indices=slots[decodes:],
        prefill_query_start_loc=offsets[decodes:] - decodes,
        prefill_has_initial_state=known[decodes:],
    )
    context = types.SimpleNamespace(attn_metadata={"layer": metadata})
    found.module("vllm.forward_context").get_forward_context = lambda: context
    found.module("vllm.model_executor.layers.mamba.mamba_utils").is_conv_state_dim_first = lambda: False
    layer = types.SimpleNamespace(
        prefix="layer",
        gdn_prefill_backend="triton",
        kv_cache=(rand(10, W - 1, D), rand(10, HV, V, K)),
        conv1d=types.SimpleNamespace(weight=rand(D, 1, W), bias=None),
        activation="silu",
        A_log=rand(HV),
        dt_bias=rand(HV, seed=1),
    )
    mixed, a, b = rand(tokens + padded, D), rand(tokens + padded, HV), rand(tokens + padded, HV, seed=1)
    out = torch.zeros(tokens + padded, HV, V)
    windows, states_ = (x.clone() for x in layer.kv_cache)
    assert found.get(path)(layer, mixed, b, a, out) is None

    real = torch.where(slots > 0, slots, -1)
    x = torch.ops.gdn.causal_conv1d(
        mixed[:tokens],
        layer.conv1d.weight[:, 0],
        None,
        windows.transpose(1, 2),
        offsets,
        state_indices=real,
        has_initial_state=known,
    )
    q, k, v = x[None].split([H * K, H * K, HV * V], dim=-1)
    first = states_[slots.long()] * known.view(-1, 1, 1, 1)
    o, last = torch.ops.gdn.recurrent_gated_delta_rule(
        q.unflatten(-1, (H, K)),
        k.unflatten(-1, (H, K)),
        v.unflatten(-1, (HV, V)),
        a[None, :tokens],
        b[None, :tokens],
        initial_state=first,
        cu_seqlens=offsets,
        use_qk_l2norm=True,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
    )
    live = real.clone()
    live[offsets.diff() == 0] = -1
    states_[live[live > 0].long()] = last[live > 0]
    torch.testing.assert_close(out[:tokens], o[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.kv_cache[1], states_, rtol=0, atol=1e-5)
    assert torch.equal(layer.kv_cache[0], windows) and not out[tokens:].any()

    # A refusal comes before the conv: both pools are as they were.
    before = [x.clone() for x in layer.kv_cache]
    layer.dt_bias = layer.dt_bias[:1]
    with pytest.raises(ValueError, match="dt_bias must have shape"):
        found.get(path)(layer, mixed, b, a, out)
    assert all(torch.equal(now, then) for now, then in zip(layer.kv_cache, before, strict=True))
    metadata.num_prefills = 0
    assert found.get(path)(layer, mixed, b, a, out)[0] == ENGINE


# Dynamo --------------------------------------------------------------------------------------------------------

NORMS = {"sglang": ("layernorm_gated.RMSNorm.forward", "fused_norm_gate.FusedRMSNormGated.forward"), "vllm": ()}
MODULES = [("sglang", name) for name in NORMS["sglang"]] + [("vllm", "layernorm_guard.RMSNormGated.forward")]


@pytest.mark.parametrize("engine, name", MODULES, ids=[name for _, name in MODULES])
def test_a_traced_module_with_our_norm_compiles_once_for_all_token_counts(engine, name, monkeypatch):
    plugin, found = stand_in(engine, monkeypatch)
    plugin.apply()
    forward = found.get(place(plugin, name).path)
    module = types.SimpleNamespace(
        weight=rand(V), bias=None, eps=1e-6, group_size=None, norm_before_gate=True, activation="silu"
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, z: forward(module, x * 1, z) + 0, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 8, 64, 65, 512, 2048):
        x, z = rand(tokens * HV, V), rand(tokens * HV, V, seed=1)
        expected = torch.ops.gdn.layer_norm_gated(x, module.weight, None, z, norm_before_gate=True)
        assert torch.equal(compiled(x, z), expected)
    assert len(graphs) == 1


# The command ---------------------------------------------------------------------------------------------------


@both
def test_the_command_says_versions_configurations_and_places(engine, monkeypatch, tmp_path, capsys):
    plugin, found = stand_in(engine, monkeypatch)
    other = {"sglang": "vllm", "vllm": "sglang"}[engine]
    monkeypatch.setitem(sys.modules, other, None)
    path = place(plugin, ".layernorm_fn").path
    assert command.main(["--json", str(tmp_path / "found.json")]) == 0
    found.add(path, engine_stand_in.function(path, inspect.signature(lambda x: None)))
    assert command.main([engine]) == 1
    data, text = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert data["places"][other] is None and len(data["places"][engine]) == len(plugin.places)
    assert data["versions"]["torch"] == torch.__version__ and "RecurrentConfig" in data["configurations"]["recurrent"]
    assert f"{other}: not installed" in text and f"signature differs  {path}" in text and "found (x)" in text
    with pytest.raises(SystemExit):
        command.main(["another"])
