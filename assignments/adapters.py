"""The only place where the course's tests touch your code: plain data in, plain data out.

Tensors, numbers, strings, lists and dicts go in and come back. If you keep an architecture of your own, change these
functions, not the tests; the grader uses your copy of this file and its own copy of the tests. `config` holds keys of
LlamaConfig, `weights` tensors by the names of a Hugging Face checkpoint, an `example` is (ids, prompt_length). Shape
letters as in model.py.
"""

import itertools
import json
import random
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn

import attack
import data.answers
import data.chat
import data.pairs
import data.worlds
import lab.defences
import model
import nanosdd.split_adamw
import sdd_loss
import train
from data.chat import Batch, Example
from data.tfidf import Tfidf
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from data.town import Town
from model import KVCache, Llama, LlamaConfig, RMSNorm
from nanosdd.chat_model import Chat, load_chat
from nanosdd.checkpoint import write_model
from nanosdd.device import Compute
from nanosdd.errors import Diverged, InputError
from nanosdd.lora import LoRALinear, merged_state
from nanosdd.split_adamw import SplitAdamW


def llama(config: dict, weights: dict) -> Llama:
    """A Llama with these weights."""
    made = Llama(LlamaConfig(**config)).eval().to(next(iter(weights.values())).dtype)
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


def rope_frequencies(config):
    """(D/2,) fp32."""
    return model.rope_frequencies(LlamaConfig(**config))


def rope(config, x, positions):
    """x (B,T,H,D), positions (B,T) -> x rotated."""
    return model.apply_rope(x, *model.rope_tables(LlamaConfig(**config), positions))


@torch.no_grad()
def logits(config, weights, tokens, pieces=None):
    """tokens (B,T) -> (B,T,V). pieces: the lengths of parts that are read one after the other through a cache."""
    made = llama(config, weights)
    if pieces is None:
        return made(tokens)
    cache, found = KVCache(made.config, *tokens.shape), []
    for part in tokens.split(pieces, dim=1):
        found.append(made(part, cache=cache))
        cache.lengths += part.shape[1]
        cache.longest += part.shape[1]
    return torch.cat(found, 1)


@torch.no_grad()
def packed_logits(config, weights, tokens, lengths):
    """Right-padded rows (B,T) of true lengths (B,) -> the logits of their tokens, one row after the other (N,V)."""
    made, mask = llama(config, weights), torch.arange(tokens.shape[1]) < lengths[:, None]
    return made.lm_head(made.hidden(tokens, positions=mask, lengths=lengths))


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
    try:
        example = data.chat.encode_example(
            town_tokenizer(words), template, prompt, response, max_length, system
        )
    except InputError:
        return "InputError"
    return [example.ids, example.prompt_length]


def collate(examples, pad):
    """Examples -> {"tokens", "targets", "loss_mask", "lengths"} as in data.chat.Batch."""
    batch = data.chat.collate([Example(*example) for example in examples], pad)
    return {name: getattr(batch, name) for name in ("tokens", "targets", "loss_mask", "lengths")}


def loss(logits, targets, loss_mask, global_tokens):
    """Logits (B,T,V), targets and mask (B,T) -> [loss, its gradient by the logits (B,T,V)]."""
    logits = logits.clone().requires_grad_()
    batch = Batch(torch.zeros_like(targets), targets, loss_mask, None)

    def made(tokens, positions=None):
        return logits if positions is None else logits[positions]

    value = sdd_loss.sdd_loss_reference(made, batch, global_tokens)
    value.backward()
    return [float(value.detach()), logits.grad]


def train_step(config, weights, batches, lr, micro_batch, scale=1.0, added=0.0):
    """A step of SGD on each global batch, a list of examples: {"loss": [...], "grad_norm": [...], "weights": {...}, and
    "rows": the most in one part}, or "Diverged". The loss is scaled; before_clip adds to the gradient of lm_head."""
    made, rows = llama(config, weights), []
    optimizer, done = torch.optim.SGD(made.parameters(), lr=0.0), []

    def scaled(model, batch, global_tokens):
        rows.append(len(batch.tokens))
        return scale * sdd_loss.sdd_loss(model, batch, global_tokens)

    def before_clip(model):
        model.lm_head.weight.grad.add_(added)

    for batch in batches:
        examples = [Example(*example) for example in batch]
        try:
            done.append(
                train.train_step(
                    made,
                    optimizer,
                    examples,
                    lr,
                    Compute(micro_batch=micro_batch),
                    scaled,
                    before_clip,
                )
            )
        except Diverged:
            return "Diverged"
    return {
        "loss": [one["loss"] for one in done],
        "grad_norm": [one["grad_norm"] for one in done],
        "weights": made.state_dict(),
        "rows": max(rows, default=0),
    }


# ---- assignment 3 ----


def tfidf_vector(corpus, text):
    """{word: value} of a text."""
    return Tfidf(corpus).vector(text)


def tfidf_cosines(corpus, a, b):
    """The cosine of each text of a with the text of b at its place."""
    return Tfidf(corpus).cosines(a, b)


def draw_irrelevant(prompts, responses, cosines, threshold, seed):
    """cosines: a list for each prompt, with one number for each response -> [[index, cosine, tries], ...] of each
    prompt, or "InputError"."""
    row, column = ({text: i for i, text in enumerate(texts)} for texts in (prompts, responses))
    calls = itertools.count(1)

    def look_up(a, b):
        if next(calls) > 20_000:  # far more than there are pairs
            raise AssertionError("the draw does not end: cosines were asked for 20,000 times")
        return [cosines[row[x]][column[y]] for x, y in zip(a, b, strict=True)]

    try:
        return [
            list(one)
            for one in data.pairs.draw_irrelevant(prompts, responses, look_up, threshold, seed)
        ]
    except InputError:
        return "InputError"


