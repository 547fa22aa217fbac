"""The theory behind SDD, sampled and solved: when does fine-tuning on spurious features take
ability away?

    python assignments/theory.py      the four tables, in seconds

The data model is that of Lin et al. 2023, "Spurious Feature Diversification Improves
Out-of-distribution Generalization" (arXiv 2309.17230), and Theorems 1 and 2 are SDD's. All three
are known here from summaries (second-hand), so their wording is reconstructed; what follows from it
is derived below.

**The data.** An example has one of K classes, y. Every feature votes for one class. An invariant
feature votes for y. A spurious feature does so in training; out of distribution (OOD) it votes,
independently of all others given y, for y with probability 1 - p, and otherwise for one of all K
classes at random, y among them. So it votes for y with q = 1 - p + p/K, for each other class with
p/K. *Ability* is OOD accuracy.

**A model** selects n_v invariant and n_s spurious features and adds up their votes with a linear
head: f = (features, head). It answers the class with the most votes; ties are split at random.

**Fine-tuning** is read as an ensemble in weight space of the released model (bar), with weight
lambda, and the attacker's optimum (star), with 1 - lambda: features and head are both averaged, so
that a feature of bar alone counts lambda * lambda, of star alone (1 - lambda)^2, and a shared one
1. n_vo and n_so features are shared.

**The closed form.** Let D_k = votes for y minus votes for class k != y. One spurious feature adds
d_k to it: 1 if it votes for y, -1 for k, else 0. With r = p/K:

    E d_k       = q - r                     = 1 - p
    Var d_k     = q + r - (1 - p)^2         = p (K + 2 - p K) / K
    Cov d_k d_l = E 1[y] - (1 - p)^2        = p (K + 1 - p K) / K =: c

(k != l: a vote for k is none for l)

so Var = c + p/K, and the normal limit of D is a + sqrt(n_s) (sqrt(c) G + sqrt(p/K) H_k) with
independent standard normals G, H_k, and a = n_v + (1 - p) n_s. All D_k are above 0 with probability
F_p(a / sqrt(n_s)), where

    F_p(x) = integral over g of phi(g) Phi((x + sqrt(c) g) / sqrt(p/K))^(K-1).

With feature weights w the argument is (sum of w a) / sqrt(sum of w^2 over spurious features); for
lambda = 1/2 that is (a_bar + a_star + 2 a_o) / sqrt(n_s_bar + n_s_star + 14 n_so), where a_bar,
a_star and a_o are the a of bar's, of star's and of the shared features. F_p increases, so arguments
can be compared in its place.

**Theorem 1's range.** The theorem (second-hand): the more spurious features star has, the lower the
accuracy of the attacked model. Let u = (1 - lambda)^2, n the unshared spurious features of star, A
and B the other terms of the sums: the argument is (A + u (1-p) n) / sqrt(B + u^2 n). Its derivative
has the sign of u (1-p) (B + u^2 n) - u^2 (A + u (1-p) n) / 2, and is negative only while n < A / (u
(1-p)) - 2 B / u^2. Without overlap at lambda = 1/2: n_s_star < (n_v_bar + n_v_star) / (1 - p) -
n_s_bar. Beyond the bound more spurious features *help*: they are many weak votes for the right
class.

**Theorem 2** (second-hand): n_v_bar > n_v_star and n_s_bar < n_s_star imply that ability falls,
ensemble < bar. These conditions, as they are reconstructed here, do not suffice. At lambda = 1/2
without overlap it falls if and only if (a_bar + a_star) / sqrt(n_s_bar + n_s_star) < a_bar /
sqrt(n_s_bar), that is a_star / a_bar < sqrt(1 + n_s_star / n_s_bar) - 1. Where the smaller set is
nested in the larger (n_vo = n_v_star, n_so = n_s_bar), (1-p) (n_s_star - n_s_bar) <= 3 (n_v_bar -
n_v_star) is enough: then the numerator is at most 4 a_bar, and the denominator above 4
sqrt(n_s_bar).

**What it says of SDD.** bar is the released model, star the optimum on harmful answers. The paper's
reading: SDD has taught bar features that star lacks, and star is full of spurious ones, so that
their average is worse than bar. What is invariant or spurious in a real model nobody has measured.
Three questions: (1) In table 1, lambda 0.5 helps where 0 would not: why does an ensemble have more
ability than either model? (2) In table 3, why do more spurious features help beyond the bound? (3)
Which two numbers would you measure in a language model to say that Theorem 2 applies to it?
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanosdd.errors import run_script  # noqa: E402

K = 3
NONE = (0, 0)  # no shared features


class Pair(NamedTuple):
    """(invariant, spurious) features of the released and the attacker's model, and of both."""

    bar: tuple[int, int]
    star: tuple[int, int]
    shared: tuple[int, int] = NONE


