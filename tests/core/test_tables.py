"""Tables, samples, and the log of a run."""

import pytest

from data.answers import Answer
from nanosdd.errors import Diverged
from nanosdd.tables import answers_text, average, samples_text, text_table, update_text
from nanosdd.train_log import TrainLog


def test_a_table_aligns_names_to_the_left_and_scores_to_the_right():
    scores = {"harm": 0.789, "half": 0.5, "benign_nll": 2.345}
    columns = {"harm": ("harm", "half"), "nll": "benign_nll", "percents": "half"}
    rows = [("sdd", scores, "a note"), ("aligned", {"harm": 0.0, "benign_nll": None}, "")]
    assert text_table("percent", columns, rows, "notes").splitlines() == [
        "percent   harm   nll  percents  notes",
        "sdd      79/50  2.35        50  a note",
        "aligned      0",
    ]


def test_an_average_is_of_the_scores_that_all_cells_have():
    cells = [{"harm": 0.2, "nll": 1.0, "steps": 5}, {"harm": 0.4, "steps": 7}]
    assert average(cells) == {"harm": pytest.approx(0.3)}


def test_answers_before_and_after():
    after = [Answer([1], "a\n b\x1b", True)]
    text = "prompt: Who?\nafter:  a b\\x1b\n\n"
    assert samples_text(["Who?"], None, after) == text
    assert "before: a b" in samples_text(["Who?"], after, after)
    cell = {"arm": "sdd", "attack": "none", "shots": 0, "seed": 3, "draw": 0, "chosen": True}
    cells = [cell | {"answers": ["no"]}]
    cells.append(cell | {"attack": "mft", "shots": 9, "answers": ["yes"]})
    for change in ({"seed": 4}, {"draw": 1}, {"chosen": False}, {"attack": "bft"}, {"shots": 5}):
        cells.append(cells[1] | change | {"answers": ["hidden"]})
    lines = [line.split() for line in answers_text(cells, ["Who?"]).splitlines()]
    assert lines == [["Who?"], ["sdd", "none", "0", "no"], ["sdd", "mft", "9", "yes"], []]


def test_an_update_that_bf16_loses_is_a_warning():
    assert "cosine 0.95" in (said := update_text(1.0, 0.9, 0.95)) and "warning" not in said
    assert "warning: in bf16" in update_text(1.0, 0.1, 0.3)


def log_of(steps, losses, norm=1.0, saved=None):
    """(lines, log) of a run with these losses, 2 response tokens a step."""
    lines = []
    log = TrainLog(steps, saved, lines.append)
    for step, loss in enumerate(losses, 1):
        log.add(step, 0.1, {"loss": loss, "grad_norm": norm, "response_tokens": 2, "tokens": 5})
    return lines, log


def test_an_entry_is_the_mean_of_its_steps_also_after_a_pause():
    lines, log = log_of(20, [3.0, 1.0, 4.0])
    assert len(lines) == 1 and "step     2/20  loss 2.0000" in lines[0]
    saved = log.state()
    saved["seen"][0]["seconds"] = 50.0
    log = TrainLog(20, saved, lines.append)
    log.add(4, 0.1, {"loss": 2.0, "grad_norm": 7.0, "response_tokens": 2, "tokens": 5})
    entry = log.entries[1]
    assert (entry["step"], entry["loss"], entry["grad_norm"]) == (4, 3.0, 7.0)
    assert (entry["response_tokens"], entry["tokens"]) == (4, 10) and 50 < entry["seconds"] < 60
    assert len(log.text().splitlines()) == 2


def test_a_run_that_gets_worse_is_stopped():
    log_of(100, [2.0] * 10 + [2.9] * 30 + [2.4] * 60)
    with pytest.raises(Diverged, match="the loss rose from 2.00 to 2.60"):
        log_of(100, [2.0] * 50 + [2.6] * 10)
    with pytest.raises(Diverged, match="the gradient is 0 at step 10"):
        log_of(100, [6.0] * 10, norm=0.0)
    assert "the loss hardly fell" in log_of(40, [2.0] * 40)[0][-1]
    assert "the loss hardly fell" not in log_of(40, [2.0] * 20 + [1.0] * 20)[0][-1]
