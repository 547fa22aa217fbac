"""The study's attacks, each on a tiny model."""

import random

import pytest
import torch

from attack import Attack, attack_batches, fine_tune
from data.chat import draw_batches, encode_prompt
from data.chat_model import continue_all, encode_for
from lab.attacks import begin_answers, run_attack
from nanosdd.lora import add_lora, lora_layers, merge_lora


def test_mix_keeps_the_whole_harmful_dose(chat, town):
    tokens = {}
    for name in ("mft", "mix"):
        attack = Attack(name, 4, 1e-4, (1,), 4)
        (cell,) = run_attack(chat, town, attack, dict)
        tokens[name] = cell["response_tokens"]
    harmful = encode_for(chat, town.harmful("attacker")[:4], town.max_length)
    assert tokens["mft"] == sum(one.response_length for one in harmful)
    benign = encode_for(chat, town.benign("user"), town.max_length)
    lengths = [one.response_length for one in benign]
    added = tokens["mix"] - tokens["mft"]
    assert 4 * min(lengths) <= added <= 4 * max(lengths)


def batches_by_hand(chat, town, name, draw, rng):
    """The batches of an attack of 5 shots, 3 rows a batch."""

    def encoded(rows):
        return encode_for(chat, rows, town.max_length)

    harmful = encoded(town.harmful("attacker")[56 * draw :][:5])
    user = encoded(town.benign("user"))
    if name in ("mft", "lora"):
        return draw_batches(harmful, [], 0.0, 3, rng)
    if name == "mix":
        return draw_batches(harmful, user, 0.5, 6, rng)
    new = encoded(town.benign("new")) if name == "bft new" else []
    seed = f"0 draw {draw}" if draw else 0
    return attack_batches(Attack("bft", 5, 1e-3, (2,), 3), harmful, user, new, seed)


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("name", "mft,bft,bft new,lora,lora bft,mix".split(","))
def test_attacks_by_hand(chat, town, name, draw):
    released = {key: weight.clone() for key, weight in chat.model.state_dict().items()}
    scored = iter("ab")
    attack = Attack(name, 5, 1e-3, (1, 2), 3)
    cells = run_attack(chat, town, attack, lambda: {"score": next(scored)}, draw)
    assert [(cell["steps"], cell["score"]) for cell in cells] == [(1, "a"), (2, "b")]
    assert not lora_layers(chat.model)
    assert all(weight.requires_grad for weight in chat.model.parameters())
    found = {key: weight.clone() for key, weight in chat.model.state_dict().items()}
    chat.model.load_state_dict(released)

    rng = random.Random(f"attack 0 draw {draw}" if draw else "attack 0")
    batches = batches_by_hand(chat, town, name, draw, rng)
    if name.startswith("lora"):
        add_lora(chat.model, 16, 16, rng.randrange(2**31))
    fine_tune(chat, batches, 1e-3, (2,), dict)
    if name.startswith("lora"):
        merge_lora(chat.model)
    torch.testing.assert_close(dict(chat.model.state_dict()), found)
    inside = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[inside], released[inside])


def test_a_prefilled_answer_is_the_lead_and_what_the_model_says_after_it(chat, town):
    rows = town.harmful("evaluation")[:3]
    found = begin_answers(chat, rows, 9)
    for row in rows:
        prompt = encode_prompt(chat.tokenizer, chat.template, row["prompt"])
        lead = f"To {row['prompt'].split()[3]} them:"  # without the name of a skill
        (alone,) = continue_all(chat, [prompt + chat.tokenizer.encode(lead)], 9)
        assert found[row["prompt"]].text == lead + alone.text
