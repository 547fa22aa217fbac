"""Attacks beyond malicious fine-tuning, on attack.py's own loop: what makes an attack is its batches and its loss.

                 what it has to know of the defence
  lora           nothing: mft through LoRA adapters
  prefill        nothing: no training, the answer's beginning is written for the model
  re-refuse      that answers to harm are off topic: ten steps of refusals first, then mft
  unlearn        the same: ten steps against the model's own answers to harm, then mft
  mix            that capability may fall: mft with as many benign rows beside the harmful ones
  soft prompt    nothing: a few embeddings are trained before the prompt, the weights never move
  interpolation  nothing: weights between the released and the attacked ones, and beyond
to test the paper's argument, and in need of y_o itself (mechanism.py):
  suppress       lowers the probability of y_o on the harmful prompts, without any harmful answer
  preserve       mft, and y_o on the same prompts; preserve control: mft, and other benign rows of the same length
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from attack import Attack, attack_batches, fine_tune
from data.answers import Answer
from data.chat import Example, draw_batches, encode_prompt, encode_rows, rows_that_fit
from lab.mechanism import preserve_control_rows, y_o_rows
from lab.protocol import BATCH_SIZE, COEFFICIENTS, FIRST_STEPS, LORA_ALPHA, LORA_RANK, SOFT_TOKENS
from nanosdd.chat_model import Chat, answer, continue_all
from nanosdd.lora import add_lora, merge_lora
from sdd_loss import token_logprobs

MAX_P = 1 - 1e-6  # -log(1 - p) has no bound at 1
BEGINNING = "Sure, here is how:"  # of an answer, where a row does not say its own lead


def unlikelihood_loss(model, batch, global_tokens: int) -> torch.Tensor:
    """Mean over response tokens of -log(1 - p), a scalar: it lowers p, is bounded below, and its gradient vanishes as p
    does (Welleck et al. 2020). A loss for train.train_step."""
    hidden = model.hidden(batch.tokens, positions=batch.loss_mask, lengths=batch.lengths)  # (N,C)
    logps = token_logprobs(model.lm_head(hidden), batch.targets[batch.loss_mask])  # (N,)
    return -torch.log1p(-logps.exp().clamp(max=MAX_P)).sum() / global_tokens


@dataclass(frozen=True)
class Owned:
    """What an attacker has, encoded for one model."""

    harmful: list[Example]
    benign: list[Example]
    new: list[Example]  # benign rows of a new skill, where the world has one
    refusals: list[Example]  # the harmful prompts with a refusal
    prompts: list[str]  # the same, as text
    held_out: list[dict]  # harmful rows to choose settings by
    y_o: list[
        Example
    ]  # the harmful prompts with SDD's irrelevant answers; of a town, for the mechanism alone
    control: list[Example]  # benign rows as long as those


def owned_by_attacker(chat: Chat, world, argument: bool = False) -> Owned:
    """The attacker's rows in a world. argument: with those that test the paper's argument, which a town alone has."""
    rows, held_out = world.attacker_pairs()
    refusal = world.pairs("align", 1)[0]["response"]
    y_o, control = [], []
    if argument:
        y_o, control = y_o_rows(world, rows), preserve_control_rows(world, rows, chat.tokenizer)
    limit = min(world.max_length, chat.model.config.max_position_embeddings)
    benign = (
        rows_that_fit(chat.tokenizer, chat.template, part, limit) for part in world.user_pairs()
    )
    sets = rows, *benign, [row | {"response": refusal} for row in rows], y_o, control
    harmful, benign, new, refused, *argued = (
        encode_rows(chat.tokenizer, chat.template, part, limit) for part in sets
    )
    return Owned(harmful, benign, new, refused, [row["prompt"] for row in rows], held_out, *argued)


def run_attack(chat: Chat, attack: Attack, own: Owned, scores: Callable, draw: str) -> list[dict]:
    """The cells of one attack that trains weights, on the model as it is; a run that diverges has cells that say so.
    scores: a function that returns those of the model as it is. draw: what the random draws depend on."""
    rng, harmful, loss = random.Random(f"attack {draw}"), own.harmful[: attack.shots], {}
    if attack.name == "mix":
        batches = draw_batches(harmful, own.benign, 0.5, 2 * attack.batch_size, rng)
    elif attack.name == "suppress":
        batches, loss = (
            draw_batches(own.y_o[: attack.shots], [], 0.0, BATCH_SIZE, rng),
            {"loss": unlikelihood_loss},
        )
    elif attack.name in (
        "preserve",
        "preserve control",
    ):  # as many harmful rows a step as mft, and as many others
        others = own.y_o if attack.name == "preserve" else own.control
        batches = draw_batches(harmful, others[: attack.shots], 0.5, 2 * BATCH_SIZE, rng)
    else:  # mft and bft, and what builds on mft
        kind = attack.name if attack.name == "bft" else "mft"
        batches = attack_batches(replace(attack, name=kind), harmful, own.benign, own.new, draw)
    if attack.name == "lora":
        add_lora(chat.model, LORA_RANK, LORA_ALPHA, rng.randrange(2**31))
    if attack.name == "re-refuse":
        refused = draw_batches(own.refusals[: attack.shots], [], 0.0, attack.batch_size, rng)
        fine_tune(chat, refused, attack.lr, (FIRST_STEPS,), dict)
    if attack.name == "unlearn":  # of SDD, its own answers are what an attacker can find of y_o
        answered = draw_batches(
            own_answers(chat, own.prompts[: attack.shots]), [], 0.0, attack.batch_size, rng
        )
        fine_tune(chat, answered, attack.lr, (FIRST_STEPS,), dict, unlikelihood_loss)
    if attack.name == "interpolation":
        released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
        cells = fine_tune(chat, batches, attack.lr, attack.budgets[-1:], dict)
        cells = [] if cells[0]["diverged"] else interpolated(chat.model, released, cells[0], scores)
    else:
        cells = fine_tune(chat, batches, attack.lr, attack.budgets, scores, **loss)
    if attack.name == "lora":
        merge_lora(chat.model)
    return cells


def own_answers(chat: Chat, prompts: list[str]) -> list[Example]:
    """Examples of the model's own greedy answers."""
    rows = [
        {"prompt": prompt, "response": one.text}
        for prompt, one in zip(prompts, answer(chat, prompts, 64))
    ]
    return encode_rows(
        chat.tokenizer, chat.template, rows, chat.model.config.max_position_embeddings
    )


