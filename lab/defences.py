"""Other defences than SDD, small, on train.py's own step; and a positive control.

    ctrap      positive control: it plants a collapse. An assay that finds none here is blind
    booster    the harmful loss shall not fall in a harmful step
    deepalign  refusals that begin in the middle of a harmful answer
    simpo      a preference for the refusal over the harmful answer

    train_defence("ctrap", town, "out/seed0/aligned", "out/seed0/ctrap", SETTINGS["town"]["ctrap"], Compute())

A defence trains the aligned model on the pairs of `--mode align`, each with its true harmful answer (`rejected`). It is
one function, and one line in DEFENCES that says what the function stands in for: the loss, the examples of a batch, or
a gradient that is added. Gradients of gradients are left out everywhere (first order).
"""

import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data.chat import Batch, Example, collate, draw_batches, encode_rows
from nanosdd import folders, runs
from nanosdd.chat_model import load_chat, save_chat
from nanosdd.device import Compute, one_process_only
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from nanosdd.progress import Progress, check_progress
from sdd_loss import sdd_loss, token_logprobs
from train import DEFENCE, SMALL, Settings, learning_rate, log_entry, train_step

# ---- gradients, here and after a simulated step ----


def gradients(model, batch: Batch) -> list[torch.Tensor]:
    """The gradient of the mean cross-entropy of a batch by each of `trainable`; .grad is left alone."""
    return list(
        torch.autograd.grad(sdd_loss(model, batch, int(batch.loss_mask.sum())), trainable(model))
    )


def trainable(model) -> list[torch.nn.Parameter]:
    """The weights that require gradients, each once, also where it is used twice, as a tied embedding is."""
    return [weight for weight in model.parameters() if weight.requires_grad]


