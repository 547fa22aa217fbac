"""The course's tests, tested: classic mistakes fail with their message, right solutions pass. The
default is a sample of the mistakes; --full tries all."""

import importlib

import pytest
from lesson import Lesson

from assignments import adapters

TESTS = {f"a{i}": importlib.import_module(f"test_a{i}") for i in range(7)}
ANSWERS = {f"a{i}": importlib.import_module(f"wrong_a{i}") for i in range(7)}
WRONG = []
RIGHT = []  # where a test checks properties: compared with a slow solution the project is enough
for name, answers in ANSWERS.items():
    RIGHT += [(name, *answer) for answer in getattr(answers, "RIGHT", [])]
    for wrong in answers.WRONG:
        marks = pytest.mark.full if len(WRONG) % 6 else ()
        case = f"{name}-{wrong.adapter}-{len(WRONG)}"
        WRONG.append(pytest.param(name, *wrong, marks=marks, id=case))


def lessons(assignment: str, adapter: str, function, seed: int) -> list[str]:
    """What the tests of an assignment say of a function in the place of one adapter."""
    found = []
    for check in TESTS[assignment].CHECKS:
        if check.adapter != adapter:
            continue
        try:
            check.function(function, seed=seed)
        except Lesson as lesson:
            found.append(str(lesson))
    return found


@pytest.mark.parametrize("assignment, adapter, function, message", WRONG)
def test_a_classic_mistake_fails_with_its_message(assignment, adapter, function, message):
    found = lessons(assignment, adapter, function, seed=1)
    assert any(message in text for text in found), found
    assert not any("not recognised" in text for text in found)


@pytest.mark.parametrize("assignment, adapter, function", RIGHT)
def test_a_right_solution_passes_however_it_is_written(assignment, adapter, function):
    for seed in (1, 2, 3, 4, 5):
        assert lessons(assignment, adapter, function, seed) == []


@pytest.mark.parametrize("assignment", TESTS)
def test_the_project_passes_at_other_seeds(assignment):
    for seed in (1, 2, 3):
        for check in TESTS[assignment].CHECKS:
            check.run(adapters, seed)


@pytest.mark.parametrize("assignment", TESTS)
def test_every_adapter_has_mistakes(assignment):
    tested = {check.adapter for check in TESTS[assignment].CHECKS}
    assert {mistake.adapter for mistake in ANSWERS[assignment].WRONG} == tested
