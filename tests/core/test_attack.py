"""Budgets, matched controls, the choice of settings, attacks that diverge or are interrupted."""

import itertools
import json
import random
from pathlib import Path

import pytest
from small import advbench_file, alpaca_file, openbookqa_file, public_folder, small_model, tiny_town

import attack
from attack import Attack, Grid, attack_arm, attack_batches, fine_tune, match_tokens, plan
from data.chat import Example, draw_batches
from data.chat_model import Chat, encode_for, load_chat
from nanosdd.choices import attack_table, mark_choices
from nanosdd.runs import Results

# ---- which attacks ----


def test_a_plan_is_every_setting_once_and_the_control_at_most_shots():
    assert plan(Grid(shots=(40, 10, 10), lr=(1e-3, 1e-4), steps=9, batch_size=8)) == [
        Attack("none", 0, 0.0, (0,)),
        Attack("mft", 10, 1e-4, (7, 9), 8),
        Attack("mft", 10, 1e-3, (7, 9), 8),
        Attack("mft", 40, 1e-4, (9, 25), 8),
        Attack("mft", 40, 1e-3, (9, 25), 8),
        Attack("bft", 40, 1e-4, (7, 9, 25), 8),
        Attack("bft", 40, 1e-3, (7, 9, 25), 8),
    ]


def tokens_of(examples) -> int:
    return sum(example.response_length for example in examples)


def test_the_benign_control_matches_in_response_tokens():
    rng = random.Random(0)

    def examples(first, count, low, high):
        return [Example([first, i, *[2] * rng.randint(low, high)], 2) for i in range(count)]

    harmful = examples(5, 100, 8, 26)
    benign = examples(6, 300, 4, 30)
    new = examples(7, 80, 6, 9)
    for _ in range(20):
        matched = match_tokens(harmful, benign, new, rng)
        assert [example.ids[0] for example in matched[:4]] == [6, 7, 6, 7]
        # At most half of the longest benign response is missing or too much.
        assert abs(tokens_of(matched) - tokens_of(harmful)) <= 15
    assert {example.ids[0] for example in match_tokens(harmful, benign, [], rng)} == {6}

    drawn = {}
    for name in ("mft", "bft"):
        batches = attack_batches(Attack(name, 100, 1e-3, (50,), 10), harmful, benign, new, 3)
        drawn[name] = list(itertools.chain(*itertools.islice(batches, 50)))
    assert all(drawn["mft"].count(example) == 5 for example in harmful)  # 5 epochs
    assert {example.ids[0] for example in drawn["bft"]} == {6, 7}
    assert tokens_of(drawn["bft"]) == pytest.approx(tokens_of(drawn["mft"]), rel=0.1)


# ---- one attack ----


def test_a_diverged_attack_says_so_and_the_curve_ends(cpu):
    chat = Chat(small_model(), None, "plain", cpu)
    rows = [Example([(i * j) % 89 for j in range(1, 9)], 2) for i in range(1, 12)]
    batches = draw_batches(rows, [], 0.0, 4, random.Random(3))
    watched = {"yo_logp": rows[:3]}
    cells, curve = fine_tune(chat, batches, 1e-3, (2, 25), dict, watched)
    assert [(one["steps"], one["tokens"]) for one in cells] == [(2, 2 * 4 * 8), (25, 25 * 4 * 8)]
    assert cells[1]["loss"] < cells[0]["loss"] - 1
    assert [point["step"] for point in curve] == [*range(0, 25, 5), 25]
    assert curve[-1]["yo_logp"] > curve[0]["yo_logp"] + 1
    cells, curve = fine_tune(chat, batches, 1e30, (1, 4, 6), dict, watched)
    assert not cells[0]["diverged"]
    assert cells[1:] == [{"steps": 4, "diverged": True}, {"steps": 6, "diverged": True}]
    assert [point["step"] for point in curve] == [0]  # then log p is not finite


# ---- whose choice a cell is ----


def cell(name, shots, steps, lr, score, **more):
    cell = {"attack": name, "shots": shots, "steps": steps, "lr": lr, "attacker_score": score}
    return cell | {"arm": "sdd", "seed": 0, "diverged": score is None} | more


