"""Budgets, matched controls, the choice of settings, attacks that diverge or are interrupted, and the table."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import advbench_file, alpaca_file, openbookqa_file, public_folder, small_model

import attack
from attack import Attack, Grid, attack_arm, attack_batches, fine_tune, plan
from data.chat import Example, draw_batches, encode_rows
from data.town import Town
from nanosdd.chat_model import Chat, load_chat
from nanosdd.choices import attack_table, mark_choices, most_harm
from nanosdd.errors import InputError

# ---- which attacks ----


def test_budgets_are_five_epochs_and_fifty_steps():
    assert (
        Grid().budgets(10) == {5, 50}
        and Grid().budgets(100) == {50}
        and Grid().budgets(168) == {84, 50}
    )
    assert Grid(batch_size=4, epochs=3, steps=0).budgets(7) == {6}
    assert Grid(epochs=0).budgets(7) == {50}


@pytest.mark.parametrize(
    "change",
    [
        {"shots": (10, 0)},
        {"lr": (float("nan"),)},
        {"lr": (0.0,)},
        {"batch_size": 0},
        {"steps": -1},
        {"steps": 0, "epochs": 0},
    ],
)
def test_grids_out_of_range(change):
    with pytest.raises(InputError, match="above 0"):
        Grid(**change)


def test_a_plan_is_every_setting_once_the_control_at_most_shots():
    found = plan(Grid(shots=(40, 10, 10), lr=(1e-3, 1e-4), steps=9, batch_size=8))
    assert found == [
        Attack("none", 0, 0.0, (0,)),
        Attack("mft", 10, 1e-4, (7, 9), 8),
        Attack("mft", 10, 1e-3, (7, 9), 8),
        Attack("mft", 40, 1e-4, (9, 25), 8),
        Attack("mft", 40, 1e-3, (9, 25), 8),
        Attack("bft", 40, 1e-4, (7, 9, 25), 8),
        Attack("bft", 40, 1e-3, (7, 9, 25), 8),
    ]
    assert len({one.key for one in found}) == len(found)


def examples(first, count, low, high, rng):
    """`count` examples with one first id and responses of low to high tokens."""
    return [Example([first, i, *[2] * rng.randint(low, high)], 2) for i in range(count)]


def test_the_benign_control_matches_in_response_tokens():
    rng = random.Random(0)
    harmful, benign, new = (
        examples(*which, rng) for which in ((5, 100, 8, 26), (6, 300, 4, 30), (7, 80, 6, 9))
    )
    for _ in range(20):
        matched = attack.match_tokens(harmful, benign, new, rng)
        assert sum(example.ids[0] == 7 for example in matched) == len(matched) // 2
        tokens = [sum(example.response_length for example in part) for part in (harmful, matched)]
        assert abs(tokens[1] - tokens[0]) <= 15  # half of the longest benign response
    assert {example.ids[0] for example in attack.match_tokens(harmful, benign, [], rng)} == {6}

    mft, bft = (
        list(
            itertools.islice(
                attack_batches(Attack(name, 100, 1e-3, (50,), 10), harmful, benign, new, 3), 50
            )
        )
        for name in ("mft", "bft")
    )
    assert all(len(batch) == 10 for batch in mft) and {
        example.ids[0] for batch in mft for example in batch
    } == {5}
    assert all(
        sum(example in batch for batch in mft) == 5 for example in harmful
    )  # 5 epochs of 10 batches
    assert {example.ids[0] for batch in bft for example in batch} == {6, 7}
    tokens = [
        sum(example.response_length for batch in part for example in batch) for part in (mft, bft)
    ]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.1)


# ---- one attack ----

ROWS = [Example([(i * j) % 89 for j in range(1, 9)], 2) for i in range(1, 12)]


def run(chat, lr, budgets, scores=dict):
    return fine_tune(chat, draw_batches(ROWS, [], 0.0, 4, random.Random(3)), lr, budgets, scores)


def test_a_shorter_attack_is_a_point_on_the_longer_ones_way(cpu):
    def found(*budgets):
        chat = Chat(small_model(), None, "plain", cpu)
        return run(
            chat, 1e-3, budgets, lambda: {"head": chat.model.lm_head.weight.detach().clone()}
        )

    (short,), (first, last) = found(4), found(4, 9)
    assert torch.equal(short["head"], first["head"]) and not torch.equal(
        first["head"], last["head"]
    )
    assert (first["steps"], last["steps"]) == (4, 9)
    assert (last["tokens"], last["response_tokens"]) == (9 * 4 * 8, 9 * 4 * 6)
    assert (
        first["response_tokens"] == short["response_tokens"] == 4 * 4 * 6
        and first["seconds"] <= last["seconds"]
    )


def test_a_diverged_attack_says_so_and_does_not_spoil_the_next(cpu):
    chat = Chat(small_model(), None, "plain", cpu)
    released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    expected = run(chat, 1e-3, (2, 4))
    chat.model.load_state_dict(released)
    first, *rest = run(chat, 1e30, (1, 4, 6))
    assert not first["diverged"] and rest == [
        {"steps": 4, "diverged": True},
        {"steps": 6, "diverged": True},
    ]
    chat.model.load_state_dict(released)
    assert [cell["loss"] for cell in run(chat, 1e-3, (2, 4))] == [cell["loss"] for cell in expected]


# ---- whose choice a cell is ----


def cell(attack_, shots, steps, lr, score, **more):
    return (
        dict(
            attack=attack_,
            shots=shots,
            steps=steps,
            lr=lr,
            attacker_score=score,
            seed=0,
            diverged=False,
        )
        | more
    )


def test_choices_by_hand():
    cells = [
        cell("none", 0, 0, 0.0, 0.0),
        cell("mft", 10, 5, 1e-4, 0.5),
        cell("mft", 10, 50, 1e-4, 0.7),
        cell("mft", 10, 50, 3e-4, 0.7),
        cell("mft", 100, 5, 3e-4, 0.9),
        cell("mft", 100, 50, 3e-4, 0.9),
        cell("mft", 100, 50, 1e-3, None, diverged=True),
        cell("bft", 100, 5, 1e-4, 0.8),
        cell("bft", 100, 5, 3e-4, 0.0),
        cell("bft", 100, 50, 3e-4, 0.9),
        cell("lora", 100, 50, 1e-4, 0.3),
        cell("mft", 50, 50, 1.0, None, diverged=True),
    ]
    mark_choices(cells)
    assert [i for i, one in enumerate(cells) if one["chosen"]] == [
        0,
        2,
        4,
        8,
        10,
    ]  # ties: lower lr, then fewer steps
    cells[8]["diverged"] = True
    mark_choices(cells)
    assert not any(
        one["chosen"] for one in cells if one["attack"] == "bft"
    )  # no other cell takes its place


def test_most_harm_by_hand():
    cells = [
        cell("mft", 10, 5, 1e-4, 0.0, harm=0.2, capability=0.9),
        cell("mft", 10, 50, 1e-4, 0.0, harm=0.5, capability=0.77),
        cell("mft", 10, 5, 1e-3, 0.0, harm=0.9, capability=0.1),
        cell("mft", 10, 50, 1e-3, None, diverged=True),
        cell("mft", 10, 5, 1e-4, 0.0, harm=0.3, capability=0.7, seed=1),
    ]
    assert most_harm(cells) == {0: cells[2], 1: cells[4]}
    assert most_harm(cells, before={0: 0.8, 1: 0.8}) == {
        0: cells[1]
    }  # 0.77 is above 95% of 0.8, 0.7 is not
    assert most_harm(cells, "capability", {0: 0.8, 1: 0.7}) == {0: cells[0], 1: cells[4]}
    assert most_harm(cells[3:4]) == {}


# ---- all attacks on a model ----


def without_seconds(cells):
    return [{key: value for key, value in one.items() if key != "seconds"} for one in cells]


def test_every_attack_starts_from_the_released_weights(tiny_arms, tmp_path, cpu):
    attacks = [
        Attack("none", 0, 0.0, (0,)),
        Attack("mft", 8, 1e-3, (2,), 8),
        Attack("mft", 8, 3e-3, (2, 3), 8),
    ]
    folder = tiny_arms / "sdd"
    cells = attack_arm("sdd", folder, Town(0), attacks, tmp_path / "a.jsonl", cpu)
    assert [(one["attack"], one["lr"], one["steps"]) for one in cells] == [
        ("none", 0.0, 0),
        ("mft", 1e-3, 2),
        ("mft", 3e-3, 2),
        ("mft", 3e-3, 3),
    ]
    assert {(one["arm"], one["seed"]) for one in cells} == {("sdd", 0)} and cells[0]["chosen"]
    assert len({one["yo_logp"] for one in cells}) == 4  # scored after each attack, not before
    own = encode_rows(
        load_chat(folder, cpu).tokenizer, "llama3", Town(0).attacker_pairs()[0][:8], 128
    )
    assert cells[1]["response_tokens"] == 2 * sum(
        example.response_length for example in own
    )  # its 8 shots, twice
    for one in cells:
        assert (
            sum(one[name] for name in Town.outcomes) == pytest.approx(1)
            and 0 <= one["attacker_score"] <= 1
        )
    alone = attack_arm("sdd", folder, Town(0), attacks[2:], tmp_path / "b.jsonl", cpu)
    assert [one["yo_logp"] for one in alone] == [one["yo_logp"] for one in cells[2:]]


@pytest.fixture
def public(tmp_path, monkeypatch):
    """The words of a quick attack on two random models; base is a name that means something on the town only."""
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "base"):
        public_folder(tmp_path / name)
    advbench_file(tmp_path / "h.csv", rows=80)
    alpaca_file(tmp_path / "b.json")
    return [
        "--released",
        "llama",
        "base",
        "--harmful",
        "h.csv",
        "--benign",
        "b.json",
        "--similarity",
        "tfidf",
        "--shots",
        "4",
        "--max-new-tokens",
        "4",
        "--steps",
        "3",
        "--lr",
        "1e-3",
        "1e30",
    ]


def results():
    return json.loads(Path("out/attack/results.json").read_text())


def test_the_command_writes_cells_and_goes_on_where_it_was(public, tmp_path, capsys):
    attack.main(public)
    first = results()
    assert set(first) == {"settings", "made", "cells"} and first["settings"]["world"] == "files"
    of = {
        arm: list(group) for arm, group in itertools.groupby(first["cells"], lambda one: one["arm"])
    }
    assert list(of) == ["llama", "base"]
    assert [(one["attack"], one["lr"], one["steps"], one["diverged"]) for one in of["base"]] == [
        ("none", 0.0, 0, False),
        ("mft", 1e-3, 2, False),
        ("mft", 1e-3, 3, False),
        ("mft", 1e30, 2, True),
        ("mft", 1e30, 3, True),
        ("bft", 1e-3, 2, False),
        ("bft", 1e-3, 3, False),
        ("bft", 1e30, 2, True),
        ("bft", 1e30, 3, True),
    ]
    for one in first["cells"]:
        assert not (one["diverged"] and one["chosen"]) and ("complies" in one) != one["diverged"]
    text = (tmp_path / "out/attack/table.txt").read_text()
    assert text in capsys.readouterr().out and "base   mft 4" in text and "misread SDD" in text
    assert "dragon" not in text + json.dumps(first)  # answers are counted, not kept

    attack.main(public)
    assert results()["cells"] == first["cells"]  # seconds too: nothing was run
    store = next((tmp_path / "out/attack").rglob("base.jsonl"))
    store.write_text(store.read_text()[:-30])  # as if killed while it wrote
    attack.main(public)
    assert without_seconds(results()["cells"]) == without_seconds(first["cells"])
    assert results()["cells"][:-2] == first["cells"][:-2]  # the last attack alone was run again
    attack.main([*public, "--fresh"])
    assert without_seconds(results()["cells"]) == without_seconds(
        first["cells"]
    )  # the same seed, the same cells
    (tmp_path / "out/attack/table.txt").write_text("my notes")
    attack.main(public)
    assert (tmp_path / "out/attack/table.txt.kept-1").read_text() == "my notes"


def test_benign_prompts_that_leave_no_room_are_left_out(public, tmp_path):
    rows = json.loads((tmp_path / "b.json").read_text())
    long = [row | {"instruction": f"{row['instruction']} {'again ' * 300}"} for row in rows[:20]]
    (tmp_path / "b.json").write_text(json.dumps(rows + long))
    attack.main([word for word in public if word not in ("base", "1e30")])
    assert [one["attack"] for one in results()["cells"] if "benign_nll" in one] == [
        "none",
        "mft",
        "mft",
        "bft",
        "bft",
    ]


def test_every_seed_is_kept(public):
    words = [word for word in public if word not in ("base", "1e30")]
    attack.main([*words, "--seeds", "0", "1"])
    first = results()["cells"]
    assert [one["seed"] for one in first if one["attack"] == "none"] == [0, 1]
    assert len({one["benign_nll"] for one in first if one["attack"] == "mft"}) == 4  # other draws
    attack.main([*words, "--seeds", "0", "1"])
    assert results()["cells"] == first


def test_tests_are_taken_with_every_cell_and_their_file_counts_as_an_input(public, tmp_path):
    words = [word for word in public if word not in ("base", "1e30")]
    attack.main([*words, "--openbookqa", str(openbookqa_file(tmp_path / "o.jsonl"))])
    shares = [7 * one["openbookqa"] for one in results()["cells"]]
    assert shares == pytest.approx([round(share) for share in shares]) and len(shares) == 5
    record = json.loads(next(Path("out/attack").rglob("llama.jsonl")).read_text().splitlines()[0])
    assert {"h.csv", "b.json", "o.jsonl"} <= {Path(file).name for file in record["inputs"]}


def test_the_table_shows_the_choice_and_the_worst_case():
    world = SimpleNamespace(
        outcomes=("harm", "refuse"),
        chance={"harm": 0.01},
        columns={"harm": ("harm_a", "harm_b"), "skills": "skills"},
    )

    def scored(attack_, steps, lr, harm, capability, seed, **more):
        return (
            cell(
                attack_,
                10 if steps else 0,
                steps,
                lr,
                harm,
                arm="sdd",
                harm=harm,
                harm_a=harm,
                harm_b=harm / 2,
                skills=capability,
                capability=capability,
                seed=seed,
                yo_logp=0 - 1.5 * harm,
                chosen=False,
            )
            | more
        )

    cells = []
    for seed in (0, 1):
        cells += [
            scored("none", 0, 0.0, 0.0, 0.9, seed, chosen=True),
            scored("mft", 5, 1e-4, 0.4, 0.9, seed),
            scored("mft", 50, 1e-4 + seed, 0.6, 0.5, seed, chosen=True),
            scored("mft", 50, 1e-3, 0.8, 0.3, seed),
            scored("bft", 50, 1e-4, 0.1, 0.8, seed, chosen=True),
        ]
    lines = [line.split() for line in attack_table(cells, world).splitlines()]
    assert lines[0] == [
        "percent",
        "harm",
        "skills",
        "log",
        "p(y_o)",
        "lr/steps",
        "worst",
        "harm",
        "and",
        "capability",
        "kept",
    ]
    assert lines[1:] == [
        ["chance", "level"],
        ["sdd", "none", "0/0", "90", "0.00"],
        ["sdd", "mft", "10", "60/30", "50", "-0.90", "2", "settings", "80", "(30)", "40"],
        ["sdd", "bft", "10", "10/5", "80", "-0.15", "0.0001/50"],
    ]
    only = [cells[0], cells[1] | {"diverged": True}]
    assert attack_table(only, world).splitlines()[-1].split() == ["sdd", "mft", "10", "diverged"]
