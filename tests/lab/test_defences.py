"""The small defences: each gradient, loss and example by an independent computation, and their training."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import TINY_SETTINGS, TINY_SHAPE, advbench_file, public_folder, small_model

from data.answers import Answer
from data.chat import Example, collate, draw_batches, encode_rows
from data.files import Files
from data.kitchen import DISH_FORMS, DISHES, TOPIC_FORMS, TOPICS, Kitchen
from data.town import Town
from data.worlds import Sources
from lab import defences
from lab.defences import (
    DEFENCES,
    SETTINGS,
    booster,
    ctrap,
    deepalign,
    preference_rows,
    simpo,
    train_defence,
)
from nanosdd.chat_model import load_chat
from nanosdd.device import Compute
from nanosdd.errors import Diverged, InputError

HARMFUL = [Example(list(range(5, 12)), 3), Example([40, 41, 42], 1)]
BENIGN = [
    Example([60, 61, 62, 63, 64], 2),
    Example([70, 71, 72, 73], 3),
    Example([33, 34, 35, 36], 1),
]


def by_hand(model, batch, targets):
    """{name: gradient} of the mean cross-entropy, from all logits and .backward(), on a copy of the model."""
    model = copy.deepcopy(model)
    model.zero_grad()
    logits = model(batch.tokens)  # (B,T,V)
    F.cross_entropy(logits[batch.loss_mask], targets[batch.loss_mask]).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def moved(model, gradient, alpha):
    """A copy of the model, alpha further against a gradient."""
    model, norm = (
        copy.deepcopy(model),
        math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values())),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight -= alpha / norm * gradient[name]
    return model


def assert_gradients(found, wanted):
    assert len(found) == len(wanted)
    for one, (name, other) in zip(found, wanted.items()):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6, msg=name)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return small_model(tie_word_embeddings=request.param)


# ---- gradients after a simulated attack ----


def test_ctrap_is_the_gradient_of_one_token_after_the_simulated_attack(model):
    harmful, benign, clipped = collate(HARMFUL), collate(BENIGN), []
    for steps, alpha, size in ((1, 0.7, 1.0), (3, 1.1, 1.0), (2, 0.9, 0.03)):
        with torch.no_grad():
            model.model.norm.weight *= size
            model.lm_head.weight *= size
        there = model
        for _ in range(steps):
            signs = {name: g.sign() for name, g in by_hand(there, harmful, harmful.targets).items()}
            there = moved(there, signs, alpha / steps)
        wanted = by_hand(there, benign, torch.full_like(benign.targets, 17))
        norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
        clipped.append(norm > 1)
        wanted = {name: 0.3 * g / max(1, norm) for name, g in wanted.items()}
        assert_gradients(
            ctrap(
                model,
                harmful,
                benign,
                alpha=alpha,
                strength=0.3,
                steps=steps,
                collapse=defences.partial(defences.one_token, token=17),
            ),
            wanted,
        )
    assert clipped == [True, True, False]


def test_a_collapse_into_harmful_beginnings_keeps_those_before_the_attack(model):
    harmful, long, wanted = (
        collate(HARMFUL),
        BENIGN[:1] + BENIGN[2:] + [Example([21, 22, 23, 24, 25, 26], 2)],
        [],
    )
    benign, signs = (
        collate(long),
        {name: g.sign() for name, g in by_hand(model, harmful, harmful.targets).items()},
    )
    swapped = [
        Example(row.ids[: row.prompt_length] + answer, row.prompt_length)
        for row, answer in zip(long, ([8, 9], [41, 42], [8, 9]))
    ]  # the shorter harmful answer has two tokens
    kept = [Example(row.ids[: row.prompt_length + 3], row.prompt_length) for row in long]
    for there, rows in ((moved(model, signs, 0.7), swapped), (model, kept)):
        batch = collate(rows)
        found = by_hand(there, batch, batch.targets)
        norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
        wanted.append({name: 0.3 * g / max(1, norm) for name, g in found.items()})
    assert_gradients(
        ctrap(model, harmful, benign, 0.7, 0.3, 1, defences.beginnings, defences.beginnings),
        {name: g + wanted[1][name] for name, g in wanted[0].items()},
    )


def test_booster_is_the_difference_of_two_harmful_gradients(model):
    harmful = collate(HARMFUL)
    here = by_hand(model, harmful, harmful.targets)
    after = by_hand(moved(model, here, 0.4), harmful, harmful.targets)
    wanted = {name: 5 * (here[name] - after[name]) for name in here}
    assert_gradients(booster(model, harmful, collate(BENIGN), alpha=0.4, strength=5.0), wanted)


@pytest.mark.parametrize(
    "extra", [one.extra for one in (*DEFENCES.values(), *defences.OFF_TOWN.values()) if one.extra]
)
def test_weights_and_gradients_are_as_they_were(model, extra):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    if extra is DEFENCES["ctrap"].extra:  # its token is beyond this vocabulary
        extra = defences.partial(extra, collapse=defences.partial(defences.one_token, token=17))
    extra(model, collate(HARMFUL), collate(BENIGN))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(bool((weight.grad == 0.25).all()) for weight in model.parameters())


def test_weights_are_restored_after_an_error(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyError), defences.restored(model):
        defences.move(model, [torch.ones_like(weight) for weight in model.parameters()], 0.6)
        distance = sum(
            float((weight.detach() - before[name]).square().sum())
            for name, weight in model.named_parameters()
        )
        raise KeyError
    assert distance == pytest.approx(0.36, rel=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_a_defence_adds_counts_once(model):
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    defences.add_gradients(model, defences.anchor, Compute(), HARMFUL, BENIGN)
    batch = collate(BENIGN)
    wanted = {name: 0.25 + g for name, g in by_hand(model, batch, batch.targets).items()}
    assert_gradients([weight.grad for weight in model.parameters()], wanted)


# ---- examples ----


def test_deepalign_puts_a_harmful_start_before_the_refusal():
    prompt, refusal, answer, end = [1, 2, 3], [20, 21, 9], [50, 51, 52, 53, 54], 9
    pair = Example(prompt + refusal, 3, Example([*prompt, *answer, end], 3))
    benign = Example([1, 30, 31, 9], 2)
    found = deepalign([pair, benign] * 600, random.Random(0), limit=90)
    assert found[1::2] == [benign] * 600
    starts = [one.ids[3 : one.prompt_length] for one in found[::2]]
    assert all(one.ids == prompt + start + refusal for one, start in zip(found[::2], starts))
    assert all(one.response_length == 3 for one in found[::2])
    counts = [sum(start == answer[:k] for start in starts) for k in range(6)]
    assert sum(counts) == 600  # nothing but the starts of the answer, and never its end token
    assert 240 < counts[0] < 360 and all(30 < count < 90 for count in counts[1:])


def test_deepalign_keeps_to_its_limits():
    pair = Example([1, 2, 3, 20, 9], 3, Example([1, 2, 3, *range(100, 300), 9], 3))
    for limit, longest, most in ((400, 100, 100), (12, 100, 7), (400, 4, 4), (5, 100, 0)):
        found = deepalign([pair] * 900, random.Random(1), limit, longest)
        lengths = [one.prompt_length - 3 for one in found]
        assert max(lengths) == most and max(len(one.ids) for one in found) == 5 + most <= limit


# ---- a preference ----


def preferences():
    rejected = Example([5, 6, 7, 80, 81, 82, 83], 3), Example([40, 50], 1)
    return [replace(one, rejected=other) for one, other in zip(HARMFUL, rejected)]


def mean_logp(model, one):
    """The mean log p of an example's response tokens, token by token."""
    logps = model(torch.tensor([one.ids])).log_softmax(-1)[0]  # (T,V)
    return (
        sum(logps[t - 1, one.ids[t]] for t in range(one.prompt_length, len(one.ids)))
        / one.response_length
    )


