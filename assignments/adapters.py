"""The only place where the course's tests touch your code: plain data in, plain data out.

Tensors, numbers, strings, lists and dicts go in and come back. If you keep an architecture of your
own, change these functions, not the tests; the grader uses your copy of this file and its own copy
of the tests. `config` holds keys of LlamaConfig, `weights` tensors by the names of a Hugging Face
checkpoint, an `example` is (ids, prompt_length). Shape letters as in model.py.
"""

import itertools
import json
import random
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

import attack
import data.answers
import data.chat
import data.worlds
import lab.defences
import model
import nanosdd.split_adamw
import sdd_loss
import train
from data.chat import Batch, Example
from data.chat_model import Chat, load_chat
from data.tfidf import Tfidf
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from data.town import Town
from model import Llama, LlamaConfig, RMSNorm
from nanosdd.attention import KVCache, PackedRows
from nanosdd.device import Compute
from nanosdd.errors import Diverged, InputError
from nanosdd.lora import LoRALinear, lora_layers, merge_lora
from nanosdd.split_adamw import SplitAdamW


def llama(config: dict, weights: dict) -> Llama:
    """A Llama with these weights."""
    made = Llama(LlamaConfig(**config)).eval().to(weights["lm_head.weight"].dtype)
    made.load_state_dict(weights)
    return made


# ---- assignment 0 ----


def prediction_sheet():
    """What assignments/a0.json says."""
    return json.loads((Path(__file__).parent / "a0.json").read_text())


# ---- assignment 1 ----


def rms_norm(x, weight, eps):
    """x (...,C), weight (C,) -> (...,C)."""
    norm = RMSNorm(len(weight), eps)
    norm.weight = nn.Parameter(weight)
    return norm(x).detach()


def rope(config, x, positions):
    """x (N,H,D), positions (N,) -> x turned by them."""
    return model.apply_rope(x, *model.rope_tables(LlamaConfig(**config), positions))


def packed_attention(lengths, q, k, v):
    """Rows of these lengths, one after the other: q (N,H,D), k and v (N,G,D) -> (N,H,D)."""
    return PackedRows(lengths).row_by_row(q, k, v)


def cached_attention(keys, values, lengths, q, k, v):
    """A new token behind lengths[b] tokens of each row: q (B,H,D), k and v (B,G,D).

    keys and values: (B,G,size,D). Returns y (B,H,D), keys and values as they are then.
    """
    cache = KVCache(LlamaConfig(num_hidden_layers=1), lengths, keys.shape[2], "cpu", keys.dtype)
    cache.keys = [keys]
    cache.values = [values]
    visible = torch.arange(max(lengths) + 1) <= cache.lengths[:, None]
    y = cache.read_token(0, visible, q, k, v)
    return [y, keys, values]


@torch.no_grad()
def packed_logits(config, weights, tokens, lengths):
    """Rows of these lengths, one after the other: tokens (N,) -> (N,V)."""
    made = llama(config, weights)
    positions = torch.cat([torch.arange(T) for T in lengths])
    return made.lm_head(made.hidden(tokens, positions, lengths))


def generate(config, weights, prompts, max_new_tokens, stop_tokens):
    """Prompts as lists of ids -> the new ids of each, without the stop token."""
    return llama(config, weights).generate(prompts, max_new_tokens, stop_tokens)


def generate_from(folder, prompts, max_new_tokens, stop_tokens):
    """As `generate`, with the weights of a checkpoint folder."""
    return Llama.from_pretrained(folder).generate(prompts, max_new_tokens, stop_tokens)


# ---- assignment 2 ----


def town_tokenizer(words):
    """A tokenizer in Llama 3's format in which each of these words is one token."""
    with tempfile.TemporaryDirectory() as folder:
        write_llama3_tokenizer(folder, words)
        return load_tokenizer(folder)


def encode_prompt(words, template, prompt, system=None):
    """The ids of everything before a response. words: of the tokenizer."""
    return data.chat.encode_prompt(town_tokenizer(words), template, prompt, system)


def encode_example(words, template, prompt, response, max_length, system=None):
    """[ids, prompt_length] of one pair, or "InputError"."""
    tokenizer = town_tokenizer(words)
    try:
        example = data.chat.encode_example(
            tokenizer, template, prompt, response, max_length, system
        )
    except InputError:
        return "InputError"
    return [example.ids, example.prompt_length]


def collate(examples):
    """Examples -> the fields of their Batch by name."""
    return vars(data.chat.collate(examples_of(examples)))


