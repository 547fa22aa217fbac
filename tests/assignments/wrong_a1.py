"""Classic mistakes of assignment 1, and right solutions written differently. Spoilers: read it after your own try."""

import math
from functools import partial
from types import SimpleNamespace

import torch
from lesson import Wrong

# ---- RMSNorm ----


def rms_norm(x, weight, eps, flaw=""):
    """x (...,C) and weight (C,) of one dtype -> the same; in fp32, cast, then weighted."""
    h = x.double() if flaw != "in the input's dtype" else x
    if flaw == "mean":
        h = h - h.mean(-1, keepdim=True)
    square = (h * h).sum(-1, keepdim=True) if flaw == "sum" else (h * h).mean(-1, keepdim=True)
    if flaw == "no eps":
        eps = 0.0
    h = h / (square.sqrt() + eps if flaw == "eps outside" else torch.sqrt(square + eps))
    if flaw == "weight before cast":
        return (h * weight.double()).to(x.dtype)
    return h.to(x.dtype) * (1.0 if flaw == "no weight" else weight)


def rms_norm_by_hand(x, weight, eps):
    rows = x.float().reshape(-1, x.shape[-1])
    scaled = torch.stack([row / math.sqrt(float(row @ row) / len(row) + eps) for row in rows])
    return scaled.view_as(x).to(x.dtype).mul(weight)


# ---- rotary embeddings ----


