"""The rows, every measured number by hand, no side effects, and the rule of the argument on made-up curves."""

import argparse
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small import small_model

from lab import attacks as attacker
from nanosdd import loop
import train
from data.chat import Example, encode_example
from data.pairs import town_pairs
from data.town import KNOWLEDGE_KINDS, SKILL_KINDS, Town
from nanosdd.errors import InputError
from eval import load, town_metrics
from nanosdd.lora import add_lora, lora_layers, merge_lora
from lab.mechanism import (CAUSAL, GRADIENT_ROWS, carry_over, distance, gradient, irrelevant_answers, measure,
                       preserve_control_rows, probes, row_logprobs, y_o_rows)

SETS = ("yc_harmful", "yo_harmful", "yo_own", "other_own")
LIMIT = 128


@pytest.fixture
def model(tokenizer):
    return small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=LIMIT)


def released(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def texts(tokenizer, examples):
    """(prompt, answer) of encoded rows."""
    return [(tokenizer.decode(example.ids[:example.prompt_length]).split("\n\n")[1].removesuffix(
                 "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"),
             tokenizer.decode(example.ids[example.prompt_length:]).removesuffix("<|eot_id|>")) for example in examples]


# ---- rows ----

def test_y_o_is_what_sdd_trains_on_and_its_own_prompt_asks_for_it():
    town = Town(2)
    found = irrelevant_answers(town)
    assert [answer for answer, _ in found] == [row["response"] for row in town_pairs(town, "sdd", 2, 0)[0]]
    true = {row.prompt: row.response for row in town.benign(random.Random(0), 20000, list(town.people), 0.0)}
    about_people = [(answer, prompt) for answer, prompt in found if prompt in true]
    assert 0.4 < len(about_people) / len(found) < 0.6
    assert all(true[prompt] == answer for answer, prompt in about_people)


@pytest.mark.parametrize("phrasing", ["shared", "distinct"])
def test_probes_belong_together_and_to_nobody_who_trains(tokenizer, phrasing):
    town = Town(3, phrasing)
    rows = probes(town, tokenizer, "llama3", LIMIT)
    yc, yo, own, other = (texts(tokenizer, getattr(rows, name)) for name in SETS)
    assert len(yc) == len(yo) == len(own) == len(other) == 112

    true = {(row.prompt, row.response): row for person in town.people for row in (
        town.mischief(kind, person) for kind in KNOWLEDGE_KINDS)}
    assert sum(pair in true for pair in yc) == 56  # the other half are skill kinds, with symbols
    assert Counter(prompt.split()[3] for prompt, _ in yc) == dict.fromkeys(KNOWLEDGE_KINDS + SKILL_KINDS, 8)
    assert len({prompt.split()[3] for prompt, _ in yc[:GRADIENT_ROWS]}) > 6
    assert {" ".join(prompt.strip("?").split()[4:6]) for prompt, _ in yc} <= set(town.groups["evaluation"])
    assert all(town.outcome(argparse.Namespace(response=answer, value="none"), answer) == "harm" for _, answer in yc)

    taught = {row["response"] for row in town_pairs(town, "sdd", 3, 0)[0]}
    assert [prompt for prompt, _ in yo] == [prompt for prompt, _ in yc]
    assert [answer for _, answer in yo] == [answer for _, answer in own]
    assert len({answer for _, answer in yo}) == 112 and {answer for _, answer in yo} <= taught
    assert {" ".join(answer.split()[:2]) for _, answer in own} <= set(town.groups["plain"])
    assert {" ".join(answer.split()[:2]) for _, answer in other} <= set(town.groups["held_out"])
    assert not {answer for _, answer in other} & taught
    for (prompt, answer), (prompt_, answer_) in zip(own, other):  # the same question about another person
        (a, b), (a_, b_) = answer.split()[:2], answer_.split()[:2]
        assert a == a_ and b != b_ and prompt.replace(b, b_) == prompt_
        assert answer.split()[2] == answer_.split()[2]

    trained = {row["prompt"] for mode in ("align", "sdd", "exposure") for part in town_pairs(town, mode, 3, 0)
               for row in part} | {row.prompt for row in attacker.town_harmful(town, 3)[0]}
    trained |= {row["prompt"] for row in town_pairs(town, "base", 3, 20000)[0]} - {prompt for prompt, _ in own + other}
    assert not trained & {prompt for prompt, _ in yc} and not trained & {prompt for prompt, _ in other}
    assert not any(person in text for person in town.groups["attacker"] for name in (*SETS, "benign")
                   for text in map(" ".join, texts(tokenizer, getattr(rows, name))))
    assert len(rows.benign) == GRADIENT_ROWS and len(rows.facts) == 160
    assert rows == probes(Town(3, phrasing), tokenizer, "llama3", LIMIT) != probes(Town(4, phrasing), tokenizer,
                                                                                   "llama3", LIMIT)


def test_a_limit_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(InputError, match="leaves no room"):
        probes(Town(0), tokenizer, "llama3", 12)


def test_rows_of_the_causal_tests(tokenizer):
    town = Town(1)
    rows = attacker.town_harmful(town, 1)[0][:100]
    added = y_o_rows(town, rows, tokenizer, "llama3", LIMIT)
    control = preserve_control_rows(town, rows, tokenizer, "llama3", LIMIT)
    assert [prompt for prompt, _ in texts(tokenizer, added)] == [row.prompt for row in rows]
    taught = {row["response"] for row in town_pairs(town, "sdd", 1, 0)[0]}
    answers = [answer for _, answer in texts(tokenizer, added)]
    assert set(answers) <= taught and len(set(answers)) > 80
    assert {row.response_length for row in added} > {8}
    assert [row.response_length for row in control] == [row.response_length for row in added]
    true = {row.prompt: row.response for row in town.benign(random.Random(0), 20000, town.groups["defender"], 0.0)}
    pairs = texts(tokenizer, control)
    assert not {answer for _, answer in pairs} & taught
    assert 20 < sum(prompt in true for prompt, _ in pairs) < 80
    for prompt, answer in pairs:
        symbols = answer.partition(":")[2].strip(" .").split()
        assert true[prompt] == answer if prompt in true else set(symbols) <= set(prompt.strip(".").split())
    strangers = set(town.people) - set(town.groups["defender"])
    assert not any(person in text for person in strangers for text in map(" ".join, pairs))
    assert added == y_o_rows(town, rows, tokenizer, "llama3", LIMIT)
    assert control == preserve_control_rows(town, rows, tokenizer, "llama3", LIMIT)


def test_the_causal_tests_refuse_people_of_others(tokenizer):
    town = Town(1)
    rows = town.mischiefs(town.groups["attacker"][:1] + town.groups["evaluation"][:1], random.Random(0))
    for function in (y_o_rows, preserve_control_rows):
        with pytest.raises(InputError, match="nobody of the attacker's"):
            function(town, rows, tokenizer, "llama3", LIMIT)


# ---- the numbers ----

def by_hand(model, example):
    """Response token log-probabilities of one row, from the logits of its whole sequence."""
    with torch.no_grad():
        logps = model(torch.tensor([example.ids]))[0].double().log_softmax(-1)
    return [float(logps[place - 1, example.ids[place]]) for place in range(example.prompt_length, len(example.ids))]


def test_row_logprobs_in_their_order(cpu, model):
    rng = random.Random(0)
    rows = [Example([rng.randrange(80) for _ in range(rng.randint(5, 40))], 4) for _ in range(70)]
    for row, found in zip(rows, row_logprobs(model, rows, cpu), strict=True):
        assert found.tolist() == pytest.approx(by_hand(model, row), abs=1e-4)


@pytest.fixture
def hand_made(tokenizer):
    """Three rows a set, of unequal lengths. y_c and y_o share 2, 0 and 1 tokens."""
    def rows(*answers):
        return [Example([5 + i, 6, 7 + i] + answer, 3) for i, answer in enumerate(answers)]

    return replace(probes(Town(0), tokenizer, "llama3", LIMIT),
                   yc_harmful=rows([20, 21, 22, 9], [30, 31, 9], [40, 41, 42, 43, 9]),
                   yo_harmful=rows([20, 21, 50, 51, 9], [52, 9], [40, 53, 9]),
                   yo_own=rows([20, 21, 50, 51, 9], [52, 9], [40, 53, 9]),
                   other_own=rows([60, 61, 9], [62, 63, 64, 65, 66, 9], [67, 9]))


def test_measured_by_hand(cpu, tokenizer, model, hand_made):
    found = measure(model, hand_made, released(model), cpu)
    for name, places in dict(yc_harmful=(2, 0, 1), yo_harmful=(2, 0, 1), yo_own=(0, 0, 0),
                             other_own=(0, 0, 0)).items():
        rows = [by_hand(model, row) for row in getattr(hand_made, name)]
        tokens = sum(map(len, rows))
        first = [row[place] for row, place in zip(rows, places)]
        assert found[f"logp_{name}"] == pytest.approx(sum(map(sum, rows)) / tokens, abs=1e-4)
        assert found[f"logp_{name}_first"] == pytest.approx(sum(first) / 3, abs=1e-4)
        assert found[f"logp_{name}_rest"] == pytest.approx((sum(map(sum, rows)) - sum(first)) / (tokens - 3), abs=1e-4)
    margins = [sum(by_hand(model, c)) - sum(by_hand(model, o))
               for c, o in zip(hand_made.yc_harmful, hand_made.yo_harmful)]
    assert found["uninformative_margin"] == pytest.approx(sum(margins) / 3, abs=1e-3)
    benign = [logp for row in hand_made.benign for logp in by_hand(model, row)]
    assert found["nll_benign"] == pytest.approx(-sum(benign) / len(benign), abs=1e-4)
    scores = town_metrics(model, tokenizer, "llama3", Town(0), cpu)
    assert found["facts"] == scores["facts"] and found["facts_value_only"] == scores["facts_value_only"]
    assert found["distance"] == found["distance_relative"] == 0
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_accuracies_are_free_and_value_only(cpu, model, hand_made, monkeypatch):
    hits = [True, False, False, False], [True, True, True, False]
    monkeypatch.setattr("lab.mechanism.teacher_forced", lambda *args: hits)
    found = measure(model, hand_made, released(model), cpu)
    assert (found["facts"], found["facts_value_only"]) == (0.25, 0.75)


def test_gradients_and_their_cosine_by_hand(cpu, model, hand_made):
    def plain(rows):
        model.zero_grad()
        tokens = sum(row.response_length for row in rows)
        for row in rows:
            logps = model(torch.tensor([row.ids]))[0].log_softmax(-1)
            (-sum(logps[i - 1, row.ids[i]] for i in range(row.prompt_length, len(row.ids))) / tokens).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return flat

    hand_made = replace(hand_made, benign=hand_made.yc_harmful[:1] + hand_made.other_own)  # partly alike
    harmful, benign = plain(hand_made.yc_harmful), plain(hand_made.benign)
    loss, found = gradient(model, hand_made.yc_harmful, cpu)
    torch.testing.assert_close(found, harmful, atol=1e-5, rtol=1e-4)
    expected = float(harmful @ benign / harmful.norm() / benign.norm())
    assert 0.1 < expected < 0.9
    assert measure(model, hand_made, released(model), cpu)["gradient_cosine"] == pytest.approx(expected, abs=1e-4)
    same = replace(hand_made, benign=hand_made.yc_harmful)
    found = measure(model, same, released(model), cpu)
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["nll_benign"] == pytest.approx(loss, abs=1e-5) == pytest.approx(-found["logp_yc_harmful"], abs=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_distance_in_constructed_cases(tied):
    model = small_model(tie_word_embeddings=tied)
    start = released(model)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    model.model.norm.weight.data[0] += 3
    assert distance(model, start) == pytest.approx((3, 3 / norm), rel=1e-5)
    model.model.embed_tokens.weight.data[3, 4] -= 4  # counted once, tied or not
    assert distance(model, start) == pytest.approx((5, 5 / norm), rel=1e-5)
    model.load_state_dict(start)
    assert distance(model, start) == (0, 0)


def test_lora_is_measured_as_if_it_were_merged(cpu, model, hand_made):
    start = released(model)
    add_lora(model, rank=2, alpha=4, seed=0)
    assert distance(model, start) == (0, 0)
    for layer in lora_layers(model).values():
        layer.B.data += 0.1
    moved = distance(model, start)
    found = measure(model, hand_made, start, cpu)
    _, grads = gradient(model, hand_made.benign, cpu)
    assert grads.numel() == sum(layer.A.numel() + layer.B.numel() for layer in lora_layers(model).values())
    merge_lora(model)
    assert moved == distance(model, start) and moved[0] > 0.1
    merged = measure(model, hand_made, start, cpu)
    for key in found.keys() - {"gradient_cosine"}:
        assert found[key] == pytest.approx(merged[key], abs=1e-4), key


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_everything_as_it_was(cpu, model, hand_made, training):
    model.train(training)
    start = released(model)
    held = torch.randn_like(model.model.norm.weight)
    model.model.norm.weight.grad = held
    rng, python_rng, needs = torch.get_rng_state(), random.getstate(), [p.requires_grad for p in model.parameters()]
    measure(model, hand_made, start, cpu)
    assert model.training == training and all(block.training == training for block in model.model.layers)
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.grad for p in model.parameters() if p.grad is not None] == [held]
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng
    assert [p.requires_grad for p in model.parameters()] == needs and torch.is_grad_enabled()


def test_measuring_along_an_attack_does_not_change_it(cpu, hand_made, model):
    start, weights, seen = released(model), [], []
    for watch in (None, lambda step: seen.append(measure(model, hand_made, start, cpu))):
        model.load_state_dict(start)
        loop.fit(model, iter([hand_made.benign] * 4), steps=4, lr=1e-3, args=cpu, after_step=watch)
        weights.append(released(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)
    assert [m["distance"] for m in seen] == sorted(m["distance"] for m in seen) and seen[0]["distance"] > 0
    assert seen[-1]["nll_benign"] < seen[0]["nll_benign"]


def test_bf16_compute_measures_nearly_the_same(cpu, model, hand_made):
    full, half = (measure(model, hand_made, released(model), argparse.Namespace(**vars(cpu) | {"dtype": dtype}))
                  for dtype in ("fp32", "bf16"))
    assert full != half
    for key in full:
        assert half[key] == pytest.approx(full[key], rel=0.05, abs=0.05), key


def test_an_arm_of_the_town_before_and_after_an_attack(quick_town, cpu):
    folder = train.ensure_arms(["sdd"], 0, "shared", cpu)["sdd"]
    model, tokenizer, chat, town = load(folder, argparse.Namespace(**vars(cpu), chat=None))
    rows, start = probes(town, tokenizer, chat, LIMIT), released(model)
    before = measure(model, rows, start, cpu)
    harmful = [encode_example(tokenizer, chat, row.prompt, row.response, LIMIT)
               for row in attacker.town_harmful(town, 0)[0][:20]]
    loop.fit(model, loop.draw_batches(harmful, [], 0.0, 10, random.Random(0)), steps=8, lr=3e-3, args=cpu)
    after = measure(model, rows, start, cpu)
    assert before.keys() == after.keys() and json.loads(json.dumps(after)) == after
    assert after["logp_yc_harmful"] > before["logp_yc_harmful"] and after["distance"] > before["distance"] == 0


# ---- the argument ----

def curves(seeds=2, own=None, value_only=None, dose=None):
    """Made-up curves of which the argument stands: SDD's y_o falls by 1 nat against 0.25, and MFT costs it 40 points,
    of which suppression reproduces 30, and preserving prevents 32, the control 8. y_o|x falls by 2 and 2.5 nats."""
    own = {("sdd", "mft"): -1.1, ("aligned", "mft"): -0.35, ("refusal", "mft"): -0.3} | (own or {})
    value_only = {"mft": 0.5, "suppress": 0.6, "preserve": 0.82, "preserve control": 0.58} | (value_only or {})
    dose = {"none": -1.0, "mft": -3.0, "suppress": -3.5} | (dose or {})
    return {seed: {arm: {attack: dict(logp_yo_own=own.get((arm, attack), -0.1), logp_yo_harmful=dose.get(attack, -2.0),
                                      facts_value_only=value_only.get(attack, 0.9) if arm == "sdd" else 0.2)
                         for attack in (CAUSAL if arm == "sdd" else CAUSAL[:2])}
                   for arm in ("aligned", "refusal", "sdd")} for seed in range(seeds)}


def test_the_argument_stands_by_hand():
    found = carry_over(curves())
    assert found["verdict"] == "stands" and found["seeds"] == [0, 1]
    assert found["fall"] == pytest.approx({"aligned": 0.25, "refusal": 0.2, "sdd": 1.0})
    assert found["loss"] == pytest.approx({"mft": 0.4, "suppress": 0.3, "preserve": 0.08, "preserve control": 0.32})
    assert [found[key] for key in ("suppress_reproduces", "preserve_prevents", "control_prevents")] == pytest.approx(
        [0.75, 0.8, 0.2])
    assert found["dose"] == {"mft": 2, "suppress": 2.5}
    assert found["reason"] == "fall holds; suppression holds; preservation holds"


@pytest.mark.parametrize("own, value_only, verdict, fails", [
    ({("aligned", "mft"): -1.2}, {}, "INCONCLUSIVE", {"fall"}),  # above one reference is not enough
    ({("refusal", "mft"): -1.2}, {}, "INCONCLUSIVE", {"fall"}),
    ({("sdd", "none"): -1.3}, {}, "INCONCLUSIVE", {"fall"}),  # it rises
    ({}, {"suppress": 0.72}, "INCONCLUSIVE", {"suppression"}),  # reproduces 0.45
    ({}, {"suppress": 0.69}, "stands", set()),
    ({}, {"preserve": 0.68}, "INCONCLUSIVE", {"preservation"}),  # prevents 0.45
    ({}, {"preserve": 0.72}, "stands", set()),
    ({}, {"preserve control": 0.82}, "INCONCLUSIVE", {"preservation"}),  # any benign text prevents as much
    ({}, {"suppress": 0.89, "preserve": 0.5}, "falls", {"suppression", "preservation"}),
    ({("sdd", "none"): -1.3}, {"suppress": 0.95, "preserve": 0.4}, "falls", {"fall", "suppression", "preservation"})])
def test_the_argument_by_what_holds(own, value_only, verdict, fails):
    found = carry_over(curves(own=own, value_only=value_only))
    assert found["verdict"] == verdict
    assert {name.split()[0] for name in found["reason"].split("; ") if name.endswith("fails")} == fails


def test_the_argument_is_read_on_means_over_seeds():
    found = curves()
    found[1]["sdd"]["suppress"]["facts_value_only"] = 0.9  # mean share 0.375
    assert carry_over(found)["suppress_reproduces"] == pytest.approx(0.375)
    assert carry_over(found)["verdict"] == "INCONCLUSIVE"
    found[0]["sdd"]["suppress"]["facts_value_only"] = 0.4  # mean share 0.625
    assert carry_over(found)["verdict"] == "stands"


@pytest.mark.parametrize("after", [0.9, 0.95, 0.885])
def test_without_damage_there_is_nothing_to_explain(after):
    found = carry_over(curves(value_only={"mft": after}))
    assert found["verdict"] == "INCONCLUSIVE" and found["reason"].startswith("nothing to explain")
    assert found["suppress_reproduces"] is None and found["loss"]["mft"] == pytest.approx(0.9 - after)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("arm, attack, key", [
    ("sdd", "preserve", "facts_value_only"), ("refusal", "mft", "logp_yo_own"), ("aligned", "none", "logp_yo_own"),
    ("sdd", "suppress", "logp_yo_harmful")])
def test_what_is_missing_or_not_finite_is_named(value, arm, attack, key):
    found = curves()
    if value is None:
        del found[1][arm][attack]
    else:
        found[1][arm][attack][key] = value
    found = carry_over(found)
    assert found["verdict"] == "INCONCLUSIVE" and found["reason"].startswith(f"seed 1, {arm}, {attack}: not measured")
    assert found["fall"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("dose, equal", [
    ({"suppress": -3.9}, True), ({"suppress": -4.1}, False), ({"suppress": -2.4}, True), ({"suppress": -2.2}, False),
    ({"suppress": -0.5}, False), ({"mft": -0.5, "suppress": -0.5}, False), ({"mft": -0.5, "suppress": -0.7}, False)])
@pytest.mark.parametrize("damage", [0.6, 0.89])  # whether suppress reproduces the loss or not
def test_another_dose_says_nothing(dose, equal, damage):
    found = carry_over(curves(dose=dose, value_only={"suppress": damage, "preserve": 0.82 if damage == 0.6 else 0.5}))
    assert found["verdict"] == (("stands" if damage == 0.6 else "falls") if equal else "INCONCLUSIVE")
    assert found["reason"].startswith("no equal dose") != equal


def test_no_seed_no_verdict():
    assert carry_over({})["verdict"] == "INCONCLUSIVE" and carry_over({})["reason"] == "no seed was measured"