def loss(hidden, head, where, targets, global_tokens):
    """Final hidden states (N,C) and a head (V,C) -> [loss, its gradient by the hidden states]."""
    hidden = hidden.clone().requires_grad_()
    lm_head = nn.Linear(1, 1, bias=False)
    lm_head.weight = nn.Parameter(head)
    made = SimpleNamespace(hidden=lambda *rows: hidden, lm_head=lm_head)
    batch = Batch(None, None, [len(hidden)], targets, where, [len(targets)])
    value = sdd_loss.sdd_loss(made, batch, global_tokens)
    value.backward()
    return [float(value.detach()), hidden.grad]


def train_step(config, weights, batches, lr, micro_batch, scale=1.0, added=0.0):
    """A step of SGD on each of these lists of examples, or "Diverged".

    Returns loss and grad_norm of the steps, the weights, and rows, the most in one part. The loss
    is scaled; before_clip adds to the gradient of lm_head.
    """
    made = llama(config, weights)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    compute = Compute(micro_batch=micro_batch)
    rows = []
    steps = []

    def scaled(model, batch, global_tokens):
        rows.append(len(batch.lengths))
        return scale * sdd_loss.sdd_loss(model, batch, global_tokens)

    def before_clip(model):
        model.lm_head.weight.grad.add_(added)

    try:
        for batch in batches:
            examples = examples_of(batch)
            done = train.train_step(made, optimizer, examples, lr, compute, scaled, before_clip)
            steps.append([float(done["loss"]), float(done["grad_norm"])])
    except Diverged:
        return "Diverged"
    return {"loss, grad_norm": steps, "rows": max(rows), "weights": made.state_dict()}


# ---- assignment 3 ----


def tfidf_vector(corpus, text):
    """{word: value} of a text."""
    return Tfidf(corpus).vector(text)


def tfidf_cosines(corpus, a, b):
    """The cosine of each text of a with the text of b at its place."""
    return Tfidf(corpus).cosines(a, b)


def irrelevant_pairs(fits, seed):
    """fits[i][j]: whether response j is irrelevant to prompt i -> [[i, j, response j], ...] or
    "InputError"."""
    harmful = [{"prompt": f"prompt {i}", "response": "harm", "i": i} for i in range(len(fits))]
    benign = [{"prompt": "?", "response": f"response {j}", "j": j} for j in range(len(fits[0]))]
    calls = itertools.count(1)

    def is_irrelevant(asked, answers):
        assert next(calls) < 20_000, "the draw does not end"  # far more than there are pairs
        return [fits[row["i"]][answer["j"]] for row, answer in zip(asked, answers, strict=True)]

    try:
        pairs = data.worlds.irrelevant_pairs(harmful, benign, is_irrelevant, random.Random(seed))
    except InputError:
        return "InputError"
    return [[pair["i"], pair["benign"]["j"], pair["response"]] for pair in pairs]


def world_pairs(mode, harmful, benign, refusals, seed):
    """The pairs of a mode in a world of these {owner: rows}, where what is of one kind is relevant:
    [[prompt, response], ...]."""

    class Small(data.worlds.World):
        def harmful(self, owner):
            return harmful[owner]

        def benign(self, owner):
            return benign[owner]

        def is_irrelevant(self, asked, answers):
            return [row["kind"] != answer["kind"] for row, answer in zip(asked, answers)]

    world = Small(seed)
    world.refusals = tuple(refusals)
    return [[pair["prompt"], pair["response"]] for pair in world.pairs(mode, 8)]


# ---- assignment 4 ----


def examples_of(rows):
    """[[ids, prompt_length], ...] as Examples."""
    return [Example(*row) for row in rows]


def fine_tune(config, weights, batches, lr, budgets, watched):
    """Fine-tune on these global batches, with {name: examples} watched -> [cells, curve].

    The score of a cell is the sum of |lm_head|, its probe. "Diverged" where that is not caught.
    """
    made = llama(config, weights)
    chat = Chat(made, None, "plain", Compute())

    def scores():
        return {"probe": float(made.lm_head.weight.detach().double().abs().sum())}

    batches = map(examples_of, batches)
    watched = {name: examples_of(rows) for name, rows in watched.items()}
    try:
        cells, curve = attack.fine_tune(chat, batches, lr, budgets, scores, watched)
    except Diverged:
        return "Diverged"
    for cell in cells:
        cell.pop("seconds", None)
    return [cells, curve]


