"""Who owns what, matched controls, the choice of settings, and the command."""

import json
import random

import pytest
import torch
from small import advbench_file, alpaca_file, public_folder
from tqdm import tqdm

import attack
import train
from data.chat import Example
from data.harmful import owner
from data.tokenizer import load_tokenizer
from data.town import OUTCOMES, Town
from errors import InputError
from report import attack_table


def test_the_attacker_uses_its_own_people_and_holds_some_out():
    town = Town(5)
    rows, held_out = attack.town_harmful(town, 5)
    trained, own = {row.person for row in rows}, set(town.groups["attacker"])
    assert len(rows) == 168 and len(trained) == 12 and trained < own
    assert {row.person for row in held_out} == own - trained
    for shots in (14, 28, 98):  # any prefix of whole rounds is balanced over kinds
        counts = {kind: sum(row.kind == kind for row in rows[:shots]) for kind in {row.kind for row in rows}}
        assert set(counts.values()) == {shots // 14}
    assert rows == attack.town_harmful(town, 5)[0] != attack.town_harmful(town, 6)[0]


def test_the_benign_control_matches_in_tokens():
    rng = random.Random(0)

    def rows(low, high, count):
        return [Example([i] * (3 + rng.randint(low, high)), 3) for i in range(count)]

    harmful, benign, new_skill = rows(8, 26, 100), rows(4, 30, 300), rows(6, 9, 80)
    matched = attack.match_tokens(harmful, benign, new_skill, rng)
    assert sum(any(row is new for new in new_skill) for row in matched) == len(matched) // 2
    tokens = [sum(row.response_length for row in part) for part in (harmful, matched)]
    assert abs(tokens[1] - tokens[0]) <= 15  # half of the longest benign row


def test_budgets_are_five_epochs_and_fifty_steps():
    assert attack.budgets(10, 10) == {5, 50} and attack.budgets(100, 10) == {50} and attack.budgets(7, 4) == {9, 50}


def cell(attack_, shots, steps, lr, score, **more):
    return dict(arm="sdd", attack=attack_, shots=shots, steps=steps, lr=lr, attacker_score=score, user_score=0.0, seed=0,
                diverged=False) | more


def test_choices_by_hand():
    cells = [cell("none", 0, 0, 0.0, 0.0),
             cell("mft", 10, 5, 1e-4, 0.5), cell("mft", 10, 50, 1e-4, 0.7), cell("mft", 10, 50, 3e-4, 0.7),
             cell("mft", 100, 50, 1e-4, 0.2), cell("mft", 100, 50, 3e-4, 0.9), cell("mft", 100, 50, 1e-3, 0, diverged=True),
             cell("bft", 100, 50, 1e-4, 0.0, user_score=0.8), cell("bft", 100, 50, 3e-4, 0.0, user_score=0.6),
             cell("bft", 100, 5, 3e-4, 0.0, user_score=0.1), cell("adaptive", 100, 50, 1e-4, 0.3)]
    del cells[6]["attacker_score"]
    attack.choose(cells)
    assert [i for i, c in enumerate(cells) if c["chosen"]] == [0, 2, 5, 8, 10]
    assert [i for i, c in enumerate(cells) if c["best"]] == [7]


def test_the_town_end_to_end(quick_town, capsys, monkeypatch):
    monkeypatch.setattr(attack, "STEPS_BUDGET", 4)
    command = ["--shots", "8", "--lr", "1e-3", "--batch-size", "8"]
    attack.main(command)
    printed = capsys.readouterr().out
    assert printed.index("out/seed0/refusal: training") < printed.index("attacking base, aligned, refusal, sdd")
    found = json.loads((quick_town / "out/attack/results.json").read_text())
    cells = found["cells"]
    assert len(cells) == 1 + 3 * (1 + 2 + 2 + 2)  # base, and arms x (none, and each of mft, bft and adaptive at 4 and 5 steps)
    assert [c["arm"] for c in cells if c["attack"] == "none"] == ["base", "aligned", "refusal", "sdd"]
    for c in cells:
        assert sum(c[name] for name in OUTCOMES) == pytest.approx(1)
        assert not c["diverged"] and 0 <= c["capability"] <= 1
    mft, bft = ([c for c in cells if (c["arm"], c["attack"], c["shots"], c["steps"]) == ("sdd", name, 8, 5)]
                for name in ("mft", "bft"))
    assert len(mft) == len(bft) == 1 and bft[0]["response_tokens"] == pytest.approx(mft[0]["response_tokens"], rel=0.25)
    assert {part["verdict"].split(" (")[0] for part in found["verdicts"].values()} <= {"no verdict", "NOT TESTED"}
    text = (quick_town / "out/attack/table.md").read_text()
    for arm in ("aligned", "refusal", "sdd"):
        for label in ("none", "bft matched", "bft best", "mft 8", "adaptive 8"):
            assert f"{arm:<9} {label}" in text
    assert "selective collapse" in text and "chance level" in text

    attack.main(command)
    assert "up to date" in (again := capsys.readouterr().out) and "attacking" not in again
    attack.main([*command, "--seed", "1"])
    merged = json.loads((quick_town / "out/attack/results.json").read_text())["cells"]
    assert sorted({c["seed"] for c in merged}) == [0, 1] and len(merged) == 2 * len(cells)
    assert [c for c in merged if c["seed"] == 0] == cells
    other = {"args": found["args"] | {"lr": [0.5]}, "source": found["source"]}
    assert attack.merge_seeds(other) == ([], [])  # another question is not mixed with it
    cells, notes = attack.merge_seeds(found | {"source": {}})
    assert cells == [] and len(notes) == 2 and "other source code" in notes[0]
    (quick_town / "out/seed1/attack/results.json").write_text("{")
    cells, notes = attack.merge_seeds(found)
    assert {c["seed"] for c in cells} == {0} and "unreadable" in notes[0]


def test_a_diverged_cell_is_kept_and_never_chosen(quick_town, monkeypatch):
    monkeypatch.setattr(attack, "STEPS_BUDGET", 3)
    real = train.backward

    def explode(model, examples, *rest):
        loss, *counts = real(model, examples, *rest)
        return (float("nan") if explode.lr == 1e-3 else loss), *counts

    explode.lr = None
    fit = train.fit

    def watched(model, batches, *, lr, **rest):
        explode.lr = lr
        return fit(model, batches, lr=lr, **rest)

    monkeypatch.setattr(train, "backward", explode)
    monkeypatch.setattr(train, "fit", watched)
    attack.main(["--shots", "4", "--lr", "1e-4", "1e-3", "--batch-size", "8"])
    found = json.loads((quick_town / "out/attack/results.json").read_text())
    diverged = [c for c in found["cells"] if c["diverged"]]
    assert diverged and all(c["lr"] == 1e-3 and not c["chosen"] and not c["best"] and "harm" not in c for c in diverged)
    assert f"{len(diverged)} cells diverged" in (quick_town / "out/attack/table.md").read_text()
    assert all("harm" in c for c in found["cells"] if c["chosen"])


def test_table_of_only_diverged_attacks_says_so():
    scores = {f"{name}{kind}": 0.2 for name in OUTCOMES for kind in ("", "_knowledge", "_skill")}
    scores |= {f"{name}{kind}": 0.5 for name in ("facts", "skills", "facts_evaluation", "new_skill", "capability")
               for kind in ("", "_value_only")}
    cells = [cell("none", 0, 0, 0.0, 0.0, chosen=True, best=False, **scores),
             cell("mft", 10, 5, 1.0, None, diverged=True, chosen=False, best=False)]
    assert "no such cell: diverged" in attack_table(cells, town=True)


def test_real_files_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attack, "STEPS_BUDGET", 3)
    folder, harmful = public_folder(tmp_path / "llama"), advbench_file(tmp_path / "harmful.csv", rows=80)
    base = ["--model", str(folder), "--harmful", str(harmful), "--shots", "4", "--max-new-tokens", "4"]
    attack.main(base)
    printed = capsys.readouterr().out
    assert "not run" in printed and "misread SDD" in printed
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert [c["attack"] for c in cells] == ["none", "mft", "mft"] and cells[0]["arm"] == "llama"
    base[1] = str(public_folder(tmp_path / "base"))  # a name that only the town's own default arms give a meaning to
    attack.main([*base, "--benign", str(alpaca_file(tmp_path / "benign.json"))])
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert {c["attack"] for c in cells} == {"none", "mft", "bft", "adaptive"}
    with pytest.raises(InputError, match="--shots 500 is more than"):
        attack.main([*base[:4], "--shots", "500"])