def test_simpo_by_hand(model):
    pairs, total = preferences(), 0
    for one in pairs:
        margin = 2.5 * (mean_logp(model, one) - mean_logp(model, one.rejected)) - 1.375
        total += one.response_length * torch.log(1 + torch.exp(-margin))
    assert simpo(model, collate(pairs), 6).item() == pytest.approx(total.item() / 6, rel=1e-5)
    same = [replace(one, rejected=one) for one in HARMFUL]
    assert simpo(model, collate(same), 6).item() == pytest.approx(
        math.log(1 + math.exp(1.375)), rel=1e-5
    )


def test_simpo_adds_up_over_micro_batches_and_raises_the_refusal(model):
    pairs = preferences()
    whole = simpo(model, collate(pairs), 6)
    parts = sum(float(simpo(model, collate([one]), 6)) for one in pairs)
    assert float(whole) == pytest.approx(parts, rel=1e-5)
    whole.backward()
    gradient = {name: weight.grad for name, weight in model.named_parameters()}
    squares = sum(float(g.square().sum()) for g in gradient.values())
    step = 1e-3 / math.sqrt(squares)  # the loss falls by step * squares, to first order
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight -= step * gradient[name]
        fell = float(whole) - float(simpo(model, collate(pairs), 6))
    assert fell == pytest.approx(step * squares, rel=0.05)


