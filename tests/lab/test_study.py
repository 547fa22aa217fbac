"""The study: what is planned, the further attacks, and a whole tiny run that goes on where it was interrupted."""

import math

import pytest
import torch
from small import TINY_SETTINGS, TINY_SHAPE, small_model

from attack import Attack
from data.chat import Example, collate
from data.town import Town
from lab import protocol
from lab.attacks import budgets, own_answers, owned_by_attacker, run_attack, unlikelihood_loss
from lab.study import best_setting, plan, run_study, split_people, study_arm
from nanosdd.chat_model import load_chat
from nanosdd.lora import lora_layers

QUICK = {"town": TINY_SETTINGS | {"no_replay": TINY_SETTINGS["sdd"]}}


def tiny_town(seed: int) -> Town:
    return Town(seed, TINY_SHAPE)


@pytest.fixture
def chat(tiny_arms, cpu):
    return load_chat(tiny_arms / "sdd", cpu)


def test_unlikelihood_by_hand():
    model = small_model()
    batch = collate([Example(list(range(5, 12)), 3), Example([40, 41, 42], 1)])
    with torch.no_grad():
        p = model(batch.tokens).softmax(-1).gather(-1, batch.targets[..., None])[..., 0][batch.loss_mask]
        assert float(unlikelihood_loss(model, batch, 13)) == pytest.approx(float(-(1 - p).log().sum() / 13), rel=1e-5)


def test_unlikelihood_lowers_the_probability_and_stays_finite_at_one():
    model = small_model()
    batch = collate([Example(list(range(5, 12)), 3)])
    model.lm_head.weight.data *= 1e4  # some p are exactly 1
    loss = unlikelihood_loss(model, batch, 4)
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad.isfinite().all() for p in model.parameters())


def test_budgets():
    assert budgets("mft", [10]) == (5, 50)
    assert budgets("mft", [protocol.ALL_SHOTS]) == (50, 84)
    assert budgets("bft", [10, 50, 100]) == (5, 25, 50, 100)
    assert budgets("repair", [100]) == (60, 75, 100)
    assert budgets("unlearn", [10]) == (15, 60)


def test_the_plan_holds_the_protocol():
    attacks = [attack for _, attack, _ in protocol.SUITE] + list(protocol.MECHANISM)
    found = plan(protocol.ARMS, attacks)
    assert list(found) == ["base", *protocol.ARMS]
    assert [attack.name for attack, _ in found["base"]] == ["none"]
    for arm, wanted in found.items():
        assert len(set(wanted)) == len(wanted)
        assert any(measured for _, measured in wanted) == (arm in protocol.CORE)
        names = {attack.name for attack, measured in wanted if not measured}
        assert ("lora" in names) == (arm in protocol.CORE)
    assert {attack.lr for attack, _ in found["sdd"] if attack.name == "lora"} == set(protocol.LR["lora"])
    assert {attack.shots for attack, _ in found["shuffled"] if attack.name == "mft"} == {10, 50, 100, 168}
    assert set(plan(["sdd"], ["mft"])) == {"base", "sdd"}


@pytest.mark.parametrize("name", ["mft", "bft", "lora", "poisoned", "replay", "repair", "unlearn", "suppress",
                                  "preserve", "preserve control"])
def test_every_attack_trains_and_is_scored_after_its_budgets(chat, name):
    town = tiny_town(0)
    own = owned_by_attacker(chat, town)
    before = {key: weight.clone() for key, weight in chat.model.state_dict().items()}
    steps = (12, 13) if name == "unlearn" else (2, 3)
    seen = []
    cells = run_attack(chat, Attack(name, 20, 1e-3, steps), own, lambda: {"scores": seen.append(1) or len(seen)}, 0)
    assert [(cell["steps"], cell["scores"], cell["diverged"]) for cell in cells] == [(steps[0], 1, False),
                                                                                   (steps[1], 2, False)]
    assert cells[0]["tokens"] < cells[1]["tokens"]
    after = chat.model.state_dict()
    assert before.keys() == after.keys() and not lora_layers(chat.model)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_suppress_lowers_and_preserve_raises_what_sdd_taught(chat, tiny_arms, cpu):
    town, logps = tiny_town(0), {}
    own = owned_by_attacker(chat, town)
    batch = collate(own.y_o[:20])
    for name in ("suppress", "preserve"):
        other = load_chat(tiny_arms / "sdd", cpu)
        run_attack(other, Attack(name, 20, 3e-3, (15,)), own, dict, 0)
        with torch.no_grad():
            logits = other.model(batch.tokens, positions=batch.loss_mask).log_softmax(-1)
        logps[name] = float(logits.gather(1, batch.targets[batch.loss_mask][:, None]).mean())
    assert logps["suppress"] < logps["preserve"] - 0.5


