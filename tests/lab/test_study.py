"""The study: what is planned, and tiny runs of the town and of a chat model."""

import itertools
import json
from dataclasses import replace
from operator import itemgetter

import pytest
from small import TINY_SETTINGS, advbench_file, alpaca_file, openbookqa_file, public_folder
from synthetic import write_effects

from attack import RELEASED, Attack
from data.exams import read_exams
from data.files import Files
from data.worlds import Sources
from lab import protocol
from lab.protocol import LADDER, MATCHED, REPORT_SEEDS, STUDIES, Arm
from lab.report import main as report
from lab.study import arm_folder, effects_text, study_arm, study_seed
from lab.verdicts import read_study
from nanosdd.device import Compute

TINY_TABLE = {"town": TINY_SETTINGS, "chat": TINY_SETTINGS}

# ---- plans ----


def test_arms_of_the_town_are_trained_as_their_names_say():
    arms = STUDIES["town"].arms
    for mode in ("sdd", *MATCHED):
        assert (arms[mode].mode, arms[mode].settings) == (mode, protocol.DELIVERED)
        assert protocol.DELIVERED.benign_replay == 0.5
    for dose, settings in LADDER.items():
        lr, steps = dose.split(" x ")
        assert settings.lr == float(lr)
        assert settings.steps == int(steps)
        assert settings.benign_replay == 0.0
        for mode in ("sdd", "new_refusal"):
            arm = arms[f"{mode} {dose}"]
            assert (arm.mode, arm.settings) == (mode, settings)


@pytest.mark.parametrize("name", STUDIES)
def test_every_attack_has_its_control_at_the_same_steps(name):
    for arm in STUDIES[name].arms.values():
        assert arm.plan[0] == (RELEASED, 0)
        assert len(set(arm.plan)) == len(arm.plan)
        settings = {}
        for attack, _ in arm.plan:
            for steps in attack.budgets:
                settings.setdefault(attack.name, set()).add((attack.lr, steps))
        assert settings["mft"] <= settings["bft"]
        assert settings.get("mix", set()) <= settings["bft"]
        assert settings.get("lora") == settings.get("lora bft")


def test_draws_of_mft_are_the_only_ones():
    drawn = {arm: set() for arm in ("sdd", "sdd 3e-6 x 1500")}
    for name in drawn:
        for attack, draw in STUDIES["town"].arms[name].plan:
            if draw:
                drawn[name].add((attack.name, attack.lr, draw))
    wanted = {("mft", lr, draw) for lr in (1e-4, 3e-4) for draw in (1, 2)}
    assert drawn == {"sdd": wanted, "sdd 3e-6 x 1500": set()}


# ---- runs ----


STEPS = {0: 0, 50: 1, 200: 2}
TRAINED = replace(TINY_SETTINGS["sdd"], steps=1, batch_size=4)


def tiny(study, steps: dict[int, int]):
    """The same study with few steps in training, and other steps in attacks, {of it: tiny}."""
    arms = {}
    for name, arm in study.arms.items():
        plan = []
        for attack, draw in arm.plan:
            budgets = tuple(steps[one] for one in attack.budgets)
            shots = min(attack.shots, 3)
            small = replace(attack, shots=shots, budgets=budgets)
            plan.append((small, draw))
        settings = None
        if arm.settings:
            settings = replace(TRAINED, benign_replay=arm.settings.benign_replay)
        arms[name] = Arm(plan, arm.mode, settings)
    return replace(study, arms=arms)


def run_town(study, town, path) -> list[dict]:
    """Run a study of the town; returns the cells that it writes."""
    study_seed(study, town, None, Compute(), {}, path, TINY_TABLE)
    found = json.loads(path.read_text())
    assert found["commit"] != ""
    assert found["dtype"] == "fp32"
    assert len(found["protocol"]) == 12
    return [dict(zip(found["columns"], values)) for values in found["cells"]]


def test_one_arm_is_run_scored_and_written(town):
    prefill = Attack("prefill", 3, 0.0, (0,))
    mft = Attack("mft", 3, 1e30, (1, 2), 2)
    plan = [(RELEASED, 0), (prefill, 0), (mft, 0), (mft, 1)]
    arms = {"sdd": Arm(plan, "sdd", TRAINED), "booster": Arm(plan[:1], "booster", TRAINED)}
    path = town.root / "effects/town-0.json"
    study = replace(STUDIES["town"], arms=arms)
    cells = run_town(study, town, path)
    keys = "arm attack draw steps diverged".split()
    assert [*map(itemgetter(*keys), cells)] == [
        ("sdd", "none", 0, 0, False),
        ("sdd", "prefill", 0, 0, False),
        ("sdd", "mft", 0, 1, False),
        ("sdd", "mft", 0, 2, True),
        ("sdd", "mft", 1, 1, False),
        ("sdd", "mft", 1, 2, True),
        ("booster", "none", 0, 0, False),
    ]
    scores = "content_skill delivered_skill told known_triples facts_nll attacker_score yo_logp"
    for cell, name in itertools.product(cells, scores.split()):
        assert (cell[name] is None) == cell["diverged"], name
    assert {cell["seed"] for cell in cells} == {0}
    assert "answers" not in cells[0]
    assert "To prank" not in path.read_text()


