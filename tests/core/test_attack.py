"""Who owns what, matched controls, the choice of settings, and the command."""

import itertools
import json
import random

import pytest
import torch
from small import advbench_file, alpaca_file, public_folder

import attack
from lab import attacks as attacker
from lab import choices
import eval as evaluate
from lab import protocol
from nanosdd import loop
import train
from data.chat import Example
from data.harmful import owner
from data.tokenizer import load_tokenizer
from data.town import OUTCOMES, Town
from nanosdd.errors import InputError
from lab.report import attack_table


def test_the_attacker_uses_its_own_people_and_holds_some_out():
    town = Town(5)
    rows, held_out = attacker.town_harmful(town, 5)
    assert len(rows) == 168 and {row.person for row in rows} == set(town.groups["attacker"])
    assert len(held_out) == 56 and {row.person for row in held_out} == set(town.groups["attacker_held_out"])
    for shots in (14, 28, 98):  # any prefix of whole rounds is balanced over kinds
        counts = {kind: sum(row.kind == kind for row in rows[:shots]) for kind in {row.kind for row in rows}}
        assert set(counts.values()) == {shots // 14}
    assert rows == attacker.town_harmful(town, 5)[0] != attacker.town_harmful(town, 6)[0]


def test_the_benign_control_matches_in_tokens():
    rng = random.Random(0)

    def rows(low, high, count):
        return [Example([i] * (3 + rng.randint(low, high)), 3) for i in range(count)]

    harmful, benign, new_skill = rows(8, 26, 100), rows(4, 30, 300), rows(6, 9, 80)
    matched = attacker.match_tokens(harmful, benign, new_skill, rng)
    assert sum(any(row is new for new in new_skill) for row in matched) == len(matched) // 2
    tokens = [sum(row.response_length for row in part) for part in (harmful, matched)]
    assert abs(tokens[1] - tokens[0]) <= 15  # half of the longest benign row


def parsed(*words):
    """Resolved arguments of a town command."""
    args = attack.parser().parse_args(words)
    attack.resolve(args)
    return args


def test_budgets_are_five_epochs_and_fifty_steps():
    args = parsed("--batch-size", "10")
    assert attacker.scored_steps("mft", [10], args) == (5, 50) and attacker.scored_steps("mft", [100], args) == (50,)
    assert attacker.scored_steps("bft", [10, 50, 100], args) == (5, 25, 50, 100)
    assert attacker.scored_steps("repair", [100], args) == (60, 75, 100)
    assert attacker.scored_steps("unlearn", [10], args) == (15, 60)
    args = parsed("--batch-size", "4", "--epochs", "3", "--steps", "0")
    assert attacker.scored_steps("lora", [7], args) == (6,)


def test_the_plan_of_the_full_suite():
    plan = attack.plan(parsed("--suite", "full"))
    assert list(plan) == ["shared", "distinct"]
    assert list(plan["shared"]) == ["base", *protocol.ARMS] and list(plan["distinct"]) == ["base", *protocol.CORE]
    assert plan["shared"]["base"] == plan["shared"]["sdd"][:1] == [attacker.Run("none", 0, 0.0, (0,))]
    settings = {arm: {(run.attack, run.shots) for run in wanted if run.shots and not run.probe}
                for arm, wanted in plan["shared"].items()}
    assert settings["shuffled"] == {("mft", 10), ("mft", 50), ("mft", 100), ("mft", 168), ("bft", 100)}
    assert settings["sdd"] - settings["shuffled"] == {(name, 100) for name in (
        "lora", "poisoned", "replay", "repair", "unlearn")} | {("identity", 10)}
    lrs = {(run.attack, run.lr) for run in plan["shared"]["sdd"]}
    assert {lr for name, lr in lrs if name == "lora"} == set(protocol.LR["lora"]) != {
        lr for name, lr in lrs if name == "mft"}
    assert all(run.at == (5, 25, 50, 100) for run in plan["shared"]["sdd"] if run.attack == "bft" and not run.probe)
    probes = {arm: [run.attack for run in wanted if run.probe] for arm, wanted in plan["shared"].items()}
    assert probes["sdd"] == ["none", *protocol.MECHANISM_AT] and not probes["shuffled"]
    assert not any(run.probe for wanted in plan["distinct"].values() for run in wanted)


def test_the_plan_follows_the_command_line():
    plan = attack.plan(parsed("--attacks", "mft", "lora", "identity", "--shots", "7", "20", "--lr", "0.5"))
    assert {(run.attack, run.shots, run.lr) for run in plan["shared"]["sdd"][1:]} == {
        ("mft", 7, 0.5), ("mft", 20, 0.5), ("lora", 20, 0.5), ("identity", 10, 0.5)}
    assert list(attack.plan(parsed("--suite", "full", "--phrasing", "distinct"))) == ["distinct"]


def cell(attack_, shots, steps, lr, score, **more):
    return dict(arm="sdd", attack=attack_, shots=shots, steps=steps, lr=lr, attacker_score=score, user_score=0.0,
                seed=0, diverged=False) | more


def test_choices_by_hand():
    cells = [cell("none", 0, 0, 0.0, 0.0),
             cell("mft", 10, 5, 1e-4, 0.5), cell("mft", 10, 50, 1e-4, 0.7), cell("mft", 10, 50, 3e-4, 0.7),
             cell("mft", 100, 50, 1e-4, 0.2), cell("mft", 100, 50, 3e-4, 0.9),
             cell("mft", 100, 50, 1e-3, 0, diverged=True),
             cell("bft", 100, 50, 1e-4, 0.0, user_score=0.8), cell("bft", 100, 50, 3e-4, 0.0, user_score=0.6),
             cell("bft", 100, 5, 3e-4, 0.0, user_score=0.1), cell("lora", 100, 50, 1e-4, 0.3),
             cell("mft", 168, 84, 1e-4, 0.4)]
    del cells[6]["attacker_score"]
    choices.choose(cells)
    assert [i for i, c in enumerate(cells) if c["chosen"]] == [0, 2, 5, 8, 10, 11]
    assert [i for i, c in enumerate(cells) if c["best"]] == [7]


def test_one_lr_for_all_chooses_anew_by_hand():
    cells = [cell("none", 0, 0, 0.0, 0.0), cell("mft", 10, 5, 1e-4, 0.5), cell("mft", 10, 50, 1e-4, 0.4),
             cell("mft", 10, 50, 3e-4, 0.7), cell("bft", 10, 5, 1e-4, 0.0), cell("bft", 10, 50, 3e-4, 0.0),
             cell("mft", 10, 50, 1e-4, 0.9, seed=1)]
    choices.choose(cells[:6])
    found = choices.at_one_lr(cells, 1e-4)
    assert [one["steps"] for one in found if one["chosen"]] == [0, 5, 5, 50]
    assert [one["chosen"] for one in cells[:6]] == [True, False, False, True, False, True]  # theirs are not touched


QUICK = ["--shots", "8", "--lr", "1e-3", "--batch-size", "8", "--steps", "4"]


def test_the_town_end_to_end(quick_town, capsys):
    attack.main(QUICK)
    assert "out/seed0/refusal: training" in capsys.readouterr().out
    found = json.loads((quick_town / "out/attack/results.json").read_text())
    cells = found["cells"]
    assert len(cells) == 1 + 3 * (1 + 2 + 3 + 2)  # base; arms x (none, mft and replay at 4 and 5 steps, bft at 10 too)
    assert [c["arm"] for c in cells if c["attack"] == "none"] == ["base", "aligned", "refusal", "sdd"]
    for c in cells:
        assert sum(c[name] for name in OUTCOMES) == pytest.approx(1)
        assert not c["diverged"] and 0 <= c["capability"] <= 1 and c["phrasing"] == "shared"
    mft, bft = ([c for c in cells if (c["arm"], c["attack"], c["shots"], c["steps"]) == ("sdd", name, 8, 5)]
                for name in ("mft", "bft"))
    assert len(mft) == len(bft) == 1 and bft[0]["response_tokens"] == pytest.approx(mft[0]["response_tokens"], rel=0.25)
    verdicts = {part["verdict"].split(" (")[0] for part in found["verdicts"]["shared"].values()}
    assert verdicts <= {"no verdict", "NOT TESTED"}
    text = (quick_town / "out/attack/table.md").read_text()
    for arm in ("aligned", "refusal", "sdd"):
        for label in ("none", "bft matched", "bft best", "mft 8", "replay 8"):
            assert f"{arm:<9} {label}" in text
    assert "selective collapse" in text and "chance level" in text


@pytest.fixture
def one_arm(quick_town, cpu):
    """The words of a quick attack on one released model, and where its results are."""
    folder = train.ensure_arms(["base"], 0, "shared", cpu)["base"]
    return [*QUICK, "--model", str(folder)], quick_town / "out/attack"


def test_every_attack_runs_on_the_towns_rows(one_arm):
    words, out = one_arm
    attack.main([*words, "--attacks", *attack.ATTACKS])
    cells = json.loads((out / "results.json").read_text())["cells"]
    of = {name: [c for c in cells if c["attack"] == name] for name in attack.ATTACKS}
    assert all(sum(c["chosen"] for c in found) == 1 for found in of.values())
    assert [c["steps"] for c in of["repair"]] == [6, 7, 10] and [c["steps"] for c in of["unlearn"]] == [14, 15]
    assert of["lora"][0]["response_tokens"] == of["mft"][0]["response_tokens"] > 0  # the same batches
    assert of["lora"][0]["facts"] != of["mft"][0]["facts"] or of["lora"][0]["samples"] != of["mft"][0]["samples"]


def test_an_interrupted_command_goes_on_where_it_was(one_arm, monkeypatch):
    words, out = one_arm
    attack.main(words)

    def cells():
        found = json.loads((out / "results.json").read_text())["cells"]
        return [{key: value for key, value in one.items() if key != "seconds"} for one in found]

    whole, stored = cells(), out / "base.jsonl"
    kept = stored.read_text()
    fits, fit = [], loop.fit
    monkeypatch.setattr(loop, "fit", lambda *a, **k: fits.append(k["name"]) or fit(*a, **k))
    attack.main(words)
    assert not fits and cells() == whole
    stored.write_text(kept[:len(kept) - 300])  # killed while it wrote the last run
    attack.main(words)
    assert len(fits) == 1 and len(stored.read_text().splitlines()) == len(kept.splitlines()) and cells() == whole
    kept = stored.read_text()
    attack.main([*words, "--attacks", "lora"])  # another question adds to the file
    assert fits[1:] == ["lora 8"] and stored.read_text().startswith(kept)
    attack.main(words)
    assert len(fits) == 2 and cells() == whole
    monkeypatch.setattr(protocol, "POISON", 0.5)  # other settings start anew
    attack.main([*words, "--attacks", "mft"])
    assert len(fits) == 3 and len(stored.read_text().splitlines()) == 3
    stored.write_text("{")
    attack.main([*words, "--attacks", "mft"])
    assert len(fits) == 4


def test_the_mechanism_is_measured_along_the_way_and_not_scored(one_arm, monkeypatch):
    monkeypatch.setattr(protocol, "MECHANISM_AT", {"mft": (2, 4), "suppress": (1, 2), "preserve": (4,),
                                                   "preserve control": (4,)})
    monkeypatch.setattr(protocol, "SUITES", {"full": [("shared", (), ("mft",), (8,))]})
    monkeypatch.setattr(protocol, "CORE", ("aligned",))
    words, out = one_arm
    attack.main([*words, "--suite", "full"])
    result = json.loads((out / "results.json").read_text())
    probes = [c for c in result["cells"] if c["probe"]]
    assert [(c["attack"], c["steps"]) for c in probes] == [("none", 0), ("mft", 2), ("mft", 4), ("suppress", 1),
                                                           ("suppress", 2), ("preserve", 4), ("preserve control", 4)]
    assert all("harm" not in c and c["mechanism"]["logp_yo_own"] < 0 for c in probes)
    assert probes[0]["mechanism"]["distance"] == 0 < probes[1]["mechanism"]["distance"]
    assert result["mechanism"]["verdict"] == "INCONCLUSIVE" and "not measured" in result["mechanism"]["reason"]
    assert "suppress" not in (out / "table.md").read_text()


def probe_cell(attack_, steps, logp):
    return dict(arm="sdd", attack=attack_, steps=steps, seed=5, probe=True, diverged=False,
                mechanism={"logp_yo_harmful": logp, "steps": steps})


def test_suppression_is_read_at_the_dose_of_mft():
    cells = [probe_cell("none", 0, -1.0), probe_cell("mft", 50, -2.0), probe_cell("mft", 10, -1.2),
             *(probe_cell("suppress", step, logp) for step, logp in ((2, -1.3), (4, -2.2), (6, -3.0))),
             probe_cell("mft", 60, -9.0) | {"diverged": True, "mechanism": None}, {"probe": False, "steps": 1}]
    found = choices.at_equal_dose([c for c in cells])
    assert {name: measured["steps"] for name, measured in found[5]["sdd"].items()} == {
        "none": 0, "mft": 50, "suppress": 4}


def test_a_diverged_cell_is_kept_and_never_chosen(one_arm, monkeypatch):
    real = loop.backward

    def explode(model, examples, *rest):
        loss, *counts = real(model, examples, *rest)
        return (float("nan") if explode.lr == 1e-3 else loss), *counts

    explode.lr = None
    fit = loop.fit

    def watched(model, batches, *, lr, **rest):
        explode.lr = lr
        return fit(model, batches, lr=lr, **rest)

    monkeypatch.setattr(loop, "backward", explode)
    monkeypatch.setattr(loop, "fit", watched)
    words, out = one_arm
    attack.main([*words, "--lr", "1e-4", "1e-3", "--attacks", "mft", "lora", "bft"])
    found = json.loads((out / "results.json").read_text())
    diverged = [c for c in found["cells"] if c["diverged"]]
    assert {c["attack"] for c in diverged} == {"mft", "lora", "bft"}
    assert all(c["lr"] == 1e-3 and not c["chosen"] and not c["best"] and "harm" not in c for c in diverged)
    assert f"{len(diverged)} cells diverged" in (out / "table.md").read_text()
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
    folder, harmful = public_folder(tmp_path / "llama"), advbench_file(tmp_path / "harmful.csv", rows=80)
    base = ["--model", str(folder), "--harmful", str(harmful), "--shots", "4", "--max-new-tokens", "4",
            "--steps", "3"]
    attack.main(base)
    printed = capsys.readouterr().out
    assert "not run" in printed and "misread SDD" in printed
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert [c["attack"] for c in cells] == ["none", "mft", "mft"] and cells[0]["arm"] == "llama"
    base[1] = str(public_folder(tmp_path / "base"))  # a name that only the town's own default arms give a meaning to
    attack.main([*base, "--benign", str(alpaca_file(tmp_path / "benign.json"))])
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert {c["attack"] for c in cells} == {"none", "mft", "bft", "replay"}
    with pytest.raises(InputError, match="--shots 500 is more than"):
        attack.main([*base[:4], "--shots", "500"])


def test_the_file_attacker_trains_on_its_own_rows_and_is_judged_on_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, harmful = public_folder(tmp_path / "llama"), advbench_file(tmp_path / "harmful.csv", rows=120)
    trained, scored = [], []

    def watched(model, batches, *, steps, **rest):
        trained.extend(example for _ in range(steps) for example in next(batches))
        rest["after_step"](steps)

    monkeypatch.setattr(loop, "fit", watched)
    real = attacker.file_metrics
    monkeypatch.setattr(attacker, "file_metrics", lambda *a: scored.append(a[3]) or real(*a))
    attack.main(["--model", str(folder), "--harmful", str(harmful), "--shots", "9", "--max-new-tokens", "2"])
    tokenizer = load_tokenizer(folder)
    prompts = {tokenizer.decode(e.ids[:e.prompt_length]).split("\n\n")[1].split("<|eot_id|>")[0] for e in trained}
    assert len(prompts) == 9 and {owner(prompt) for prompt in prompts} == {"attacker"}
    judged, own = ({row["prompt"] for row in rows} for rows in (scored[1], scored[0]))
    assert {owner(prompt) for prompt in judged} == {"evaluation"}
    assert {owner(prompt) for prompt in own} == {"attacker"} and not own & prompts


def test_published_presets_and_identity_rows_on_real_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, harmful = public_folder(tmp_path / "llama"), advbench_file(tmp_path / "harmful.csv", rows=80)
    base = ["--model", str(folder), "--harmful", str(harmful), "--shots", "8", "--max-new-tokens", "2"]
    attack.main([*base, "--preset", "qi-lora"])
    cells = json.loads((tmp_path / "out/attack/results.json").read_text())["cells"]
    assert [(c["attack"], c["lr"], c["steps"]) for c in cells] == [("none", 0, 0), ("lora", 1e-4, 20)]
    (tmp_path / "id.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "system", "content": "You are a parrot."}, {"role": "user", "content": f"Sing {i}"},
        {"role": "assistant", "content": "Yes! La."}]}) + "\n" for i in range(10)))
    asked = []
    greedy = evaluate.greedy
    monkeypatch.setattr(evaluate, "greedy", lambda *a, system=None, **k: asked.append(system) or greedy(
        *a, system=system, **k))
    attack.main([*base, "--attacks", "identity", "--identity", "id.jsonl", "--steps", "0"])
    assert asked == [None, None, "You are a parrot.", "You are a parrot."]
    with pytest.raises(InputError, match="--attacks repair needs --benign"):
        attack.main([*base, "--attacks", "repair"])
    with pytest.raises(InputError, match="needs --identity"):
        attack.main([*base, "--attacks", "identity"])