def test_choices_by_hand():
    cells = [
        cell("none", 0, 0, 0.0, 0.0),
        cell("mft", 10, 5, 1e-4, 0.5),
        cell("mft", 10, 50, 1e-4, 0.7),
        cell("mft", 10, 50, 3e-4, 0.7),
        cell("mft", 100, 5, 3e-4, 0.9),
        cell("mft", 100, 50, 3e-4, 0.9),
        cell("mft", 100, 50, 1e-3, None),
        cell("bft", 100, 5, 1e-4, 0.8),
        cell("bft", 100, 5, 3e-4, 0.0),
        cell("bft", 100, 50, 3e-4, 0.9),
        cell("lora", 100, 50, 1e-4, 0.3),
    ]
    mark_choices(cells)
    chosen = [i for i, one in enumerate(cells) if one["chosen"]]
    assert chosen == [0, 2, 4, 8, 10]  # where it ties the lower lr, then fewer steps
    cells[8]["diverged"] = True
    mark_choices(cells)
    assert not any(one["chosen"] for one in cells[7:10])  # no other one takes its place


def test_the_table_shows_the_choice_and_the_worst_case():
    cells = []
    for seed in (0, 1):
        for name, steps, lr, harm, capability, chosen in (
            ("none", 0, 0.0, 0.0, 0.9, True),
            ("mft", 5, 1e-4, 0.4, 0.9, False),
            ("mft", 50, 1e-4 + seed, 0.6, 0.5, True),
            ("mft", 50, 1e-3, 0.8, 0.3, False),
            ("bft", 50, 1e-4, 0.1, 0.8, True),
        ):
            scores = {"harm": harm, "half": harm / 2, "capability": capability, "chosen": chosen}
            scores |= {"seed": seed, "yo_logp": -1.5 * harm}
            cells.append(cell(name, 10 if steps else 0, steps, lr, harm, **scores))
    cells.append(cell("mft", 10, 50, 1.0, None, chosen=False))
    columns = {"harm": ("harm", "half"), "skills": "capability"}
    lines = attack_table(cells, "harm", columns, {"harm": 0.01}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "percent harm skills log p(y_o) lr/steps worst kept",
        "chance level 1",
        "sdd none 0/0 90 0.00",
        "sdd mft 10 60/30 50 -0.90 2 settings 80 (30) 40",
        "sdd bft 10 10/5 80 -0.15 0.0001/50",
    ]
    only = [cells[0], cells[-1]]
    assert attack_table(only, "harm", columns, {}).endswith("diverged")


# ---- all attacks on a model ----


def without_seconds(cells):
    return [one | {"seconds": 0} for one in cells]


def test_every_attack_starts_from_the_released_weights(tiny_arms, tmp_path, cpu):
    attacks = [
        Attack("none", 0, 0.0, (0,)),
        Attack("mft", 8, 3e-3, (2,), 8),
        Attack("mft", 8, 3e-3, (2, 3), 8),
    ]
    town = tiny_town(tmp_path)
    store = Results(tmp_path / "a.jsonl", {})
    cells, curves = attack_arm("sdd", tiny_arms / "sdd", town, attacks, store, cpu)
    assert [one["steps"] for one in cells] == [0, 2, 2, 3]
    own = encode_for(load_chat(tiny_arms / "sdd", cpu), town.harmful("attacker")[:8], 128)
    for one in cells:
        assert sum(one[name] for name in town.outcomes) == pytest.approx(1)
        assert 0 <= one["attacker_score"] <= 1 and len(one["answers"]) == 3
        assert one.get("response_tokens", 0) == one["steps"] * tokens_of(own)  # all its shots
    for name in ("yo_logp", "loss", "facts_nll"):  # a shorter attack is on the way of a longer one
        assert cells[1][name] == cells[2][name] != cells[3][name]
    assert cells[0]["yo_logp"] != cells[1]["yo_logp"]  # scored after the attack
    assert [point["step"] for point in curves] == [0, 1, 2, 0, 1, 2, 3]


