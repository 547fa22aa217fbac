"""Assignment 0: predictions before the run, numbers after it, and an explanation. Only the form is
checked."""

import pytest
from lesson import Check, require
from wrong_a0 import CAUSES, NUMBERS

from assignments import adapters


def numbers(sheet: dict, key: str, missing: str) -> list:
    """The numbers of a sheet, each in its range."""
    given = [sheet[name][key] for name in NUMBERS]
    require(None not in given, "a number for each question", given, missing)
    require({type(one) for one in given} <= {int, float}, "numbers", given, CAUSES["word"])
    *percent, logp = given
    in_range = 0 <= min(percent) and max(percent) <= 100 and logp <= 0
    require(in_range, "0 to 100 percent, nats of at most 0", given, CAUSES["range"])
    return given


def check_predictions(prediction_sheet, seed=0):
    given = numbers(prediction_sheet(), "prediction", CAUSES["empty"])
    require(max(given) > 1 or max(given) == 0, "percent", given, CAUSES["shares"])


def check_what_was_found(prediction_sheet, seed=0):
    found = numbers(prediction_sheet(), "found", CAUSES["not run"])
    predicted = numbers(prediction_sheet(), "prediction", CAUSES["empty"])
    require(predicted != found, "predictions of your own", found, CAUSES["same"])


def check_surprise(prediction_sheet, seed=0):
    words = (prediction_sheet()["surprise"]["answer"] or "").split()
    require(len(words) >= 40, "40 words or more", f"{len(words)} words", CAUSES["short"])


CHECKS = [
    Check(check_predictions, "prediction_sheet", 40),
    Check(check_what_was_found, "prediction_sheet", 40),
    Check(check_surprise, "prediction_sheet", 20),
]


@pytest.mark.a0
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a0(check):
    check.run(adapters)
