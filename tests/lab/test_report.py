"""The page of an effects file, on made-up cells."""

import json

import pytest
from test_verdicts import made_up

from lab.report import chosen, main, page
from lab.verdicts import harm_lines, secondary_lines, verdict_lines
from nanosdd.errors import InputError


def stamped():
    return [cell | {"commit": "abc", "protocol": "def"} for cell in made_up()]


def test_the_chosen_cells_are_one_for_each_seed():
    found = chosen(stamped())
    assert len(found["base", "none"]) == len(found["sdd", "user"]) == 15
    assert ("base", "mft") not in found
    assert found["sdd", "any"][3]["attack"] == "mft"


def test_the_page_holds_verdicts_harm_and_scores():
    cells = stamped()
    cells[1]["facts"] = 0.07  # of aligned as released, on the first of 15 seeds
    text = page(cells)
    for lines in (verdict_lines(cells), secondary_lines(cells), harm_lines(cells)):
        assert "\n".join(lines) in text
    assert "abc/def" in text
    assert "ctrap, mft" in text
    scores = next(line for line in text.splitlines() if line.startswith("aligned, as released"))
    assert scores.endswith("15 seeds")
    assert "91/99" in scores


def test_the_command_writes_beside_the_file(tmp_path):
    (tmp_path / "effects.json").write_text(json.dumps(stamped()))
    main([str(tmp_path / "effects.json")])
    assert (tmp_path / "effects.md").read_text() == page(stamped())
    pytest.importorskip("matplotlib")
    assert (tmp_path / "effects.png").read_bytes()[:4] == b"\x89PNG"


def test_a_page_that_was_edited_by_hand_is_never_overwritten(tmp_path):
    (tmp_path / "effects.json").write_text(json.dumps(stamped()))
    (tmp_path / "effects.md").write_text("# Effects\n\nWritten by lab/report.py. And by me.\n")
    with pytest.raises(InputError, match="effects.md exists; delete it"):
        main([str(tmp_path / "effects.json")])
    assert "And by me." in (tmp_path / "effects.md").read_text()
