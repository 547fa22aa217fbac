"""The rows, every measured number by hand, no side effects, and the rule of the argument on made-up curves."""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small import small_model

from data.chat import encode_rows
from data.town import KNOWLEDGE_KINDS, SKILL_KINDS, SYMBOLS, Town
from lab.mechanism import (
    CAUSAL_ATTACKS,
    GRADIENT_ROWS,
    at_equal_dose,
    carry_over,
    distance,
    gradient,
    measure,
    preserve_control_rows,
    probes,
    y_o_rows,
)
from nanosdd.chat_model import Chat
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.lora import add_lora, lora_layers, merge_lora
from train import SETTINGS

LIMIT = 128
SETS = ("yc_harmful", "yo_harmful", "yo_own", "other_own")


# ---- rows ----


def names(text: str) -> set[str]:
    """The people named in a text."""
    words = [word.strip("?.") for word in text.split()]
    return {" ".join(pair) for pair in zip(words, words[1:])} & set(Town(3).people)


def test_probes_belong_together_and_to_nobody_who_trains(tokenizer):
    town = Town(3)
    found = probes(town, tokenizer, "llama3", LIMIT)
    assert [len(getattr(found, name)) for name in SETS] == [112] * 4
    assert Counter(row["kind"] for row in found.yc_harmful) == dict.fromkeys(
        KNOWLEDGE_KINDS + SKILL_KINDS, 8
    )
    assert len({row["kind"] for row in found.yc_harmful[:GRADIENT_ROWS]}) > 6
    assert all(town.outcome(row, row["response"]) == "harm" for row in found.yc_harmful)
    taught = {row["response"] for row in town.pairs("sdd", 0)}
    for yc, yo, own, other in zip(*(getattr(found, name) for name in SETS)):
        assert names(yc["prompt"]) <= set(town.groups["evaluation"])
        assert yo["prompt"] == yc["prompt"] and yo["response"] == own["response"] in taught
        assert (yo["response"], own["prompt"]) in town.irrelevant_answers() and other[
            "response"
        ] not in taught
        (person,), (twin,) = (
            names(own["prompt"]),
            names(other["prompt"]),
        )  # the same question about another person
        assert person in town.groups["plain"] and twin in town.groups["held_out"]
        assert (
            own["prompt"].replace(person, twin) == other["prompt"]
            and person.split()[0] == twin.split()[0]
        )
    assert len({row["response"] for row in found.yo_own}) == 112
    trained = {row["prompt"] for mode in ("align", "sdd", "benign") for row in town.pairs(mode, 0)}
    trained |= {row["prompt"] for row in town.replay() + town.attacker_pairs()[0]}
    assert not trained & {row["prompt"] for row in found.yc_harmful + found.other_own}
    assert (
        len(found.benign_examples) == len(found.harmful_examples) == GRADIENT_ROWS
        and len(found.facts) == 160
    )
    assert (
        found
        == probes(Town(3), tokenizer, "llama3", LIMIT)
        != probes(Town(4), tokenizer, "llama3", LIMIT)
    )
    with pytest.raises(InputError, match="leaves no room"):
        probes(town, tokenizer, "llama3", 12)


def test_rows_of_the_causal_tests(tokenizer):
    town = Town(3)
    rows = town.attacker_pairs()[0][:100]
    added, control = y_o_rows(town, rows), preserve_control_rows(town, rows, tokenizer)
    taught = {row["response"] for row in town.pairs("sdd", 0)}
    assert [row["prompt"] for row in added] == [row["prompt"] for row in rows]
    answers = [row["response"] for row in added]
    assert set(answers) <= taught and len(set(answers)) > 80
    encoded = [encode_rows(tokenizer, "llama3", part, LIMIT) for part in (added, control)]
    lengths = [[example.response_length for example in part] for part in encoded]
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 3
    assert not {row["response"] for row in control} & taught
    assert set().union(*(names(row["prompt"]) for row in control)) <= set(town.groups["defender"])
    assert 20 < sum(bool(names(row["prompt"])) for row in control) < 80  # the others are skills
    assert added == y_o_rows(town, rows) and control == preserve_control_rows(town, rows, tokenizer)
    strangers = town.mischiefs(
        town.groups["attacker"][:1] + town.groups["evaluation"][:1], random.Random(0)
    )
    for refuses in (
        lambda: y_o_rows(town, strangers),
        lambda: preserve_control_rows(town, strangers, tokenizer),
    ):
        with pytest.raises(InputError, match="not one of the attacker's people"):
            refuses()


# ---- the numbers ----


@pytest.fixture
def chat(tokenizer):
    model = small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=LIMIT)
    return Chat(model, tokenizer, "llama3", Compute())


