"""Harmful prompts of a public file: which rows are harmful, who owns each prompt, and equal shares of categories."""

import hashlib
import random
from collections import Counter

from data.sources import read_rows
from nanosdd.errors import InputError

OWNERS = ("defender", "defender", "attacker", "evaluation")  # 50%, 25%, 25%


def letters(prompt: str) -> str:
    """A prompt's letters and digits, in lower case. Two prompts with the same letters count as one."""
    return "".join(ch for ch in prompt.casefold() if ch.isalnum())


def owner(prompt: str) -> str:
    """The owner of a harmful prompt, by a hash of its letters: a prompt has the same owner in every file."""
    return OWNERS[hashlib.sha256(letters(prompt).encode("utf-8", "surrogatepass")).digest()[0] % 4]


def read_harmful(path) -> list[dict]:
    """The harmful rows of a file, each prompt once, with its first response.

    In BeaverTails these are the rows marked unsafe; a prompt has the categories of all its unsafe rows.
    """
    found = {}
    for row in read_rows(path):
        if row.get("is_safe"):
            continue
        kept = found.setdefault(letters(row["prompt"]), row)
        if kept is not row and "categories" in row:
            kept["categories"] += [
                name for name in row["categories"] if name not in kept["categories"]
            ]
    if not found:
        raise InputError(f"{path} holds no harmful rows (all are marked safe); give another file")
    return list(found.values())


def split_harmful(rows: list[dict], path, minimum: int = 4) -> dict[str, list[dict]]:
    """The rows of each owner: {"defender": rows, "attacker": rows, "evaluation": rows}.

    train.py trains on the defender's rows, attack.py on the attacker's; both score on the evaluation prompts, which are
    never trained on. InputError when an owner has fewer rows than `minimum`.
    """
    split = {
        name: [row for row in rows if owner(row["prompt"]) == name]
        for name in dict.fromkeys(OWNERS)
    }
    for name, owned in split.items():
        if len(owned) < minimum:
            raise InputError(
                f"{path}: {len(rows)} prompts are too few, {name} owns only {len(owned)} of them "
                f"and needs {minimum}; use a larger file"
            )
    return split


def marked_harmful(row: dict) -> bool:
    """Whether the file of a row marks it as harmful or unsafe."""
    return bool(row.get("harmful")) or row.get("is_safe") is False


def whose(row: dict) -> str:
    """The owner of a row of any file. A pairs file names it; a row that is marked harmful belongs to the owner of its
    prompt; every other row is the defender's."""
    return row.get("owner") or (owner(row["prompt"]) if marked_harmful(row) else "defender")


def keep_evaluation_out(rows: list[dict], harmful: list[dict], path):
    """InputError when the prompt of a training row is also an evaluation prompt of the harmful file."""
    evaluation = {letters(row["prompt"]) for row in harmful if owner(row["prompt"]) == "evaluation"}
    for row in rows:
        if letters(row["prompt"]) in evaluation:
            raise InputError(
                f"{row.get('file', path)}, row {row['row']} (from 0): an evaluation prompt of the harmful "
                "file; take it out"
            )


def balance(rows: list[dict], count: int, seed) -> tuple[list[dict], list[str]]:
    """Draw `count` rows, equally many of each category, in random order. Returns the rows, each with its "category",
    and notes to print.

    A row with several categories counts for the rarest of them in the file. A category with fewer prompts than its
    share repeats them, and a note says so. Rows without a category are left out, unless no row has one: then all have
    the category "none".
    """
    sizes = Counter(name for row in rows for name in row.get("categories", ()))
    groups, notes = {}, []
    for row in rows:
        names = row.get("categories") or ([] if sizes else ["none"])
        if names:
            name = min(names, key=lambda name: (sizes[name], name))
            groups.setdefault(name, []).append(row | {"category": name})
    without = len(rows) - sum(map(len, groups.values()))
    if without:
        notes.append(f"{without} harmful rows have no category and are left out")
    rng, chosen = random.Random(f"balance {seed}"), []
    for i, (name, group) in enumerate(sorted(groups.items())):
        share = (count + len(groups) - 1 - i) // len(
            groups
        )  # the first categories get the remainder
        if share > len(group):
            notes.append(
                f"category {name!r} has {len(group)} prompts for its {share} pairs: they are used in turn"
            )
        for start in range(0, share, len(group)):
            chosen += rng.sample(group, min(len(group), share - start))
    rng.shuffle(chosen)
    return chosen, notes
