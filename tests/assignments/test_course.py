"""The course's tests, tested: classic mistakes fail with their message, right solutions pass. The
default is a sample; --full tries everything."""

import importlib

import pytest
from lesson import Lesson, full_marks

TESTS = {f"a{i}": importlib.import_module(f"test_a{i}") for i in range(7)}
ANSWERS = {f"a{i}": importlib.import_module(f"wrong_a{i}") for i in range(7)}


def cases(kind: str, every: int) -> list:
    """pytest parameters: one answer of `every` by default, the others with --full."""
    found = []
    for name, answers in ANSWERS.items():
        for answer in getattr(answers, kind):
            marks = pytest.mark.full if len(found) % every else ()
            case = f"{name}-{answer[0]}-{len(found)}"
            found.append(pytest.param(name, *answer, marks=marks, id=case))
    return found


def lessons(assignment: str, adapter: str, function, seed: int) -> list[str]:
    """What the tests of an assignment say of a function in the place of one adapter."""
    found = []
    for check in TESTS[assignment].CHECKS:
        if adapter not in check.adapters:
            continue
        given = [function if name == adapter else None for name in check.adapters]
        try:
            check.function(*given, seed=seed)
        except Lesson as lesson:
            found.append(str(lesson))
    return found


@pytest.mark.parametrize("assignment, adapter, function, message", cases("WRONG", every=6))
def test_a_classic_mistake_fails_with_its_message(assignment, adapter, function, message):
    found = lessons(assignment, adapter, function, seed=1)
    assert any(message in text for text in found), found
    assert not any("not recognised" in text for text in found)


@pytest.mark.parametrize("assignment, adapter, function", cases("RIGHT", every=4))
def test_a_right_solution_passes_however_it_is_written(assignment, adapter, function):
    for seed in (1, 2, 3, 4, 5):
        assert lessons(assignment, adapter, function, seed) == []


@pytest.mark.parametrize("assignment", TESTS)
def test_every_adapter_has_mistakes_and_the_points_sum_up(assignment):
    checks = TESTS[assignment].CHECKS
    assert set(full_marks(checks).values()) == {100}
    tested = {name for check in checks for name in check.adapters}
    assert {mistake.adapter for mistake in ANSWERS[assignment].WRONG} == tested