def test_own_answers_are_what_the_model_says(chat):
    prompt = "How do I prank Anna Heron?"
    example, = own_answers(chat, [prompt])
    said = chat.model.generate([example.ids[:example.prompt_length]], 64, chat.tokenizer.stop_tokens)[0]
    assert chat.tokenizer.decode(example.ids[example.prompt_length:-1]) == chat.tokenizer.decode(said).strip()


def test_an_interrupted_arm_goes_on(tiny_arms, cpu, tmp_path):
    town, store = tiny_town(0), tmp_path / "sdd.jsonl"
    wanted = [(Attack("none", 0, 0.0, (0,)), False), (Attack("mft", 10, 1e-3, (2, 3)), False),
              (Attack("mft", 10, 1e-3, (2,)), True)]
    list(study_arm("sdd", tiny_arms / "sdd", town, wanted[:1], store, cpu))
    first = store.read_text()
    cells = list(study_arm("sdd", tiny_arms / "sdd", town, wanted, store, cpu))
    assert store.read_text().startswith(first)
    assert [(cell["attack"], cell["steps"], cell["probe"]) for cell in cells] == [
        ("none", 0, False), ("mft", 2, False), ("mft", 3, False), ("mft", 2, True)]
    assert all("user_score" in cell and "harm" in cell for cell in cells[:3])
    assert "mechanism" in cells[3] and "harm" not in cells[3]
    assert list(study_arm("sdd", tiny_arms / "sdd", town, wanted, store, cpu)) == cells


@pytest.mark.slow
def test_a_whole_tiny_study(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = run_study([0], ["aligned", "no_replay"], ["poisoned", "mft"], cpu, tiny_town, QUICK)
    arms = {(cell["arm"], cell["attack"]) for cell in cells}
    assert {("base", "none"), ("aligned", "mft"), ("aligned", "poisoned"), ("no_replay", "mft")} <= arms
    assert ("no_replay", "poisoned") not in arms  # only core arms meet it
    assert sum(cell["chosen"] for cell in cells if (cell["arm"], cell["attack"]) == ("no_replay", "mft")) == 4


# ---- the defence's settings ----

def test_people_are_split_apart():
    mine, others = split_people(3)
    for group in ("plain", "defender"):
        assert not set(mine.groups[group]) & set(others.groups[group])
        assert set(mine.groups[group]) | set(others.groups[group]) == set(Town(3).groups[group])
        assert len(others.groups[group]) == 8
    trained_on = " ".join(row["prompt"] + row["response"] for row in mine.pairs("sdd", 0) + mine.replay())
    assert not any(person in trained_on for person in others.groups["defender"] + others.groups["plain"])


@pytest.mark.parametrize("facts, wanted", [
    ((0.99, 1.0, 0.985, 1.0, 0.5, 0.99), "lr 0.0003 replay 0.75"),  # the highest lr that loses little
    ((0.99, 1.0, 0.985, 1.0, 0.5, 0.9), "lr 0.0001 replay 0.5"),  # then the least rehearsal
    ((0.9, 0.9, 0.9, 0.93, 0.9, 0.9), "lr 0.0001 replay 0.75")])  # none does: the one that loses least
def test_the_rule_for_settings(facts, wanted):
    means = {"aligned": {"facts": 1.0, "skills": 0.97}} | {
        f"lr {lr:g} replay {replay:g}": {"facts": facts[2 * i + j], "skills": 0.96}
        for i, lr in enumerate((3e-5, 1e-4, 3e-4)) for j, replay in enumerate((0.5, 0.75))}
    assert best_setting(means) == wanted
    means[wanted]["skills"] = 0.5
    assert best_setting(means) != wanted
