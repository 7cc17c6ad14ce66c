"""The plugin for SGLang against SGLang's own code: what is replaced, and what it computes beside it."""

from __future__ import annotations

import engine_cases
import pytest
import suite
import torch
import triton_support

plugin = suite.load("sglang", triton_support.INTERPRETED)

from sglang.kernels.ops.attention.fla.layernorm_gated import RMSNorm  # noqa: E402
from sglang.srt import plugins  # noqa: E402
from sglang.srt.layers.attention.linear import gdn_backend  # noqa: E402
from sglang.srt.plugins import hook_registry  # noqa: E402

CASES = engine_cases.sglang_cases(engine_cases.SMALL, (3,), ((70, 5, 64),))


@pytest.fixture
def loaded(monkeypatch):
    """SGLang loads its plugins, ours as an installed package, under these environment variables."""
    for name in ("SGLANG_PLUGINS", "GDN_KERNELS_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    before = suite.functions(plugin)

    def load(**variables: str) -> dict[str, int]:
        suite.entry_point(plugin, plugins.GENERAL_PLUGINS_GROUP, monkeypatch)
        monkeypatch.setattr(plugins, "entry_points", suite.importlib.metadata.entry_points)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        found = suite.functions(plugin)
        plugins.load_plugins()
        return found

    yield load
    monkeypatch.undo()
    plugin.restore()
    hook_registry.HookRegistry.reset()
    plugin.records.clear()
    suite.unchanged(plugin, before)


def test_every_signature_is_the_expected_one():
    assert {path: record.why for path, record in plugin.examine().items() if record.state != "replaced"} == {}


@pytest.mark.parametrize(
    "variables",
    [{}, {"SGLANG_PLUGINS": "another"}, {"GDN_KERNELS_ENGINE": "0"}],
    ids=["nothing-set", "another-named", "variable-0"],
)
def test_not_chosen_the_engine_is_as_it_was(variables, loaded):
    before = loaded(**variables)
    suite.unchanged(plugin, before)


@pytest.mark.parametrize(
    "variables", [{"SGLANG_PLUGINS": "gdn_kernels"}, {"GDN_KERNELS_ENGINE": "1"}], ids=["named", "variable-1"]
)
def test_chosen_every_place_is_replaced_where_it_is_used(variables, loaded):
    before = loaded(**variables)
    after = suite.functions(plugin)
    assert {row["state"] for row in plugin.report()} == {"replaced"}
    assert not [place.path for place in plugin.places if before[place.path] == after[place.path]]
    used = ("causal_conv1d_fn", "causal_conv1d_update", "fused_gdn_gating")
    names = [f"{gdn_backend.__name__}:{name}" for name in used]
    assert all(before[name] != after[name] for name in names)
    assert gdn_backend.TritonGDNKernel.supports_track_state_snapshot is True


def test_the_layers_module_runs_and_reports(loaded):
    loaded(GDN_KERNELS_ENGINE="1")
    norm = RMSNorm(64, eps=1e-6, activation="silu")
    x, z = torch.randn(6, 64), torch.randn(3, 2, 64)
    with torch.no_grad():
        y = norm(x, z)
        expected = torch.ops.gdn.layer_norm_gated(x.view(3, 2, 64), norm.weight, None, z, norm_before_gate=True)
    assert torch.equal(y, expected.view(6, 64))
    (row,) = (row for row in plugin.report() if row["place"].endswith("layernorm_gated.RMSNorm.forward"))
    assert row["calls"] == 1 and "x float32 [6, 64]" in row["shapes"]


def test_a_traced_model_function_compiles_once_for_all_token_counts(loaded):
    loaded(GDN_KERNELS_ENGINE="1")
    norm, graphs = RMSNorm(64, eps=1e-6, activation="silu"), []

    def layer(core, z):
        """The end of SGLang's mixer, as its models write it."""
        shape = z.shape
        core, z = core.reshape(-1, core.shape[-1]), z.reshape(-1, z.shape[-1])
        return norm(core, z).reshape(shape).flatten(-2)

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
def test_no_further_from_fp64_than_sglang(case):
    if case.needs_gpu:
        pytest.skip("SGLang refuses CPU tensors there")
    suite.compare(plugin, case, torch.float16)


@pytest.mark.interpreter
def test_the_tracked_state_is_that_of_sglangs_chunks():
    (case,) = (case for case in CASES if case.place.endswith("TritonGDNKernel.extend"))
    arguments = case.arguments(engine_cases.Inputs(0, torch.device("cpu"), torch.float16))
    theirs, mine = engine_cases.copied(arguments), engine_cases.copied(arguments)
    _, _, h = suite.function(plugin, case)(*theirs[0], **theirs[1])
    state = arguments[1]["ssm_states"]
    track = torch.full((3, *state.shape[1:]), torch.nan)
    chunk = torch.tensor([1, -1, 0], dtype=torch.int32)
    suite.adapter(plugin, case)(*mine[0], **mine[1], track_state=track, track_chunk_idx=chunk)
    # chunks of 64 and 6, 5, and 64 tokens; SGLang rounds h to fp16
    assert track[1].isnan().all()
    for row, at in ((0, 1), (2, 3)):
        assert engine_cases.relative_error(h[0, at], track[row].double()) < suite.LIMITS[torch.float16]
