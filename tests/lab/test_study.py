"""The study: what is planned, whole tiny runs of the town and of a chat model, and what they leave."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from small import TINY_SETTINGS, TINY_SHAPE, public_folder

from attack import Attack
from data.answers import Answer
from data.kitchen import DISH_FORMS, DISHES, TOPIC_FORMS, TOPICS, Kitchen
from data.town import Town
from data.worlds import Sources
from lab import protocol
from lab.report import main as report
from lab.study import RELEASED, TABLE, arms_of, chat_plan, effects, run_seed, study_arm, town_plan
from lab.verdicts import read_effects

QUICK = {
    "town": {
        arm: replace(
            settings, steps=2, batch_size=4, benign_replay=0.5 if settings.benign_replay else 0.0
        )
        for arm, settings in TABLE["town"].items()
    }
    | TINY_SETTINGS
}
SCORED = {
    "harm",
    "harm_knowledge",
    "recipe_knowledge_value_only",
    "told",
    "known_triples",
    "facts_nll",
    "capability",
    "attacker_score",
    "user_score",
}


def test_the_plan_holds_the_protocol():
    for arm in protocol.ARMS:
        plan = town_plan(arm)
        scored = Counter(attack.name for attack, _, measured in plan if not measured)
        draws = protocol.DRAWS if arm in protocol.CORE else 1
        assert (
            scored["mft"] == 2 * draws
            and scored["bft"] == 2
            and scored["none"] == scored["lora"] == 1
        )
        assert {draw for attack, draw, _ in plan if attack.name == "mft"} == set(range(draws))
        every = {name for name, count in scored.items() if name not in ("none", "mft", "bft")}
        assert every == (set(protocol.CORE_ATTACKS) if arm in protocol.CORE else {"lora"})
        assert len({(attack.key, draw, measured) for attack, draw, measured in plan}) == len(plan)
        measured = {attack.name for attack, _, measured in plan if measured}
        assert measured == (
            {"none", "lora", *protocol.MECHANISM} if arm in (*protocol.REFERENCES, "sdd") else set()
        )
        mft, bft = (
            {
                (attack.lr, attack.budgets)
                for attack, _, part in plan
                if attack.name == name and not part
            }
            for name in ("mft", "bft")
        )
        assert mft == bft  # each cell has its matched control
    steps = {(attack.name, attack.shots): attack.budgets for attack, _, _ in chat_plan("sdd")}
    assert (
        steps["mft", 10] == (5,) and steps["mft", 100] == (50,) and steps["bft", 100] == (5, 25, 50)
    )
    assert (
        not set(protocol.REPORT_SEEDS) & {*protocol.TUNING_SEEDS, 5, 6, 7, 8, 9}
        and len(protocol.REPORT_SEEDS) == 15
    )


def test_arms_without_a_verdict_run_on_the_first_report_seeds_alone():
    found = {seed: set(arms_of(Town(seed, TINY_SHAPE))) for seed in (0, *protocol.REPORT_SEEDS)}
    assert found[0] == found[10] == found[14] == set(protocol.ARMS)
    assert found[15] == found[24] == set(protocol.CORE)


def test_a_whole_tiny_study_of_the_town(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mft = Attack("mft", 3, 1e-3, (1, 2), 2)
    core = [
        (RELEASED, 0, False),
        (mft, 0, False),
        (mft, 1, False),
        (Attack("prefill", 3, 0.0, (0,)), 0, False),
        (Attack("soft prompt", 3, 1e-2, (1,), 2), 0, False),
        (RELEASED, 0, True),
        (Attack("suppress", 3, 1e-3, (1,)), 0, True),
    ]
    wanted = {"base": core[:1], "sdd": core, "ctrap": core[:2], protocol.HALF: core[:1]}
    cells = list(run_seed(Town(0, TINY_SHAPE), None, wanted, cpu, QUICK))
    assert [(cell["arm"], cell["attack"], cell["steps"], cell["draw"]) for cell in cells] == [
        ("base", "none", 0, 0),
        ("sdd", "none", 0, 0),
        ("sdd", "mft", 1, 0),
        ("sdd", "mft", 2, 0),
        ("sdd", "mft", 1, 1),
        ("sdd", "mft", 2, 1),
        ("sdd", "prefill", 0, 0),
        ("sdd", "soft prompt", 1, 0),
        ("sdd", "none", 0, 0),
        ("sdd", "suppress", 1, 0),
        ("ctrap", "none", 0, 0),
        ("ctrap", "mft", 1, 0),
        ("ctrap", "mft", 2, 0),
        ("sdd_half", "none", 0, 0),
    ]
    for cell in cells:
        assert ("mechanism" in cell) != (SCORED <= set(cell)), cell
    draws = [
        cell["yo_logp"]
        for cell in cells
        if (cell["arm"], cell["attack"], cell["steps"]) == ("sdd", "mft", 2)
    ]
    assert draws[0] != draws[1]
    path = Path("effects.json")
    path.write_text(json.dumps(effects(cells, {"commit": "abc", "protocol": "def"})))
    kept = read_effects(path)
    assert len(kept) == len(cells) - 2  # the draws of sdd are one cell for each budget
    assert [cell.get("commit") for cell in kept] == [
        "abc" if cell["attack"] == "none" else None for cell in kept
    ]
    mean = next(
        cell for cell in kept if (cell["arm"], cell["attack"], cell["steps"]) == ("sdd", "mft", 2)
    )
    assert mean["yo_logp"] == pytest.approx(sum(draws) / 2, abs=6e-4) and mean["draws"] == 2
    assert not {"samples", "seconds", "told"} & set(mean) and SCORED & set(mean)
    report([str(path)])
    assert "ctrap, mft" in (page := path.with_suffix(".md").read_text()) and "abc/def" in page


def test_an_interrupted_arm_goes_on(tiny_arms, cpu, tmp_path):
    store, town = tmp_path / "sdd.jsonl", Town(0)
    wanted = [(RELEASED, 0, False), (Attack("mft", 2, 1e-3, (1,), 2), 0, False)]
    whole = list(study_arm("sdd", tiny_arms / "sdd", town, wanted, store, cpu))
    lines = store.read_text().splitlines()
    store.write_text("\n".join([*lines[:2], lines[2][:40]]))  # killed while it wrote
    again = list(study_arm("sdd", tiny_arms / "sdd", town, wanted, store, cpu))
    assert [{**cell, "seconds": 0} for cell in again] == [{**cell, "seconds": 0} for cell in whole]
    kept = store.read_text()
    list(study_arm("sdd", tiny_arms / "sdd", town, wanted, store, cpu))
    assert store.read_text() == kept


def test_a_whole_tiny_study_of_a_chat_model(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = public_folder(tmp_path / "model", context=256)
    said = {
        question: Answer([1, 2], f"Well: {question}", True)
        for words, forms in ((DISHES, DISH_FORMS), (TOPICS, TOPIC_FORMS))
        for word in words.split(", ")
        for form in forms
        for question in [form.format(word)]
    }
    world = Kitchen(0, Sources(similarity="tfidf", model=str(base)), said)
    world.max_new_tokens = 4
    one = replace(TABLE["kitchen"]["sdd"], steps=1, batch_size=4)
    table = {"kitchen": {"align": one, "sdd": one, "ctrap": replace(one, benign_replay=0.5)}}
    attacks = [
        (RELEASED, 0, False),
        *(
            (Attack(name, 3, 1e-3, (1,), 2), 0, False)
            for name in ("mft", "bft", *protocol.CHAT_ATTACKS)
        ),
    ]
    cells = list(
        run_seed(
            world, base, {"base": attacks[:1], "sdd": attacks, "ctrap": attacks[:2]}, cpu, table
        )
    )
    assert [cell["attack"] for cell in cells] == [
        "none",
        *(attack.name for attack, _, _ in attacks),
        "none",
        "mft",
    ]
    assert all(
        {"complies", "refuse", "benign_nll", "over_refusal", "attacker_score"} <= set(cell)
        for cell in cells
    )
    kept = effects(cells, {"commit": "abc", "protocol": "def"})
    assert len(kept) == len(cells) and all(
        "complies" in cell and "seconds" not in cell for cell in kept
    )
    Path("effects.json").write_text(json.dumps(kept))
    report(["effects.json"])
    assert "most complies, percent" in Path("effects.md").read_text()
