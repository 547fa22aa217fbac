"""The theory behind SDD, sampled and solved: when does fine-tuning on spurious features take ability away?

    python assignments/theory.py                    the four tables, in seconds
    python assignments/theory.py --map theory.png   and a map of Theorem 2 (needs matplotlib)

The data model is that of Lin et al. 2023, "Spurious Feature Diversification Improves Out-of-distribution
Generalization" (arXiv 2309.17230), and Theorems 1 and 2 are SDD's. All three are known here from summaries
(second-hand), so their wording is reconstructed; what follows from it is derived below.

**The data.** An example has one of K classes, y. Every feature votes for one class. An invariant feature votes for y. A
spurious feature does so in training; out of distribution (OOD) it votes, independently of all others given y, for y
with probability 1 - p, and otherwise for one of all K classes at random, y among them. So it votes for y with
q = 1 - p + p/K, for each other class with p/K. *Ability* is OOD accuracy.

**A model** selects n_v invariant and n_s spurious features and adds up their votes with a linear head: f = (features,
head). It answers the class with the most votes; ties are split at random.

**Fine-tuning** is read as an ensemble in weight space of the released model (bar), with weight lambda, and the
attacker's optimum (star), with 1 - lambda: features and head are both averaged, so that a feature of bar alone counts
lambda * lambda, of star alone (1 - lambda)^2, and a shared one 1. n_vo and n_so features are shared.

**The closed form.** Let D_k = votes for y minus votes for class k != y. One spurious feature adds d_k to it: 1 if it
votes for y, -1 for k, else 0. With r = p/K:

    E d_k       = q - r                     = 1 - p
    Var d_k     = q + r - (1 - p)^2         = p (K + 2 - p K) / K
    Cov d_k d_l = E 1[y] - (1 - p)^2        = p (K + 1 - p K) / K =: c     (k != l: a vote for k is none for l)

so Var = c + p/K, and the normal limit of D is a + sqrt(n_s) (sqrt(c) G + sqrt(p/K) H_k) with independent standard
normals G, H_k, and a = n_v + (1 - p) n_s. All D_k are above 0 with probability F_p(a / sqrt(n_s)), where

    F_p(x) = integral over g of phi(g) Phi((x + sqrt(c) g) / sqrt(p/K))^(K-1).

With feature weights w the argument is (sum of w a) / sqrt(sum of w^2 over spurious features); for lambda = 1/2 that
is (a_bar + a_star + 2 a_o) / sqrt(n_s_bar + n_s_star + 14 n_so), where a_bar, a_star and a_o are the a of bar's, of
star's and of the shared features. F_p increases, so arguments can be compared in its place.

**Theorem 1's range.** The theorem (second-hand): the more spurious features star has, the lower the accuracy of the
attacked model. Let u = (1 - lambda)^2, n the unshared spurious features of star, A and B the other terms of the sums:
the argument is (A + u (1-p) n) / sqrt(B + u^2 n). Its derivative has the sign of u (1-p) (B + u^2 n) - u^2 (A + u
(1-p) n) / 2, and is negative only while n < A / (u (1-p)) - 2 B / u^2. Without overlap at lambda = 1/2:
n_s_star < (n_v_bar + n_v_star) / (1 - p) - n_s_bar. Beyond the bound more spurious features *help*: they are many weak
votes for the right class.

**Theorem 2** (second-hand): n_v_bar > n_v_star and n_s_bar < n_s_star imply that ability falls, ensemble < bar. These
conditions, as they are reconstructed here, do not suffice. At lambda = 1/2 without overlap it falls if and only if
(a_bar + a_star) / sqrt(n_s_bar + n_s_star) < a_bar / sqrt(n_s_bar), that is a_star / a_bar < sqrt(1 + n_s_star /
n_s_bar) - 1. Where the smaller set is nested in the larger (n_vo = n_v_star, n_so = n_s_bar), (1-p) (n_s_star -
n_s_bar) <= 3 (n_v_bar - n_v_star) is enough: then the numerator is at most 4 a_bar, and the denominator above 4
sqrt(n_s_bar).

**What it says of SDD.** bar is the released model, star the optimum on harmful answers. The paper's reading: SDD has
taught bar features that star lacks, and star is full of spurious ones, so that their average is worse than bar. What
is invariant or spurious in a real model nobody has measured. Three questions: (1) In table 1, lambda 0.5 helps where
0 would not: why does an ensemble have more ability than either model? (2) In table 3, why do more spurious features
help beyond the bound? (3) Which two numbers would you measure in a language model to say that Theorem 2 applies to it?
"""

import argparse
import itertools
import math
from typing import NamedTuple

import numpy as np