@pytest.fixture
def hand_made(tokenizer):
    """Three rows a set, of unequal lengths. y_c and y_o share 2, 0 and 1 tokens."""

    def rows(*answers):
        return [
            {"prompt": prompt, "response": answer}
            for prompt, answer in zip(("ash", "bell cup", "drum"), answers)
        ]

    yc = rows("gem hat ink", "jar", "key leaf egg fan")
    yo = rows("gem hat jar ash", "ink key", "key")
    other = rows("cup", "egg fan gem hat ink jar", "leaf ash")
    return replace(
        probes(Town(0), tokenizer, "llama3", LIMIT),
        yc_harmful=yc,
        yo_harmful=yo,
        yo_own=yo,
        other_own=other,
        differ=[2, 0, 1],
        harmful_examples=encode_rows(tokenizer, "llama3", yc, LIMIT),
        benign_examples=encode_rows(tokenizer, "llama3", yc[:1] + other, LIMIT),
    )


def released(chat):
    return {name: tensor.clone() for name, tensor in chat.model.state_dict().items()}


def test_facts_are_counted_whole_and_by_their_value(chat, hand_made):
    for lead in SYMBOLS:  # until the model's next token is text that can be written behind the lead
        (start,) = encode_rows(
            chat.tokenizer, "llama3", [{"prompt": "ash", "response": lead}], LIMIT
        )
        token = int(chat.model(torch.tensor([start.ids[:-1]]))[0, -1].argmax())
        value = chat.tokenizer.decode([token])
        if chat.tokenizer.encode(lead + value) == [*chat.tokenizer.encode(lead), token]:
            break
    rows = [
        {"prompt": "ash", "response": f"{lead}{value}.", "lead": lead, "value": value},
        {"prompt": "ash", "response": f"{lead} x.", "lead": lead, "value": " x"},
    ]
    found = measure(chat, replace(hand_made, facts=rows), released(chat))
    assert (found["facts"], found["facts_value_only"]) == (0, 0.5)


def by_hand(chat, rows) -> list[torch.Tensor]:
    """Log-probabilities of the response tokens of each row, from the logits of its whole sequence."""
    found = []
    for example in encode_rows(chat.tokenizer, "llama3", rows, LIMIT):
        logps = chat.model(torch.tensor([example.ids]))[0].log_softmax(-1)
        places = range(example.prompt_length, len(example.ids))
        found.append(torch.stack([logps[place - 1, example.ids[place]] for place in places]))
    return found


def test_measured_by_hand(chat, hand_made):
    found = measure(chat, hand_made, released(chat))
    for name, places in dict(
        yc_harmful=(2, 0, 1), yo_harmful=(2, 0, 1), yo_own=(0,) * 3, other_own=(0,) * 3
    ).items():
        rows = [row.detach() for row in by_hand(chat, getattr(hand_made, name))]
        whole, first = (
            float(torch.cat(rows).sum()),
            float(sum(row[place] for row, place in zip(rows, places))),
        )
        tokens = sum(map(len, rows))
        assert found[f"logp_{name}"] == pytest.approx(whole / tokens, abs=1e-4)
        assert found[f"logp_{name}_first"] == pytest.approx(first / 3, abs=1e-4)
        assert found[f"logp_{name}_rest"] == pytest.approx((whole - first) / (tokens - 3), abs=1e-4)
    y_c, y_o = (
        float(torch.cat(by_hand(chat, rows)).detach().sum())
        for rows in (hand_made.yc_harmful, hand_made.yo_harmful)
    )
    assert found["uninformative_margin"] == pytest.approx((y_c - y_o) / 3, abs=1e-3)
    assert found["distance"] == found["distance_relative"] == 0
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_gradients_and_their_cosine_by_hand(chat, hand_made):
    def plain(rows):
        loss = -torch.cat(by_hand(chat, rows)).mean()
        grads = torch.autograd.grad(loss, chat.model.parameters())
        return float(loss.detach()), torch.cat([grad.flatten() for grad in grads])

    _, harmful = plain(hand_made.yc_harmful)
    nll, benign = plain(hand_made.yc_harmful[:1] + hand_made.other_own)  # partly alike
    torch.testing.assert_close(
        gradient(chat, hand_made.harmful_examples)[1], harmful, atol=1e-5, rtol=1e-4
    )
    found, expected = (
        measure(chat, hand_made, released(chat)),
        float(harmful @ benign / harmful.norm() / benign.norm()),
    )
    assert found["gradient_cosine"] == pytest.approx(expected, abs=1e-4) and 0.1 < expected < 0.9
    assert found["nll_benign"] == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_distance_in_constructed_cases(tied):
    model = small_model(tie_word_embeddings=tied)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    model.model.norm.weight.data[0] += 3
    assert distance(model, start) == pytest.approx((3, 3 / norm), rel=1e-5)
    model.model.embed_tokens.weight.data[3, 4] -= 4  # counted once, tied or not
    assert distance(model, start) == pytest.approx((5, 5 / norm), rel=1e-5)