def vary_response(mode, response, seed):
    """A response as a mode teaches it, or "InputError"."""
    try:
        return data.worlds.vary_response(mode, response, random.Random(seed))
    except InputError:
        return "InputError"


# ---- assignment 4 ----


def fine_tune(config, weights, batches, lr, budgets):
    """Fine-tune on these global batches -> the cells of the budgets, each with the sum of |lm_head| as its probe."""
    made = llama(config, weights)

    def scores():
        return {"probe": float(made.lm_head.weight.detach().double().abs().sum())}

    rows = ([Example(*example) for example in batch] for batch in batches)
    try:
        cells = attack.fine_tune(Chat(made, None, "plain", Compute()), rows, lr, budgets, scores)
    except Diverged:
        return "Diverged"
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def match_tokens(harmful, benign, new, seed):
    """Pairs (tokens, prompt_length) -> the control's rows, [["benign" or "new", index], ...]."""
    pools = {
        name: [Example([i] * tokens, length) for i, (tokens, length) in enumerate(pairs)]
        for name, pairs in (("harmful", harmful), ("benign", benign), ("new", new))
    }
    picked = attack.match_tokens(*pools.values(), random.Random(seed))
    return [
        ["new" if any(pick is one for one in pools["new"]) else "benign", pick.ids[0]]
        for pick in picked
    ]


def lora(base, A, B, alpha, x):
    """Weight (O,I), A (R,I), B (O,R), x (...,I) -> [the layer's output, the merged weight]."""
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False)
    linear.weight = nn.Parameter(base)
    layer = LoRALinear(linear, len(A), alpha, torch.Generator())
    layer.A, layer.B = nn.Parameter(A), nn.Parameter(B)
    merged = layer.merged()
    return [layer(x).detach(), merged]


def outcomes(answers, threshold):
    """Answers [text, ids, cosine] -> the outcome of each, as data.answers.outcome; every other one did not end."""
    return [
        data.answers.outcome(data.answers.Answer(ids, text, i % 2 == 0), cosine, threshold)
        for i, (text, ids, cosine) in enumerate(answers)
    ]


def town_outcomes(seed, cases):
    """Cases [row, answer, whether it ended] -> the outcome of each, in the town of a seed."""
    town = Town(seed)
    return [town.outcome(row, answer, ended) for row, answer, ended in cases]


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
    """bf16 weights (n,) and the gradients of some steps, each (n,) and clipped to max_norm -> the fp32 master (n,)."""
    weight = nn.Parameter(values)
    optimizer = SplitAdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for grad in grads:
        weight.grad = grad
        if max_norm is not None:
            optimizer.clip(max_norm)
        optimizer.step()
    return optimizer.master(weight)


def drift(values, grad, lr, steps):
    """Steps with one gradient -> [mean change of the master in units of lr, share of the bf16 weights that moved]."""
    weight = nn.Parameter(values.clone())
    optimizer = SplitAdamW([weight], lr=lr, betas=(0.5, 0.5), eps=1e-12)
    for _ in range(steps):
        weight.grad = grad
        optimizer.step()
    change = (optimizer.master(weight) - values.float()).abs().mean()
    return [float(change) / lr, float((weight.detach() != values).float().mean())]


# ---- assignment 6: one of three ----


def booster(config, weights, harmful, benign, alpha, strength):
    """Two batches of examples -> {"gradients": {name: what is added}, "weights": the weights afterwards, "grad": what
    .grad of lm_head holds afterwards, where it held 0.25}."""
    made = llama(config, weights)
    batches = (data.chat.collate([Example(*one) for one in rows]) for rows in (harmful, benign))
    for weight in made.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    found = lab.defences.booster(made, *batches, alpha=alpha, strength=strength)
    return {
        "gradients": dict(zip([name for name, _ in made.named_parameters()], found, strict=True)),
        "weights": made.state_dict(),
        "grad": made.lm_head.weight.grad,
    }


def preferences(pairs):
    """[ids with the refusal, prompt_length, ids with the harmful answer or None] -> Examples."""
    return [
        Example(ids, length, None if rejected is None else Example(rejected, length))
        for ids, length, rejected in pairs
    ]


def deepalign(pairs, limit, longest, seed):
    """Pairs as of `preferences` -> examples [ids, prompt_length]."""
    found = lab.defences.deepalign(preferences(pairs), random.Random(seed), limit, longest)
    return [[one.ids, one.prompt_length] for one in found]


def simpo(config, weights, pairs, global_tokens, beta, gamma):
    """Pairs as of `preferences` -> [loss, its gradient by lm_head (V,C)], or "InputError"."""
    made = llama(config, weights)
    try:
        value = lab.defences.simpo(
            made, data.chat.collate(preferences(pairs)), global_tokens, beta, gamma
        )
    except InputError:
        return "InputError"
    value.backward()
    return [float(value.detach()), made.lm_head.weight.grad]


# ---- assignment 7: the grader uses its own copy of this ----


def solve_open(kind, rows, seed, steps):
    """Let a7/submission.py change the model in start/, and write it to result/. kind: "attack" or "defend"."""
    chat = load_chat("start", Compute())
    getattr(import_module("a7.submission"), kind)(chat, rows, seed, steps)
    write_model("result", chat.model.config.to_dict(), merged_state(chat.model))
    return True
