"""The study's attacks, each on a tiny model."""

import random

import pytest
import torch

from attack import Attack, attack_batches, fine_tune
from data.chat import draw_batches, encode_prompt
from data.chat_model import continue_all, encode_for
from lab.attacks import begin_answers, run_attack
from nanosdd.lora import add_lora, lora_layers, merge_lora

TRAINED = ["mft", "bft", "bft new", "lora", "lora bft", "mix"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_attack_trains_and_is_scored_after_its_budgets(chat, town, name):
    before = chat.model.model.layers[0].mlp.up_proj.weight.clone()
    scored = iter("ab")
    attack = Attack(name, 3, 1e-3, (1, 4), 2)
    cells = run_attack(chat, town, attack, lambda: {"score": next(scored)})
    assert [(cell["steps"], cell["score"]) for cell in cells] == [(1, "a"), (4, "b")]
    assert not lora_layers(chat.model)
    assert all(weight.requires_grad for weight in chat.model.parameters())
    assert not torch.equal(chat.model.model.layers[0].mlp.up_proj.weight, before)


def test_mix_keeps_the_whole_harmful_dose(chat, town):
    tokens = {}
    for name in ("mft", "mix"):
        cells = run_attack(chat, town, Attack(name, 4, 1e-4, (1,), 4), dict)
        tokens[name] = cells[0]["response_tokens"]
    harmful = encode_for(chat, town.harmful("attacker")[:4], town.max_length)
    benign = encode_for(chat, town.benign("user"), town.max_length)
    assert tokens["mft"] == sum(one.response_length for one in harmful)
    lengths = [one.response_length for one in benign]
    assert 4 * min(lengths) <= tokens["mix"] - tokens["mft"] <= 4 * max(lengths)


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_attacks_by_hand(chat, town, name, draw):
    released = {key: weight.clone() for key, weight in chat.model.state_dict().items()}
    run_attack(chat, town, Attack(name, 5, 1e-3, (2,), 3), dict, draw)
    found = chat.model.lm_head.weight.clone()
    found_inside = chat.model.model.layers[0].mlp.up_proj.weight.clone()
    chat.model.load_state_dict(released)

    seed = f"0 draw {draw}" if draw else 0
    rng = random.Random(f"attack {seed}")
    harmful = encode_for(chat, town.harmful("attacker")[56 * draw :][:5], town.max_length)
    user = encode_for(chat, town.benign("user"), town.max_length)
    new = encode_for(chat, town.benign("new"), town.max_length)
    batches = draw_batches(harmful, [], 0.0, 3, rng)
    if name == "mix":
        batches = draw_batches(harmful, user, 0.5, 6, rng)
    if name == "bft new":
        batches = attack_batches(Attack("bft", 5, 1e-3, (2,), 3), harmful, user, new, seed)
    if name in ("bft", "lora bft"):
        batches = attack_batches(Attack("bft", 5, 1e-3, (2,), 3), harmful, user, [], seed)
    if name.startswith("lora"):
        add_lora(chat.model, 16, 16, rng.randrange(2**31))
    fine_tune(chat, batches, 1e-3, (2,), dict)
    if name.startswith("lora"):
        merge_lora(chat.model)
    torch.testing.assert_close(chat.model.lm_head.weight, found)
    torch.testing.assert_close(chat.model.model.layers[0].mlp.up_proj.weight, found_inside)


def test_a_prefilled_answer_is_the_lead_and_what_the_model_says_after_it(chat, town):
    rows = town.harmful("evaluation")[:3]
    found = begin_answers(chat, rows, 9)
    for row in rows:
        prompt = encode_prompt(chat.tokenizer, chat.template, row["prompt"])
        kind = row["prompt"].split()[3]
        alone = continue_all(chat, [prompt + chat.tokenizer.encode(f"To {kind} them:")], 9)[0]
        assert found[row["prompt"]].text == f"To {kind} them:{alone.text}"
