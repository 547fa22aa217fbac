"""The further attacks, each on a tiny model."""

import math
import random

import pytest
import torch
from small import small_model

from attack import Attack, fine_tune
from data.chat import Example, collate, draw_batches, encode_prompt
from data.chat_model import continue_all, encode_for
from data.town import REFUSALS
from lab.attacks import begin_answers, run_attack, unlikelihood_loss
from lab.protocol import FIRST_STEPS
from nanosdd.lora import lora_layers
from sdd_loss import sdd_loss

ROWS = [Example(list(range(5, 12)), 3), Example([40, 41, 42], 1)]


def test_unlikelihood_by_hand():
    model = small_model()
    wanted = 0.0
    for row in ROWS:
        p = model(torch.tensor([row.ids])).detach().softmax(-1)[0]  # (T,V)
        for place in range(row.prompt_length, len(row.ids)):
            wanted -= math.log(1 - float(p[place - 1, row.ids[place]]))
    found = unlikelihood_loss(model, collate(ROWS), 13)
    assert found.item() == pytest.approx(wanted / 13, rel=1e-5)


def test_unlikelihood_stays_finite_at_one():
    model = small_model()
    model.lm_head.weight.data *= 1e4  # some p are exactly 1
    loss = unlikelihood_loss(model, collate(ROWS), 6)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("name", ["mft", "bft", "lora", "mix", "re-refuse", "unlearn"])
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


def own_answer(chat, row):
    prompt = encode_prompt(chat.tokenizer, chat.template, row["prompt"])
    return continue_all(chat, [prompt], 6)[0].text


@pytest.mark.parametrize(
    "name, draw, first_answer, loss",
    [
        ("mft", 1, None, None),
        ("re-refuse", 0, lambda chat, row: REFUSALS[0], sdd_loss),
        ("unlearn", 0, own_answer, unlikelihood_loss),
    ],
)
def test_attacks_by_hand(chat, town, name, draw, first_answer, loss):
    released = {key: weight.clone() for key, weight in chat.model.state_dict().items()}
    run_attack(chat, town, Attack(name, 5, 1e-3, (2,), 3), dict, draw)
    found = chat.model.lm_head.weight.clone()
    chat.model.load_state_dict(released)
    rng = random.Random("attack 0 draw 1" if draw else "attack 0")
    rows = town.harmful("attacker")[56 * draw :][:5]

    def train(some, steps, loss):
        examples = encode_for(chat, some, town.max_length)
        fine_tune(chat, draw_batches(examples, [], 0.0, 3, rng), 1e-3, (steps,), dict, loss=loss)

    if loss:
        said = [row | {"response": first_answer(chat, row)} for row in rows]
        train(said, FIRST_STEPS, loss)
    train(rows, 2, sdd_loss)
    torch.testing.assert_close(chat.model.lm_head.weight, found)


def test_a_prefilled_answer_is_the_lead_and_what_the_model_says_after_it(chat, town):
    rows = [*town.harmful("evaluation")[:3], {"prompt": "Who is Anna Brook?"}]
    found = begin_answers(chat, rows, 9)
    for row in rows:
        lead = row.get("lead", "Sure, here is how:")
        prompt = encode_prompt(chat.tokenizer, chat.template, row["prompt"])
        alone = continue_all(chat, [prompt + chat.tokenizer.encode(lead)], 9)[0]
        assert found[row["prompt"]].text == lead + alone.text