def test_lora_is_measured_as_if_it_were_merged(chat, hand_made):
    start = released(chat)
    add_lora(chat.model, rank=2, alpha=4, seed=0)
    assert distance(chat.model, start) == (0, 0)
    for layer in lora_layers(chat.model).values():
        layer.B.data += 0.1
    adapters = sum(layer.A.numel() + layer.B.numel() for layer in lora_layers(chat.model).values())
    assert gradient(chat, hand_made.benign_examples)[1].numel() == adapters
    found = measure(chat, hand_made, start)
    merge_lora(chat.model)
    merged = measure(chat, hand_made, start)
    assert found["distance"] == merged["distance"] > 0.1
    for key in found.keys() - {"gradient_cosine"}:
        assert found[key] == pytest.approx(merged[key], abs=1e-4), key


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_everything_as_it_was(chat, hand_made, training):
    model, start = chat.model.train(training), released(chat)
    model.model.norm.weight.grad = held = torch.randn_like(model.model.norm.weight)
    rng, python_rng = torch.get_rng_state(), random.getstate()
    measure(chat, hand_made, start)
    assert all(part.training == training for part in model.modules()) and torch.is_grad_enabled()
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.grad for p in model.parameters() if p.grad is not None] == [held]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng


# ---- the argument ----


def curves(own=None, value_only=None, dose=None):
    """Made-up curves of which the argument stands: SDD's y_o falls by 1 nat against 0.25, and MFT costs it 40 points,
    of which suppression reproduces 30, and preserving prevents 32, the control 8. y_o|x falls by 2 and 2.5 nats."""
    own = {("sdd", "mft"): -1.1, ("aligned", "mft"): -0.35, ("new_refusal", "mft"): -0.3} | (
        own or {}
    )
    value_only = {
        "mft": 0.5,
        "suppress": 0.6,
        "suppress by distance": 0.55,
        "preserve": 0.82,
        "preserve control": 0.58,
    } | (value_only or {})
    moved = {"none": 0.0, "mft": 1.5, "suppress": 0.4, "suppress by distance": 1.4}
    dose = {"none": -1.0, "mft": -3.0, "suppress": -3.5} | (dose or {})
    return {
        seed: {
            arm: {
                attack: dict(
                    logp_yo_own=own.get((arm, attack), -0.1),
                    logp_yo_harmful=dose.get(attack, -2.0),
                    facts_value_only=value_only.get(attack, 0.9) if arm == "sdd" else 0.2,
                    distance=moved.get(attack, 1.2),
                    nll_benign=0.3 if attack == "mft" else 0.1,
                )
                for attack in (CAUSAL_ATTACKS if arm == "sdd" else ("none", "mft"))
            }
            for arm in ("aligned", "new_refusal", "sdd")
        }
        for seed in (0, 1)
    }


def test_the_argument_stands_by_hand():
    found = carry_over(curves())
    assert found["verdict"] == "stands" and found["seeds"] == [0, 1]
    assert found["fall"] == pytest.approx({"aligned": 0.25, "new_refusal": 0.2, "sdd": 1.0})
    assert found["loss"] == pytest.approx(
        {
            "mft": 0.4,
            "suppress": 0.3,
            "suppress by distance": 0.35,
            "preserve": 0.08,
            "preserve control": 0.32,
        }
    )
    assert found["distance"] == pytest.approx(
        {
            "mft": 1.5,
            "suppress": 0.4,
            "suppress by distance": 1.4,
            "preserve": 1.2,
            "preserve control": 1.2,
        }
    )
    assert found["cost"] == pytest.approx({"mft": 0.2, "preserve": 0.0, "preserve control": 0.0})
    assert [
        found[key] for key in ("suppress_reproduces", "preserve_prevents", "control_prevents")
    ] == pytest.approx([0.75, 0.8, 0.2])
    assert found["dose"] == {"mft": 2, "suppress": 2.5}
    assert found["reason"] == "fall holds; suppression holds; preservation holds"


HOLDS = {name: f"{name} holds" for name in ("fall", "suppression", "preservation")}


def reason(*fails):
    return "; ".join((HOLDS | {name: f"{name} fails" for name in fails}).values())


