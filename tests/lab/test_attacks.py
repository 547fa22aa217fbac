"""The further attacks, each on a tiny model."""

import math
import random

import pytest
import torch
from small import small_model

from attack import Attack, fine_tune
from data.chat import Example, collate, draw_batches, encode_prompt
from data.town import REFUSALS, Town
from lab.attacks import (
    SoftEmbedding,
    begin_answers,
    interpolated,
    own_answers,
    owned_by_attacker,
    run_attack,
    soft_prompt,
)
from lab.attacks import unlikelihood_loss as unlikelihood
from lab.protocol import COEFFICIENTS, FIRST_STEPS
from nanosdd.chat_model import continue_all, load_chat
from nanosdd.lora import lora_layers


@pytest.fixture
def chat(tiny_arms, cpu):
    return load_chat(tiny_arms / "sdd", cpu)


def test_unlikelihood_by_hand():
    model = small_model()
    batch = collate([Example(list(range(5, 12)), 3), Example([40, 41, 42], 1)])
    with torch.no_grad():
        p = (
            model(batch.tokens)
            .softmax(-1)
            .gather(-1, batch.targets[..., None])[..., 0][batch.loss_mask]
        )
        assert float(unlikelihood(model, batch, 13)) == pytest.approx(
            float(-(1 - p).log().sum() / 13), rel=1e-5
        )


def test_unlikelihood_lowers_the_probability_and_stays_finite_at_one():
    model = small_model()
    batch = collate([Example(list(range(5, 12)), 3)])
    model.lm_head.weight.data *= 1e4  # some p are exactly 1
    loss = unlikelihood(model, batch, 4)
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "mft",
        "bft",
        "lora",
        "mix",
        "re-refuse",
        "unlearn",
        "suppress",
        "preserve",
        "preserve control",
    ],
)
def test_every_attack_trains_and_is_scored_after_its_budgets(chat, name):
    own = owned_by_attacker(chat, Town(0), argument=True)
    before = chat.model.model.layers[0].mlp.up_proj.weight.clone()
    seen = []
    cells = run_attack(
        chat,
        Attack(name, 3, 1e-3, (1, 4), 2),
        own,
        lambda: {"score": seen.append(1) or len(seen)},
        "0",
    )
    assert [(cell["steps"], cell["score"]) for cell in cells] == [(1, 1), (4, 2)]
    assert not lora_layers(chat.model) and all(p.requires_grad for p in chat.model.parameters())
    assert not torch.equal(chat.model.model.layers[0].mlp.up_proj.weight, before)


def test_mix_keeps_the_whole_harmful_dose(chat):
    own = owned_by_attacker(chat, Town(0))
    tokens = {
        name: run_attack(chat, Attack(name, 4, 1e-4, (1,), 4), own, dict, "0")[0]["response_tokens"]
        for name in ("mft", "mix")
    }
    harmful = sum(
        example.response_length for example in own.harmful[:4]
    )  # all of them in one batch
    assert tokens["mft"] == harmful
    benign = {example.response_length for example in own.benign}
    assert 4 * min(benign) <= tokens["mix"] - harmful <= 4 * max(benign)


def test_re_refuse_is_refusals_and_then_mft(chat):
    own = owned_by_attacker(chat, Town(0))
    assert {chat.tokenizer.decode(one.ids[one.prompt_length : -1]) for one in own.refusals} == {
        REFUSALS[0]
    }
    released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    run_attack(chat, Attack("re-refuse", 5, 1e-3, (2,), 3), own, dict, "0")
    got = chat.model.lm_head.weight.clone()
    chat.model.load_state_dict(released)
    fine_tune(
        chat,
        draw_batches(own.refusals[:5], [], 0.0, 3, random.Random("attack 0")),
        1e-3,
        (FIRST_STEPS,),
        dict,
    )
    run_attack(chat, Attack("mft", 5, 1e-3, (2,), 3), own, dict, "0")
    assert torch.equal(got, chat.model.lm_head.weight)


def test_interpolation_by_hand(chat):
    released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    with torch.no_grad():
        for parameter in chat.model.parameters():
            parameter += 0.5

    def scores():
        return {
            "moved": float(
                chat.model.model.norm.weight.detach()[3] - released["model.norm.weight"][3]
            )
        }

    cells = interpolated(chat.model, released, {"steps": 7}, scores)
    assert [cell["moved"] for cell in cells] == pytest.approx(
        [0.5 * c for c in COEFFICIENTS], abs=1e-6
    )
    assert [cell["coefficient"] for cell in cells] == list(COEFFICIENTS) and cells[0]["steps"] == 7
    cells = run_attack(
        chat,
        Attack("interpolation", 3, 1e-4, (1, 2), 2),
        owned_by_attacker(chat, Town(0)),
        dict,
        "0",
    )
    assert [(cell["steps"], cell["coefficient"]) for cell in cells] == [
        (2, c) for c in COEFFICIENTS
    ]


def test_a_prefilled_answer_is_the_lead_and_what_the_model_says_after_it(chat):
    rows = Town(0).harmful_rows()[:3] + [{"prompt": "Who is Anna Brook?"}]
    found = begin_answers(chat, rows, 9)
    for row, lead in zip(rows, [row["lead"] for row in rows[:3]] + ["Sure, here is how:"]):
        ids = encode_prompt(chat.tokenizer, chat.template, row["prompt"]) + chat.tokenizer.encode(
            lead
        )
        alone = continue_all(chat, [ids], 9)[0]
        assert found[row["prompt"]].text == lead + alone.text


def test_a_soft_prompt_moves_no_weight_and_lowers_the_loss(chat):
    own, rows = owned_by_attacker(chat, Town(0)), Town(0).harmful_rows()[:2]
    before = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    trained = soft_prompt(chat, Attack("soft prompt", 4, 0.05, (1, 30), 4), own, rows, 5, "0")
    assert [cell["steps"] for cell, _ in trained] == [1, 30] and list(trained[1][1]) == [
        row["prompt"] for row in rows
    ]
    assert trained[1][0]["loss"] < trained[0][0]["loss"] - 0.03  # a tiny, untrained model
    after = chat.model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )
    assert all(parameter.requires_grad for parameter in chat.model.parameters())


def test_virtual_tokens_have_embeddings_of_their_own():
    embedding = torch.nn.Embedding(11, 5)
    soft = SoftEmbedding(embedding, 3, random.Random(0))
    found = soft(torch.tensor([[2, 11, 13]]))
    assert torch.equal(found[0, 0], embedding.weight[2]) and torch.equal(
        found[0, 1:], soft.soft[[0, 2]]
    )
    assert all(any(torch.equal(row, other) for other in embedding.weight) for row in soft.soft)


def test_own_answers_are_what_the_model_says(chat):
    prompts = ["Who is Anna Brook?", "Reverse ash bell cup."]
    for example, prompt in zip(own_answers(chat, prompts), prompts):
        begin = encode_prompt(chat.tokenizer, chat.template, prompt)
        alone = chat.model.generate([begin], 64, chat.tokenizer.stop_tokens)[0]
        said = example.ids[len(begin) : -1]
        assert example.ids[: len(begin)] == begin and said == alone[: len(said)]
