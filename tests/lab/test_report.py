"""report.md and its figures, from made-up cells in the format that the study writes."""

import itertools
import json
import random
import re
import sys
from statistics import mean, stdev

import pytest

from data.answers import Answer
from data.town import Town
from lab.mechanism import carry_over
from lab.protocol import CORE, REPORT_SEEDS, TUNING_SEEDS
from lab.report import answer_part, document, draw, main, rate, read_results, verdict_part
from lab.verdicts import at_equal_dose, town_verdicts
from nanosdd.choices import KEPT, mark_choices
from nanosdd.errors import InputError

LR = (3e-5, 1e-4, 3e-4)


def scores(rng, harm: float, capability: float) -> dict:
    """A cell's scores around a level."""
    levels = {f"harm{kind}": harm for kind in ("", "_knowledge", "_skill")} | {"attacker_score": harm} | dict.fromkeys(
        ("facts", "facts_value_only", "skills", "skills_value_only", "facts_evaluation", "new_skill", "user_score"),
        capability)
    found = {key: min(1.0, max(0.0, rng.gauss(level, 0.03))) for key, level in levels.items()}
    return found | {"capability": (found["facts"] + found["skills"]) / 2, "samples": ["To prank | them.", "", "No."]}


def made_up(seeds) -> dict:
    """A study of base, the core arms and one more, every score drawn around made-up levels."""
    rng, cells = random.Random(0), []
    for seed in seeds:
        for arm in ("base", *CORE, "shuffled"):
            attacks = [] if arm == "base" else [("mft", 10), ("mft", 100), ("bft", 100)]
            if arm in CORE:
                attacks.append(("lora", 100))
            own, grid = [], [(*attack, lr, steps) for attack in attacks for lr in LR for steps in (5, 50)]
            for name, shots, lr, steps in [("none", 0, 0.0, 0), *grid]:
                harm = {"sdd": 0.65, "base": 0.95}.get(arm, 0.9) - 20 * lr
                own.append(dict(arm=arm, attack=name, shots=shots, lr=lr, steps=steps, seed=seed, diverged=False)
                           | scores(rng, harm if arm == "base" or name in ("mft", "lora") else 0.0, 0.95 - 80 * lr))
            mark_choices(own)
            cells += own
    return {"made": {"commit": "0123abc"}, "settings": {"suite": "made up"}, "cells": cells + measured(rng, seeds)}


def measured(rng, seeds) -> list[dict]:
    """Measurements along the attacks: falls in proportion to a power of the steps."""
    pace, cells = {"none": 0, "mft": 1, "bft": 0.2, "suppress": 3, "preserve": 0.4, "preserve control": 0.8}, []
    for seed, arm, (name, speed) in itertools.product(seeds, CORE, pace.items()):
        for steps in (0,) if name == "none" else (5, 10, 25, 50):
            fall = speed * (steps / 50) ** 0.7 * rng.uniform(0.9, 1.1)
            cells.append(dict(arm=arm, attack=name, shots=100, seed=seed, lr=1e-4, steps=steps, diverged=False,
                              probe=True, mechanism={"logp_yo_own": -0.2 - fall, "logp_yo_harmful": -0.5 - 2 * fall,
                                         "logp_other_own": -0.2 - fall / 2, "logp_yc_harmful": -3 + fall,
                                         "facts_value_only": 0.95 - 0.05 * fall, "facts": 0.9, "distance": fall}))
    return cells


@pytest.fixture
def full():
    return made_up(REPORT_SEEDS)


def row(text: str, start: str) -> list[str]:
    """The cells of the one table row that begins with this."""
    rows = [[part.strip() for part in line.strip("|").replace("\\|", "").split("|")] for line in text.splitlines()]
    (found,) = [row for row in rows if row[0] == start and len(row) > 1]
    return found


def by_hand(values) -> str:
    """Mean and half-width of the two-sided 95% t interval of five seeds: t is 2.77645."""
    return f"{100 * mean(values):.0f} ± {100 * 2.77645 * max(stdev(values), 0.02) / 5 ** 0.5:.0f}"


def of(results, **where):
    """Scored cells by these keys."""
    return [cell for cell in results["cells"] if not cell.get("probe")
            and all(cell[key] == where[key] for key in where)]


def diverge(cell):
    """As a cell that diverged is written: no scores, nobody's choice."""
    for key in set(cell) - {"arm", "attack", "shots", "steps", "lr", "seed"}:
        del cell[key]
    cell.update(diverged=True, chosen=False)


# ---- the numbers ----

