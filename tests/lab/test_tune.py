"""Tuning the defence: whose people are looked at, and the rule of the choice."""

import json

import pytest

from lab import protocol
import train
from lab import tune
from data.pairs import town_pairs
from data.town import Town


def test_the_people_set_aside_are_the_defenders_and_are_not_trained_on():
    town, (mine, others) = Town(3), tune.split_people(3)
    for group in ("plain", "defender"):
        assert sorted(mine.groups[group] + others.groups[group]) == sorted(town.groups[group])
        assert len(others.groups[group]) == 8
    pairs, replay = town_pairs(mine, "sdd", 3, 0)
    aside = others.groups["plain"] + others.groups["defender"]
    assert not any(name in row["prompt"] + row["response"] for row in pairs + replay for name in aside)


@pytest.mark.parametrize("facts, wanted", [
    ((0.99, 1.0, 0.985, 1.0, 0.5, 0.99), "lr 0.0003 replay 0.75"),  # the highest lr that loses little
    ((0.99, 1.0, 0.985, 1.0, 0.5, 0.9), "lr 0.0001 replay 0.5"),  # then the least replay
    ((0.9, 0.9, 0.9, 0.93, 0.9, 0.9), "lr 0.0001 replay 0.75")])  # none does: the one that loses least
def test_the_rule(facts, wanted):
    means = {"aligned": {"facts": 1.0, "skills": 0.97}} | {
        f"lr {lr:g} replay {replay:g}": {"facts": facts[2 * i + j], "skills": 0.96}
        for i, lr in enumerate((3e-5, 1e-4, 3e-4)) for j, replay in enumerate((0.5, 0.75))}
    assert tune.choose(means) == wanted
    means[wanted]["skills"] = 0.5
    assert tune.choose(means) != wanted


def test_the_command(quick_town, monkeypatch, capsys):
    monkeypatch.setattr(train, "DEFENCE", train.DEFENCE | dict(steps=1, batch_size=4))
    monkeypatch.setattr(tune, "LR", (1e-4,))
    monkeypatch.setattr(tune, "REPLAY", (0.5, 0.75))
    tune.main(["--seeds", "3"])
    result = json.loads((quick_town / "out/tune.json").read_text())
    assert list(result["scores"][0]) == ["aligned", "lr 0.0001 replay 0.5", "lr 0.0001 replay 0.75"]
    assert result["chosen"] in result["scores"][0] and "chosen: lr" in capsys.readouterr().out
    assert set(protocol.TUNING_SEEDS).isdisjoint(protocol.REPORT_SEEDS)
