"""The Llama: against a slow reference written here, and against itself with and without cache, batch and padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import LLAMA3_SCALING, small_config, small_model

from model import KVCache, LlamaConfig, RMSNorm, apply_rope, rope_frequencies, rope_tables
from nanosdd.errors import InputError
from nanosdd.generate import Linear, attend


def token_ids(*shape, seed):
    return torch.randint(0, 89, shape, generator=torch.Generator().manual_seed(seed))


# ---- the layers ----


def reference_logits(model, ids):
    """One row, position by position, head by head, in fp64 and without any of the model's functions: (T,V)."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    T, D, group = len(ids), c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def norm(x, name):
        return (
            torch.stack([row / math.sqrt(float((row * row).mean()) + c.rms_norm_eps) for row in x])
            * w[name]
        )

    def rope(head):  # (T,D)
        out = head.clone()
        for t in range(T):
            for i in range(D // 2):
                angle = t / c.rope_theta ** (2 * i / D)
                a, b = float(head[t, i]), float(head[t, i + D // 2])
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + D // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for n in range(c.num_hidden_layers):
        at = f"model.layers.{n}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ w[f"{at}self_attn.{p}_proj.weight"].T for p in "qkv")
        heads = []
        for head in range(c.num_attention_heads):
            shared = head // group  # neighbours share
            qh = rope(q[:, head * D : (head + 1) * D])
            kh, vh = rope(k[:, shared * D : (shared + 1) * D]), v[:, shared * D : (shared + 1) * D]
            heads.append(
                torch.stack(
                    [
                        torch.softmax(kh[: t + 1] @ qh[t] / math.sqrt(D), 0) @ vh[: t + 1]
                        for t in range(T)
                    ]
                )
            )  # causal attention of one head, (T,D)
        x = x + torch.cat(heads, 1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_reference(tied):
    model = small_model(tie_word_embeddings=tied, rope_theta=500.0)
    ids = token_ids(13, seed=3)
    expected = reference_logits(model, ids)
    got = model(ids[None])[0].double()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rope_by_hand():
    # D = 4, theta = 100: pair (0,2) turns 1 radian a position, pair (1,3) 0.1. Position 3 of the vector (1, 2, 3, 4).
    config = small_config(head_dim=4, rope_theta=100.0)
    cos, sin = rope_tables(config, torch.tensor([[3]]))
    got = apply_rope(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), cos, sin).flatten()
    # 1 cos3 - 3 sin3, 2 cos.3 - 4 sin.3, 3 cos3 + 1 sin3, 4 cos.3 + 2 sin.3, with sin3 = .141120, cos3 = -.989992
    expected = torch.tensor([-1.413353, 0.728592, -2.828857, 4.412387])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_llama3_scaling_by_hand():
    # Original context 32: a pair with over 4 turns in it is kept, with under 1 turn slowed 8 times, between: blended.
    config = small_config(head_dim=6, rope_theta=64.0, rope_scaling=LLAMA3_SCALING)
    got = rope_frequencies(config)  # unscaled 1, 1/4, 1/16: 5.093, 1.273 and 0.318 turns
    keep = (32 / 4 / (2 * math.pi) - 1) / 3
    expected = torch.tensor([1.0, keep / 4 + (1 - keep) / 32, 1 / 128])
    torch.testing.assert_close(got, expected)


def test_linear_scaling_slows_every_pair():
    config = small_config(
        head_dim=4, rope_theta=100.0, rope_scaling={"rope_type": "linear", "factor": 2.5}
    )
    torch.testing.assert_close(rope_frequencies(config), torch.tensor([0.4, 0.04]))


def test_norm_is_fp32_then_cast_then_weighted():
    x, norm = torch.randn(200, 48).bfloat16(), RMSNorm(48, 0.03)
    norm.weight.data += 0.3 * torch.randn(48)
    norm.bfloat16()
    h = x.float() / (x.float().square().mean(-1, keepdim=True) + 0.03).sqrt()
    found, expected = norm(x), h.bfloat16() * norm.weight
    assert (
        found.dtype == torch.bfloat16 and (found == expected).float().mean() > 0.999
    )  # rsqrt may round differently
    assert (found == (h * norm.weight).bfloat16()).float().mean() < 0.9


def test_causality():
    model, tokens = small_model(), token_ids(1, 12, seed=2)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 89
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_padding_does_not_reach_the_row():
    model, row = small_model(), token_ids(1, 6, seed=4)
    padded = torch.cat([row, torch.full((1, 5), 3)], 1)
    torch.testing.assert_close(model(padded)[:, :6], model(row), atol=1e-5, rtol=1e-5)


def test_packed_rows_are_what_they_are_alone():
    model, lengths, tokens = small_model(), torch.tensor([5, 31, 12, 1]), token_ids(4, 31, seed=3)
    mask = torch.arange(31) < lengths[:, None]
    packed = model.hidden(tokens, positions=mask, lengths=lengths)
    alone = torch.cat([model.hidden(tokens[i : i + 1, :n])[0] for i, n in enumerate(lengths)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, model.hidden(tokens, positions=mask), atol=1e-5, rtol=1e-5)
    gradients = []
    for given in (lengths, None):
        model.zero_grad()
        model.hidden(tokens, positions=mask, lengths=given).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


def test_packed_rows_leave_no_work_on_padding():
    model, seen = small_model(), []
    for block in model.model.layers:
        block.mlp.register_forward_hook(
            lambda module, inputs, output: seen.append(tuple(output.shape))
        )
    model.hidden(torch.ones(3, 20, dtype=torch.long), lengths=torch.tensor([20, 2, 7]))
    assert seen == [(29, 48)] * 2


def test_head_only_at_positions():
    model, tokens = small_model(), token_ids(3, 8, seed=5)
    every = model(tokens)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2] = mask[2, 7] = mask[2, 1] = True
    torch.testing.assert_close(model(tokens, positions=mask), every[mask])
    places = torch.tensor([[1, 4], [0, 0], [7, 5]])
    torch.testing.assert_close(
        model(tokens, positions=places), torch.stack([every[row, places[row]] for row in range(3)])
    )
    torch.testing.assert_close(model(tokens, positions=torch.tensor([6])), every[:, [6]])


def test_checkpointed_activations_are_recomputed_and_give_the_same_gradient():
    model, tokens, calls, gradients = small_model().train(), token_ids(2, 9, seed=6), [], []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        model.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 1 + 2 and all(map(torch.equal, *gradients))


# ---- the configuration ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": None}, "model_type None"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (
            {"rope_parameters": {"rope_theta": 9e3, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_config_refuses_what_it_would_get_wrong(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_dict(small_config().to_dict() | changes)


def test_config_reads_older_and_newer_rope_keys():
    older = small_config(rope_theta=7e4, rope_scaling=LLAMA3_SCALING).to_dict()
    newer = {key: value for key, value in older.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {"rope_theta": 7e4, **LLAMA3_SCALING}
    assert LlamaConfig.from_dict(older) == LlamaConfig.from_dict(newer)
    assert LlamaConfig.from_dict(
        older | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    ).rope_scaling == {"rope_type": "linear", "factor": 3.0}


def test_a_config_survives_saving():
    for rope_scaling in (None, LLAMA3_SCALING, {"rope_type": "linear", "factor": 3.0}):
        config = small_config(rope_theta=7e4, rope_scaling=rope_scaling, eos_token_id=[4, 9])
        assert LlamaConfig.from_dict(config.to_dict()) == config


# ---- the cache ----


@torch.no_grad()
@pytest.mark.parametrize("heads", [6, 2, 1])
def test_rows_of_unequal_lengths_go_on_in_the_cache(heads):
    model, tokens = small_model(num_key_value_heads=heads), token_ids(3, 24, seed=8)
    every, lengths = model(tokens), torch.tensor([9, 3, 6])
    cache = KVCache(model.config, 3, 24)
    first = model(tokens[:, :9], cache=cache)  # two of the rows are padding from places 3 and 6 on
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], every[row, :length], atol=1e-5, rtol=1e-5)
    cache.lengths, cache.longest = lengths.clone(), 9
    for count in (1, 5, 1, 2):  # new tokens at once
        places = cache.lengths[:, None] + torch.arange(count)
        rows = torch.arange(3)[:, None]
        torch.testing.assert_close(
            model(tokens[rows, places], cache=cache), every[rows, places], atol=1e-5, rtol=1e-5
        )
        cache.lengths += count
        cache.longest += count


def test_dropping_rows_moves_as_few_as_possible():
    cache = KVCache(small_config(), 6, 5)
    for layer, cached in enumerate(part for pair in cache.layers for part in pair):
        cached += torch.arange(6)[:, None, None, None] + 10 * layer
    cache.lengths = torch.tensor([7, 8, 9, 10, 11, 12])
    before = [part for pair in cache.layers for part in pair]
    assert cache.keep([1, 3, 4, 5]) == [4, 1, 5, 3]
    assert cache.lengths.tolist() == [11, 8, 12, 10]
    for layer, (cached, whole) in enumerate(
        zip((part for pair in cache.layers for part in pair), before)
    ):
        assert (cached[:, 0, 0, 0] - 10 * layer).tolist() == [4, 1, 5, 3]
        assert cached.data_ptr() == whole.data_ptr()  # in place


# ---- greedy decoding ----

PROMPTS = [[5, 9, 2], [11] * 17, [1, 2, 3, 4, 5, 6, 7], [80]]


@pytest.fixture
def uncompiled():
    """torch.compile runs what it is given as it is, so that compiled=True needs no compiler; see test_compile.py."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def greedy_without_cache(model, prompt, count, stop):
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_generate_equals_the_loop_without_cache_row_by_row(uncompiled):
    model = small_model(rope_scaling=LLAMA3_SCALING)
    free = [greedy_without_cache(model, prompt, 24, ()) for prompt in PROMPTS]
    stop = {free[0][5], free[2][9]}  # rows stop at different steps
    alone = [greedy_without_cache(model, prompt, 24, stop) for prompt in PROMPTS]
    assert len({len(answer) for answer in alone}) > 2
    assert model.generate(PROMPTS, 24, stop) == alone
    assert model.generate(PROMPTS, 24, stop, compiled=True) == alone
    assert [model.generate([prompt], 24, stop)[0] for prompt in PROMPTS] == alone


def test_generate_stops_at_the_context_and_refuses_what_does_not_fit(uncompiled):
    model = small_model(max_position_embeddings=20)
    answers = model.generate(PROMPTS, 50)
    assert [len(answer) for answer in answers] == [17, 3, 13, 19]
    assert (
        model.generate(PROMPTS, 50, compiled=True) == answers
    )  # here finished rows stay for a while
    assert model.generate(PROMPTS, 4) == [answer[:4] for answer in answers]
    assert model.generate([], 5) == [] and model.generate(PROMPTS[:2], 0) == [[], []]
    for prompt in ([], [1] * 20):
        with pytest.raises(InputError, match="context of 20"):
            model.generate([PROMPTS[0], prompt], 5)


@pytest.mark.parametrize("compiled, sizes", [(False, [4, 3, 2, 1]), (True, [4, 2, 1])])
def test_finished_rows_are_dropped_at_once_or_compiled_when_half_is_finished(
    uncompiled, compiled, sizes
):
    model, seen = (
        small_model(max_position_embeddings=20),
        [],
    )  # the rows end after 17, 3, 13 and 19 tokens
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output))
    )
    model.generate(PROMPTS, 50, compiled=compiled)
    assert list(dict.fromkeys(seen)) == sizes


def test_a_bf16_cache_decodes_the_same_compiled_or_not(uncompiled):
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(PROMPTS, 24, {4, 70}, compiled=True) == model.generate(
            PROMPTS, 24, {4, 70}
        )


@pytest.mark.parametrize("out_features", [7, 40])  # fewer and more than in_features
def test_products_of_few_rows_are_the_same_products(out_features):
    layer = Linear(19, out_features, bias=False)
    for shape in [(1, 1), (5, 1), (128, 1), (3, 2), (129, 1)]:
        x = torch.randn(*shape, 19)
        torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=1e-5, rtol=1e-5)


def test_attention_trains_in_the_dtype_of_the_weights():
    q, k, v = (
        torch.randn(2, heads, 11, 6, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, k, v, None, True, torch.float32)
        y.float().sum().backward()
        fast = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    assert (
        y.dtype == q.grad.dtype == torch.bfloat16
        and torch.equal(y, exact.bfloat16())
        and not torch.equal(y, fast)
    )