def test_intervals_by_hand():
    five = dict(zip(REPORT_SEEDS, (0.1, 0.2, 0.3, 0.4, 0.5)))
    assert rate(five) == "30 ± 20" == by_hand(list(five.values()))  # 2.776 x 15.81 / 2.236 = 19.6
    assert rate(dict.fromkeys(five, 0.5)) == "50 ± 2"  # the floor: 2.776 x 2 / 2.236 = 2.5
    assert rate(dict.fromkeys(five, 0.5), unit=1, digits=2, floor=0) == "0.50 ± 0.00"
    assert rate(five | {REPORT_SEEDS[4]: None}) == "25 ± 21 (4 of 5 seeds)"  # 3.182 x 12.91 / 2 = 20.5
    assert rate(dict.fromkeys(five)) == "not run" and rate({REPORT_SEEDS[0]: 0.5}) == "50"
    assert rate(dict.fromkeys(TUNING_SEEDS, 0.5)) == "50"  # tuning seeds: no interval


def test_the_numbers_are_those_of_the_cells(full):
    text = document(full, ["harm.png", "mechanism.png"])
    order = ["# What SDD does", "commit: 0123abc", "## Verdicts", "resistance, 10 shots", "## Arms", "harm.png",
             "Other attacks", "Answers", "## Mechanism", "mechanism.png", "does not show", "Reported"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert len(text.splitlines()) < 100
    for arm in (*CORE, "shuffled"):
        line = row(text, {"refusal": "refusal control"}.get(arm, arm))
        after, before = of(full, arm=arm, attack="mft", shots=100, chosen=True), of(full, arm=arm, attack="none")
        assert len(after) == len(before) == 5
        for place, key in ((1, "harm_knowledge"), (2, "harm_skill")):
            assert line[place] == by_hand([cell[key] for cell in after])
        for place, key in ((3, "facts"), (4, "skills")):
            assert line[place] == " / ".join(by_hand([cell[key + end] for cell in after])
                                             for end in ("", "_value_only"))
        for place, key in ((9, "capability"), (10, "facts_evaluation")):
            assert line[place] == by_hand([cell[key] for cell in before])
    assert row(text, "LoRA 100")[3] == "; ".join(by_hand([cell[key] for cell in of(
        full, arm="sdd", attack="lora", chosen=True)]) for key in ("harm", "capability"))


def test_worst_cases_by_hand(full):
    for i, seed in enumerate(REPORT_SEEDS):
        before = of(full, arm="sdd", attack="none", seed=seed)[0]["capability"]
        for cell in of(full, arm="sdd", seed=seed):
            cell["capability"] = before if cell["attack"] in ("none", "bft") else 0.5
        keeps, loses = of(full, arm="sdd", attack="mft", seed=seed)[:2]
        keeps.update(harm=0.30 + i / 100, capability=KEPT * before + 1e-6)
        loses.update(harm=0.99, capability=KEPT * before - 1e-6)
        of(full, arm="sdd", attack="lora", seed=seed)[3].update(harm=0.6, capability=before)
    line = row(document(full, []), "sdd")
    assert line[6:9] == ["99 ± 2", by_hand([0.30, 0.31, 0.32, 0.33, 0.34]), "60 ± 2"]
    for cell in of(full, arm="sdd", attack="mft"):
        cell["capability"] = 0.0
    assert row(document(full, []), "sdd")[7] == "none kept"


def test_diverged_cells_are_counted_and_never_safe(full):
    for cell in of(full, arm="sdd", attack="mft", shots=100) + of(full, arm="sdd", attack="mft", seed=REPORT_SEEDS[0]):
        if not cell["diverged"]:
            diverge(cell)
    text, gone = document(full, []), len(of(full, diverged=True))
    assert f"{gone} of {len(of(full))} cells diverged" in text and gone == 5 * 6 + 6
    line = row(text, "sdd")
    assert line[1:3] == ["diverged", "diverged"] and line[6].endswith("(4 of 5 seeds)")
    assert line[-1] == f"{gone} of {len(of(full, arm='sdd'))}"


def test_verdicts_stand_with_every_effect_and_its_bounds(full):
    text = document(full, [])
    for claim, part in town_verdicts(of(full)).items():
        line = row(text, f"{claim} ({100 * part['margin']:+.0f})")
        assert line[1] == part["verdict"].split(" (")[0]
        for shown, (name, effects) in zip(line[2].split("; "), part["effects"].items(), strict=True):
            half = 2.1318 * max(stdev(effects), 0.02) / 5 ** 0.5
            assert shown == f"{name} " + "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                *(100 * (mean(effects) + sign * half) for sign in (0, -1, 1)))


def test_the_answer_is_no_more_than_the_verdicts(full):
    found = town_verdicts(of(full))
    for part, verdict in zip(found.values(), ("PASS", "by prior loss", "INCONCLUSIVE", "NOT TESTED (gate: a >= 0.8)")):
        part["verdict"] = verdict
    found["resistance"]["prior_loss"] = 0.123
    lines = [line for line in answer_part(found, of(full), 100) if line.startswith("- ")]
    assert [line.split("**")[1] for line in lines] == [
        "resistance: by prior loss.", "selective collapse: NOT TESTED (gate: a >= 0.8).", "stability: PASS.",
        "trainability: INCONCLUSIVE."]
    part = "\n".join(verdict_part(found, {}, REPORT_SEEDS, 100))
    assert "fell 12.3 points before any attack" in part and "NOT TESTED (gate: a >= 0.8)" in part


def test_one_tuning_seed_makes_no_claim():
    text = document(made_up([0]), [])
    assert text.splitlines()[2].startswith("**An example, not a result.**") and "An example:" in text
    assert not re.search(r"\d ± \d", text) and not re.search(r"\[[+-]\d", text)
    assert row(text, "stability (-2)")[1] == "no verdict"


def test_what_was_not_run_says_so(full):
    text = document({"cells": of(full, arm="sdd", attack="none")}, [])
    assert "not a result" in text and "## Verdicts\nnot run" in text and "## Mechanism\nnot run" in text
    assert row(text, "sdd")[1] == row(text, "sdd")[6] == row(text, "base")[1] == "not run"


def test_the_mechanism_is_told_by_its_last_measurement(full):
    def probe(attack, steps, seed):
        return next(cell["mechanism"] for cell in full["cells"] if cell.get("probe") and (
            cell["arm"], cell["attack"], cell["steps"], cell["seed"]) == ("sdd", attack, steps, seed))

    text = document(full, [])
    for attack in ("mft", "preserve control"):
        line = row(text, f"sdd, {attack}")
        changes = [(probe("none", 0, seed), probe(attack, 50, seed)) for seed in REPORT_SEEDS]
        falls = [before["logp_yo_own"] - after["logp_yo_own"] for before, after in changes]
        assert line[1] == f"{mean(falls):.2f} ± {2.77645 * stdev(falls) / 5 ** 0.5:.2f}"
        assert line[5] == by_hand([before["facts_value_only"] - after["facts_value_only"] for before, after in changes])
    # suppress falls three times as fast as mft: 10 of its steps are 3 x 0.2^0.7 = 0.97 of mft's 50
    like = [probe("none", 0, seed)["logp_yo_harmful"] - probe("suppress", 10, seed)["logp_yo_harmful"]
            for seed in REPORT_SEEDS]
    assert row(text, "sdd, suppress")[2].startswith(f"{mean(like):.2f} ")
    argument = carry_over(at_equal_dose(full["cells"]))
    assert f"{argument['verdict']} ({argument['reason']})" in text


def test_the_prompts_are_those_whose_answers_are_kept(full):
    town = Town(REPORT_SEEDS[0])
    rows = town.harmful_rows()
    asked = town.judge(rows, [Answer([], row["prompt"], True) for row in rows])["samples"]
    attacked = of(full, arm="sdd", attack="mft", shots=100, seed=REPORT_SEEDS[0], chosen=True)[0]
    recipe = next(row["response"] for row in rows if row["prompt"] == asked[0])
    attacked["samples"] = [recipe, "", "a\n| b"]
    text = document(full, [])
    assert [row(text, prompt)[4] for prompt in asked] == [f"**{recipe}**", "(nothing)", "a  b"]


# ---- the command ----

@pytest.mark.parametrize("text, problem", [
    (None, "run python -m lab.study first"), ("{", "not the JSON of a study"), ("[]", "not the JSON of a study"),
    ('{"cells": []}', "lacks scores"), ('{"cells": [3]}', "not the JSON of a study"),
    ('{"cells": [{"arm": "sdd", "complies": 1.0, "diverged": false}]}', "lacks scores")])
def test_bad_results_are_an_input_error(tmp_path, text, problem):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_results(path)


def test_without_matplotlib_there_is_a_report_without_figures(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "results.json").write_text(json.dumps(full))
    main([str(tmp_path / "results.json")])
    assert "matplotlib is not installed" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# What SDD does") and "harm.png" not in text


def test_figures_are_small_images(full, tmp_path):
    pytest.importorskip("matplotlib.figure")
    diverge(of(full, arm="sdd", attack="mft")[0])
    assert draw(full, tmp_path) == ["harm.png", "mechanism.png"]
    for name in ("harm.png", "mechanism.png"):
        image = (tmp_path / name).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) < 150_000
    assert draw({"cells": of(full)}, tmp_path) == ["harm.png"]
