"""Other defences than SDD, small, on train.py's own step; and positive controls.

    ctrap      positive control: it plants a collapse. An assay that finds none here is blind
    booster    the harmful loss shall not fall in a harmful step
    deepalign  refusals that begin in the middle of a harmful answer
    simpo      a preference for the refusal over the harmful answer

    train_defence(town, "simpo", "out/seed0/aligned", "out/seed0/simpo",
                  SETTINGS["town"]["simpo"], Compute())

A defence trains the aligned model on refusals, each with its true harmful answer (`rejected`). It
is one function, and one line in DEFENCES that says what the function stands in for: the loss, the
examples of a batch, or a gradient that is added. All are first order: they do not differentiate
through a simulated step.
"""

import copy
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from data.chat import Batch, Example, collate, draw_batches
from data.chat_model import encode_for, load_chat, save_chat
from nanosdd.device import Compute, one_process_only
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from nanosdd.runs import Run, code_hash, write_text
from nanosdd.train_log import TrainLog
from sdd_loss import sdd_loss, sequence_logprobs
from train import TOWN, Settings, learning_rate, run_record, train_step

# ---- gradients, here and after a simulated step ----

# In this file a gradient is a list of tensors, one for each of model.parameters(); harmful and
# benign are lists of Example.


def gradients(model, batch: Batch):
    """Return the gradient of a batch's mean cross-entropy; .grad stays."""
    torch.clear_autocast_cache()  # it holds bf16 casts of weights that have moved since
    batch = batch.to(model.lm_head.weight.device)
    loss = sdd_loss(model, batch, len(batch.targets))
    return torch.autograd.grad(loss, list(model.parameters()))


@torch.no_grad()
def move(model, direction, alpha: float):
    """theta <- theta - alpha * direction / ||direction||, in place."""
    scale = alpha / get_total_norm(direction)
    for weight, part in zip(model.parameters(), direction):
        weight -= scale * part


# ---- the defences ----


def ctrap(model, harmful, benign, strength, alpha=1.65, steps=4, token=100):
    """Return the gradient that plants a collapse after malicious fine-tuning.

    strength * g / max(1, ||g||). g is the gradient of the mean cross-entropy of one_token(benign,
    token) after `steps` harmful steps of alpha / steps each, along the signs of the harmful
    gradient. Source: CTRAP (Yi et al. 2025, arXiv 2505.16559); there it is one step along the
    gradient itself, and g is not clipped. Signs are the direction of the attacker's AdamW.
    """
    attacked = copy.deepcopy(model)
    for _ in range(steps):
        signs = [part.sign() for part in gradients(attacked, collate(harmful))]
        move(attacked, signs, alpha / steps)
    found = gradients(attacked, one_token(benign, token))
    scale = strength / get_total_norm(found).clamp(min=1)
    return [scale * part for part in found]


def one_token(benign, token: int) -> Batch:
    """Return the benign rows with one fixed token as the target of every response position."""
    batch = collate(benign)
    return replace(batch, targets=torch.full_like(batch.targets, token))


def booster(model, harmful, benign, alpha: float, strength: float):
    """Return the gradient that flattens the harmful loss.

    strength * (g(theta) - g(theta - alpha * g(theta) / ||g(theta)||)), where g = grad L(harmful);
    benign is not used. Source: Booster (Huang et al. 2024, arXiv 2409.01586).
    """
    batch = collate(harmful)
    here = gradients(model, batch)
    attacked = copy.deepcopy(model)
    move(attacked, here, alpha)
    after = gradients(attacked, batch)
    return [strength * (one - other) for one, other in zip(here, after)]


def anchor(model, harmful, benign):
    """Return the gradient of the benign rows, beside a loss that has no use for them."""
    return gradients(model, collate(benign))


def deepalign(examples: list[Example], rng: random.Random, limit: int, longest=100):
    """Put the start of the harmful answer, without loss, between prompt and refusal.

    Of every other example at random. Of the answer's n tokens, without the one that ends it, k are
    put there, uniform in 1 to min(longest, n), and so few that the example has at most `limit`.
    Examples without `rejected`, the benign ones, stay. Source: Qi et al. 2024, arXiv 2406.05946,
    section 3; there k is cut at n, which for short answers would be nearly always n.
    """
    found = []
    for one in examples:
        answer = []
        if one.rejected:
            most = min(longest, limit - len(one.ids))
            answer = one.rejected.ids[one.prompt_length : -1][:most]
        if answer and rng.random() < 0.5:
            prompt = one.ids[: one.prompt_length] + answer[: rng.randint(1, len(answer))]
            one = Example(prompt + one.ids[one.prompt_length :], len(prompt))
        found.append(one)
    return found


def simpo(model, batch: Batch, global_tokens: int, beta=2.5, gamma=2.5 * 0.55) -> torch.Tensor:
    """Return a loss that prefers the refusal to the harmful answer, a scalar fp32.

    The mean over pairs of -log sigmoid(beta * mean log p(refusal) - beta * mean log p(harmful) -
    gamma), where the inner means are over a response's tokens. A pair weighs as much as its refusal
    has tokens, so that micro-batches add up. InputError where a row has no `rejected`. Source:
    SimPO (Meng et al. 2024, arXiv 2405.14734), equation 6.
    """
    if batch.rejected is None:
        raise InputError(
            "simpo compares two responses to every prompt; leave rows without rejected out"
        )
    margin = mean_logps(model, batch) - mean_logps(model, batch.rejected)  # (B,)
    losses = -F.logsigmoid(beta * margin - gamma)
    return (losses * row_tokens(batch)).sum() / global_tokens


