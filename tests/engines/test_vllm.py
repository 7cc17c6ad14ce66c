"""The plugin for vLLM against vLLM's own code: what is replaced, and what it computes beside it."""

from __future__ import annotations

import functools
import sys
import types

import engine_cases
import pytest
import suite
import torch
import triton_support

plugin = suite.load("vllm", triton_support.INTERPRETED)

import vllm.plugins  # noqa: E402
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layers  # noqa: E402
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import RMSNormGated  # noqa: E402
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata  # noqa: E402

SHAPES = engine_cases.SMALL
CASES = engine_cases.vllm_cases(SHAPES, (3,), ((70, 5, 64),))
#: Kernels of vLLM that Triton's interpreter does not run: a loop variable with a method, a grid that reads an argument.
NOT_INTERPRETED = ("causal_conv1d_fn", "chunk_gated_delta_rule")


@pytest.fixture
def loaded(monkeypatch):
    """vLLM loads its plugins, ours as an installed package, under these environment variables."""
    for name in ("VLLM_PLUGINS", "GDN_KERNELS_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    before = suite.functions(plugin)

    def load(**variables: str) -> dict[str, int]:
        suite.entry_point(plugin, vllm.plugins.DEFAULT_PLUGINS_GROUP, monkeypatch)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        return before

    yield load
    monkeypatch.undo()
    plugin.restore()
    plugin.records.clear()
    suite.unchanged(plugin, before)


def test_every_signature_is_the_expected_one():
    assert {path: record.why for path, record in plugin.examine().items() if record.state != "replaced"} == {}


@pytest.mark.parametrize(
    "variables",
    [{}, {"VLLM_PLUGINS": "another"}, {"GDN_KERNELS_ENGINE": "0"}],
    ids=["nothing-set", "another-named", "variable-0"],
)
def test_not_chosen_the_engine_is_as_it_was(variables, loaded):
    before = loaded(**variables)
    suite.unchanged(plugin, before)


@pytest.mark.parametrize(
    "variables", [{"VLLM_PLUGINS": "gdn_kernels"}, {"GDN_KERNELS_ENGINE": "1"}], ids=["named", "variable-1"]
)
def test_chosen_every_place_is_replaced_where_it_is_used(variables, loaded):
    before = loaded(**variables)
    after = suite.functions(plugin)
    assert {row["state"] for row in plugin.report()} == {"replaced"}
    assert not [place.path for place in plugin.places if before[place.path] == after[place.path]]
    used = ("causal_conv1d_update", "fla_chunk_gated_delta_rule", "fused_sigmoid_gating_delta_rule_update")
    assert all(before[f"{layers.__name__}:{name}"] != after[f"{layers.__name__}:{name}"] for name in used)


def test_the_module_runs_and_reports(loaded):
    loaded(GDN_KERNELS_ENGINE="1")
    norm = RMSNormGated(64, eps=1e-6, norm_before_gate=True)
    x, z = torch.randn(6, 64), torch.randn(6, 64)
    with torch.no_grad():
        assert torch.equal(norm(x, z), torch.ops.gdn.layer_norm_gated(x, norm.weight, None, z, norm_before_gate=True))
    (row,) = (row for row in plugin.report() if row["place"].endswith("RMSNormGated.forward"))
    assert row["calls"] == 1 and "x float32 [6, 64]" in row["shapes"]


def test_a_traced_model_function_compiles_once_for_all_token_counts(loaded):
    loaded(GDN_KERNELS_ENGINE="1")
    norm, graphs = RMSNormGated(64, eps=1e-6, norm_before_gate=True), []

    def layer(core, z):
        """The end of vLLM's mixer, as its layer writes it."""
        return norm(core, z).flatten(-2)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 2, 7, 64, 65, 300, 1024, 4096):
            x, z = torch.randn(tokens, 2, 64), torch.randn(tokens, 2, 64)
            assert torch.equal(compiled(x, z), layer(x, z))
    assert len(graphs) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_further_from_fp64_than_vllm(case):
    name = case.place.rpartition(".")[2]
    suite.compare(plugin, case, torch.float16, runs=name not in NOT_INTERPRETED)