def weights(pair: Pair, lam: float) -> list[tuple[float, int, int]]:
    """(weight, invariant, spurious features) of the ensemble's groups: bar's, star's, shared."""
    (vb, sb), (vs, ss), (vo, so) = pair
    return [(lam**2, vb - vo, sb - so), ((1 - lam) ** 2, vs - vo, ss - so), (1.0, vo, so)]


def argument(groups, p: float) -> float:
    """What F_p is taken of; infinite without spurious features."""
    mean = sum(w * (v + (1 - p) * s) for w, v, s in groups)
    variance = sum(w * w * s for w, _, s in groups)
    return mean / math.sqrt(variance) if variance else math.inf


def F(x: float, p: float, k: int = K) -> float:
    """F_p(x), as a sum over 2,001 points (its error is far below 1e-6); p in (0, 1]."""
    g = np.linspace(-9, 9, 2001)
    inner = (x + math.sqrt(p * (k + 1 - p * k) / k) * g) / math.sqrt(p / k)
    cdf = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in inner])
    density = np.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    return float((density * cdf ** (k - 1)).sum() * (g[1] - g[0]))


def limit(pair: Pair, lam: float, p: float) -> float:
    """OOD accuracy in the normal limit."""
    return F(argument(weights(pair, lam), p), p)


def exact(groups, p: float) -> float:
    """OOD accuracy for K = 3 from the multinomial distribution of votes; ties are split."""
    margins = np.zeros((1, 2))  # (D_1, D_2)
    chances = np.ones(1)  # their probability
    r = p / K
    q = 1 - p + r
    for w, v, s in groups:
        new = []
        chance = []
        for right in range(s + 1):
            for one in range(s + 1 - right):  # votes for class 1; the rest are for class 2
                new.append([w * (right - one), w * (2 * right + one - s)])
                ways = math.comb(s, right) * math.comb(s - right, one)
                chance.append(ways * q**right * r ** (s - right))
        sums = (margins[:, None] + w * v + np.array(new)).reshape(-1, 2)
        chances = (chances[:, None] * np.array(chance)).reshape(-1)
        margins, where = np.unique(sums.round(9), axis=0, return_inverse=True)
        chances = np.bincount(where.reshape(-1), chances)
    tied = (margins == 0).sum(1)  # with how many classes y shares the first place
    return float((chances * (margins >= 0).all(1) / (1 + tied)).sum())