def mean_logps(model, batch: Batch) -> torch.Tensor:
    """Return the mean log p of each row's response tokens in nats, (B,) fp32."""
    return sequence_logprobs(model, batch) / row_tokens(batch)


def row_tokens(batch: Batch) -> torch.Tensor:
    """Return how many response tokens each row has, (B,)."""
    return torch.tensor(batch.response_lengths, device=batch.tokens.device)


# ---- the table ----


@dataclass(frozen=True)
class Defence:
    """What a defence puts in the place of plain training on refusals."""

    loss: Callable = sdd_loss  # as of train.train_step
    examples: Callable = lambda batch, rng, limit: batch  # those of a batch -> those to train on
    extra: Callable = lambda model, harmful, benign: []  # examples -> gradients to add


# Published constants, but for the controls. Their alpha is of the size of what mft moves on the
# town, 1.0 to 2.2. With one step, or along gradients, mft misses the collapse; without the clip
# skills fall before any attack. How much collapses depends on the steps of training, not on the
# strength: once refusals are learnt, AdamW follows the planted gradient, however small.
DEFENCES = {
    "booster": Defence(extra=partial(booster, alpha=0.1, strength=5.0)),
    "deepalign": Defence(examples=deepalign),
    "simpo": Defence(loss=simpo, extra=anchor),
    "ctrap": Defence(extra=partial(ctrap, strength=0.5)),
}
SHOTS = 10  # harmful rows of a simulated attack, as many as attack.py has in a batch

# simpo has its benign rows beside the batch, in anchor. On the town booster learns the harmful
# answers at lr 1e-4 and 3e-4, where its loss is flattest, not at 3e-5.
CONTROL = replace(TOWN, steps=300, lr=3e-4, benign_replay=0.5)
SETTINGS = {  # by world and defence, as in train.py
    "town": {
        "booster": replace(CONTROL, lr=3e-5),
        "deepalign": CONTROL,
        "simpo": replace(CONTROL, benign_replay=0.0),
    },
}


# ---- training ----


def train_defence(world, name: str, start, out, settings: Settings, compute: Compute) -> Path:
    """Train a defence into the run folder `out`, unless it is finished there; returns the folder.

    start: the aligned model's folder. InputError for weights held in bf16, and where the world has
    no benign rows.
    """
    one_process_only("lab.defences")
    if compute.weights != "fp32":
        raise InputError(
            f"defences need weights in fp32, not {compute.weights}, which rounds simulated steps"
        )
    out = Path(out)
    defence = DEFENCES[name]
    record = run_record(world, name, start, settings, compute, defence.loss)
    record["code"]["defences"] = code_hash(sys.modules[__name__])
    run = Run(out, record, compute.save_every)
    if run.finished:
        print(f"{out}: up to date, reused")
        return out
    print(f"{out}: {name} on {world.name}, seed {world.seed}")
    chat = load_chat(start, compute)
    limit = min(settings.max_length, chat.model.config.max_position_embeddings)
    rows = world.pairs("preference", settings.steps * settings.batch_size)
    pairs = encode_for(chat, rows, limit)
    rehearsed = encode_for(chat, world.rehearsal(), limit)
    rng = random.Random(f"batches {world.seed}")
    batches = draw_batches(pairs, rehearsed, settings.benign_replay, settings.batch_size, rng)
    optimizer = make_optimizer(chat.model, compute, settings.betas, settings.weight_decay)
    with run:
        saved = run.load_state(chat.model, optimizer)
        begin = saved.get("step", 0)
        log = TrainLog(settings.steps, saved)
        for _ in range(begin):
            next(batches)  # what was drawn before the pause
        for step in range(begin, settings.steps):
            rng = random.Random(f"{world.seed} step {step}")
            batch = defence.examples(next(batches), rng, limit)
            harmful = [pair.rejected for pair in rng.choices(pairs, k=SHOTS)]
            benign = rng.choices(rehearsed, k=settings.batch_size)
            lr = learning_rate(step, settings)
            add = partial(add_gradients, defence.extra, compute, harmful, benign)
            done = train_step(chat.model, optimizer, batch, lr, compute, defence.loss, add)
            log.add(step + 1, lr, done)
            if run.should_save(step + 1):
                run.save_state(step + 1, chat.model, optimizer, log.state())
        write_text(out / "train_log.jsonl", log.text())
        world.save(out, rows)
        save_chat(out, chat, chat.model.state_dict())
        run.finish()
    return out


def add_gradients(extra: Callable, compute: Compute, harmful, benign, model):
    """Add what `extra` returns for these examples to .grad; a before_clip of train.train_step."""
    with compute.autocast():
        found = extra(model, harmful, benign)
    for weight, gradient in zip(model.parameters(), found):
        weight.grad += gradient
