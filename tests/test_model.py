"""Compare the model with transformers in float32.

Logits must agree to 1e-5 of the largest logit, and each gradient to 1e-4 of its norm. Both programs do the same float32
arithmetic in another order. Measured differences are around 1e-6, so that any wrong term exceeds the bounds.
"""
from __future__ import annotations

import gc
import itertools
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels_npu
from common import InputError, UsageError
from model import (
    COMPONENTS,
    LMHead,
    Qwen3VL,
    Qwen3VLConfig,
    SparseMLP,
    build_model,
    chunked_cross_entropy,
    component_of,
    load_balancing_loss,
    parameter_table,
    step_flops,
    trainable_components,
    weighted_cross_entropy,
)

ROWS = {
    "image": [5, ("image", 4, 6), 9],
    "images": [3, ("image", 2, 2), 4, ("image", 6, 4), 1, ("image", 2, 8), 6],
    "text": [17],
    "video": [4, ("video", 3, 4, 4), 8],
    "image and video": [2, ("image", 4, 4), 3, ("video", 2, 2, 6), 5, ("image", 2, 4), 7],
}
MODELS = {"dense": {}, "dense tied": {"tied": True}, "moe": {"moe": True}, "moe tied": {"moe": True, "tied": True}}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    raw = tiny.config_dict(**MODELS[request.param])
    hf = tiny.hf_model(raw)
    return hf, tiny.ours_from_hf(hf, raw, tmp_path_factory.mktemp("config"))


def hf_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100)


def assert_gradients_equal(hf, ours):
    hf_grads = {n: p.grad for n, p in hf.named_parameters()}
    for name, p in ours.named_parameters():
        expected = hf_grads.pop(name)
        expected = torch.zeros_like(p) if expected is None else tiny.our_layout(name, expected)
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        # softmax cancels the bias of k, whose gradient is rounding error: hence the absolute term
        assert (grad - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
    assert not hf_grads


def assert_equal_transformers(hf, ours, sample):
    """Compare logits, loss and gradients."""
    batch = tiny.batch_from_hf(hf, [sample])
    hf.zero_grad()
    ours.zero_grad()
    expected = hf(**tiny.hf_inputs(sample)).logits[0]
    logits = ours.lm_head(ours.hidden_states(batch)[0])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    loss = hf_loss(expected, batch.labels)
    loss.backward()
    our_loss, _ = ours(batch)
    our_loss.backward()
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_gradients_equal(hf, ours)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ROWS)
def test_forward_and_backward_equal_transformers(pair, kind, attention):
    hf, ours = pair
    ours.set_attention(text=attention, vision=attention)
    sample = tiny.row(ROWS[kind])
    assert_equal_transformers(hf, ours, sample)


def test_forward_with_packed_samples_equals_each_alone(pair):
    hf, ours = pair
    samples = [tiny.row(parts, seed) for seed, parts in enumerate(ROWS.values())]
    packed = ours.lm_head(ours.hidden_states(tiny.batch_from_hf(hf, samples))[0])
    alone = torch.cat([hf(**tiny.hf_inputs(s)).logits[0] for s in samples])
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("chunk_size", [1, 7, 1024, 0])
def test_chunked_cross_entropy_equals_unchunked(pair, chunk_size):
    """Compare with plain cross entropy on all logits, with uneven weights."""
    _, ours = pair
    head = ours.lm_head
    x = torch.randn(23, 56, requires_grad=True)
    labels, weights = torch.randint(0, 260, (23,)), torch.rand(23)
    unchunked = (torch.nn.functional.cross_entropy(head(x), labels, reduction="none") * weights).sum() * 3
    expected = torch.autograd.grad(unchunked, (x, head.weight))
    batch = SimpleNamespace(labels=labels, loss_weights=weights, supervised_index=torch.arange(23))
    chunked = head(x, batch, chunk_size) * 3
    grads = torch.autograd.grad(chunked, (x, head.weight))
    assert chunked.item() == pytest.approx(unchunked.item(), rel=1e-6)
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_chunked_cross_entropy_holds_one_chunk_of_logits():
    """Count the rows of all [*, V] tensors that are alive at once in forward and backward."""
    V, D, S, chunk = 1009, 8, 64, 4
    alive: dict[int, int] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == V and out.shape[0] != D:
                store = out.untyped_storage()
                if store.data_ptr() not in alive:
                    alive[store.data_ptr()] = out.shape[0]
                    weakref.finalize(out, alive.pop, store.data_ptr(), None)
                peak = max(peak, sum(alive.values()))
            return out

    head = LMHead(D, V, bias=False)
    x = torch.randn(S, D, requires_grad=True)
    batch = SimpleNamespace(
        labels=torch.randint(0, V, (S,)), loss_weights=torch.ones(S), supervised_index=torch.arange(S))
    with Watch():
        head(x, batch, chunk).backward()
    gc.collect()
    assert 0 < peak <= chunk
    assert x.grad is not None and head.weight.grad is not None
    peak = 0
    with Watch():
        head(x, batch, 0).backward()
    assert peak == S  # the counter sees all logits


