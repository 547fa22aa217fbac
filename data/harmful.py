"""Harmful prompts of a public file: which rows, whose they are, and equal numbers from each category."""

import hashlib
import random
from collections import Counter

from data.sources import read_rows
from nanosdd.errors import InputError

OWNERS = ("defender", "defender", "attacker", "evaluation")  # 50/25/25 by hash


def letters(prompt: str) -> str:
    """A prompt's letters and digits: two prompts with the same are one."""
    return "".join(ch for ch in prompt.casefold() if ch.isalnum())


def owner(prompt: str) -> str:
    """Whose a harmful prompt is, by a hash of its letters and digits: one prompt, one owner, in every file."""
    return OWNERS[hashlib.sha256(letters(prompt).encode("utf-8", "surrogatepass")).digest()[0] % 4]


def read_harmful(path) -> list[dict]:
    """The harmful rows of a file, each prompt once, with the first response given to it.

    Of a file that says so (BeaverTails), the rows marked unsafe; a prompt has the categories of all its unsafe rows.
    """
    rows, found = [row for row in read_rows(path) if not row.get("is_safe")], {}
    for row in rows:
        kept = found.setdefault(letters(row["prompt"]), row)
        if kept is not row and "categories" in row:
            kept["categories"] += [name for name in row["categories"] if name not in kept["categories"]]
    if not found:
        raise InputError(f"{path} holds no harmful rows (all are marked safe); give another file")
    return list(found.values())


def split_harmful(rows: list[dict], path, least: int = 4) -> dict[str, list[dict]]:
    """{"defender", "attacker", "evaluation"} -> their rows; InputError when an owner gets fewer than `least`.

    train.py takes the defender's, attack.py the attacker's, and both judge on the evaluation prompts, which nobody
    trains on.
    """
    split = {name: [row for row in rows if owner(row["prompt"]) == name] for name in dict.fromkeys(OWNERS)}
    for name, owned in split.items():
        if len(owned) < least:
            raise InputError(f"{path}: {len(rows)} prompts are too few, {name} owns only {len(owned)} of them "
                             f"and needs {least}; use a larger file")
    return split


def marked_harmful(row: dict) -> bool:
    """Whether its file says that a row is harmful, or unsafe."""
    return bool(row.get("harmful")) or row.get("is_safe") is False


def whose(row: dict) -> str:
    """Who owns a row of any file: of one that is marked harmful the owner of its prompt (a pairs file says for each
    pair); any other row is the defender's to use."""
    return row.get("owner") or (owner(row["prompt"]) if marked_harmful(row) else "defender")


def keep_evaluation_out(rows: list[dict], harmful: list[dict], path):
    """InputError when a training row asks what an evaluation prompt of the harmful file asks."""
    evaluation = {letters(row["prompt"]) for row in harmful if owner(row["prompt"]) == "evaluation"}
    for row in rows:
        if letters(row["prompt"]) in evaluation:
            raise InputError(f"{row.get('file', path)}, row {row['row']} (from 0): an evaluation prompt of the harmful "
                             "file; take it out")


def balance(rows: list[dict], count: int, seed) -> tuple[list[dict], list[str]]:
    """(`count` rows with a "category", equally many of each, in random order; notes to print).

    A row with several categories counts for the rarest of them in the file. A category with fewer prompts than its
    share has them used in turn, which a note says; a remainder goes to the first by the alphabet. Rows without a
    category are left out, unless no row has one: then all are of the category "none".
    """
    sizes = Counter(name for row in rows for name in row.get("categories", ()))
    groups = {}
    for row in rows:
        names = row.get("categories") or ([] if sizes else ["none"])
        if names:
            name = min(names, key=lambda name: (sizes[name], name))
            groups.setdefault(name, []).append(row | {"category": name})
    without = len(rows) - sum(map(len, groups.values()))
    notes = [f"{without} harmful rows have no category and are left out"] * bool(without)
    rng, chosen = random.Random(f"balance {seed}"), []
    for i, name in enumerate(sorted(groups)):
        group, share = groups[name], count // len(groups) + (i < count % len(groups))
        if share > len(group):
            notes.append(f"category {name!r} has {len(group)} prompts for its {share} pairs: they are used in turn")
        chosen += [group[j % len(group)] for start in range(0, share, len(group))
                   for j in rng.sample(range(len(group)), min(len(group), share - start))]
    rng.shuffle(chosen)
    return chosen, notes