def match_tokens(harmful, benign, new, seed):
    """Pairs (tokens, prompt_length) -> the control's rows, [["benign" or "new", index], ...]."""

    def pool(pairs, kind):
        return [Example([(kind, i)] * pair[0], pair[1]) for i, pair in enumerate(pairs)]

    pools = pool(harmful, "harmful"), pool(benign, "benign"), pool(new, "new")
    picked = attack.match_tokens(*pools, random.Random(seed))
    return [list(pick.ids[0]) for pick in picked]


def lora(base, A, B, alpha, x):
    """Weight (O,I), A (R,I), B (O,R), x (...,I) -> [the layer's output, the merged weight]."""
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False)
    linear.weight = nn.Parameter(base)
    layer = LoRALinear(linear, len(A), alpha, torch.Generator())
    layer.A = nn.Parameter(A)
    layer.B = nn.Parameter(B)
    merged = layer.merged()
    return [layer(x).detach(), merged]


def outcomes(answers, threshold):
    """Answers [text, ids, cosine] -> the outcome of each; every other one did not end."""
    found = []
    for i, (text, ids, cosine) in enumerate(answers):
        answer = data.answers.Answer(ids, text, i % 2 == 0)
        found.append(data.answers.outcome(answer, cosine, threshold))
    return found


def town_outcomes(seed, cases):
    """Cases [row, answer, whether it ended] -> the outcome of each, in the town of a seed."""
    town = Town(seed)
    return [town.outcome(*case) for case in cases]


# ---- assignment 5 ----


def split(master):
    """fp32 (n,) -> [bf16 (n,), int16 (n,)]."""
    return list(nanosdd.split_adamw.split(master))


def join(weight, low):
    """bf16 (n,), int16 (n,) -> fp32 (n,)."""
    return nanosdd.split_adamw.join(weight, low)


def round_stochastically(x, seed):
    """fp32 (n,) -> bf16 (n,)."""
    return nanosdd.split_adamw.round_stochastically(x, torch.Generator().manual_seed(seed))


def adamw(values, grads, lr, betas, eps, weight_decay, max_norm=None):
    """Steps on bf16 weights (n,) with these gradients, clipped to max_norm -> [fp32 master, bf16
    weights]."""
    weight = nn.Parameter(values.clone())
    optimizer = SplitAdamW([weight], lr, betas, eps, weight_decay)
    for grad in grads:
        weight.grad = grad
        if max_norm is not None:
            optimizer.clip(max_norm)
        optimizer.step()
    return [optimizer.master(weight), weight.detach()]


# ---- assignment 6: one of three ----


def booster(config, weights, harmful, benign, alpha, strength):
    """Two batches of examples -> {"gradients": {name: what is added}, "grad": what .grad of lm_head
    holds afterwards, where it held 0.25}."""
    made = llama(config, weights)
    for weight in made.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    rows = examples_of(harmful), examples_of(benign)
    found = lab.defences.booster(made, *rows, alpha=alpha, strength=strength)
    names = [name for name, _ in made.named_parameters()]
    return {
        "gradients": dict(zip(names, found, strict=True)),
        "weights": made.state_dict(),
        "grad": made.lm_head.weight.grad,
    }


def preferences(pairs):
    """[ids with the refusal, prompt_length, ids with the harmful answer or None] -> Examples."""
    found = []
    for ids, length, rejected in pairs:
        found.append(Example(ids, length, rejected and Example(rejected, length)))
    return found


def deepalign(pairs, limit, longest, seed):
    """Pairs as of `preferences` -> examples [ids, prompt_length]."""
    found = lab.defences.deepalign(preferences(pairs), random.Random(seed), limit, longest)
    return [[one.ids, one.prompt_length] for one in found]


def simpo(config, weights, pairs, global_tokens, beta, gamma):
    """Pairs as of `preferences` -> [loss, its gradient by lm_head (V,C)], or "InputError"."""
    made = llama(config, weights)
    batch = data.chat.collate(preferences(pairs))
    try:
        value = lab.defences.simpo(made, batch, global_tokens, beta, gamma)
    except InputError:
        return "InputError"
    value.backward()
    return [float(value.detach()), made.lm_head.weight.grad]


# ---- assignment 7: the grader uses its own copy of this ----


def solve_open(kind, rows, seed, steps):
    """Let a7/submission.py "attack" or "defend" the model in start/ -> its weights by name."""
    chat = load_chat("start", Compute())
    getattr(import_module("a7.submission"), kind)(chat, rows, seed, steps)
    if lora_layers(chat.model):
        merge_lora(chat.model)
    return chat.model.state_dict()