def test_forward_with_router_auxiliary_loss_equals_transformers(pair):
    hf, ours = pair
    if not ours.config.text.num_experts:
        pytest.skip("a dense model has no router")
    sample = tiny.row(ROWS["image and video"])
    batch = tiny.batch_from_hf(hf, [sample])
    hf.zero_grad()
    ours.zero_grad()
    out = hf(**tiny.hf_inputs(sample), output_router_logits=True)
    (hf_loss(out.logits[0], batch.labels) + 0.5 * out.aux_loss).backward()
    ours.router_aux_loss_coef = 0.5
    loss, aux = ours(batch)
    loss.backward()
    ours.router_aux_loss_coef = 0.0
    assert aux.item() == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert_gradients_equal(hf, ours)


def test_sparse_mlp_has_router_statistics_outside_inference_mode_only(tmp_path):
    config = tiny.our_config(tiny.config_dict(moe=True), tmp_path).text
    torch.manual_seed(0)
    mlp, x = SparseMLP(config), torch.randn(5, config.hidden_size)
    for p in mlp.parameters():
        p.data.normal_(std=0.1)
    out, stats = mlp(x)
    assert stats[0].sum() == 5 * config.num_experts_per_tok and abs(stats[1].sum() - 5) < 1e-5
    with torch.inference_mode():
        fast, none = mlp(x)
    assert none is None
    torch.testing.assert_close(fast, out)


def test_load_balancing_loss_with_even_routing_is_k():
    E, k, T = 8, 2, 40
    even = torch.stack((torch.full((E,), T * k / E), torch.full((E,), T / E)))
    assert load_balancing_loss([even, even], T).item() == pytest.approx(k)


def test_forward_with_dense_layers_among_experts_equals_transformers(tmp_path):
    raw = tiny.config_dict(moe=True)
    raw["text_config"] |= {"mlp_only_layers": [1], "decoder_sparse_step": 2}
    hf = tiny.hf_model(raw)
    assert_equal_transformers(hf, tiny.ours_from_hf(hf, raw, tmp_path), tiny.row(ROWS["image"]))


@pytest.mark.parametrize("layers", [1, 2])
def test_forward_with_fewer_layers_than_deepstack_features_equals_transformers(tmp_path, layers):
    raw = tiny.config_dict(layers=layers)
    hf = tiny.hf_model(raw)
    ours = tiny.ours_from_hf(hf, raw, tmp_path)
    assert len(ours.model.visual.deepstack_merger_list) == 3
    assert_equal_transformers(hf, ours, tiny.row(ROWS["image and video"]))
    assert ours.model.visual.deepstack_merger_list[2].linear_fc1.weight.grad is None

    ours.zero_grad()
    ours.vision_always = True  # the dummy pass must leave out the same gradients, or the collectives would not match
    text = tiny.batch_from_hf(hf, [tiny.row(ROWS["text"])])
    ours(text)[0].backward()
    assert ours.model.visual.deepstack_merger_list[layers - 1].linear_fc1.weight.grad is not None
    assert ours.model.visual.deepstack_merger_list[2].linear_fc1.weight.grad is None


def test_embed_returns_a_queue_that_the_decoder_empties(pair):
    hf, ours = pair
    batch = tiny.batch_from_hf(hf, [tiny.row(ROWS["image"])])
    inputs = ours.embed(batch)
    assert [t.shape for t in inputs] == [(len(batch.input_ids), 56)] * 4
    ours.model.language_model(inputs, batch.position_ids, batch.cu_seqlens)
    assert not inputs


