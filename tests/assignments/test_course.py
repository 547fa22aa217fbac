"""The course's tests, tested: classic mistakes fail with their message, right solutions pass. The default is a sample;
--full tries everything."""

import pytest
import test_a0
import test_a1
import test_a2
import test_a3
import test_a4
import test_a5
import test_a6
import wrong_a0
import wrong_a1
import wrong_a2
import wrong_a3
import wrong_a4
import wrong_a5
import wrong_a6
from lesson import Lesson, full_marks

ASSIGNMENTS = {
    name: (tests.CHECKS, wrong.WRONG, wrong.RIGHT)
    for name, tests, wrong in (
        ("a0", test_a0, wrong_a0),
        ("a1", test_a1, wrong_a1),
        ("a2", test_a2, wrong_a2),
        ("a3", test_a3, wrong_a3),
        ("a4", test_a4, wrong_a4),
        ("a5", test_a5, wrong_a5),
        ("a6", test_a6, wrong_a6),
    )
}


def sample(cases: list, every: int) -> list:
    """pytest parameters: one of `every` by default, the others with --full."""
    return [
        pytest.param(*case, id=f"{case[0]}-{i}", marks=() if i % every == 0 else pytest.mark.full)
        for i, case in enumerate(cases)
    ]


def lessons(assignment: str, adapter: str, function, seed: int) -> list[str]:
    """What the tests of an assignment say of a function in the place of one adapter."""
    found = []
    for check in ASSIGNMENTS[assignment][0]:
        if adapter in check.adapters:
            try:
                check.function(
                    *[function if name == adapter else None for name in check.adapters], seed=seed
                )
            except Lesson as lesson:
                found.append(str(lesson))
    return found


@pytest.mark.parametrize(
    "assignment, mistake",
    sample(
        [(name, mistake) for name, (_, wrong, _) in ASSIGNMENTS.items() for mistake in wrong],
        every=6,
    ),
)
def test_a_classic_mistake_fails_with_its_message(assignment, mistake):
    found = lessons(assignment, mistake.adapter, mistake.function, seed=1)
    assert any(mistake.message in text for text in found), found
    assert not any("not recognised" in text for text in found)


@pytest.mark.parametrize(
    "assignment, adapter, function",
    sample(
        [(name, *right) for name, (_, _, rights) in ASSIGNMENTS.items() for right in rights],
        every=4,
    ),
)
def test_a_right_solution_passes_however_it_is_written(assignment, adapter, function):
    for seed in (1, 2, 3, 4, 5):
        assert lessons(assignment, adapter, function, seed) == []


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_there_are_five_mistakes_and_two_right_solutions_at_least(assignment):
    checks, wrong, right = ASSIGNMENTS[assignment]
    assert len(wrong) >= 5 and len(right) >= 2 and set(full_marks(checks).values()) == {100}
    assert {mistake.adapter for mistake in wrong} == {
        name for check in checks for name in check.adapters
    }