def sampled(pair: Pair, lam: float, p: float, n: int, seed: int) -> tuple[float, float]:
    """OOD accuracy on n sampled examples and its standard error.

    lam = 1 is the released model, 0 the attacker's.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(K, size=n)
    scores = np.zeros((K, n))
    for weight, v, s in weights(pair, lam):
        votes = np.repeat(y[:, None], v + s, 1)  # (n, features): the class that each votes for
        moved = rng.random((n, s)) < p
        votes[:, v:][moved] = rng.integers(K, size=moved.sum())
        for k in range(K):
            scores[k] += weight * (votes == k).sum(1)
    scores = scores.round(9)
    best = scores == scores.max(0)
    right = best[y, np.arange(n)] / best.sum(0)
    return float(right.mean()), float(right.std() / math.sqrt(n))


def theorem1_bound(pair: Pair, p: float, lam: float = 0.5) -> float:
    """The number of star's spurious features below which the argument falls with it, p < 1.

    A real number; shared features stay as many.
    """
    (one, vb, sb), (u, vs, _), (_, vo, so) = weights(pair, lam)
    A = one * (vb + (1 - p) * sb) + u * vs + vo + (1 - p) * so
    return so + A / (u * (1 - p)) - 2 * (one**2 * sb + so) / u**2


def degrades(pair: Pair, p: float, lam: float = 0.5) -> bool:
    """Whether the ensemble is worse than the released model, by the arguments of F_p."""
    return argument(weights(pair, lam), p) < argument(weights(pair, 1.0), p)


def nested(bar, star) -> Pair:
    """Of invariant and of spurious features, the smaller set lies within the larger."""
    return Pair(bar, star, (min(bar[0], star[0]), min(bar[1], star[1])))


def sweep(p: float, overlap, most=(12, 40)) -> list[tuple[Pair, bool]]:
    """(pair, whether ability falls, by the limit) of pairs under Theorem 2's stated conditions.

    With even numbers of spurious features; overlap: Pair or nested.
    """
    found = []
    invariant = itertools.combinations(range(1, most[0] + 1), 2)
    spurious = itertools.combinations(range(2, most[1] + 1, 2), 2)
    for (vs, vb), (sb, ss) in itertools.product(invariant, spurious):
        pair = overlap((vb, sb), (vs, ss))
        found.append((pair, degrades(pair, p)))
    return found


# ---- the tables ----

POINT = Pair((2, 20), (1, 30))


def accuracy_table(seed: int, n: int = 100_000):
    """Sampled, exact and limit of a few models."""
    print("1. OOD accuracy, p = 0.9: sampled, exact, and the normal limit F_p\n")
    print("   bar       star      shared  lambda  sampled          exact   F_p")
    cases = [(Pair((2, 3), NONE), 1.0), (POINT, 1.0), (POINT, 0.5), (POINT, 0.3)]
    cases.append((Pair((3, 8), (2, 12), (1, 4)), 0.5))
    for pair, lam in cases:
        mean, error = sampled(pair, lam, 0.9, n, seed)
        shown = f"   {pair.bar!s:9} {pair.star!s:9} {pair.shared!s:7} {lam:5.1f}"
        shown += f"   {mean:.4f} +- {error:.4f}{exact(weights(pair, lam), 0.9):9.4f}"
        print(f"{shown}{limit(pair, lam, 0.9):7.3f}")


def gap_table():
    """How far the normal limit is from the exact accuracy."""
    print("\n2. The gap of the limit, p = 0.9, n_v = 2: F_p - exact against n_s\n")
    for n_s in (1, 2, 3, 5, 10, 20, 40, 80):
        pair = Pair((2, n_s), NONE)
        true = exact(weights(pair, 1.0), 0.9)
        print(f"   n_s {n_s:3}   exact {true:.4f}   gap {limit(pair, 1.0, 0.9) - true:+.4f}")


def theorem1_table():
    """Accuracy against the spurious features of the attacker's model."""
    print(
        "\n3. Theorem 1 (second-hand): spurious features of star; p 0.9, bar (4, 6), n_v_star 2\n"
    )
    bound = theorem1_bound(Pair((4, 6), (2, 0)), 0.9)
    print(f"   the accuracy falls only while n_s_star < {bound:.1f}:")
    for n_s in (5, 20, 40, 53, 54, 55, 70, 100, 200):
        print(f"   n_s_star {n_s:3}   F_p {limit(Pair((4, 6), (2, n_s)), 0.5, 0.9):.5f}")


def theorem2_table():
    """How often ability falls where Theorem 2's stated conditions hold."""
    print("\n4. Theorem 2 (second-hand): of pairs with n_v_bar > n_v_star and n_s_bar < n_s_star,")
    print(
        "   up to 12 invariant and an even number, up to 40, of spurious features, the share whose"
    )
    print("   ability falls in the normal limit, and a pair whose ability does not\n")
    kinds = {"no overlap": Pair, "nested": nested}
    for p, name in itertools.product((0.5, 0.7, 0.9, 0.99), kinds):
        found = sweep(p, kinds[name])
        rises = [pair for pair, falls in found if not falls]
        shown = f"   p {p:<5}{name:11} {1 - len(rises) / len(found):6.1%}"
        if rises:
            pair = rises[0]
            shown += f"   bar {pair.bar}, star {pair.star}:"
            shown += f" {limit(pair, 1.0, p):.3f} -> {limit(pair, 0.5, p):.3f}"
        print(shown)
    print("\n   The stated conditions hold and ability rises: p 0.9, bar (2, 20), star (1, 30):")
    print(f"   F_p {limit(POINT, 1.0, 0.9):.3f} -> {limit(POINT, 0.5, 0.9):.3f}", end=", ")
    before = exact(weights(POINT, 1.0), 0.9)
    print(f"exact {before:.3f} -> {exact(weights(POINT, 0.5), 0.9):.3f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="OOD accuracy of a model and of an ensemble")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled examples (default: 0)")
    accuracy_table(parser.parse_args(argv).seed)
    gap_table()
    theorem1_table()
    theorem2_table()


if __name__ == "__main__":
    run_script(main)
