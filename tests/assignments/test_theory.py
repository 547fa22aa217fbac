"""The theory: sampled, exact and closed form agree where they should, and the bounds are where they are derived."""

import itertools
import math

import numpy as np
import pytest

from assignments.theory import (
    NONE,
    F,
    Pair,
    argument,
    degrades,
    draw_map,
    exact,
    main,
    nested,
    sampled,
    sweep,
    theorem1_bound,
    weights,
)

POINT = Pair((2, 20), (1, 30))  # Theorem 2's stated conditions hold and ability rises, at p = 0.9
CASES = [
    (Pair((2, 3), NONE), 1.0, 0.9),
    (POINT, 1.0, 0.9),
    (POINT, 0.5, 0.9),
    (POINT, 0.3, 0.7),
    (Pair((3, 8), (2, 12), (1, 4)), 0.5, 0.9),
    (Pair((3, 8), (2, 12), (1, 4)), 0.8, 0.99),
]


def test_the_numbers_that_the_design_quotes():
    single = weights(Pair((2, 3), NONE), 1.0)
    assert (
        round(F(argument(single, 0.9), 0.9), 3) == 0.906 and round(exact(single, 0.9), 3) == 0.865
    )
    before, after = (F(argument(weights(POINT, lam), 0.9), 0.9) for lam in (1.0, 0.5))
    assert (round(before, 3), round(after, 3)) == (0.777, 0.857)


@pytest.mark.parametrize("pair, lam, p", CASES)
def test_the_exact_accuracy_is_that_of_samples_within_their_error(pair, lam, p):
    mean, error = sampled(pair, lam, p, 40_000, seed=3)
    assert 0 < error < 0.003 and abs(mean - exact(weights(pair, lam), p)) < 4 * error


def test_exact_by_hand():
    # n_v 1, n_s 1, p 1: the spurious feature votes for y (1/3), or for another class (2/3), which ties: 1/3 + 1/3
    assert exact([(1.0, 1, 1)], 1.0) == pytest.approx(2 / 3)
    assert exact([(1.0, 0, 2)], 1.0) == pytest.approx(1 / 3)  # by chance, ties split
    assert exact([(1.0, 2, 0)], 0.5) == 1.0


def test_the_covariance_of_one_feature():
    p, rng = 0.8, np.random.default_rng(0)
    votes = np.where(rng.random(400_000) < p, rng.integers(3, size=400_000), 0)  # y is class 0
    d = np.stack([(votes == 0) * 1.0 - (votes == k) for k in (1, 2)])
    assert np.allclose(d.mean(1), 1 - p, atol=0.005)
    expected = [
        [p * (5 - 3 * p) / 3, p * (4 - 3 * p) / 3],
        [p * (4 - 3 * p) / 3, p * (5 - 3 * p) / 3],
    ]
    assert np.allclose(np.cov(d), expected, atol=0.005)


def test_F_is_a_probability_that_rises_and_the_limit_of_the_exact_accuracy():
    values = [F(x, 0.9) for x in np.linspace(-6, 6, 25)]
    assert np.all(np.diff(values) > 0) and values[0] < 1e-4 and values[-1] > 1 - 1e-4
    assert F(0.0, 1.0) == pytest.approx(
        1 / 3, abs=1e-6
    )  # by symmetry, at p = 1 without invariant features
    assert F(0.7, 0.6, k=2) == pytest.approx(
        0.5 * math.erfc(-0.7 / math.sqrt(0.6 * (2 - 0.6)) / math.sqrt(2))
    )
    gaps = [
        F(argument([(1.0, 2, n)], 0.9), 0.9) - exact([(1.0, 2, n)], 0.9) for n in (3, 10, 40, 160)
    ]
    assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 0.004


@pytest.mark.parametrize("pair", [Pair((4, 6), (2, 0)), Pair((5, 7), (3, 2), (1, 2))])
@pytest.mark.parametrize("p, lam", [(0.9, 0.5), (0.8, 0.3), (0.95, 0.7)])
def test_theorem_1_holds_below_its_bound_only(pair, p, lam):
    bound = theorem1_bound(pair, p, lam)
    lowest = min(
        range(pair.star[1], 2000),
        key=lambda n: argument(weights(pair._replace(star=(pair.star[0], n)), lam), p),
    )
    assert abs(lowest - max(bound, pair.star[1])) <= 1  # a bound below the start: it never falls


def test_theorem_1_without_overlap_is_the_formula_of_the_docstring():
    assert theorem1_bound(POINT, 0.9) == pytest.approx((2 + 1) / 0.1 - 20)


def test_without_overlap_the_condition_is_exact():
    for vb, sb, vs, ss in itertools.product((1, 3, 9), (2, 8, 30), (1, 2, 5), (4, 20, 60)):
        a = [v + 0.1 * s for v, s in ((vb, sb), (vs, ss))]
        assert degrades(Pair((vb, sb), (vs, ss)), 0.9) == (a[1] / a[0] < math.sqrt(1 + ss / sb) - 1)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_nested_features_degrade_where_the_bound_says_and_not_everywhere(p):
    found = sweep(p, nested)
    enough = [
        (pair, falls)
        for pair, falls in found
        if (1 - p) * (pair.star[1] - pair.bar[1]) <= 3 * (pair.bar[0] - pair.star[0])
    ]
    assert len(enough) > 1000 and all(falls for _, falls in enough)
    assert all(pair.bar[0] > pair.star[0] and pair.bar[1] < pair.star[1] for pair, _ in found)
    assert any(not falls for _, falls in found) == (p == 0.5)


def test_the_stated_conditions_do_not_suffice():
    falls = [falls for _, falls in sweep(0.9, Pair)]
    assert any(falls) and not all(falls) and not degrades(POINT, 0.9)
    assert exact(weights(POINT, 0.5), 0.9) > exact(
        weights(POINT, 1.0), 0.9
    )  # and not by the limit alone


def test_the_command(capsys):
    main(["--seed", "1"])
    out = capsys.readouterr().out
    assert all(f"\n{n}. " in "\n" + out for n in (1, 2, 3, 4)) and "0.777 -> 0.857" in out


def test_the_map(tmp_path):
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError:
        pytest.skip("needs matplotlib")
    draw_map(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