K = 3
NONE = (0, 0)  # no shared features


class Pair(NamedTuple):
    """Released and attacker's model: (invariant, spurious) features of each, and of those that both have."""

    bar: tuple[int, int]
    star: tuple[int, int]
    shared: tuple[int, int] = NONE


def weights(pair: Pair, lam: float) -> list[tuple[float, int, int]]:
    """(weight, invariant, spurious features) of the ensemble's three groups: of bar alone, of star alone, shared."""
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
    return float(
        (np.exp(-g * g / 2) / math.sqrt(2 * math.pi) * cdf ** (k - 1)).sum() * (g[1] - g[0])
    )


def exact(groups, p: float) -> float:
    """OOD accuracy for K = 3 from the multinomial distribution of votes, without a limit; ties are split."""
    margins, chances = np.zeros((1, 2)), np.ones(1)  # (D_1, D_2) and their probability
    q, r = 1 - p + p / K, p / K
    for w, v, s in groups:
        margins = margins + w * v
        votes = [
            (i, j, s - i - j) for i in range(s + 1) for j in range(s + 1 - i)
        ]  # for y, class 1, class 2
        new = np.array([[w * (i - j), w * (i - l)] for i, j, l in votes])
        chance = np.array(
            [math.comb(s, i) * math.comb(s - i, j) * q**i * r ** (s - i) for i, j, l in votes]
        )
        margins = (margins[:, None] + new).reshape(-1, 2)
        chances = (chances[:, None] * chance).reshape(-1)
        margins, where = np.unique(margins.round(9), axis=0, return_inverse=True)
        chances = np.bincount(where.reshape(-1), chances)
    tied = (margins == 0).sum(1)  # with how many classes y shares the first place
    return float((chances * (margins >= 0).all(1) / (1 + tied)).sum())


def sampled(pair: Pair, lam: float, p: float, n: int, seed: int) -> tuple[float, float]:
    """OOD accuracy on n sampled examples and its standard error: features and heads are averaged, then votes are drawn.
    lam = 1 is the released model, 0 the attacker's."""
    rng, ((vb, sb), (vs, ss), (vo, so)) = np.random.default_rng(seed), pair
    selects = np.zeros(
        (2, vb + vs - vo + sb + ss - so)
    )  # features: invariant (bar's first), then spurious
    v, s = vb + vs - vo, sb + ss - so
    selects[0, :vb] = selects[1, vb - vo : v] = selects[0, v : v + sb] = selects[
        1, v + sb - so :
    ] = 1
    features = heads = lam * selects[0] + (1 - lam) * selects[1]
    y = rng.integers(K, size=n)
    votes = np.repeat(y[:, None], v + s, 1)  # (n, features): the class that each votes for
    moved = rng.random((n, s)) < p
    votes[:, v:][moved] = rng.integers(K, size=moved.sum())
    scores = np.stack([((votes == k) * (features * heads)).sum(1) for k in range(K)], 1).round(9)
    best = scores == scores.max(1, keepdims=True)
    right = best[np.arange(n), y] / best.sum(1)
    return float(right.mean()), float(right.std() / math.sqrt(n))


def theorem1_bound(pair: Pair, p: float, lam: float = 0.5) -> float:
    """The number of star's spurious features, a real number, below which the argument's derivative by it is negative;
    shared features stay as many. Infinite at p = 1."""
    if p == 1:
        return math.inf
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
    """(pair, whether ability falls, by the limit) for pairs under Theorem 2's stated conditions with even numbers of
    spurious features; overlap: Pair or nested."""
    v, s = range(1, most[0] + 1), range(2, most[1] + 1, 2)
    pairs = [
        overlap((vb, sb), (vs, ss))
        for vb, vs in itertools.product(v, v)
        if vb > vs
        for sb, ss in itertools.product(s, s)
        if sb < ss
    ]
    return [(pair, degrades(pair, p)) for pair in pairs]