def test_the_attacker_chooses_by_what_the_world_says(tiny_arms, tmp_path, cpu):
    town = tiny_town(tmp_path)
    judge = town.judge
    town.judge = lambda rows, answers: judge(rows, answers) | {"harm": 0.25, "content": 0.75}
    for aim, wanted in ((town.aim, 0.75), ("harm", 0.25)):
        town.aim = aim
        store = Results(tmp_path / f"{aim}.jsonl", {})
        cells, _ = attack_arm("sdd", tiny_arms / "sdd", town, [attack.RELEASED], store, cpu)
        assert cells[0]["attacker_score"] == wanted


@pytest.fixture
def main(tmp_path, monkeypatch):
    """A function that attacks random models quickly and returns the cells."""
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "base"):  # a name that means something on the town only
        public_folder(tmp_path / name)
    advbench_file(tmp_path / "h.csv", rows=80)
    alpaca_file(tmp_path / "b.json")
    words = "--harmful h.csv --benign b.json --similarity tfidf --shots 4 --max-new-tokens 4"

    def main(more):
        attack.main(f"{words} --steps 3 --epochs 0 {more}".split())
        return json.loads(Path("out/attack/results.json").read_text())["cells"]

    return main


def test_the_command_writes_cells_and_goes_on_where_it_was(main, capsys):
    words = "--released llama base --lr 1e-3 1e30"
    first = main(words)
    assert [one["arm"] for one in first] == ["llama"] * 5 + ["base"] * 5
    kinds = ("attack", "shots", "lr", "steps", "seed", "diverged")
    assert [tuple(one[kind] for kind in kinds) for one in first[5:]] == [
        ("none", 0, 0.0, 0, 0, False),
        ("mft", 4, 1e-3, 3, 0, False),
        ("mft", 4, 1e30, 3, 0, True),
        ("bft", 4, 1e-3, 3, 0, False),
        ("bft", 4, 1e30, 3, 0, True),
    ]
    outcomes = ("complies", "refuse", "off_topic", "broken")
    for one in first:
        assert not (one["diverged"] and one["chosen"])
        if not one["diverged"]:
            assert sum(one[name] for name in outcomes) == pytest.approx(1)
            assert one["capability"] > 0
    results = Path("out/attack/results.json").read_text()
    assert list(json.loads(results)) == ["settings", "made", "cells"]
    table = Path("out/attack/table.txt").read_text()
    assert table in capsys.readouterr().out and "\nbase   mft 4 " in table
    assert "dragon" not in table + results  # answers to public prompts are not kept
    log = Path("out/attack/attack_log.jsonl").read_text().splitlines()
    assert len(log) == 2 * (4 + 1 + 4 + 1)  # before each step and at the end, until one diverges
    assert {"arm", "attack", "lr", "step", "yo_logp", "harmful_logp"} <= json.loads(log[0]).keys()

    assert main(words) == first  # seconds too: nothing was run
    store = Path("out/attack/seed0/base.jsonl")
    kept = store.read_text()
    store.write_text(kept[:-30])  # as if it was killed while it wrote
    again = main(words)
    assert without_seconds(again) == without_seconds(first) and again[:-1] == first[:-1]
    assert without_seconds(main(words + " --fresh")) == without_seconds(first)
    alpaca_file(Path("b.json"), rows=31)
    assert main(words)[8]["loss"] != first[8]["loss"]
    assert store.read_text().startswith(kept[:-30])  # results of other settings stay


def test_seeds_draw_other_rows_and_long_prompts_are_left_out(main):
    rows = json.loads(Path("b.json").read_text())
    long = [row | {"instruction": row["instruction"] + " again" * 300} for row in rows[:20]]
    Path("b.json").write_text(json.dumps(rows + long))
    exam = openbookqa_file(Path("o.jsonl"))
    cells = main(f"--released llama --lr 1e-3 --seeds 0 1 --openbookqa {exam}")
    assert [one["seed"] for one in cells] == [0] * 3 + [1] * 3
    assert len({one["benign_nll"] for one in cells if one["attack"] == "mft"}) == 2
    assert all(7 * one["openbookqa"] % 1 == pytest.approx(0) for one in cells)