# number of parameters in the published safetensors
PUBLISHED = {
    "qwen3-vl-2b": 2_127_532_032, "qwen3-vl-4b": 4_437_815_808, "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064, "qwen3-vl-30b-a3b": 31_070_754_032, "qwen3-vl-235b-a22b": 235_670_022_896,
}
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_build_model_with_published_configurations(name):
    """Compare every parameter's name and shape with transformers', experts in the published layout."""
    import transformers as t

    raw = json.loads((CONFIGS / name / "config.json").read_text())
    moe = raw["model_type"] == "qwen3_vl_moe"
    ours = build_model(Qwen3VLConfig.from_json(CONFIGS / name))
    with torch.device("meta"):
        hf = (t.Qwen3VLMoeForConditionalGeneration if moe else t.Qwen3VLForConditionalGeneration)._from_config(
            (t.Qwen3VLMoeConfig if moe else t.Qwen3VLConfig)(**raw))
    shapes = {n: tuple(p.shape) for n, p in ours.named_parameters()}
    assert shapes == {n: tuple(tiny.our_layout(n, p).shape) for n, p in hf.named_parameters()}
    assert sum(total for total, _ in parameter_table(ours.named_parameters()).values()) == PUBLISHED[name]
    assert not list(ours.buffers())


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
    (lambda c: c.pop("vision_config"), "text_config and vision_config"),
    (lambda c: c["text_config"].pop("hidden_size"), "text_config.hidden_size is missing"),
    (lambda c: c["text_config"].update(num_hidden_layers="4"), "num_hidden_layers is '4'"),
    (lambda c: c["text_config"].update(num_key_value_heads=4), "num_key_value_heads must divide"),
    (lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 2, 3]), "mrope_section"),
    (lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"), "rope_type 'yarn'"),
    (lambda c: c["vision_config"].update(deepstack_visual_indexes=[1, 9]), "deepstack_visual_indexes"),
    (lambda c: c["vision_config"].update(out_hidden_size=60), "out_hidden_size must equal"),
    (lambda c: c["vision_config"].update(depth=-1), "vision_config.depth is -1"),
    (lambda c: c["vision_config"].update(in_channels=1), "in_channels must be 3"),
    (lambda c: c["vision_config"].update(num_heads=5), "hidden_size must be a multiple of 4"),
    (lambda c: c["vision_config"].update(deepstack_visual_indexes=["1"]), "deepstack_visual_indexes is"),
    (lambda c: c["vision_config"].update(hidden_act="gelu"), "vision_config.hidden_act must be"),
    (lambda c: c["text_config"].update(rope_parameters="x"), "rope_parameters must be an object"),
    (lambda c: c.update(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
])
def test_from_json_with_a_bad_configuration_names_file_and_key(tmp_path, change, message):
    raw = tiny.config_dict()
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message) as e:
        Qwen3VLConfig.from_json(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_set_attention_with_an_unavailable_implementation_raises(pair):
    with pytest.raises(UsageError, match="flash_attention_2.*take one of eager, sdpa"):
        pair[1].set_attention(text="flash_attention_2")


@pytest.mark.parametrize("count", ["num_experts_per_tok", "moe_intermediate_size", "num_experts"])
def test_from_json_with_missing_expert_sizes_names_the_key(tmp_path, count):
    raw = tiny.config_dict(moe=True)
    del raw["text_config"][count]
    with pytest.raises(InputError, match=count):
        tiny.our_config(raw, tmp_path)


def test_init_weights_does_not_depend_on_the_order_of_parameters(tmp_path):
    config = tiny.our_config(tiny.config_dict(moe=True), tmp_path)
    a, b = Qwen3VL(config), Qwen3VL(config)
    a.init_weights(1)
    torch.randn(5)
    b.init_weights(1)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    b.init_weights(2)
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert a.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_to_empty_keeps_tied_embeddings(tmp_path):
    model = build_model(tiny.our_config(tiny.config_dict(tied=True), tmp_path))
    model.to_empty(device="cpu")
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_trainable_components_with_a_partly_frozen_component(tmp_path):
    def is_frozen(name: str) -> bool:
        return not name.endswith("language_model.layers.0.self_attn.q_proj.weight")

    model = build_model(tiny.our_config(tiny.config_dict(), tmp_path), is_frozen)
    assert trainable_components(model) == {"text decoder"}
    table = parameter_table(model.named_parameters())
    assert [trainable for _, trainable in table.values()] == [0, 0, 56 * 6 * 24]


@pytest.mark.parametrize("trainable", [COMPONENTS, COMPONENTS[:1], COMPONENTS[1:2], COMPONENTS[2:]], ids=", ".join)
@pytest.mark.parametrize("kind", MODELS)
def test_step_flops_equals_the_count_of_pytorch(tmp_path, monkeypatch, kind, trainable):
    """Allow 3 %, as we count a gradient that is not needed in the product next to a frozen component.

    PyTorch counts the upper half of causal attention, which the eager implementation computes in vain.
    """
    monkeypatch.setattr(kernels_npu.Torch, "grouped_matmul", kernels_npu.Torch.grouped_matmul_loop)
    model = Qwen3VL(tiny.our_config(tiny.config_dict(**MODELS[kind]), tmp_path))
    model.init_weights(0)
    model.set_attention("eager", "eager")
    for name, p in model.named_parameters():
        p.requires_grad_(component_of(name) in trainable)
    samples = [tiny.row(ROWS["images"] + [90]), tiny.row(ROWS["text"]), tiny.row(ROWS["image"] + [50])]
    batch = tiny.batch_of(samples, [torch.arange(len(s.input_ids)).expand(3, -1) for s in samples])
    with FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    t = model.config.text
    bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    half = t.num_hidden_layers * t.num_attention_heads * t.head_dim * sum((b - a) ** 2 for a, b in bounds)
    expected = counter.get_total_flops() - 2 * 3 * half
    supervised = len(batch.supervised_index)
    found = step_flops(model.config, batch.cu_seqlens, batch.grid_thw, supervised, trainable_components(model))
    assert found == pytest.approx(expected, rel=0.03)


def test_init_weights_with_names_fills_only_these(tmp_path):
    model = build_model(tiny.our_config(tiny.config_dict(), tmp_path))
    model.model.register_buffer("bias", torch.empty(7, device="meta"))
    model.to_empty(device="cpu")
    names = {"model.bias", "lm_head.weight"}
    for tensor in model.state_dict().values():
        tensor.fill_(3.0)
    model.init_weights(1, names=names)
    changed = {name for name, tensor in model.state_dict().items() if not (tensor == 3).all()}
    assert changed == names
    assert not model.model.bias.any()
    drawn = model.lm_head.weight.clone()
    model.init_weights(1)
    assert torch.equal(model.lm_head.weight, drawn)


def test_lm_head_with_another_loss_fn_equals_autograd(pair):
    """Compute a preference loss on a pair of sequences through the chunked function."""
    _, ours = pair

    def preference_loss(hidden, weight, batch, chunk_size):
        scores = []
        for start, end in itertools.pairwise(batch.cu_seqlens):
            ones = torch.ones(end - start)
            labels = batch.labels[start:end]
            scores.append(-chunked_cross_entropy(hidden[start:end], weight, labels, ones, chunk_size))
        return -torch.nn.functional.logsigmoid(scores[0] - scores[1])

    x = torch.randn(11, 56, requires_grad=True)
    batch = SimpleNamespace(labels=torch.randint(0, 260, (11,)), cu_seqlens=[0, 5, 11])
    log_probs = -torch.nn.functional.cross_entropy(ours.lm_head(x), batch.labels, reduction="none")
    expected = -torch.nn.functional.logsigmoid(log_probs[:5].sum() - log_probs[5:].sum())
    expected_grads = torch.autograd.grad(expected, (x, ours.lm_head.weight))

    ours.lm_head.loss_fn = preference_loss
    loss = ours.lm_head(x, batch, 4)
    grads = torch.autograd.grad(loss, (x, ours.lm_head.weight))
    ours.lm_head.loss_fn = weighted_cross_entropy
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert (grad - reference).norm() <= 1e-5 * reference.norm()