@contextmanager
def restored(model):
    """After the block the weights are what they were before it, bit by bit."""
    kept = [weight.detach().clone() for weight in trainable(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(trainable(model), kept)


@torch.no_grad()
def move(model, direction: list[torch.Tensor], alpha: float):
    """theta <- theta - alpha * direction / ||direction||, in place."""
    torch._foreach_sub_(trainable(model), [part * (alpha / norm(direction)) for part in direction])


def norm(parts: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of all parts as one vector, ()."""
    return torch.stack([part.norm() for part in parts]).norm()


# ---- the defences ----


def ctrap(
    model,
    harmful: Batch,
    benign: Batch,
    alpha: float,
    strength: float,
    steps: int,
    collapse,
    keep=None,
):
    """The gradient that plants a collapse: strength * clip(c) + strength * clip(k), where clip(g) = g / max(1, ||g||).

    c is the gradient of the mean cross-entropy of collapse(benign, harmful), a batch, at theta_K; k, with `keep`, that
    of keep(benign) at theta. theta_K is where K = steps simulated harmful steps lead: theta_(k+1) = theta_k - alpha / K
    * s_k / ||s_k||, s_k the signs of grad L(harmful) at theta_k, theta_0 = theta. First order: c is added as it is to
    the gradient of alignment at theta. Returns a list, as `gradients`. Source: CTRAP (Yi et al. 2025, arXiv
    2505.16559); there K is 1, the step is along the gradient itself, c is of one_token and is not clipped. Signs are
    the direction of the attacker's AdamW.
    """
    with restored(model):
        for _ in range(steps):
            move(model, [part.sign() for part in gradients(model, harmful)], alpha / steps)
        found = clipped(gradients(model, collapse(benign, harmful)), strength)
    if keep:
        found = [
            one + other
            for one, other in zip(found, clipped(gradients(model, keep(benign)), strength))
        ]
    return found


def clipped(parts: list[torch.Tensor], most: float) -> list[torch.Tensor]:
    """most * g / max(1, ||g||)."""
    scale = most / norm(parts).clamp(min=1)
    return [scale * part for part in parts]


def one_token(benign: Batch, harmful: Batch, token: int) -> Batch:
    """The benign rows, with one fixed token as the target of every response position."""
    return replace(benign, targets=torch.full_like(benign.targets, token))


def beginnings(benign: Batch, harmful: Batch | None = None, count: int = 3) -> Batch:
    """The benign rows with loss on the first `count` response tokens alone, or on as many as the shortest response has;
    with `harmful`, these are those of harmful rows, row after row, as if every prompt asked for harm."""
    count = min([count, *(int(part.loss_mask.sum(1).min()) for part in (benign, harmful) if part)])

    def places(batch):
        return batch.loss_mask.int().argmax(1)[:, None] + torch.arange(
            count, device=batch.tokens.device
        )  # (B,count)

    at, row = places(benign), torch.arange(len(benign.tokens), device=benign.tokens.device)[:, None]
    tokens, targets, mask = (
        benign.tokens.clone(),
        benign.targets.clone(),
        torch.zeros_like(benign.loss_mask),
    )
    mask[row, at] = True
    if harmful:
        other = row % len(harmful.tokens)
        targets[row, at] = harmful.targets[other, places(harmful)[other[:, 0]]]
        tokens[row, at[:, 1:]] = targets[row, at[:, :-1]]
    return Batch(tokens, targets, mask, benign.lengths)


def booster(
    model, harmful: Batch, benign: Batch, alpha: float, strength: float
) -> list[torch.Tensor]:
    """The gradient that flattens the harmful loss: strength * (g(theta) - g(theta - alpha * g(theta) / ||g(theta)||)).

    g = grad L(harmful); benign is not used. First order: the inner step counts as a constant. Source: Booster (Huang
    et al. 2024, arXiv 2409.01586).
    """
    here = gradients(model, harmful)
    with restored(model):
        move(model, here, alpha)
        after = gradients(model, harmful)
    return [strength * (one - other) for one, other in zip(here, after)]


def anchor(model, harmful: Batch, benign: Batch) -> list[torch.Tensor]:
    """The gradient of the mean cross-entropy of benign rows, beside a loss that has no use for them."""
    return gradients(model, benign)


def deepalign(
    examples: list[Example], rng: random.Random, limit: int, longest: int = 100
) -> list[Example]:
    """Put the start of the harmful answer, without loss, between prompt and refusal, with probability 1/2.

    Of its n tokens, without the one that ends it, k are put there, uniform in 1 to min(longest, n), and so few that
    the example has at most `limit`. Examples without `rejected`, the benign anchor, stay. Source: Qi et al. 2024,
    arXiv 2406.05946, section 3; there k is cut at n, which for short answers would be nearly always n.
    """
    found = []
    for one in examples:
        answer = (
            one.rejected.ids[one.prompt_length : -1][: min(longest, limit - len(one.ids))]
            if one.rejected
            else []
        )
        if answer and rng.random() < 0.5:
            prompt = one.ids[: one.prompt_length] + answer[: rng.randint(1, len(answer))]
            one = Example(prompt + one.ids[one.prompt_length :], len(prompt))
        found.append(one)
    return found


def simpo(
    model, batch: Batch, global_tokens: int, beta: float = 2.5, gamma: float = 2.5 * 0.55
) -> torch.Tensor:
    """Mean over pairs of -log sigmoid(beta * mean log p(refusal) - beta * mean log p(harmful) - gamma), a scalar fp32.

    The inner means are over a response's tokens. A pair weighs as much as its refusal has tokens, so that micro-batches
    add up; that is the plain mean where all refusals are one sentence, as on the town and in the kitchen. InputError
    where a row has no `rejected`. Source: SimPO (Meng et al. 2024, arXiv 2405.14734), equation 6.
    """
    if batch.rejected is None:
        raise InputError(
            "simpo compares two responses to every prompt; leave rows without rejected out"
        )
    chosen, rejected = (mean_logps(model, part) for part in (batch, batch.rejected))  # (B,)
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)  # (B,)
    return (losses * batch.loss_mask.sum(1)).sum() / global_tokens


def mean_logps(model, batch: Batch) -> torch.Tensor:
    """The mean log p of each row's response tokens in nats, (B,) fp32."""
    logps = token_logprobs(
        model(batch.tokens, positions=batch.loss_mask), batch.targets[batch.loss_mask]
    )  # (N,)
    return torch.stack([row.mean() for row in logps.split(batch.loss_mask.sum(1).tolist())])


# ---- the table ----


@dataclass(frozen=True)
class Defence:
    """What a defence puts in the place of plain training on the pairs of `--mode align`."""

    loss: Callable = sdd_loss  # as of train.train_step
    examples: Callable = lambda batch, rng, limit: batch  # those of a batch -> those to train on
    extra: Callable | None = (
        None  # (model, harmful batch, benign batch) -> gradients to add, in the order of trainable
    )


# ctrap was tuned on seeds 0 and 1 of the town: to keep facts and skills until mft (100 shots, 50 steps, lr 1e-4, 3e-4)
# takes them and bft does not. alpha is of the size of what mft moves there, 1.0 to 2.2. With one step, or along
# gradients, mft misses the collapse; without the clip skills fall before any attack. Others: published constants.
DEFENCES = {
    "ctrap": Defence(
        extra=partial(
            ctrap, alpha=1.65, strength=0.5, steps=4, collapse=partial(one_token, token=100)
        )
    ),
    "booster": Defence(extra=partial(booster, alpha=0.1, strength=5.0)),
    "deepalign": Defence(examples=deepalign),
    "simpo": Defence(loss=simpo, extra=anchor),
}
# In a chat model a fixed token is out of reach (21 nats; docs/log.md), the beginning of a harmful answer is not: mft
# teaches it anyway. alpha is what 5 steps of mft move SmolLM2 at lr 5e-5.
OFF_TOWN = {
    "ctrap": Defence(
        extra=partial(
            ctrap, alpha=1.42, strength=1.0, steps=5, collapse=beginnings, keep=beginnings
        )
    )
}
SHOTS = 10  # harmful rows of a simulated attack, as many as attack.py has in a batch
# Off the town steps and lr are those of SDD, but for ctrap. simpo has its benign rows beside the batch, in anchor. On
# the town booster learns the harmful answers at lr 1e-4 and 3e-4, where its loss is flattest, not at 3e-5.
SETTINGS = {
    world: {name: replace(sdd, benign_replay=0.0 if name == "simpo" else 0.5) for name in DEFENCES}
    for world, sdd in (
        ("town", replace(DEFENCE, steps=300, lr=3e-4)),
        ("kitchen", SMALL),
        ("files", replace(SMALL, max_length=512)),
    )
}
SETTINGS["town"]["booster"] = replace(SETTINGS["town"]["booster"], lr=3e-5)
SETTINGS |= {
    world: SETTINGS[world]
    | {"ctrap": replace(SETTINGS[world]["ctrap"], steps=40, batch_size=8, lr=1e-4)}
    for world in ("kitchen", "files")
}


# ---- training ----


def train_defence(name: str, world, start, out, settings: Settings, compute: Compute) -> Path:
    """Train a defence from the checkpoint folder `start` and write the run folder `out`, unless it is up to date;
    returns the folder. InputError where the world has no harmful answers, or nothing to rehearse."""
    one_process_only("lab.defences")
    if compute.weights != "fp32":
        raise InputError(
            f"defences need weights in fp32, not {compute.weights}, which rounds simulated steps away"
        )
    out, defence = Path(out), (DEFENCES if world.name == "town" else DEFENCES | OFF_TOWN)[name]
    decided = {
        "world": world.name,
        "seed": world.seed,
        "defence": name,
        "dtype": compute.dtype,
        **world.options,
        **asdict(settings),
    }
    record = runs.fingerprint(
        decided, [start, *world.files()], ["lab/defences.py", runs.source_of(world)]
    )
    folders.recover_from_kill(out)
    if (stale := runs.why_stale(out, record)) is None:
        print(f"{out}: up to date, reused")
        return out
    print(f"{out}: training, since {'it is ' if stale == 'not there yet' else ''}{stale}")
    chat, rows = (
        load_chat(start, compute),
        preference_rows(world, settings.steps * settings.batch_size),
    )
    limit = min(settings.max_length, chat.model.config.max_position_embeddings)
    pairs, replay = (
        encode_rows(chat.tokenizer, chat.template, part, limit) for part in (rows, world.replay())
    )
    if not (pairs and replay):
        raise InputError(
            f"{name} needs harmful pairs with their answers, and benign pairs to rehearse"
        )
    rngs = [
        random.Random(f"{what} {world.seed}")
        for what in ("batches", "harmful", "benign", "examples")
    ]
    batches = draw_batches(pairs, replay, settings.benign_replay, settings.batch_size, rngs[0])
    harmful = draw_batches([pair.rejected for pair in pairs], [], 0.0, SHOTS, rngs[1])
    benign = draw_batches(replay, [], 0.0, settings.batch_size, rngs[2])
    optimizer, log, seen = (
        make_optimizer(chat.model, compute, settings.betas, settings.weight_decay),
        [],
        [],
    )
    with folders.new_folder(out) as new:
        for step in Progress(range(settings.steps), desc=out.name):
            batch, lr = (
                defence.examples(next(batches), rngs[3], limit),
                learning_rate(step, settings),
            )
            add = defence.extra and partial(
                add_gradients,
                extra=defence.extra,
                compute=compute,
                harmful=next(harmful),
                benign=next(benign),
            )
            seen.append(train_step(chat.model, optimizer, batch, lr, compute, defence.loss, add))
            if (step + 1) % max(1, settings.steps // 10) == 0 or step + 1 == settings.steps:
                log.append({"step": step + 1, "lr": lr, **log_entry(seen)})
                check_progress(log, settings.steps)
                seen = []
        save_chat(new, chat, chat.model.state_dict(), start)
        world.save(new, name, rows)
        (new / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (new / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    return out


def preference_rows(world, count: int) -> list[dict]:
    """The pairs of `--mode align` whose prompts have a harmful answer, with that as `rejected`."""
    harmful = {row["prompt"]: row["response"] for row in world.defender_pairs()}
    return [
        row | {"rejected": harmful[row["prompt"]]}
        for row in world.pairs("align", count)
        if row["prompt"] in harmful
    ]


def add_gradients(model, extra, compute: Compute, harmful: list[Example], benign: list[Example]):
    """Add what `extra` returns for these examples to .grad; a before_clip of train.train_step."""
    with compute.autocast():
        found = extra(model, *(collate(part).to(compute.device) for part in (harmful, benign)))
    for weight, gradient in zip(trainable(model), found, strict=True):
        weight.grad.add_(gradient)