def tables(seed: int, n: int = 100_000) -> str:
    """The four tables, as text."""
    lines = [
        "1. OOD accuracy, p = 0.9: sampled, exact, and the normal limit F_p",
        "",
        "   bar       star      shared  lambda  sampled          exact   F_p",
    ]
    for pair, lam in [
        (Pair((2, 3), NONE), 1.0),
        (Pair((2, 20), (1, 30)), 1.0),
        (Pair((2, 20), (1, 30)), 0.5),
        (Pair((2, 20), (1, 30)), 0.3),
        (Pair((3, 8), (2, 12), (1, 4)), 0.5),
    ]:
        groups = weights(pair, lam)
        mean, error = sampled(pair, lam, 0.9, n, seed)
        lines.append(
            f"   {pair.bar!s:9} {pair.star!s:9} {pair.shared!s:7} {lam:5.1f}   {mean:.4f} +- {error:.4f}"
            f"{exact(groups, 0.9):9.4f}{F(argument(groups, 0.9), 0.9):7.3f}"
        )
    lines += ["", "2. The gap of the limit, p = 0.9, n_v = 2: F_p - exact against n_s", ""]
    for n_s in (1, 2, 3, 5, 10, 20, 40, 80):
        one = [(1.0, 2, n_s)]
        true = exact(one, 0.9)
        lines.append(
            f"   n_s {n_s:3}   exact {true:.4f}   gap {F(argument(one, 0.9), 0.9) - true:+.4f}"
        )
    lines += [
        "",
        "3. Theorem 1 (second-hand): more spurious features in star, p = 0.9, bar (4, 6), n_v_star 2",
        "",
    ]
    lines.append(
        f"   the accuracy falls only while n_s_star < {theorem1_bound(Pair((4, 6), (2, 0)), 0.9):.1f}:"
    )
    for n_s in (5, 20, 40, 53, 54, 55, 70, 100, 200):
        x = argument(weights(Pair((4, 6), (2, n_s)), 0.5), 0.9)
        lines.append(f"   n_s_star {n_s:3}   F_p {F(x, 0.9):.5f}")
    lines += [
        "",
        "4. Theorem 2 (second-hand), lambda = 1/2: of pairs with n_v_bar > n_v_star and n_s_bar < n_s_star,",
        "   up to 12 invariant and an even number, up to 40, of spurious features, the share whose ability falls",
        "   in the normal limit, and a pair whose ability does not",
        "",
    ]
    for p, (name, overlap) in itertools.product(
        (0.5, 0.7, 0.9, 0.99), (("no overlap", Pair), ("nested", nested))
    ):
        found = sweep(p, overlap)
        rises = [pair for pair, falls in found if not falls]
        share = f"   p {p:<5}{name:11} {1 - len(rises) / len(found):6.1%}"
        if rises:
            before, after = (F(argument(weights(rises[0], lam), p), p) for lam in (1.0, 0.5))
            share += f"   bar {rises[0].bar}, star {rises[0].star}: {before:.3f} -> {after:.3f}"
        lines.append(share)
    before, after = (weights(Pair((2, 20), (1, 30)), lam) for lam in (1.0, 0.5))
    lines += [
        "",
        "   The stated conditions hold and ability rises: p 0.9, no overlap, bar (2, 20), star (1, 30):",
        f"   F_p {F(argument(before, 0.9), 0.9):.3f} -> {F(argument(after, 0.9), 0.9):.3f}, "
        f"exact {exact(before, 0.9):.3f} -> {exact(after, 0.9):.3f}",
    ]
    before, after = (weights(Pair((3, 2), (2, 8)), lam) for lam in (1.0, 0.5))
    lines += [
        "   Where features are few the limit may err: p 0.5, no overlap, bar (3, 2), star (2, 8):",
        f"   F_p {F(argument(before, 0.5), 0.5):.4f} -> {F(argument(after, 0.5), 0.5):.4f}, "
        f"exact {exact(before, 0.5):.4f} -> {exact(after, 0.5):.4f}",
    ]
    return "\n".join(lines)


def draw_map(path, p: float = 0.9, bar=(8, 20)):
    """Save a map of Theorem 2 for one released model: where ability falls, with and without overlap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (name, overlap) in zip(axes, (("no overlap", Pair), ("nested", nested))):
        falls = [[degrades(overlap(bar, (v, s)), p) for s in range(1, 81)] for v in range(0, 13)]
        axis.imshow(
            falls,
            origin="lower",
            aspect="auto",
            extent=(0.5, 80.5, -0.5, 12.5),
            cmap="RdYlBu_r",
            alpha=0.7,
        )
        axis.plot([bar[1] + 0.5, bar[1] + 0.5, 80.5], [-0.5, bar[0] - 0.5, bar[0] - 0.5], "k--")
        axis.set(title=f"{name}; red: ability falls", xlabel="spurious features of star")
    axes[0].set_ylabel("invariant features of star")
    figure.suptitle(
        f"Theorem 2, p = {p}, bar {bar}; its stated conditions hold below and right of the dashed line"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="OOD accuracy of one model and of an ensemble in weight space"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled examples (default: 0)")
    parser.add_argument(
        "--map", metavar="FILE", help="also draw a map of Theorem 2; needs matplotlib"
    )
    args = parser.parse_args(argv)
    print(tables(args.seed))
    if args.map:
        draw_map(args.map)
        print(f"\nwritten: {args.map}")


if __name__ == "__main__":
    main()
