"""Classic mistakes of assignment 1, and right solutions written differently.

Spoilers: read it after your own try.
"""

import math
from functools import partial
from types import SimpleNamespace

import torch
from lesson import mistakes

# ---- RMSNorm ----


def rms_norm(x, weight, eps, flaw=""):
    """x (...,C) and weight (C,) of one dtype -> the same; in fp32, cast, then weighted."""
    h = x if flaw == "in the input's dtype" else x.double()
    if flaw == "mean":
        h = h - h.mean(-1, keepdim=True)
    square = (h * h).mean(-1, keepdim=True)
    root = torch.sqrt(square + eps)
    if flaw == "eps outside":
        root = square.sqrt() + eps
    if flaw == "weight before cast":
        return (h / root * weight.double()).to(x.dtype)
    return (h / root).to(x.dtype) * weight


# ---- rotary embeddings ----


def angles(config, positions):
    """The angle of every pair: positions (N,) -> (N,1,D/2)."""
    D = config["head_dim"]
    pair = torch.arange(D // 2).double()
    return positions[:, None, None] * config["rope_theta"] ** (-2 * pair / D)


def rope(config, x, positions, flaw=""):
    """x (N,H,D), positions (N,) -> the same, turned."""
    D = config["head_dim"]
    cos = angles(config, positions).cos()
    sin = angles(config, positions).sin()
    if flaw == "other way":
        sin = -sin
    places = (slice(0, D // 2), slice(D // 2, D))
    if flaw == "interleaved":
        places = (slice(0, D, 2), slice(1, D, 2))
    a, b = (x[..., place].double() for place in places)
    out = torch.empty_like(x, dtype=torch.float64)
    out[..., places[0]] = a * cos - b * sin
    out[..., places[1]] = b * cos + a * sin
    return out.to(x.dtype)


# ---- attention ----


def attention(q, k, v, flaw="", last_seen=math.inf):
    """The last T of S tokens: q (T,H,D), k and v (S,G,D) -> (T,H,D). last_seen: a place."""
    T, H, D = q.shape
    S, G, _ = k.shape
    serves = [h // (H // G) for h in range(H)]  # the key-value head of a query head
    if flaw == "modulo":
        serves = [h % G for h in range(H)]
    scores = torch.einsum("thd,shd->hts", q, k[:, serves])
    if flaw != "no scale":
        scores = scores / math.sqrt(D)
    own = torch.arange(S - T, S)[:, None]
    unseen = torch.arange(S) > own
    if flaw == "not causal":
        unseen = unseen & False
    unseen = unseen | (torch.arange(S) > last_seen)
    share = scores.masked_fill(unseen, -math.inf).softmax(-1)
    y = torch.einsum("hts,shd->htd", share, v[:, serves])
    if flaw == "heads not merged":
        return y.reshape(T, H, D)
    return y.transpose(0, 1)


def packed_attention(lengths, q, k, v, flaw=""):
    """Row by row: q (N,H,D), k and v (N,G,D) -> (N,H,D)."""
    if flaw == "rows run together":
        lengths = [sum(lengths)]
    rows = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    return torch.cat([attention(*row, flaw) for row in rows])


def cached_attention(keys, values, lengths, q, k, v, flaw=""):
    """One token behind each row of a cache (B,G,size,D): [y (B,H,D), keys, values]."""
    found = []
    for b, length in enumerate(lengths):
        place = max(lengths) if flaw == "longest" else length
        seen = length + 1
        if flaw == "not masked":
            seen = max(lengths) + 1
        keys[b, :, place] = k[b]
        values[b, :, place] = v[b]
        row = keys[b, :, :seen].transpose(0, 1), values[b, :, :seen].transpose(0, 1)
        found.append(attention(q[b : b + 1], *row)[0])
    return [torch.stack(found), keys, values]


# ---- the whole Llama, slowly ----


def row_logits(config, weights, tokens, flaw="", last_seen=math.inf):
    """One row of tokens (T,) -> (T,V) fp32. last_seen: the last place that attention covers."""
    c = SimpleNamespace(**config)
    w = {name: tensor.double() for name, tensor in weights.items()}
    norm = partial(rms_norm, eps=c.rms_norm_eps)
    turn = partial(rope, config, positions=torch.arange(len(tokens)))
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, w[at + "input_layernorm.weight"])
        heads = [h @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv"]
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in heads)
        q = q if flaw == "no rope" else turn(q)
        k = k if flaw in ("no rope", "k not turned") else turn(k)
        y = attention(q, k, v, last_seen=last_seen)
        x = x + y.flatten(1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        up = h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    return (norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T).float()


def packed_logits(config, weights, tokens, lengths, flaw=""):
    """Rows one after the other (N,) -> (N,V)."""
    return torch.cat([row_logits(config, weights, row, flaw) for row in tokens.split(lengths)])


# ---- generate ----


def generate(config, weights, prompts, max_new_tokens, stop_tokens, flaw=""):
    """Greedy answers, each prompt by itself and without a cache."""
    answers = []
    context = config["max_position_embeddings"] + (flaw == "one past the context")
    last_seen = max(map(len, prompts)) if flaw == "longest stays" else math.inf
    for prompt in prompts:
        ids = list(prompt)
        new = []
        while len(new) < max_new_tokens and len(ids) < context:
            one = row_logits(config, weights, torch.tensor(ids), last_seen=last_seen)
            token = int(one[-1].argmax())
            ids.append(token)
            if token in stop_tokens and flaw == "keeps the stop token":
                new.append(token)
            if token in stop_tokens:
                break
            new.append(token)
        answers.append(new)
    return answers


MISTAKES = {
    rms_norm: {
        "mean": "the mean is subtracted: that is LayerNorm; RMSNorm only divides",
        "eps outside": "eps is added outside the root",
        "weight before cast": "the weight is multiplied before the cast; published weights were "
        "trained with the cast first",
        "in the input's dtype": "squares are averaged in bf16; convert to fp32 first",
    },
    rope: {
        "interleaved": "interleaved RoPE: dimensions 2i and 2i+1 are turned together; Hugging Face "
        "weights pair i with i + D/2",
        "other way": "the rotation has the other sign: (a cos - b sin, b cos + a sin)",
    },
    packed_attention: {
        "rows run together": "packed rows see each other: split q, k, v by the lengths",
        "modulo": "query head h reads key-value head h % G; neighbours share: h // (H/G), as "
        "repeat_interleave, not repeat",
        "not causal": "no causal mask: a token sees what follows it",
        "no scale": "scores are not divided by sqrt(head_dim), or twice: "
        "scaled_dot_product_attention divides too",
        "heads not merged": "heads come back in the wrong order: transpose (H,T,D) to (T,H,D)",
    },
    cached_attention: {
        "longest": "all rows write at the same place; a row's next place is its own length",
        "not masked": "visible is not used: a short row sees places that it has not filled",
    },
    packed_logits: {
        "no rope": "q and k are not turned: RoPE is missing",
        "k not turned": "k is not turned; RoPE is for q and k",
    },
    generate: {
        "longest stays": "cache.longest stays where it was: a row does not see its newest tokens",
        "keeps the stop token": "the stop token is part of the answer",
        "one past the context": "an answer runs past max_position_embeddings",
    },
}
WRONG = mistakes(MISTAKES)