def rope_frequencies(config, flaw=""):
    """(D/2,) fp32."""
    D, theta = config["head_dim"], config["rope_theta"]
    pair = torch.arange(D // 2).double()
    exponent = {
        "half": pair / D,
        "double": 4 * pair / D,
        "wide": 2 * pair / config["hidden_size"],
        "from one": 2 * (pair + 1) / D,
    }.get(flaw, 2 * pair / D)
    freq = theta ** (exponent if flaw == "rising" else -exponent)
    scaling = config.get("rope_scaling")
    if scaling and scaling["rope_type"] == "linear":
        return (freq if flaw in ("no scaling", "no linear") else freq / scaling["factor"]).float()
    if scaling and flaw != "no scaling":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = (turns - low) / (high - low)
        keep = keep if flaw == "not clamped" else keep.clamp(0, 1)
        if flaw == "slows the fast":
            keep = 1 - keep
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    return freq.float()


def frequencies_one_by_one(config):
    base, scaling, found = config["rope_theta"], config.get("rope_scaling"), []
    for i in range(0, config["head_dim"], 2):
        freq = math.exp(-math.log(base) * i / config["head_dim"])
        if scaling and scaling["rope_type"] == "linear":
            freq /= scaling["factor"]
        elif scaling:
            turns = scaling["original_max_position_embeddings"] / (2 * math.pi / freq)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if turns < low:
                freq /= scaling["factor"]
            elif turns < high:
                keep = (turns - low) / (high - low)
                freq = keep * freq + (1 - keep) * freq / scaling["factor"]
        found.append(freq)
    return torch.tensor(found)


def rope(config, x, positions, flaw=""):
    """x (B,T,H,D), positions (B,T) -> the same, rotated."""
    D = config["head_dim"]
    if flaw == "from one":
        positions = positions + 1
    if flaw == "index":  # the place in the tensor
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
    angle = positions[..., None, None].double() * rope_frequencies(config).double()  # (B,T,1,D/2)
    cos, sin = angle.cos(), angle.sin()
    if flaw == "other way":
        sin = -sin
    out = torch.empty_like(x, dtype=torch.float64)
    halves, neighbours = (slice(0, D // 2), slice(D // 2, D)), (slice(0, D, 2), slice(1, D, 2))
    first, second = neighbours if flaw == "interleaved" else halves
    a, b = (
        x[..., part].double()
        for part in (neighbours if flaw == "read interleaved" else (first, second))
    )
    out[..., first] = a * cos - b * sin
    out[..., second] = (a if flaw == "no minus" else b) * cos + (
        b if flaw == "no minus" else a
    ) * sin
    return out.to(x.dtype)


def rope_as_complex_numbers(config, x, positions):
    """The pair (a, b) is a + ib, and a turn is a product."""
    a, b = x.double().chunk(2, -1)
    angle = positions[..., None, None].double() * rope_frequencies(config).double()
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def rope_as_rotate_half(config, x, positions):
    """As transformers writes it."""
    angle = (positions[..., None, None].float() * rope_frequencies(config)).repeat(1, 1, 1, 2)
    half = x.shape[-1] // 2
    turned = x * angle.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angle.sin()
    return turned.to(x.dtype)


# ---- the whole Llama, slowly ----


def logits(config, weights, tokens, pieces=None, flaw="", last_seen=math.inf):
    """tokens (B,T) -> (B,T,V) fp32. pieces: lengths of the parts that are read one after the other through a cache;
    last_seen: the last place that attention covers."""
    c, w = SimpleNamespace(**config), {name: tensor.double() for name, tensor in weights.items()}
    (B, T), H, G, D = tokens.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    pieces = torch.tensor(pieces or [T])
    piece = torch.arange(len(pieces)).repeat_interleave(
        pieces
    )  # (T,): in which part a token is read
    place = torch.arange(T)
    if flaw == "positions restart":
        place = torch.cat([torch.arange(n) for n in pieces])
    serves = [
        h % G if flaw == "modulo" else h // (H // G) for h in range(H)
    ]  # the key-value head of a query head
    visible = (torch.arange(T)[:, None] >= torch.arange(T)) & (
        torch.arange(T) <= last_seen
    )  # (T,S)
    same = piece[:, None] == piece
    if flaw == "not causal":
        visible = torch.ones(T, T, dtype=torch.bool)
    if flaw == "strict":
        visible = torch.arange(T)[:, None] > torch.arange(T)
        visible[0, 0] = True
    if flaw == "not causal in a piece":
        visible = piece[:, None] >= piece
    if flaw == "cache forgotten":
        visible = visible & same
    norm = partial(rms_norm, eps=c.rms_norm_eps)
    turn = partial(rope, config, positions=place.expand(B, -1))
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (
            part.view(B, T, -1, D)
            for part in (h @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        )
        raw = k
        q, k = (q, k) if flaw == "no rope" else (turn(q), turn(k))
        if flaw == "values turned":
            v = turn(v)
        k, v, raw = k[:, :, serves], v[:, :, serves], raw[:, :, serves]  # (B,S,H,D)
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        if flaw == "cache before rope":  # keys of earlier parts come back as they were stored
            scores = torch.where(same, scores, torch.einsum("bthd,bshd->bhts", q, raw))
        scale = {
            "no scale": 1.0,
            "scale of the hidden size": math.sqrt(c.hidden_size),
            "scale without root": D,
        }
        scores = (scores / scale.get(flaw, math.sqrt(D))).masked_fill(~visible, -math.inf)
        share = scores.softmax(1 if flaw == "softmax over heads" else -1).nan_to_num()
        y = torch.einsum("bhts,bshd->bthd", share, v)
        if flaw == "heads not merged":
            y = y.transpose(1, 2)
        x = x + y.reshape(B, T, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    return (norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T).float()


def logits_one_token_at_a_time(config, weights, tokens, pieces=None):
    """Every position from a pass of its own over the tokens up to it, in fp32."""
    return torch.stack(
        [logits(config, weights, tokens[:, : t + 1])[:, -1] for t in range(tokens.shape[1])], 1
    )


def packed_logits(config, weights, tokens, lengths, flaw=""):
    """Rows (B,T) of true lengths (B,) -> logits of their tokens, one row after the other (N,V)."""
    if flaw == "rows run together":
        flat = torch.cat([row[:n] for row, n in zip(tokens, lengths.tolist())])
        return logits(config, weights, flat[None])[0]
    width = int(lengths.max())
    order = (
        range(len(lengths))
        if flaw != "sorted"
        else sorted(range(len(lengths)), key=lambda i: int(lengths[i]))
    )
    found = logits(
        config, weights, tokens[:, :width], flaw="not causal" if flaw == "sees padding" else ""
    )
    return torch.cat([found[i, : lengths[i]] for i in order])


# ---- generate ----


def generate(config, weights, prompts, max_new_tokens, stop_tokens, flaw=""):
    """Greedy answers, each prompt by itself and without a cache."""
    answers, most = [], max_new_tokens + {"one too many": 1, "one too few": -1}.get(flaw, 0)
    longest, context = (
        max(map(len, prompts)),
        config["max_position_embeddings"] + (flaw == "one past the context"),
    )
    for prompt in prompts:
        ids, new = list(prompt), []
        padding = [0] * (longest - len(ids))
        if flaw == "reads the padding":
            ids += padding
        start = len(ids)
        while len(new) < most and (len(ids) < context or flaw == "no end of context"):
            read = ids + padding if flaw == "last column" and not new else ids
            seen = longest if flaw == "longest stays" else math.inf
            one = logits(config, weights, torch.tensor([read]), last_seen=seen)[0, -1]
            token = int(one.argmin() if flaw == "argmin" else one.argmax())
            ids += padding * (flaw == "padding stays" and not new) + [token]
            if token in stop_tokens and flaw != "never stops":
                new += [token] * (flaw == "keeps the stop token")
                break
            new.append(token)
        if flaw == "first token lost":
            new = new[1:]
        answers.append(ids[:start] + new if flaw == "keeps the prompt" else new)
    if flaw == "all stop together":
        shortest = min(map(len, answers))
        answers = [answer[:shortest] for answer in answers]
    return answers


WRONG = [
    Wrong("rms_norm", partial(rms_norm, flaw=flaw), message)
    for flaw, message in {
        "mean": "the mean is subtracted: that is LayerNorm; RMSNorm only divides",
        "sum": "the sum of squares in the place of their mean",
        "no eps": "eps is left out: it is added to the mean of squares",
        "eps outside": "eps is added outside the root",
        "no weight": "the weight is left out",
        "weight before cast": "the weight is multiplied in fp32 before the cast; published weights were trained with the "
        "cast first",
        "in the input's dtype": "squares are averaged in bf16; convert to fp32 first",
    }.items()
]
WRONG += [
    Wrong("rope_frequencies", partial(rope_frequencies, flaw=flaw), message)
    for flaw, message in {
        "half": "the exponent is i/D: the i-th pair has 2i/D",
        "double": "the exponent is 4i/D: the 2 is counted twice, in arange(0, D, 2) and beside it",
        "wide": "the exponent is divided by hidden_size, not by head_dim",
        "from one": "pairs are counted from 1: the first turns 1 radian a position",
        "rising": "theta has a positive exponent: later pairs turn more slowly",
        "not clamped": "the share that is kept runs below 0 and above 1: clamp it",
        "no linear": "rope_type linear is not read: it divides every frequency by factor",
        "no scaling": "rope_scaling is not read: Llama 3.1 slows the pairs of long wavelength",
        "slows the fast": "the wrong pairs are slowed: those with many turns in the original context stay",
    }.items()
]
WRONG += [
    Wrong("rope", partial(rope, flaw=flaw), message)
    for flaw, message in {
        "interleaved": "interleaved RoPE: dimensions 2i and 2i+1 are turned together; Hugging Face weights pair i with "
        "i + D/2",
        "read interleaved": "dimensions 2i and 2i+1 are turned together and written to i and i + D/2: take the two halves",
        "other way": "the rotation has the other sign: (a cos - b sin, b cos + a sin)",
        "no minus": "the two halves are swapped in the second output: b cos + a sin",
        "from one": "positions are counted from 1",
        "index": "the place in the tensor is used, not the given position: with a cache the two differ",
    }.items()
]
WRONG += [
    Wrong("logits", partial(logits, flaw=flaw), message)
    for flaw, message in {
        "modulo": "query head h reads key-value head h % G; neighbours share: h // (H/G), as repeat_interleave, not repeat",
        "not causal": "no causal mask: a token sees what follows it",
        "not causal in a piece": "with a cache there is no causal mask within the new tokens",
        "strict": "the mask is one place off: a token must see itself",
        "no rope": "q and k are not turned: RoPE is missing",
        "values turned": "v is turned too; RoPE is for q and k",
        "no scale": "scores are not divided by sqrt(head_dim)",
        "scale of the hidden size": "scores are divided by sqrt(hidden_size), not by sqrt(head_dim)",
        "scale without root": "scores are divided by head_dim, without the root; or twice by the root, since attend "
        "divides too",
        "softmax over heads": "softmax runs over heads, not over keys",
        "heads not merged": "heads are flattened in the wrong order: transpose (B,H,T,D) back to (B,T,H,D) first",
        "cache before rope": "the cache is written before RoPE: old keys come back without their rotation",
        "positions restart": "positions restart at 0 in every call: with a cache they continue at cache.lengths",
        "cache forgotten": "keys and values of the cache are not read: new tokens see only each other",
    }.items()
]
WRONG += [
    Wrong("packed_logits", partial(packed_logits, flaw=flaw), message)
    for flaw, message in {
        "rows run together": "packed rows see each other: unpack q, k, v before attention",
        "sees padding": "a row's tokens see padding, or what follows them",
        "sorted": "rows come back in another order",
    }.items()
]
WRONG += [
    Wrong("generate", partial(generate, flaw=flaw), message)
    for flaw, message in {
        "reads the padding": "a short prompt is continued after its padding: softmax over padding, or logits of the last "
        "column; read each row at its own last token",
        "last column": "the first new token of a short prompt is read from the last column, which is padding; read each "
        "row at its own last token",
        "longest stays": "cache.longest stays where it was: a row does not see its own newest tokens",
        "padding stays": "new tokens come after the padding of a short prompt, and see it; a row's next place is its own "
        "length",
        "keeps the stop token": "the stop token is part of the answer",
        "keeps the prompt": "the prompt is part of the answer",
        "never stops": "stop tokens are not looked at",
        "all stop together": "the first row that stops ends all rows",
        "first token lost": "the first new token, which the prompt's pass predicts, is lost",
        "one too many": "one token more than max_new_tokens",
        "one too few": "one token fewer than max_new_tokens",
        "argmin": "greedy is argmax",
        "one past the context": "an answer has one token more than max_position_embeddings leaves room for",
        "no end of context": "an answer runs past max_position_embeddings",
    }.items()
]

RIGHT = [
    ("rms_norm", rms_norm),
    ("rms_norm", rms_norm_by_hand),
    ("rope_frequencies", rope_frequencies),
    ("rope_frequencies", frequencies_one_by_one),
    ("rope", rope_as_complex_numbers),
    ("rope", rope_as_rotate_half),
    ("logits", logits),
    ("logits", logits_one_token_at_a_time),
    ("packed_logits", packed_logits),
    ("generate", generate),
]
