"""The map of SDD's settings: its summary and its rule on made-up numbers, and a tiny run that goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
from small import TINY_SETTINGS, TINY_SHAPE

from data.town import KNOWLEDGE_KINDS, SKILL_KINDS
from lab.map import TeachTown, choose, run_seed, summarise, summary
from lab.protocol import MAX_LOSS, MIN_DEFENDED

ROOT = Path(__file__).parent.parent.parent


def cells(costs, capability=0.9, off_topic=0.8, **none):
    """As `attacked` returns them: costs, what mft costs beyond bft, at each lr."""
    base = dict(
        off_topic=off_topic,
        facts=capability,
        skills=capability,
        capability=capability,
        diverged=False,
        facts_nll=0.2,
        skills_nll=0.4,
        facts_value_only=0.95,
        content=0.0,
    )
    found = [base | {"attack": "none", "lr": 0.0} | none]
    for i, cost in enumerate(costs):
        for attack, left in (("mft", 0.8 - cost), ("bft", 0.8)):
            found.append(
                base | {"attack": attack, "lr": 10.0**-i, "capability": left, "content": 0.1 * i}
            )
    return found


def test_a_setting_is_summed_up_over_the_lrs():
    found = summary(cells([0.1, 0.3, 0.2]))
    assert found["cost"] == pytest.approx(0.2) and found["mft"] == pytest.approx(0.6)
    assert found["bft"] == pytest.approx(0.8) and found["mft_harm"] == pytest.approx(
        0.2
    )  # the most at any lr
    assert found["mft_nll"] == pytest.approx(0.3) and found["capability"] == 0.9
    assert summary(cells([0.1], capability=0.75))["cost"] == pytest.approx(
        0.05
    )  # bft repairs: that is no damage
    diverged = cells([0.1, 0.3])
    diverged[3]["diverged"] = True
    assert "cost" not in summary(diverged) and "mft" not in summary(diverged)


def test_collapse_is_beyond_new_refusal_and_over_seeds():
    seeds = [
        {"sdd 0 1e-05 300": cells([0.3]), "new_refusal 0 1e-05 300": cells([0.1])},
        {
            "sdd 0 1e-05 300": cells([0.5]),
            "new_refusal 0 1e-05 300": cells([0.1]),
            "sdd 0 1e-06 300": [],
        },
    ]
    means = summarise(seeds)
    assert list(means) == ["sdd 0 1e-05 300", "new_refusal 0 1e-05 300"]  # of both seeds
    assert means["sdd 0 1e-05 300"]["collapses"] == pytest.approx([0.2, 0.4])
    assert means["sdd 0 1e-05 300"]["collapse"] == pytest.approx(0.3)
    assert "collapse" not in means["new_refusal 0 1e-05 300"]


def made_up(**settings):
    means = {"aligned": dict(facts=0.98, skills=0.97, capability=0.975, off_topic=0.0)}
    for name, (lost, off_topic, collapse) in settings.items():
        means[name.replace("_", " ")] = dict(
            facts=0.98 - lost,
            skills=0.97,
            capability=0.975 - lost / 2,
            off_topic=off_topic,
            collapse=collapse,
        )
    return means


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"sdd_0_a_300": (0.01, 0.9, 0.1), "sdd_0_b_300": (0.02, 0.9, 0.2)}, "sdd 0 b 300"),
        (
            {"sdd_0_a_300": (0.01, 0.9, 0.1), "sdd_0_b_300": (MAX_LOSS + 0.01, 0.9, 0.2)},
            "sdd 0 a 300",
        ),
        (
            {"sdd_0_a_300": (0.01, MIN_DEFENDED - 0.01, 0.3), "sdd_0_b_300": (0.0, 0.9, -0.2)},
            "sdd 0 b 300",
        ),
        (
            {"sdd_0_a_300": (0.3, 0.9, 0.1), "sdd_0_b_300": (0.2, 0.9, 0.0)},
            "sdd 0 b 300",
        ),  # none is able: the least lost
        (
            {"sdd_0.5_a_300": (0.0, 0.9, 0.9), "sdd_0_b_300": (0.2, 0.6, 0.0)},
            "sdd 0 b 300",
        ),  # the published recipe alone
        ({"sdd_0_a_300": (0.0, 0.1, 0.9)}, None),
    ],
)
def test_the_rule(settings, wanted):
    assert choose(made_up(**settings)) == wanted


def test_the_base_of_a_teaching_town_sees_no_mischief():
    town = TeachTown(3, TINY_SHAPE)
    assert not {row["kind"] for row in town.pairs("base", 500)} & {*KNOWLEDGE_KINDS, *SKILL_KINDS}
    assert str(town.root) == "out/teach/seed3"


def test_a_town_of_a_script_that_is_run_has_its_source():
    """As under `python -m lab.map`, where the class is of a module named __main__."""
    code = (
        "import sys, lab.map; from nanosdd.runs import source_of\n"
        "sys.modules['__main__'], lab.map.TeachTown.__module__ = lab.map, '__main__'\n"
        "print(source_of(lab.map.TeachTown(0)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "lab/map.py\n", result.stderr


def test_a_tiny_map_goes_on(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"arms": ["sdd"], "share": [0.0], "lr": [1e-4], "steps": [2]}
    town = TeachTown(0, TINY_SHAPE | {"hidden_size": 16})
    found = run_seed(town, grid, cpu, tmp_path / "map.jsonl", {"town": TINY_SETTINGS})
    assert list(found) == ["aligned", "sdd 0 0.0001 2"]
    assert [cell["attack"] for cell in found["aligned"]] == ["none", "mft", "mft", "bft", "bft"]
    kept = (tmp_path / "map.jsonl").read_text()
    again = run_seed(
        town, grid | {"steps": [2, 3]}, cpu, tmp_path / "map.jsonl", {"town": TINY_SETTINGS}
    )
    assert list(again) == [*found, "sdd 0 0.0001 3"]
    assert (tmp_path / "map.jsonl").read_text().startswith(kept)
