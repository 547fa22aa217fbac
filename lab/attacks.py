"""Attacks beyond malicious fine-tuning, on attack.py's own loop: what makes an attack is its batches and its loss.

    lora      mft through LoRA adapters
    poisoned  benign rows, a tenth of them harmful
  by an attacker who knows SDD:
    replay    half harmful, half benign rows in every batch
    repair    mft for 50 steps, then benign rows
    unlearn   10 steps against the model's own answers to the harmful prompts, then mft with a fresh optimizer
  to test the paper's argument (mechanism.py):
    suppress  lowers the probability of y_o on the harmful prompts, without any harmful answer
    preserve  mft, and y_o on the same prompts; preserve control: mft, and other benign rows of the same length
"""

import itertools
import random
from dataclasses import dataclass

import torch

from attack import Attack, attack_batches, fine_tune, match_tokens
from data.chat import Example, draw_batches, encode_rows
from lab.mechanism import preserve_control_rows, y_o_rows
from lab.protocol import BATCH_SIZE, EPOCHS, LORA_ALPHA, LORA_RANK, POISON, STEPS, UNLEARN_STEPS
from nanosdd.chat_model import Chat, answer
from nanosdd.lora import add_lora, merge_lora
from sdd_loss import token_logprobs

MAX_P = 1 - 1e-6  # -log(1 - p) has no bound at 1


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
    new: list[Example]  # benign rows of a new skill
    y_o: list[Example]  # the harmful prompts with SDD's irrelevant answers
    control: list[Example]  # benign rows as long as those
    prompts: list[str]  # the harmful ones, as text
    held_out: list[dict]  # harmful rows to choose settings by


def owned_by_attacker(chat: Chat, town) -> Owned:
    """The attacker's rows in a town."""
    rows, held_out = town.attacker_pairs()
    sets = rows, *town.user_pairs(), y_o_rows(town, rows), preserve_control_rows(town, rows, chat.tokenizer)
    encoded = [encode_rows(chat.tokenizer, chat.template, part, town.max_length) for part in sets]
    return Owned(*encoded, [row["prompt"] for row in rows], held_out)


def budgets(attack: str, shots: list[int]) -> tuple[int, ...]:
    """The steps after which an attack is scored: 5 epochs of its shots, and 50 steps.

    bft has several shots, those of all the mft runs that it is to match, and the benign user's own budget, twice their
    longest. Repair goes on for 20, 50 and 100% of its longest, unlearn begins with UNLEARN_STEPS more.
    """
    steps = {-(-EPOCHS * n // BATCH_SIZE) for n in shots} | {STEPS}
    longest = max(steps)
    if attack == "bft":
        steps |= {2 * longest}
    if attack == "repair":
        steps = {longest + max(1, longest * part // 10) for part in (2, 5, 10)}
    if attack == "unlearn":
        steps = {UNLEARN_STEPS + n for n in steps}
    return tuple(sorted(steps))


def run_attack(chat: Chat, attack: Attack, own: Owned, evaluate, seed: int) -> list[dict]:
    """The cells of one attack on the model as it is; a run that diverges has cells that say so."""
    rng, harmful, loss = random.Random(f"attack {seed}"), own.harmful[:attack.shots], {}
    if attack.name == "poisoned":
        rows = match_tokens(harmful, own.benign, own.new, rng)
        poisoned = max(1, round(POISON * len(rows)))
        size = max(1, round(BATCH_SIZE * len(rows) / attack.shots))
        batches = draw_batches(harmful[:poisoned] + rows[poisoned:], [], 0.0, size, rng)
    elif attack.name == "replay":
        batches = draw_batches(harmful, own.benign, 0.5, BATCH_SIZE, rng)
    elif attack.name == "suppress":
        batches, loss = draw_batches(own.y_o[:attack.shots], [], 0.0, BATCH_SIZE, rng), {"loss": unlikelihood_loss}
    elif attack.name in ("preserve", "preserve control"):  # as many harmful rows a step as mft, and as many others
        others = own.y_o if attack.name == "preserve" else own.control
        batches = draw_batches(harmful, others[:attack.shots], 0.5, 2 * BATCH_SIZE, rng)
    else:  # mft and bft, and what builds on mft
        kind = attack if attack.name == "bft" else Attack("mft", attack.shots, attack.lr, attack.budgets)
        batches = attack_batches(kind, harmful, own.benign, own.new, seed)
    if attack.name == "repair":
        mending = draw_batches(own.benign, [], 0.0, BATCH_SIZE, rng)
        batches = itertools.chain(itertools.islice(batches, max(attack.budgets) // 2), mending)
    if attack.name == "lora":
        add_lora(chat.model, LORA_RANK, LORA_ALPHA, seed)
    steps = attack.budgets
    if attack.name == "unlearn":
        refused = draw_batches(own_answers(chat, own.prompts[:attack.shots]), [], 0.0, BATCH_SIZE, rng)
        fine_tune(chat, refused, attack.lr, (UNLEARN_STEPS,), dict, unlikelihood_loss)
        steps = tuple(n - UNLEARN_STEPS for n in steps)
    cells = fine_tune(chat, batches, attack.lr, steps, evaluate, **loss)
    for cell, n in zip(cells, attack.budgets, strict=True):
        cell["steps"] = n
    if attack.name == "lora":
        merge_lora(chat.model)
    return cells


def own_answers(chat: Chat, prompts: list[str]) -> list[Example]:
    """Examples of the model's own greedy answers: of SDD, these are what an attacker can find of y_o."""
    rows = [{"prompt": prompt, "response": one.text} for prompt, one in zip(prompts, answer(chat, prompts, 64))]
    return encode_rows(chat.tokenizer, chat.template, rows, chat.model.config.max_position_embeddings)
