"""transformers' Qwen3-Next and Qwen3.5 with and without the operators: the same numbers, and nothing left behind."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import types
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[clients]'")

import transformers_support  # noqa: E402

import gdn_kernels.integrations.transformers as gdn  # noqa: E402

transformers_support.import_models()


PROMPT, NEW, PADDED = 70, 64, 23
TOLERANCE = 1e-4  # of logits of order one, fp32
SIZES = {
    "initializer_range": 0.05,  # logits of order one, which one mixer less changes by as much
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,  # the fourth is full attention
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**SIZES, **EXPERTS}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", SIZES),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**SIZES, **EXPERTS}),
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
#: As in the released models, fewer of them: the sizes whose kernels serve.
REAL = {
    "initializer_range": 0.02,  # the library's own
    "hidden_size": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "head_dim": 64,
}


def build(family: str = "qwen3_next", **changes):
    config, model, sizes = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes})).eval()
    for layer in mixers(model):  # as trained: gates that differ, a norm's weight that is not one
        torch.nn.init.normal_(layer.dt_bias)
        torch.nn.init.normal_(layer.norm.weight, 1.0, 0.2)
    return model


def mixers(model) -> list:
    return [module for module in model.modules() if type(module).__name__ in gdn.FAMILIES.values()]


def batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Two prompts, the second padded on the left."""
    tokens = torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[1, :PADDED] = mask[1, :PADDED] = 0
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small spend their time in the threads' barriers: a minute a model beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def restored():
    yield
    gdn.restore()


@pytest.fixture(scope="module", params=MODELS)
def expected(request):
    """A model and what it gives on the library's own code: logits of the prompts, then greedy tokens from a cache."""
    model = build(request.param)
    with torch.no_grad():
        return model, model(**batch()).logits, generate(model)


def generate(model, **options) -> torch.Tensor:
    found = model.generate(**batch(model.device), max_new_tokens=NEW, do_sample=False, **options)
    return found[:, PROMPT:]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = (found - wanted).abs().max().item()
    print(f"largest difference {difference:.2e} of {TOLERANCE:.0e}, largest logit {wanted.abs().max():.2f}")
    assert difference <= TOLERANCE


def kept(logits: torch.Tensor) -> torch.Tensor:
    """Without the padded positions, whose logits nobody reads."""
    return logits[batch(logits.device)["attention_mask"].bool()]


def test_logits_and_greedy_tokens_are_the_librarys(expected):
    model, logits, tokens = expected
    gdn.apply()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        close(kept(model(**batch()).logits), kept(logits))
        assert torch.equal(generate(model), tokens)
    calls = gdn._calls[type(mixers(model)[0]).__name__]
    assert sum(calls.values()) == 3 * (2 + NEW - 1) and not any("own code" in what for what in calls)


def test_cached_decode_logits_step_by_step(expected):
    model, _, tokens = expected
    inputs = batch()
    gdn.apply()
    ours = steps(model, inputs, tokens[:, :8])
    gdn.restore()
    close(ours, steps(model, inputs, tokens[:, :8]))