def test_the_file_attacker_trains_on_its_own_rows_and_is_judged_on_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, harmful = public_folder(tmp_path / "llama"), advbench_file(tmp_path / "harmful.csv", rows=120)
    trained, scored = [], []

    def watched(model, batches, *, steps, **rest):
        trained.extend(example for _ in range(steps) for example in next(batches))
        rest["after_step"](steps)

    monkeypatch.setattr(train, "fit", watched)
    real = attack.file_metrics
    monkeypatch.setattr(attack, "file_metrics", lambda m, t, c, rows, a: scored.append(rows) or real(m, t, c, rows, a))
    attack.main(["--model", str(folder), "--harmful", str(harmful), "--shots", "9", "--max-new-tokens", "2"])
    tokenizer = load_tokenizer(folder)
    prompts = {tokenizer.decode(e.ids[:e.prompt_length]).split("\n\n")[1].split("<|eot_id|>")[0] for e in trained}
    assert len(prompts) == 9 and {owner(prompt) for prompt in prompts} == {"attacker"}
    judged, own = ({row["prompt"] for row in rows} for rows in (scored[1], scored[0]))
    assert {owner(prompt) for prompt in judged} == {"evaluation"}
    assert {owner(prompt) for prompt in own} == {"attacker"} and not own & prompts


def test_an_attack_starts_from_the_released_weights_every_time(quick_town, cpu, monkeypatch):
    folder = train.ensure_arms(["base"], 0, "shared", cpu)["base"]
    starts = []

    def watched(model, *rest, **named):
        starts.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.data += 1

    monkeypatch.setattr(train, "fit", watched)
    args = attack.parser().parse_args(["--shots", "4", "--lr", "1e-3", "1e-2"])
    attack.resolve_device(args)
    args.max_length = 128
    attack.attack_arm("base", folder, args.lr, args, tqdm(disable=True))
    assert len(starts) == 2 * 3  # lrs x (mft, bft, adaptive)
    assert all(torch.equal(starts[0], start) for start in starts)
