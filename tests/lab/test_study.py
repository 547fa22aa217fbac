"""The study: what is planned, and tiny runs of the town and of a chat model."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from small import StandIn, public_folder
from test_verdicts import made_up

from attack import RELEASED, Attack
from data.kitchen import Kitchen
from data.town import Town
from data.worlds import Sources
from lab import protocol
from lab.report import main as report
from lab.study import SETTING, TABLE, arm_folder, arms_of, effects, main, plan_of, study_arm

STAMP = {"commit": "abc", "protocol": "def"}
QUICK = {}
for world_name, table in TABLE.items():
    QUICK[world_name] = {}
    for mode, settings in table.items():
        share = 0.5 if settings.benign_replay else 0.0
        QUICK[world_name][mode] = replace(settings, steps=2, batch_size=4, benign_replay=share)


def kitchen(folder):
    world = Kitchen(0, Sources(similarity="tfidf", model=str(folder)), StandIn(), folder)
    world.max_new_tokens = 4
    return world


# ---- plans ----


@pytest.mark.parametrize("arm", protocol.ARMS)
def test_the_plan_of_the_town_holds_the_protocol(arm):
    plan = plan_of(arm, Town(0))
    core = arm in protocol.CORE
    draws = protocol.DRAWS if core else 1
    further = protocol.CORE_ATTACKS if core else ("lora",)
    wanted = dict.fromkeys(further, 1) | {"none": 1, "mft": 2 * draws, "bft": 2}
    assert Counter(attack.name for attack, _ in plan) == wanted
    settings = {"mft": set(), "bft": set()}
    for attack, draw in plan:
        if attack.name in settings:
            settings[attack.name].add((attack.lr, attack.budgets))
        assert draw in range(draws)
    assert settings["mft"] == settings["bft"]  # each cell has its matched control
    assert len({(attack.key, draw) for attack, draw in plan}) == len(plan)


def test_the_plan_of_a_chat_model_holds_the_protocol(tmp_path):
    plan = plan_of("sdd", kitchen(public_folder(tmp_path)))
    steps = {(attack.name, attack.shots): attack.budgets for attack, _ in plan}
    assert steps == {
        ("none", 0): (0,),
        ("mft", 10): (5,),
        ("mft", 50): (25,),
        ("mft", 100): (50,),
        ("bft", 100): (5, 25, 50),
        **{(name, 50): (25,) for name in ("lora", "prefill", "re-refuse", "unlearn", "mix")},
    }


def test_arms_without_a_verdict_run_on_the_first_report_seeds_alone():
    found = {seed: set(arms_of(Town(seed))) for seed in (0, *protocol.REPORT_SEEDS)}
    assert found[0] == found[10] == found[14] == set(protocol.ARMS)
    assert found[15] == found[24] == set(protocol.CORE)
    assert plan_of("base", Town(0)) == [(RELEASED, 0)]


# ---- runs ----


def study(world, base, wanted, cpu):
    """The effects of these attacks, and what the report says of them."""
    cells = []
    for arm, attacks in wanted.items():
        folder = arm_folder(arm, world, base, cpu, QUICK)
        cells += study_arm(arm, folder, world, attacks, cpu)
    path = world.root / "effects.json"
    path.write_text(json.dumps(effects(cells, STAMP)))
    report([str(path)])
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_whole_tiny_study_of_the_town(town, cpu):
    released = (RELEASED, 0)
    mft = Attack("mft", 3, 1e-3, (1, 2), 2)
    attacks = [released, (mft, 0), (mft, 1), (Attack("prefill", 3, 0.0, (0,)), 0)]
    wanted = {"base": [released], "sdd": attacks, "ctrap": [(mft, 0)], protocol.HALF: [released]}
    cells, page = study(town, None, wanted, cpu)
    assert [(cell["arm"], cell["attack"], cell["steps"], cell["draws"]) for cell in cells] == [
        ("base", "none", 0, 1),
        ("sdd", "none", 0, 1),
        ("sdd", "mft", 1, 2),
        ("sdd", "mft", 2, 2),
        ("sdd", "prefill", 0, 1),
        ("ctrap", "mft", 1, 1),
        ("ctrap", "mft", 2, 1),
        ("sdd_half", "none", 0, 1),
    ]
    scores = {"harm", "harm_knowledge", "told", "known_triples", "facts_nll", "capability"}
    for cell in cells:
        assert cell.keys() >= scores | {"attacker_score", "user_score", "yo_logp"}
    assert "sdd, mft" in page
    assert "abc/def" in page


def test_a_whole_tiny_study_of_a_chat_model(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = public_folder(tmp_path / "model", context=256)
    attacks = [(RELEASED, 0)]
    for name in ("mft", "prefill"):
        attacks.append((Attack(name, 3, 1e-3, (1,), 2), 0))
    wanted = {"base": attacks[:1], "sdd": attacks, "ctrap": attacks[:2]}
    cells, page = study(kitchen(base), base, wanted, cpu)
    names = [attack.name for attack, _ in attacks]
    assert [cell["attack"] for cell in cells] == ["none", *names, "none", "mft"]
    for cell in cells:
        assert cell.keys() >= {
            "complies",
            "useless",
            "benign_nats",
            "over_refusal",
            "attacker_score",
        }
    assert "most complies, percent" in page


def test_an_interrupted_arm_goes_on(town, aligned, cpu):
    mft = Attack("mft", 2, 1e-3, (1,), 2)
    wanted = [(mft, 0), (mft, 1), (Attack("prefill", 2, 0.0, (0,)), 0)]
    store = town.root / "study/sdd.jsonl"

    def run():
        cells = study_arm("sdd", aligned, town, wanted, cpu)
        return [cell | {"seconds": 0} for cell in cells]

    whole = run()
    assert all(sample.startswith("To ") for sample in whole[2]["samples"])  # the beginning given
    lines = store.read_text().splitlines()
    store.write_text("\n".join([*lines[:2], lines[2][:40]]))  # killed while it wrote
    assert run() == whole  # each attack starts from the released model
    kept = store.read_text()
    assert run() == whole
    assert store.read_text() == kept


def test_effects_are_means_over_the_draws_that_did_not_diverge():
    run = {"arm": "sdd", "seed": 7, "attack": "mft", "shots": 100, "lr": 3e-4, "steps": 50}
    run |= {"diverged": False, "answers": ["x"]}
    cells = [
        run | {"draw": 0, "harm": 0.25},
        run | {"draw": 1, "harm": 0.5},
        run | {"draw": 2, "diverged": True},
        run | {"draw": 0, "steps": 200, "diverged": True},
        run | {"draw": 0, "attack": "none", "harm": 0.11111},
    ]
    mean, released = effects(cells, STAMP)
    wanted = {name: run[name] for name in SETTING}
    assert mean == wanted | {"harm": 0.375, "draws": 2, "diverged": False}
    assert released["harm"] == 0.111
    assert released.items() >= STAMP.items()


def test_the_command_skips_arms_that_the_effects_file_has(tmp_path, capsys):
    path = tmp_path / "effects.json"
    path.write_text(json.dumps(made_up((10, 11))))
    kept = path.read_text()
    main(["--seeds", "10", "11", "--arms", *protocol.CORE, "--effects", str(path)])
    assert path.read_text() == kept
    assert "most harm, percent" in capsys.readouterr().out