def after(cache) -> dict:
    """The cache as an argument of a model's forward, by its name in the installed version."""
    parameters = inspect.signature(transformers.Qwen3NextForCausalLM.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def steps(model, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, at: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits of ``tokens`` one by one after a prefill; before those of ``at`` the operators are switched on or off."""
    out = model(**inputs, use_cache=True)
    mask, logits = inputs["attention_mask"], [out.logits[:, -1]]
    for i in range(tokens.shape[1]):
        if i in at:
            (gdn.restore if gdn._replaced else gdn.apply)()
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        out = model(tokens[:, i : i + 1], attention_mask=mask, **after(out.past_key_values))
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def test_a_cache_passes_between_the_library_and_the_operators():
    model, inputs = build(), batch()
    tokens = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(2))
    wanted = steps(model, inputs, tokens)
    close(steps(model, inputs, tokens, at=(2, 5)), wanted)  # the library's, ours, the library's
    assert not gdn._replaced
    gdn.apply()
    close(steps(model, inputs, tokens, at=(3, 6)), wanted)


@torch.no_grad()
def test_a_prompt_in_pieces_continues_from_the_cache():
    model, inputs = build(), batch()
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs).logits
    gdn.apply()
    cache, logits = None, []
    for start, end in ((0, 40), (40, 42), (42, 43), (43, PROMPT)):  # fewer tokens than the conv is wide, and one
        out = model(tokens[:, start:end], attention_mask=mask[:, :end], **after(cache))
        cache = out.past_key_values
        logits.append(out.logits)
    close(kept(torch.cat(logits, 1)), kept(whole))


def test_beam_search_reorders_the_states():
    model = build()
    options = {"num_beams": 2, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(**batch(), **options)
    gdn.apply()
    assert torch.equal(model.generate(**batch(), **options), wanted)


def test_decode_updates_the_cached_state_in_place():
    model, inputs = build(), batch()
    gdn.apply()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        state = cache.layers[0].recurrent_states[0]
        assert state.shape == (2, 4, 64, 64) and state.transpose(2, 3).is_contiguous()
        before, pointer = state.clone(), state.data_ptr()
        model(inputs["input_ids"][:, :1], **after(cache))
    assert cache.layers[0].recurrent_states[0].data_ptr() == pointer and not torch.equal(state, before)


@torch.no_grad()
def test_packed_sequences_are_kept_apart():
    layer = mixers(build())[0]
    hidden = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(3))
    offsets = torch.tensor([0, 11, 30], dtype=torch.int32)
    wanted = torch.cat([layer(hidden[:, :11]), layer(hidden[:, 11:])], 1)
    gdn.apply()
    close(layer(hidden, cu_seq_lens_q=offsets), wanted)


def hooked(layer) -> None:
    """What accelerate's ``add_hook_to_module`` does to a module of a model that it spreads over devices."""
    layer._old_forward = layer.forward
    layer.forward = functools.partial(lambda module, *args, **kwargs: module._old_forward(*args, **kwargs), layer)


def test_modules_that_accelerate_has_hooked_are_served_and_restored():
    early, late, inputs = build(), build(), batch()
    original = type(mixers(early)[0]).forward
    for layer in mixers(early):
        hooked(layer)
    with torch.no_grad():
        wanted = early(**inputs).logits
        gdn.apply()
        for layer in mixers(late):
            hooked(layer)
        close(kept(early(**inputs).logits), kept(wanted))
        close(kept(late(**inputs).logits), kept(wanted))
        assert "6 x prefill on cpu" in gdn.report()
        gdn.restore()
        for layer in mixers(early) + mixers(late):
            assert layer._old_forward.__func__ is original and layer._old_forward.__self__ is layer
        assert torch.equal(early(**inputs).logits, wanted)


def test_a_model_compiled_before_is_served_after():
    layer = mixers(build("qwen3_5"))[0]
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        wanted = compiled(hidden)
        gdn.apply()
        assert "compiled" not in gdn.report()
        close(compiled(hidden), wanted)
        assert "compiled: prefill on cpu: causal_conv1d, chunk_gated_delta_rule" in gdn.report()


def test_a_compiled_fallback_is_told_and_reported():
    layer = mixers(build("qwen3_5", linear_key_head_dim=32))[0]
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    gdn.apply()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="own code, not gdn_kernels: head_k_dim must be"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden)
    assert "compiled: transformers' own code: head_k_dim must be" in gdn.report()


def test_an_exported_mixer_is_the_librarys():
    layer = mixers(build("qwen3_5"))[0].requires_grad_(False)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    wanted = layer(hidden)
    gdn.apply()
    with pytest.warns(RuntimeWarning, match="torch.export is tracing"):
        exported = torch.export.export(layer, (hidden,))
    assert "gdn." not in str(exported.graph)
    close(exported.module()(hidden), wanted)


def test_a_compiled_call_for_training_falls_back_and_is_told():
    layer = mixers(build("qwen3_5"))[0]
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    wanted = layer(hidden)
    gdn.apply()
    with pytest.warns(RuntimeWarning, match="own code, not gdn_kernels: a gradient is required"):
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden)
    close(found, wanted)
    assert found.requires_grad


