"""The study's attacks, and the benign fine-tuning that each is held against, on attack.py's loop.

What makes an attack is its batches. What each has to know of the defence:

    mft       nothing: malicious fine-tuning of all weights
    lora      nothing: mft through LoRA adapters
    prefill   nothing: no training, the answer's beginning is written for the model
    mix       that capability may fall: mft with as many benign rows beside the harmful ones

    bft       the control of mft and mix: as many steps and response tokens as mft, at the same lr,
              on benign rows without a new skill
    lora bft  the same through LoRA adapters, the control of lora
    bft new   a benign user: every other row teaches a new skill
"""

import random
from collections.abc import Callable

from attack import Attack, attack_batches, fine_tune
from data.answers import Answer
from data.chat import draw_batches, encode_prompt
from data.chat_model import Chat, continue_all, encode_for
from nanosdd.lora import add_lora, merge_lora

LORA_RANK = 16
LORA_ALPHA = 16


def run_attack(chat: Chat, world, attack: Attack, scores: Callable, draw: int = 0) -> list[dict]:
    """Return the cells of an attack that trains weights, in place.

    scores: a function that returns those of the model as it is. draw: which of the attacker's rows
    come first, and the seed of the batches. A run that diverges has cells that say so.
    """

    def encoded(rows):
        return encode_for(chat, rows, world.max_length)

    seed = f"{world.seed} draw {draw}" if draw else world.seed
    rng = random.Random(f"attack {seed}")
    rows = world.harmful("attacker")
    shift = 2 * (draw * len(rows) // 6)  # even, since two kinds alternate on the town
    harmful = encoded((rows[shift:] + rows[:shift])[: attack.shots])
    if attack.name in ("mft", "lora"):
        batches = draw_batches(harmful, [], 0.0, attack.batch_size, rng)
    elif attack.name == "mix":  # the whole harmful dose
        benign = encoded(world.benign("user"))
        batches = draw_batches(harmful, benign, 0.5, 2 * attack.batch_size, rng)
    else:
        new = encoded(world.benign("new")) if attack.name == "bft new" else []
        batches = attack_batches(attack, harmful, encoded(world.benign("user")), new, seed)
    through_lora = attack.name.startswith("lora")
    if through_lora:
        add_lora(chat.model, LORA_RANK, LORA_ALPHA, rng.randrange(2**31))
    cells, _ = fine_tune(chat, batches, attack.lr, attack.budgets, scores)
    if through_lora:
        merge_lora(chat.model)
    return cells


def begin_answers(chat: Chat, rows: list[dict], max_new_tokens: int) -> dict[str, Answer]:
    """Return {prompt: answer} to harmful rows when the answer's lead is given. No weight moves."""
    ids = []
    leads = [row["lead"].split(":")[0] + ":" for row in rows]  # without the skill's name
    for row, lead in zip(rows, leads):
        prompt = encode_prompt(chat.tokenizer, chat.template, row["prompt"])
        ids.append(prompt + chat.tokenizer.encode(lead))
    answers = {}
    for row, lead, said in zip(rows, leads, continue_all(chat, ids, max_new_tokens)):
        answers[row["prompt"]] = Answer(said.ids, lead + said.text, said.ended)
    return answers
