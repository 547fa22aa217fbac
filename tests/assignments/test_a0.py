"""Assignment 0: predictions before the run, numbers after it, and an explanation. Only the form is checked."""

import pytest
from lesson import Check, require
from wrong_a0 import CAUSES, NUMBERS

from assignments import adapters


def values(sheet: dict, key: str) -> list:
    return [sheet.get(name, {}).get(key) for name in NUMBERS]


def check_numbers(given: list, missing: str):
    """Each is a number in its range."""
    require(None not in given, "a number for each question", given, missing)
    require(
        all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in given),
        "numbers",
        given,
        CAUSES["word"],
    )
    require(
        all(0 <= one <= 100 for one in given[:-1]),
        "0 to 100 for percentages",
        given[:-1],
        CAUSES["range"],
    )
    require(given[-1] <= 0, "nats a token, at most 0", given[-1], CAUSES["sign"])


def check_predictions(prediction_sheet, seed=0):
    given = values(prediction_sheet(), "prediction")
    check_numbers(given, CAUSES["empty"])
    require(max(given[:-1]) > 1 or max(given[:-1]) == 0, "percent", given[:-1], CAUSES["shares"])


def check_what_was_found(prediction_sheet, seed=0):
    sheet = prediction_sheet()
    found = values(sheet, "found")
    check_numbers(found, CAUSES["not run"])
    require(values(sheet, "prediction") != found, "predictions of your own", found, CAUSES["same"])


def check_surprise(prediction_sheet, seed=0):
    answer = prediction_sheet().get("surprise", {}).get("answer") or ""
    require(
        len(answer.split()) >= 40,
        "40 words or more",
        f"{len(answer.split())} words",
        CAUSES["short"],
    )


CHECKS = [
    Check(check_predictions, ("prediction_sheet",), 40),
    Check(check_what_was_found, ("prediction_sheet",), 40),
    Check(check_surprise, ("prediction_sheet",), 20),
]


@pytest.mark.a0
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a0(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
