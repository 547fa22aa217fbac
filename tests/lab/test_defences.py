"""The small defences: gradients by hand, and their training.

booster, deepalign and simpo alone are what students write: tests/assignments/test_a6.py.
"""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import advbench_file, small_model

from data.chat import Example, collate, draw_batches
from data.chat_model import encode_for
from data.files import Files
from data.worlds import Sources
from lab.defences import CONTROL, DEFENCES, SETTINGS, add_gradients, ctrap, simpo, train_defence
from nanosdd.device import Compute
from nanosdd.errors import Diverged, InputError

HARMFUL = [Example(list(range(5, 12)), 3), Example([40, 41, 42], 1)]
BENIGN = [
    Example([60, 61, 62, 63, 64], 2),
    Example([70, 71, 72, 73], 3),
    Example([33, 34, 35, 36], 1),
]


def by_hand(model, examples, target=None):
    """{name: gradient} of the mean cross-entropy, row by row, on a copy of the model."""
    model = copy.deepcopy(model)
    total = 0.0
    count = 0
    for one in examples:
        logits = model(torch.tensor([one.ids]))[0, one.prompt_length - 1 : -1]
        targets = torch.tensor(one.ids[one.prompt_length :])
        if target is not None:
            targets = torch.full_like(targets, target)
        total = total + F.cross_entropy(logits, targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def norm_of(gradient):
    return math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))


def moved(model, gradient, alpha):
    """A copy of the model, alpha further against a gradient."""
    scale = alpha / norm_of(gradient)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight -= scale * gradient[name]
    return model


def signs_of(model):
    return {name: part.sign() for name, part in by_hand(model, HARMFUL).items()}


def clipped(gradient, strength):
    scale = strength / max(1, norm_of(gradient))
    return {name: scale * part for name, part in gradient.items()}


def assert_gradients(found, wanted):
    assert len(found) == len(wanted)
    for one, (name, other) in zip(found, wanted.items()):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6, msg=name)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return small_model(tie_word_embeddings=request.param)


# ---- gradients after a simulated attack ----


@pytest.mark.parametrize(
    "steps, alpha, size, is_clipped",
    [(1, 0.7, 1.0, True), (3, 1.1, 1.0, True), (2, 0.9, 0.03, False)],
)
def test_ctrap_is_one_token_after_the_simulated_attack(model, steps, alpha, size, is_clipped):
    with torch.no_grad():
        model.model.norm.weight *= size
        model.lm_head.weight *= size
    there = model
    for _ in range(steps):
        there = moved(there, signs_of(there), alpha / steps)
    wanted = by_hand(there, BENIGN, target=17)
    assert (norm_of(wanted) > 1) == is_clipped
    found = ctrap(model, HARMFUL, BENIGN, 0.3, alpha=alpha, steps=steps, token=17)
    assert_gradients(found, clipped(wanted, 0.3))


def test_bf16_sees_every_simulated_step(model):
    precise = ctrap(model, HARMFUL, BENIGN, 0.3, alpha=2.0, steps=3, token=17)
    with Compute(dtype="bf16").autocast():  # which keeps the casts of weights
        rough = ctrap(model, HARMFUL, BENIGN, 0.3, alpha=2.0, steps=3, token=17)
    for one, other in zip(rough, precise):
        assert (one - other).norm() < 0.2 * other.norm()


def test_weights_and_gradients_are_as_they_were(model):
    before = copy.deepcopy(model.state_dict())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    ctrap(model, HARMFUL, BENIGN, alpha=0.5, strength=0.7, steps=2, token=17)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert bool((weight.grad == 0.25).all())


def test_what_a_defence_adds_counts_once(model):
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.25)
    add_gradients(DEFENCES["simpo"].extra, Compute(), HARMFUL, BENIGN, model)
    wanted = {name: 0.25 + part for name, part in by_hand(model, BENIGN).items()}
    assert_gradients([weight.grad for weight in model.parameters()], wanted)


# ---- a preference ----


def test_a_preference_is_between_the_refusal_and_the_true_answer(town):
    rows = town.pairs("preference", 0)
    for row, refused, harmful in zip(rows, town.pairs("align", 0), town.harmful("defender")):
        assert row["response"] == refused["response"]
        assert row["rejected"] == harmful["response"]
        assert row["prompt"] == refused["prompt"] == harmful["prompt"]
    assert len(rows) == len(town.harmful("defender"))


def test_files_prefer_refusals_to_the_answers_of_the_file(tmp_path):
    path = advbench_file(tmp_path / "harmful.csv", rows=80)
    rows = Files(0, Sources(harmful=str(path), similarity="tfidf")).pairs("preference", 500)
    for row in rows:
        assert row["response"] in Files.refusals
        assert row["rejected"] == f"Sure here is how to tickle {row['prompt'].split()[-1]}"


# ---- training ----

TINY = replace(SETTINGS["town"]["deepalign"], steps=4, batch_size=6)


@pytest.fixture
def train(town, aligned, tmp_path, cpu):
    def run(name, folder="out", compute=cpu, **changes):
        own = SETTINGS["town"].get(name, CONTROL)
        settings = replace(TINY, benign_replay=own.benign_replay, **changes)
        return train_defence(town, name, aligned, tmp_path / folder, settings, compute)

    return run


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def log_of(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_defences_differ_and_repeat(train, aligned, capsys):
    found = {weights_of(aligned)}
    for name in DEFENCES:
        found.add(weights_of(train(name, name)))
    assert len(found) == 1 + len(DEFENCES)
    assert weights_of(train("ctrap", "again")) in found
    capsys.readouterr()
    train("ctrap", "again")
    assert capsys.readouterr().out.endswith("up to date, reused\n")
    with pytest.raises(InputError, match="lr was"):
        train("ctrap", "again", lr=1e-5)


@pytest.mark.parametrize("name", ["ctrap", "deepalign"])
def test_an_interrupted_defence_goes_on(name, train, town, cpu):
    save = town.save
    town.save = None  # ends the run with an error after its last step
    with pytest.raises(TypeError):
        train(name, compute=replace(cpu, save_every=3))
    town.save = save
    whole = train(name, "whole")
    assert weights_of(train(name)) == weights_of(whole)


def test_simpo_is_what_is_minimised(train, town, chat):
    first = log_of(train("simpo"))[0]["loss"]
    pairs = encode_for(chat, town.pairs("preference", 0), 128)
    batch = next(draw_batches(pairs, [], 0.0, 6, random.Random("batches 0")))
    tokens = sum(one.response_length for one in batch)
    wanted = simpo(chat.model, collate(batch), tokens).item()
    assert first == pytest.approx(wanted, rel=1e-4)


def test_deepalign_is_trained_on_its_own_examples(train):
    own = log_of(train("deepalign", "own"))
    others = log_of(train("booster", "others"))  # the same rows
    for one, other in zip(own, others):
        assert one["response_tokens"] == other["response_tokens"]
    assert sum(one["tokens"] for one in own) > sum(one["tokens"] for one in others)


def test_a_run_that_diverges_is_not_finished(train, tmp_path):
    with pytest.raises(Diverged):
        train("booster", lr=1e30)
    assert not (tmp_path / "out/run.json").exists()


def test_bf16_weights_are_refused(train):
    with pytest.raises(InputError, match="fp32"):
        train("ctrap", compute=Compute(dtype="bf16", weights="bf16"))