def test_threads_may_run_while_the_operators_are_switched():
    model, inputs, failures = build(), batch(), []
    with torch.no_grad():
        wanted = kept(model(**inputs).logits)
    done = threading.Event()

    def run() -> None:
        with torch.no_grad():  # of this thread
            while not done.is_set():
                try:
                    close(kept(model(**inputs).logits), wanted)
                except Exception as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        gdn.apply()
        gdn.report()
        gdn.restore()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_autocast_takes_the_dtype_of_the_projections():
    model, inputs = build(), batch()
    wanted = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        library = model(**inputs).logits
    gdn.apply()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = model(**inputs).logits
    # how a CPU multiplies bf16 decides how far the library's own code is from fp32
    assert 1 - cosine(kept(found), kept(wanted)) < 1.1 * (1 - cosine(kept(library), kept(wanted)))
    assert cosine(kept(found), kept(library)) > 0.999
    with pytest.warns(RuntimeWarning, match="the dtype must be .* got torch.float64"):
        mixers(model.double())[0](torch.randn(1, 3, 64).double())


def cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(found.flatten().double(), wanted.flatten().double(), dim=0).item()


def test_a_cache_of_another_kind_is_left_to_the_library():
    model, inputs = build(), batch()
    gdn.apply()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="the cache has no states of linear attention"):
        with pytest.raises((ValueError, IndexError, AttributeError)):  # the library's own, which differs by version
            model(**inputs, **after(transformers.DynamicCache()))


@torch.no_grad()
def test_a_prefill_leaves_the_states_that_the_librarys_does():
    model, inputs = build(), batch()
    for length in (2, 3, 4, PROMPT):  # shorter and longer than the window
        piece = {name: tensor[:, :length] for name, tensor in inputs.items()}
        wanted = model(**piece, use_cache=True).past_key_values.layers[0]
        gdn.apply()
        found = model(**piece, use_cache=True).past_key_values.layers[0]
        gdn.restore()
        assert found.conv_states[0].shape == wanted.conv_states[0].shape
        assert found.recurrent_states[0].dtype is wanted.recurrent_states[0].dtype
        close(found.conv_states[0], wanted.conv_states[0])
        close(found.recurrent_states[0], wanted.recurrent_states[0])


def test_restore_puts_back_the_same_functions():
    classes = gdn._classes()
    before = [vars(cls)["forward"] for cls in classes]
    gdn.apply()
    gdn.apply()  # no effect
    assert all(vars(cls)["forward"] is not old for cls, old in zip(classes, before, strict=True))
    gdn.restore()
    gdn.restore()  # no effect
    assert all(vars(cls)["forward"] is old for cls, old in zip(classes, before, strict=True))


def test_restore_refuses_where_other_code_has_replaced_a_function_again(monkeypatch):
    gdn.apply()
    cls = next(iter(gdn._replaced))
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self: None)
        with pytest.raises(RuntimeError, match="forward must be the one that apply"):
            gdn.restore()
        assert len(gdn._replaced) == len(gdn.FAMILIES)
        assert gdn.report().count("replaced since apply() by") == 1


def test_without_the_library_apply_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers must be installed, 5\.17\.0 to .*pip install"):
        gdn.apply()
    assert not gdn._replaced


def test_report_says_what_ran():
    assert "apply() was not called" in gdn.report()
    gdn.apply()
    model = build()  # after apply()
    assert gdn.report().count("not called yet") == len(gdn.FAMILIES)
    with torch.no_grad():
        model(**batch())
    assert "3 x prefill on cpu: split_qkvz_ba, causal_conv1d, chunk_gated_delta_rule, layer_norm_gated" in gdn.report()
    assert "modeling_qwen3_next.Qwen3NextGatedDeltaNet.forward: gdn_kernels" in gdn.report()


def test_a_required_gradient_falls_back_with_one_warning():
    model, inputs = build(), batch()
    wanted = gradients(model, inputs)
    gdn.apply()
    with pytest.warns(RuntimeWarning, match="own code, not gdn_kernels: a gradient is required") as caught:
        found = gradients(model, inputs)
        gradients(model, inputs)
    assert len([w for w in caught if "gdn_kernels" in str(w.message)]) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert "6 x transformers' own code: a gradient is required" in gdn.report()


def gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return [parameter.grad.clone() for layer in mixers(model) for parameter in layer.parameters()]


def test_sizes_without_a_kernel_fall_back_with_a_warning():
    model, inputs = build(linear_key_head_dim=32), batch()
    with torch.no_grad():
        wanted = model(**inputs).logits
        gdn.apply()
        with pytest.warns(RuntimeWarning, match=r"head_k_dim must be one of \(64, 128, 256\), got 32"):
            assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_the_mixer_compiles_to_one_graph():
    layer = mixers(build("qwen3_5"))[0]
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    wanted = layer(hidden)
    gdn.apply()
    close(torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden), wanted)


class Changed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_k_heads = 1

    def forward(self, hidden_states, state):
        return hidden_states


@pytest.mark.parametrize("content", [{}, {"Qwen3_5GatedDeltaNet": Changed}], ids=["no-class", "another-form"])
def test_a_version_without_the_expected_classes_is_refused_whole(monkeypatch, content):
    classes = gdn._classes()
    before = [vars(cls)["forward"] for cls in classes]
    name = "transformers.models.qwen3_5.modeling_qwen3_5"
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RuntimeError, match=r"transformers must be a version .* 5\.17\.0 to .*, got .*: .*Qwen3_5Gated"):
        gdn.apply()
    assert not gdn._replaced
    assert all(vars(cls)["forward"] is old for cls, old in zip(classes, before, strict=True))


def test_a_version_without_the_library_functions_is_refused_whole(monkeypatch):
    monkeypatch.delattr("transformers.integrations.accelerate.force_accelerate_hooks")
    with pytest.raises(RuntimeError, match="has no force_accelerate_hooks"):
        gdn.apply()
    assert not gdn._replaced


def test_a_copied_model_is_served_too():
    model, inputs = build(), batch()
    gdn.apply()
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, wanted)


# In 16 bits, on a GPU too ----------------------------------------------------------------------------------------

SIXTEEN_BITS = 0.9999  # least cosine of all logits, with the operators and without


@devices
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_logits_in_bf16(family, device):
    # one MLP a layer: a router that picks other experts after a rounding would hide what is compared
    options = {"mlp_only_layers": [0, 1, 2, 3]} if family == "qwen3_next" else {}
    model = build(family, **REAL, **options).to(device)
    inputs = batch(device)
    with torch.no_grad():
        exact = kept(model(**inputs).logits)
        model = model.bfloat16()
        tokens = generate(model) if device == "cuda" else inputs["input_ids"].flip(0)
        wanted = [kept(model(**inputs).logits), steps(model, inputs, tokens[:, :16])]
        gdn.apply()
        found = [kept(model(**inputs).logits), steps(model, inputs, tokens[:, :16])]
        if device == "cuda":  # not asserted: two logits may round to one number
            print(f"equal greedy tokens: {(generate(model) == tokens).sum().item()} of {tokens.numel()}")
    for what, one, other in zip(("prefill", "cached decode"), found, wanted, strict=True):
        print(f"{what}: cosine {cosine(one, other):.6f}, at least {SIXTEEN_BITS}")
        assert cosine(one, other) >= SIXTEEN_BITS
    ours, theirs = (1 - cosine(logits[0], exact) for logits in (found, wanted))
    print(f"prefill, 1 - cosine to fp32: {ours:.1e}, the library's {theirs:.1e}")
    assert ours <= 1.5 * theirs + 1e-5
    assert "own code" not in gdn.report() and f"prefill on {device}" in gdn.report()


@pytest.mark.gpu
def test_prefill_in_fp32_on_a_gpu_falls_back_with_a_warning_and_its_decode_does_not():
    model = build(**REAL).to("cuda")
    gdn.apply()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="prefill on a GPU must be in bfloat16 or float16"):
        out = model(**batch("cuda"), use_cache=True)
        model(torch.ones(2, 1, dtype=torch.long, device="cuda"), **after(out.past_key_values))
    assert "3 x transformers' own code: prefill on a GPU" in gdn.report()
    assert "3 x one cached token on cuda: split_qkvz_ba, decode_step" in gdn.report()