@pytest.mark.interpreter
@pytest.mark.parametrize("decodes", [0, 2], ids=["prompts", "prompts-and-decodes"])
def test_the_layers_core_is_vllms_own_on_the_same_functions(decodes, loaded, monkeypatch):
    """vLLM's ``_forward_core``, with gathers, its own kernel for split, norm and gates, and scatters, beside ours."""
    own = layers.QwenGatedDeltaNetAttention._forward_core
    loaded(GDN_KERNELS_ENGINE="1")
    inputs = engine_cases.Inputs(0, torch.device("cpu"), torch.float16)
    lengths = [1] * decodes + [70, 5, 64]
    tokens, offsets = sum(lengths), inputs.offsets(lengths)
    slots, known = (
        inputs.tensor(list(range(3, 3 + len(lengths)))),
        inputs.tensor([True] * decodes + [True, False, True]),
    )
    known = known.bool()
    metadata = GDNAttentionMetadata(
        num_prefills=3,
        num_prefill_tokens=tokens - decodes,
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_spec_decodes=0,
        num_spec_decode_tokens=0,
        num_actual_tokens=tokens,
        has_initial_state=known,
        non_spec_query_start_loc=offsets,
        non_spec_state_indices_tensor=slots,
        prefill_query_start_loc=offsets[decodes:] - decodes,
        prefill_state_indices=slots[decodes:],
        prefill_has_initial_state=known[decodes:],
    )
    context = types.SimpleNamespace(attn_metadata={"layer": metadata})
    monkeypatch.setattr(layers, "get_forward_context", lambda: context)
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    for module in (layers, sys.modules["vllm.model_executor.layers.mamba.mamba_utils"]):
        monkeypatch.setattr(module, "is_conv_state_dim_first", lambda: False)
    gates = inputs.gates(SHAPES, tokens + 2)

    def run(core) -> tuple[torch.Tensor, ...]:
        draw = engine_cases.Inputs(1, torch.device("cpu"), torch.float16)
        layer = types.SimpleNamespace(
            prefix="layer",
            enable_packed_recurrent_decode=True,
            gdn_prefill_backend="triton",
            kv_cache=(draw.normal(12, SHAPES.W - 1, SHAPES.channels), draw.pool(SHAPES, 12)),
            conv1d=types.SimpleNamespace(weight=draw.normal(SHAPES.channels, 1, SHAPES.W) * 0.5, bias=None),
            activation="silu",
            A_log=gates["A_log"],
            dt_bias=gates["dt_bias"],
            key_dim=SHAPES.H * SHAPES.K,
            value_dim=SHAPES.HV * SHAPES.V,
            num_k_heads=SHAPES.H,
            num_v_heads=SHAPES.HV,
            head_k_dim=SHAPES.K,
            head_v_dim=SHAPES.V,
            tp_size=1,
            chunk_gated_delta_rule=lambda aiter_prefill_metadata, **call: layers.fla_chunk_gated_delta_rule(**call),
        )
        cls = layers.QwenGatedDeltaNetAttention
        layer.rearrange_mixed_qkv = functools.partial(cls.rearrange_mixed_qkv, layer)
        mixed, out = draw.normal(tokens + 2, SHAPES.channels), torch.zeros(tokens + 2, SHAPES.HV, SHAPES.V).half()
        core(layer, mixed, gates["b"].contiguous(), gates["a"].contiguous(), out)
        return out, *layer.kv_cache

    ours, theirs = run(layers.QwenGatedDeltaNetAttention._forward_core), run(own)
    (row,) = (row for row in plugin.report() if row["place"].endswith("_forward_core"))
    assert row["calls"] == 1 and not row["left"]
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=2e-3)