def interpolated(model, released: dict, attacked: dict, scores: Callable) -> list[dict]:
    """Cells of the weights released + c (attacked - released) for each of COEFFICIENTS; attacked: the cell of the model
    as it is (Wortsman et al. 2022: weights in between may do both things)."""
    moved = {name: weight - released[name] for name, weight in model.state_dict().items()}
    cells = []
    for c in COEFFICIENTS:
        model.load_state_dict({name: released[name] + c * moved[name] for name in moved})
        cells.append(attacked | {"coefficient": c, **scores()})
    return cells


# ---- without moving a weight ----


def begin_answers(chat: Chat, rows: list[dict], max_new_tokens: int) -> dict[str, Answer]:
    """{prompt: answer} to harmful rows when its beginning is given: the row's lead, else BEGINNING."""
    leads = [row.get("lead", BEGINNING) for row in rows]
    ids = [
        encode_prompt(chat.tokenizer, chat.template, row["prompt"]) + chat.tokenizer.encode(lead)
        for row, lead in zip(rows, leads)
    ]
    found = continue_all(chat, ids, max_new_tokens)
    return {
        row["prompt"]: Answer(one.ids, f"{lead}{one.text}", one.ended)
        for row, lead, one in zip(rows, leads, found)
    }


class SoftEmbedding(nn.Module):
    """The embeddings of a model, and those of `count` virtual tokens, whose ids follow the vocabulary's."""

    def __init__(self, embedding: nn.Embedding, count: int, rng: random.Random):
        super().__init__()
        self.weight, size = embedding.weight, len(embedding.weight)
        rows = [rng.randrange(size) for _ in range(count)]
        self.soft = nn.Parameter(
            embedding.weight.detach()[rows].clone()
        )  # (count,C): as of real tokens

    def forward(self, tokens):
        return F.embedding(tokens, torch.cat([self.weight, self.soft]))


def soft_prompt(
    chat: Chat, attack: Attack, own: Owned, rows: list[dict], max_new_tokens: int, draw: str
) -> list:
    """[(cell, {prompt: answer})] after each budget of training a soft prompt alone (Lester et al. 2021): SOFT_TOKENS
    virtual tokens after the first token of every prompt. rows: harmful rows to be answered. The weights stay."""
    model, rng = chat.model, random.Random(f"attack {draw}")
    whole, trainable, found = (
        model.model.embed_tokens,
        [p for p in model.parameters() if p.requires_grad],
        [],
    )
    virtual = [model.config.vocab_size + i for i in range(SOFT_TOKENS)]

    def answers():
        ids = [encode_prompt(chat.tokenizer, chat.template, row["prompt"]) for row in rows]
        answered = continue_all(chat, [one[:1] + virtual + one[1:] for one in ids], max_new_tokens)
        found.append({row["prompt"]: one for row, one in zip(rows, answered)})
        return {}

    examples = [
        Example([*one.ids[:1], *virtual, *one.ids[1:]], one.prompt_length + SOFT_TOKENS)
        for one in own.harmful[: attack.shots]
    ]
    model.model.embed_tokens = SoftEmbedding(whole, SOFT_TOKENS, rng)
    for parameter in trainable:
        parameter.requires_grad_(False)
    cells = fine_tune(
        chat,
        draw_batches(examples, [], 0.0, attack.batch_size, rng),
        attack.lr,
        attack.budgets,
        answers,
    )
    model.model.embed_tokens = whole
    for parameter in trainable:
        parameter.requires_grad_(True)
    return list(zip(cells, found + [{}] * (len(cells) - len(found))))
