"""The page of an effects file, on made-up cells."""

import json

import pytest
from test_verdicts import made_up

from lab.report import chosen, main, page
from lab.verdicts import harm_lines, verdict_lines, verdicts
from nanosdd.tables import average


def stamped(**changes):
    return [
        cell | {"commit": "abc", "protocol": "def", "text": "no score"}
        for cell in made_up(**changes)
    ]


def test_means_are_of_the_choices():
    cells = stamped()
    next(cell for cell in cells if (cell["arm"], cell["attack"]) == ("sdd", "none"))["facts"] = 0.37
    found = chosen(cells)
    assert (
        len(found["base", "none"]) == len(found["sdd", "user"]) == 15
        and ("base", "mft") not in found
    )
    assert average(found["sdd", "none"])["facts"] == pytest.approx((0.37 + 14 * 0.97) / 15)
    assert "text" not in average(found["sdd", "none"])


def test_the_page_holds_verdicts_harm_and_scores():
    cells = stamped()
    text = page(cells)
    for line in verdict_lines(verdicts(cells)) + harm_lines(cells):
        assert line in text
    assert "abc/def" in text and "ctrap, mft" in text and "carry the damage" not in text
    assert "base, as released" in text and "15 seeds" in text


def test_measured_cells_are_told_apart():
    measured = {
        "arm": "sdd",
        "seed": 10,
        "attack": "mft",
        "steps": 50,
        "shots": 100,
        "lr": 3e-4,
        "draw": 0,
        "diverged": False,
        "commit": "abc",
        "protocol": "def",
        "mechanism": {"distance": 1.5},
    }
    text = page([*stamped(), measured])
    assert "verdict: INCONCLUSIVE" in text and "not measured, or not finite" in text


def test_the_command_writes_beside_the_file(tmp_path, capsys):
    (tmp_path / "effects.json").write_text(json.dumps(stamped()))
    main([str(tmp_path / "effects.json")])
    assert (tmp_path / "effects.md").read_text() == page(stamped())
    pytest.importorskip("matplotlib")
    assert (tmp_path / "effects.png").read_bytes()[:4] == b"\x89PNG"