@devices
def test_generation_from_a_static_cache(device):
    """On a GPU the library compiles this decode step and captures it."""
    model = build("qwen3_5", **REAL).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    gdn.apply()
    with torch.no_grad():
        tokens = generate(model)
        found = generate(model, cache_implementation="static")
    equal = (found == tokens).float().mean().item()
    print(f"equal tokens: {equal:.3f}")
    # a compiler rounds otherwise, and after one other token all may differ
    assert equal == 1 if device == "cpu" else torch.equal(found[:, :1], tokens[:, :1])
    assert "own code" not in gdn.report()
    assert f"one cached token on {device}: decode_step" in gdn.report()
    print(gdn.report())


@devices
@torch.no_grad()
def test_cached_tokens_of_a_mixer_replay_as_a_cuda_graph(device):
    """The step reads and writes the memory that it began with, so a capture of it continues; on a CPU it just runs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(**REAL).to(device, dtype)
    layer = mixers(model)[0]
    gdn.apply()
    cache = model(**batch(device), use_cache=True).past_key_values
    again, tokens = copy.deepcopy(cache), torch.randn(6, 2, 1, 256, generator=torch.Generator().manual_seed(4))
    tokens = tokens.to(device, dtype)
    wanted = [layer(token, again) for token in tokens]

    states = cache.layers[0]
    pointers = states.conv_states[0].data_ptr(), states.recurrent_states[0].data_ptr()
    step, given = captured(layer, tokens[0].clone(), cache) if device == "cuda" else uncaptured(layer, tokens[0], cache)
    for token, expected in zip(tokens, wanted, strict=True):
        given.copy_(token)
        same(step(), expected)
    assert (states.conv_states[0].data_ptr(), states.recurrent_states[0].data_ptr()) == pointers
    same(states.recurrent_states[0], again.layers[0].recurrent_states[0])
    same(states.conv_states[0][..., 1:], again.layers[0].conv_states[0][..., 1:])


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """But for a matrix product of another algorithm, which a capture may choose: a few units of bf16."""
    assert found.shape == wanted.shape and found.dtype is wanted.dtype
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=2**-6 * scale if found.is_cuda else 0)


def uncaptured(layer, token, cache):
    given = token.clone()
    return lambda: layer(given, cache), given


def captured(layer, given, cache):
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(given, copy.deepcopy(cache))  # builds what a capture must not
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        result = layer(given, cache)

    def step():
        graph.replay()
        return result.clone()

    return step, given


@pytest.mark.gpu
@torch.no_grad()
def test_a_whole_decode_step_with_a_static_cache_replays_as_a_cuda_graph():
    model = build("qwen3_5", **REAL).to("cuda", torch.bfloat16)
    prompt = batch("cuda")["input_ids"][:1]
    tokens = torch.randint(1, 128, (6, 1, 1), generator=torch.Generator().manual_seed(4)).cuda()

    def replayed() -> list[torch.Tensor]:
        def filled():
            cache = transformers.StaticCache(config=model.config, max_cache_len=128)
            model(prompt, **after(cache))
            return cache

        given, graph, side = tokens[0].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(given, **after(filled()))
        torch.cuda.current_stream().wait_stream(side)
        cache = filled()
        with torch.cuda.graph(graph):
            logits = model(given, **after(cache)).logits
        found = []
        for token in tokens:
            given.copy_(token)
            graph.replay()
            found.append(logits.clone())
        return found

    try:
        replayed()
    except RuntimeError as error:
        torch.cuda.synchronize()
        pytest.skip(f"this version of transformers cannot capture a decode step of its own: {error}")
    gdn.apply()
    found = replayed()
    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    model(prompt, **after(cache))
    for token, logits in zip(tokens, found, strict=True):
        assert cosine(logits, model(token, **after(cache)).logits) >= SIXTEEN_BITS
