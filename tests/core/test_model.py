"""The Llama: against a slow reference written here, and against itself with and without cache, batch and padding."""

import math

import pytest
import torch
from small import LLAMA3_SCALING, small_config, small_model

import model as model_file
from nanosdd.errors import InputError
from model import LlamaConfig, apply_rope, plain_attention, rope_frequencies, rope_tables


def reference_logits(model, ids):
    """One row, position by position, head by head, in fp64 and without any of the model's functions: (T,V)."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    T, D, group = len(ids), c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def norm(x, name):
        return torch.stack([row / math.sqrt(float((row * row).mean()) + c.rms_norm_eps) for row in x]) * w[name]

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
            qh = rope(q[:, head * D:(head + 1) * D])
            kh, vh = rope(k[:, shared * D:(shared + 1) * D]), v[:, shared * D:(shared + 1) * D]
            heads.append(torch.stack([torch.softmax(kh[:t + 1] @ qh[t] / math.sqrt(D), 0) @ vh[:t + 1]
                                      for t in range(T)]))
        x = x + torch.cat(heads, 1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_reference(tied):
    model = small_model(tie_word_embeddings=tied, rope_theta=500.0)
    ids = torch.randint(0, 89, (13,), generator=torch.Generator().manual_seed(3))
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


def test_plain_attention_is_what_the_model_calls(monkeypatch):
    model, tokens = small_model(), torch.randint(0, 89, (2, 9), generator=torch.Generator().manual_seed(1))
    fast = model(tokens)

    def plain(q, k, v, attn_mask, is_causal, enable_gqa):
        assert attn_mask is None and is_causal and enable_gqa
        return plain_attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())

    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", plain)
    torch.testing.assert_close(model(tokens), fast, atol=1e-5, rtol=1e-5)


def test_causality():
    model, tokens = small_model(), torch.randint(0, 89, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 89
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_padding_does_not_reach_the_row():
    model = small_model()
    row = torch.randint(0, 89, (1, 6), generator=torch.Generator().manual_seed(4))
    padded = torch.cat([row, torch.full((1, 5), 3)], 1)
    torch.testing.assert_close(model(padded)[:, :6], model(row), atol=1e-5, rtol=1e-5)


def test_packed_rows_are_what_they_are_alone():
    model, lengths = small_model(), torch.tensor([5, 31, 12, 1])
    tokens = torch.randint(0, 89, (4, 31), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(31) < lengths[:, None]
    packed = model.hidden(tokens, positions=mask, lengths=lengths)
    alone = torch.cat([model.hidden(tokens[i:i + 1, :n])[0] for i, n in enumerate(lengths)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, model.hidden(tokens, positions=mask), atol=1e-5, rtol=1e-5)
    gradients = []
    for given in (lengths, None):
        model.zero_grad()
        model.hidden(tokens, positions=mask, lengths=given).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


def test_packed_rows_leave_no_work_on_padding(monkeypatch):
    model, seen = small_model(), []
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: seen.append(x.shape) or x)
    model.hidden(torch.ones(3, 20, dtype=torch.long), lengths=torch.tensor([20, 2, 7]))
    assert seen == [(29, 48)] * 2


def test_head_only_at_positions():
    model, tokens = small_model(), torch.randint(0, 89, (3, 8), generator=torch.Generator().manual_seed(5))
    every = model(tokens)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2] = mask[2, 7] = mask[2, 1] = True
    torch.testing.assert_close(model(tokens, positions=mask), every[mask])
    places = torch.tensor([[1, 4], [0, 0], [7, 5]])
    torch.testing.assert_close(model(tokens, positions=places),
                               torch.stack([every[row, places[row]] for row in range(3)]))
    torch.testing.assert_close(model(tokens, positions=torch.tensor([6])), every[:, [6]])


@pytest.mark.parametrize("changes, message", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 64}, "sliding_window"), ({"model_type": "mistral"}, "mistral"), ({"hidden_act": "gelu"}, "gelu"),
    ({"model_type": None}, "model_type None"), ({"rope_interleaved": True}, "rope_interleaved"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rms_norm_eps": None}, "rms_norm_eps"), ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_parameters": {"rope_theta": 9e3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"), ({"vocab_size": None}, "vocab_size")])
def test_config_refuses_what_it_would_get_wrong(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_dict(small_config().to_dict() | changes)


def test_config_reads_older_and_newer_rope_keys():
    older = small_config(rope_theta=7e4, rope_scaling=LLAMA3_SCALING).to_dict()
    newer = {key: value for key, value in older.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {"rope_theta": 7e4, **LLAMA3_SCALING}
    assert LlamaConfig.from_dict(older) == LlamaConfig.from_dict(newer)
    assert LlamaConfig.from_dict(older | {"rope_scaling": {"type": "linear", "factor": 3.0}}).rope_scaling == \
        {"rope_type": "linear", "factor": 3.0}


def test_a_config_survives_saving():
    for rope_scaling in (None, LLAMA3_SCALING, {"rope_type": "linear", "factor": 3.0}):
        config = small_config(rope_theta=7e4, rope_scaling=rope_scaling, eos_token_id=[4, 9])
        assert LlamaConfig.from_dict(config.to_dict()) == config