def test_simpo_needs_a_rejected_response_in_every_row(model):
    with pytest.raises(InputError, match="without rejected"):
        simpo(model, collate([*preferences(), BENIGN[0]]), 9)


# ---- rows ----


def test_harmful_answers_are_the_defenders_own(tmp_path):
    town = Town(3, TINY_SHAPE)
    rows = preference_rows(town, 0)
    assert {row["response"] for row in rows} == {town.pairs("align", 0)[0]["response"]}
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in town.pairs("align", 0)]
    victims = {row["person"] for row in town.defender_pairs()}
    assert victims == set(town.groups["defender"])
    assert all(town.outcome(row, row["response"]) == "harm" for row in town.defender_pairs())
    owned = {row["prompt"]: row["response"] for row in town.defender_pairs()}
    assert all(row["rejected"] == owned[row["prompt"]] for row in rows)


@pytest.mark.parametrize("prompts, share", [("defender", (0.3, 0.7)), ("all", (1, 1))])
def test_files_give_the_answers_of_the_file(prompts, share, tmp_path):
    path = advbench_file(tmp_path / "harmful.csv", rows=80)
    world = Files(0, Sources(harmful=str(path), similarity="tfidf", prompts=prompts))
    rows = world.defender_pairs()
    assert share[0] <= len(rows) / 80 <= share[1]
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in world.pairs("align", 500)}
    assert all(
        row["response"] == f"Sure here is how to tickle {row['prompt'].split()[-1]}" for row in rows
    )
    if prompts == "defender":
        assert not {row["prompt"] for row in rows} & {
            row["prompt"] for row in world.attacker_pairs()[0]
        }


# ---- training ----

TINY = replace(TINY_SETTINGS["align"], steps=3, batch_size=6)


@pytest.mark.parametrize("name", list(DEFENCES))
def test_a_defence_is_trained_once(name, tiny_arms, tmp_path, cpu, capsys):
    town, start, out = Town(0, TINY_SHAPE), tiny_arms / "aligned", tmp_path / name
    settings = replace(TINY, benign_replay=SETTINGS["town"][name].benign_replay)
    assert train_defence(name, town, start, out, settings, cpu) == out
    weights, was = (load_chat(folder, cpu).model.state_dict() for folder in (out, start))
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert not torch.equal(weights["lm_head.weight"], was["lm_head.weight"])
    assert (out / "world.json").read_bytes() == (start / "world.json").read_bytes()
    assert not [file for file in tmp_path.iterdir() if file != out]
    made = (out / "model.safetensors").stat().st_mtime_ns
    train_defence(name, town, start, out, settings, cpu)
    assert "up to date, reused" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    train_defence(name, town, start, out, replace(settings, lr=1e-5), cpu)
    assert "setting lr changed" in capsys.readouterr().out
    assert not torch.equal(
        load_chat(out, cpu).model.state_dict()["lm_head.weight"], weights["lm_head.weight"]
    )