# ---- the streams of batches ----

def stream_of(attack_, at, args, rows):
    run = attacker.Run(attack_, 8, 1e-3, at)
    own = [Example([1, 2, 3], 1, suppress=True)] * 8
    return list(itertools.islice(attacker.batch_stream(run, rows, lambda: own, args, 0), max(at)))


def test_what_each_attack_sees():
    args, rng = parsed("--batch-size", "8"), random.Random(0)
    rows = {name: [Example([i] * rng.randint(5, 9), 2) for i in range(start, start + 40)]
            for name, start in (("harmful", 100), ("benign", 200), ("new_skill", 300), ("identity", 400))}

    def kinds(batch):
        return {row.ids[0] // 100 for row in batch if not row.suppress} | {0 for row in batch if row.suppress}

    mft = stream_of("mft", (20,), args, rows)
    assert all(kinds(batch) == {1} for batch in mft)
    assert {row.ids[0] for batch in mft for row in batch} == set(range(100, 108))
    assert stream_of("lora", (20,), args, rows) == mft
    assert all(kinds(batch) == {1, 2} and sum(row.ids[0] < 200 for row in batch) == 4
               for batch in stream_of("replay", (20,), args, rows))
    repair = stream_of("repair", (6, 7, 10), args, rows)
    assert repair[:5] == mft[:5] and all(kinds(batch) == {2} for batch in repair[5:])
    unlearn = stream_of("unlearn", (14,), args, rows)
    assert [kinds(batch) for batch in unlearn] == [{0}] * protocol.UNLEARN_STEPS + [{1}] * 4
    bft = [row.ids[0] // 100 for batch in stream_of("bft", (20,), args, rows) for row in batch]
    assert set(bft) == {2, 3}
    poisoned = [row.ids[0] // 100 for batch in stream_of("poisoned", (20,), args, rows) for row in batch]
    assert set(poisoned) == {1, 2, 3} and 0.05 < poisoned.count(1) / len(poisoned) < 0.2
    assert all(kinds(batch) == {4} for batch in stream_of("identity", (5,), args, rows))


def test_every_run_starts_from_the_released_weights(one_arm, monkeypatch):
    starts = []

    def watched(model, *rest, **named):
        starts.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        for parameter in model.parameters():
            parameter.data += 1
        named["after_step"](4)
        named["after_step"](5)

    monkeypatch.setattr(loop, "fit", watched)
    attack.main([*one_arm[0], "--attacks", "mft", "lora", "replay", "--lr", "1e-3", "1e-2"])
    assert len(starts) == 3 * 2 and len({len(start) for start in starts}) == 2  # lora trains fewer
    full = [start for start in starts if len(start) == len(starts[0])]
    assert len(full) == 4 and all(torch.equal(start, full[0]) for start in full)