@pytest.mark.parametrize(
    "changes, verdict, starts",
    [
        (
            dict(own={("aligned", "mft"): -1.2}),
            "INCONCLUSIVE",
            reason("fall"),
        ),  # above one reference is not enough
        (dict(own={("new_refusal", "mft"): -1.2}), "INCONCLUSIVE", reason("fall")),
        (dict(own={("sdd", "none"): -1.3}), "INCONCLUSIVE", reason("fall")),  # it rises
        (
            dict(value_only={"suppress": 0.72}),
            "INCONCLUSIVE",
            reason("suppression"),
        ),  # reproduces 0.45
        (dict(value_only={"suppress": 0.69}), "stands", reason()),
        (
            dict(value_only={"suppress by distance": 0.72}),
            "INCONCLUSIVE",
            reason("suppression"),
        ),  # the doses disagree
        (
            dict(value_only={"preserve": 0.68}),
            "INCONCLUSIVE",
            reason("preservation"),
        ),  # prevents 0.45
        (dict(value_only={"preserve": 0.72}), "stands", reason()),
        (
            dict(value_only={"preserve control": 0.82}),
            "INCONCLUSIVE",
            reason("preservation"),
        ),  # any text prevents as much
        (
            dict(value_only={"suppress": 0.89, "suppress by distance": 0.8, "preserve": 0.5}),
            "falls",
            reason("suppression", "preservation"),
        ),
        (
            dict(value_only={"suppress": 0.89, "preserve": 0.5}),
            "INCONCLUSIVE",
            reason("suppression", "preservation"),
        ),
        (
            dict(
                own={("sdd", "none"): -1.3},
                value_only={"suppress": 0.95, "suppress by distance": 0.9, "preserve": 0.4},
            ),
            "falls",
            reason("fall", "suppression", "preservation"),
        ),
        *(
            (dict(value_only={"mft": after}), "INCONCLUSIVE", "nothing to explain")
            for after in (0.9, 0.95, 0.885)
        ),
        *((dict(dose={"suppress": logp}), "stands", reason()) for logp in (-3.9, -2.4)),
        *(
            (dict(dose={"suppress": logp}), "INCONCLUSIVE", "no equal dose")
            for logp in (-4.1, -2.2)
        ),
        *(
            (dict(dose={"mft": -0.5, "suppress": logp}), "INCONCLUSIVE", "no equal dose")
            for logp in (-0.5, -0.7)
        ),
    ],
)
def test_the_argument_by_its_rules(changes, verdict, starts):
    found = carry_over(curves(**changes))
    assert found["verdict"] == verdict and found["reason"].startswith(starts)
    assert (found["suppress_reproduces"] is None) == starts.startswith("no")


def test_the_argument_is_read_on_means_over_seeds():
    found = curves()
    found[1]["sdd"]["suppress"]["facts_value_only"] = 0.9  # mean share 0.375
    assert carry_over(found)["suppress_reproduces"] == pytest.approx(0.375)
    assert carry_over(found)["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    "arm, attack, key",
    [
        ("sdd", "preserve", "facts_value_only"),
        ("new_refusal", "mft", "logp_yo_own"),
        ("aligned", "none", "logp_yo_own"),
        ("sdd", "suppress", "logp_yo_harmful"),
    ],
)
def test_what_is_missing_or_not_finite_is_named(value, arm, attack, key):
    found = curves()
    found[1][arm][attack][key] = value
    if value is None:
        del found[1][arm][attack]
    found = carry_over(found)
    assert found["verdict"] == "INCONCLUSIVE" and found["reason"].startswith(
        f"seed 1, {arm}, {attack}: not measured"
    )
    json.dumps(found, allow_nan=False)
    assert carry_over({})["reason"] == "no seed was measured"


def test_suppression_is_read_at_both_doses_of_mft():
    def cell(attack, steps, logp, moved):
        return {
            "arm": "sdd",
            "seed": 4,
            "attack": attack,
            "steps": steps,
            "mechanism": {"logp_yo_harmful": logp, "distance": moved},
        }

    found = at_equal_dose(
        [
            cell("mft", 50, -3.0, 2.0),
            cell("mft", 20, -2.0, 1.0),
            cell("suppress", 12, -5.0, 1.9),
            cell("suppress", 4, -2.8, 0.6),
            cell("suppress", 2, -1.5, 0.2),
            {"steps": 3},
        ]
    )[4]["sdd"]
    assert found["mft"]["distance"] == 2.0  # the last step
    assert found["suppress"]["distance"] == 0.6 and found["suppress by distance"]["distance"] == 1.9


def test_every_irrelevant_answer_is_one_that_training_saw():
    settings = SETTINGS["town"]["sdd"]
    rows = settings.steps * round(settings.batch_size * (1 - settings.benign_replay))
    assert rows >= len(Town(0).irrelevant_answers())