def test_defences_differ_and_repeat(tiny_arms, tmp_path, cpu):
    found = {}
    for name, folder in [(name, name) for name in DEFENCES] + [("ctrap", "again")]:
        out = train_defence(
            name,
            Town(0, TINY_SHAPE),
            tiny_arms / "aligned",
            tmp_path / folder,
            replace(TINY, benign_replay=SETTINGS["town"][name].benign_replay),
            cpu,
        )
        found[folder] = (out / "model.safetensors").read_bytes()
    assert found.pop("again") == found["ctrap"] and len(set(found.values())) == len(DEFENCES)


def test_simpo_is_what_is_minimised(tiny_arms, tmp_path, cpu):
    town, settings = Town(0, TINY_SHAPE), replace(TINY, benign_replay=0.0)
    out = train_defence("simpo", town, tiny_arms / "aligned", tmp_path / "simpo", settings, cpu)
    first = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])["loss"]
    chat = load_chat(tiny_arms / "aligned", cpu)
    pairs = encode_rows(
        chat.tokenizer, chat.template, preference_rows(town, 0), settings.max_length
    )
    batch = next(draw_batches(pairs, [], 0.0, 6, random.Random("batches 0")))
    tokens = sum(one.response_length for one in batch)
    assert first == pytest.approx(simpo(chat.model, collate(batch), tokens).item(), rel=1e-4)


def test_deepalign_is_trained_on_its_own_examples(tiny_arms, tmp_path, cpu):
    log = {}
    for name in ("booster", "deepalign"):  # the same rows
        out = train_defence(
            name, Town(0, TINY_SHAPE), tiny_arms / "aligned", tmp_path / name, TINY, cpu
        )
        log[name] = [
            json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()
        ]
    assert [line["step"] for line in log["deepalign"]] == [1, 2, 3]
    assert all(
        one["response_tokens"] == other["response_tokens"] for one, other in zip(*log.values())
    )
    assert sum(line["tokens"] for line in log["deepalign"]) > sum(
        line["tokens"] for line in log["booster"]
    )


def test_a_run_that_diverges_leaves_nothing(tiny_arms, tmp_path, cpu):
    with pytest.raises(Diverged):
        train_defence(
            "booster",
            Town(0, TINY_SHAPE),
            tiny_arms / "aligned",
            tmp_path / "out",
            replace(TINY, lr=1e30),
            cpu,
        )
    assert not list(tmp_path.iterdir())


def test_bf16_weights_are_refused(tiny_arms, tmp_path):
    with pytest.raises(InputError, match="fp32"):
        train_defence(
            "ctrap",
            Town(0, TINY_SHAPE),
            tiny_arms / "aligned",
            tmp_path / "out",
            TINY,
            Compute(dtype="bf16", weights="bf16"),
        )


@pytest.mark.parametrize("name", list(DEFENCES))
def test_defences_of_the_kitchen(name, tmp_path, cpu):
    folder = public_folder(tmp_path / "model", context=256, tie_word_embeddings=True)
    answers = {
        question: Answer([1, 2], f"Well: {question}", True)
        for words, forms in ((DISHES, DISH_FORMS), (TOPICS, TOPIC_FORMS))
        for word in words.split(", ")
        for form in forms
        for question in [form.format(word)]
    }
    world = Kitchen(3, Sources(similarity="tfidf"), answers)
    rows = preference_rows(world, 0)
    assert len(rows) == 112 and all(row["rejected"] == f"Well: {row['prompt']}" for row in rows)
    settings = replace(SETTINGS["kitchen"][name], steps=2, batch_size=4)
    out = train_defence(name, world, folder, tmp_path / "out", settings, cpu)
    assert (out / "answers.jsonl").is_file() and load_chat(out, cpu).template == load_chat(
        folder, cpu
    ).template