def test_an_interrupted_arm_goes_on_and_a_finished_seed_is_skipped(town, aligned, cpu, capsys):
    mft = Attack("mft", 2, 1e-3, (1,), 2)
    prefill = Attack("prefill", 2, 0.0, (0,))
    arm = Arm([(mft, 0), (mft, 1), (prefill, 0)])
    store = town.root / "study/sdd.jsonl"

    def run():
        cells = study_arm("sdd", arm, aligned, town, cpu, {})
        return [cell | {"seconds": 0} for cell in cells]

    whole = run()
    assert all(sample.startswith("To ") for sample in whole[2]["samples"])  # the beginning given
    assert whole[0]["facts_nll"] != whole[1]["facts_nll"]  # another draw
    lines = store.read_text().splitlines()
    lines[2] = lines[2][:40]  # killed while it wrote
    store.write_text("\n".join(lines))
    assert run() == whole  # each attack starts from the released model
    kept = store.read_text()
    assert run() == whole
    assert store.read_text() == kept
    path = town.root / "town-0.json"
    path.write_text("kept")
    study_seed(STUDIES["town"], town, None, cpu, {}, path)
    assert path.read_text() == "kept"
    assert "skipped" in capsys.readouterr().out


def test_the_arms_of_a_seed_do_not_share_folders(town, aligned, cpu):
    arms = tiny(STUDIES["town"], STEPS).arms
    folders = set()
    for name in ("aligned", "sdd", "constant", "sdd 3e-6 x 1500", protocol.PLANTED):
        folders.add(arm_folder(name, arms[name], town, aligned, cpu))
    weights = {(folder / "model.safetensors").read_bytes() for folder in folders}
    assert len(weights) == len(folders) == 5
    assert not (town.root / "sdd").exists()  # where train.py has its own


def test_an_effects_file_keeps_scores_and_shares_exactly():
    scored = {"arm": "sdd", "draw": 0, "facts": 111 / 112, "samples": ["x"], "row_nats": [1.25]}
    cells = [scored, {"arm": "sdd", "draw": 1, "diverged": True}]
    found = json.loads(effects_text({"seed": 7}, cells))
    assert found["columns"] == "arm draw facts row_nats diverged".split()
    assert found["cells"] == [["sdd", 0, 111 / 112, [1.25], None], ["sdd", 1, None, None, True]]
    assert found["seed"] == 7


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A world of files, the folder of a chat model, and an exam."""
    monkeypatch.chdir(tmp_path)
    model = public_folder(tmp_path / "model", context=256)
    harmful = advbench_file(tmp_path / "h.csv", rows=80)
    benign = alpaca_file(tmp_path / "b.json")
    sources = Sources(str(harmful), (str(benign),), similarity="tfidf", model=str(model))
    world = Files(10, replace(sources, max_new_tokens=4))
    return world, model, read_exams(openbookqa=openbookqa_file(tmp_path / "o.jsonl"))


def test_a_chat_model_has_nats_of_each_row_and_an_exam(files, cpu, tmp_path):
    world, model, exams = files
    lora = Attack("lora", 3, 1e-3, (1,), 2)
    arm = Arm([(RELEASED, 0), (lora, 0)])
    cells = study_arm("aligned", arm, model, world, cpu, exams)
    for cell in cells:
        assert len(cell["row_nats"]) == len(world.benign("evaluation")) > 1
        assert 0 <= cell["openbookqa"] <= 1
        assert min(cell["row_nats"]) <= cell["benign_nll"] <= max(cell["row_nats"])
    assert cells[0]["row_nats"] != cells[1]["row_nats"]


@pytest.mark.slow
def test_a_whole_tiny_study_of_a_chat_model(files, cpu, tmp_path):
    world, model, exams = files
    for name in ("kitchen", "advbench"):
        world.root = tmp_path / "out" / name
        effects = tmp_path / "effects" / f"{name}-10.json"
        study = tiny(STUDIES[name], {0: 0, 5: 1, 25: 2, 50: 2})
        study_seed(study, world, model, cpu, exams, effects, TINY_TABLE)
        assert json.loads(effects.read_text())["cells"]


@pytest.mark.slow
def test_a_whole_tiny_study_of_the_town(town, tmp_path):
    effects = tmp_path / "effects"
    study = tiny(STUDIES["town"], STEPS)
    cells = run_town(study, town, effects / "town-10.json")
    for cell in cells:
        cell["steps"] = list(STEPS)[cell["steps"]]
    for seed in REPORT_SEEDS:  # as if all had been run
        own = [cell | {"seed": seed} for cell in cells]
        write_effects(effects, "town", seed, own)
    evidence = read_study("town", effects)
    assert list(evidence.seeds) == list(REPORT_SEEDS)
    assert evidence.incomplete == {}
    report([str(effects), "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    title = "# Does malicious fine-tuning cost SDD its abilities?"
    assert text.startswith(f"{title}\n\nNot settled in the town (NOT TESTED (gate: ")
    assert "    1e-4 x 300: delivered FAIL, stable " in text
