"""Harmful prompts of a public file.

Which rows are harmful, who owns each prompt, and equal shares of categories.
"""

import hashlib
import random
import unicodedata
from collections import Counter, defaultdict

from data.sources import read_rows
from nanosdd.errors import InputError

OWNERS = ("defender", "defender", "attacker", "evaluation")  # 50%, 25%, 25%
MIN_PROMPTS = 4  # of each owner


def prompt_key(prompt: str) -> str:
    """Return what tells prompts apart: two with the same key count as one.

    They differ in nothing but capitals, white space, and the marks that end a sentence.
    """
    text = " ".join(unicodedata.normalize("NFC", prompt.lower()).split())
    return text.rstrip(" .?!。？！।؟") or text


def letters_hash(prompt: str) -> bytes:
    """Return a hash of a prompt's letters and digits, which similar prompts share."""
    letters = "".join(filter(str.isalnum, prompt.casefold()))
    return hashlib.sha256((letters or prompt).encode()).digest()


def owner(prompt: str) -> str:
    """Return the owner of a harmful prompt, by a hash of its letters.

    So a prompt has the same owner in every file.
    """
    return OWNERS[letters_hash(prompt)[0] % 4]


def read_harmful(path) -> list[dict]:
    """Return the harmful rows of a file; of rows with the same prompt, the first.

    In BeaverTails these are the rows marked unsafe. Rows of a file of prompts alone have no
    "response". InputError when there are none.
    """
    found = {}
    for row in read_rows(path, needs_response=False):
        if row.get("harmful", True):
            found.setdefault(prompt_key(row["prompt"]), row)
    if not found:
        raise InputError(f"{path} holds no harmful rows (all are marked safe); give another file")
    return list(found.values())


def split_harmful(rows: list[dict], path) -> dict:
    """Return the rows of each owner: {"defender": rows, "attacker": rows, "evaluation": rows}.

    train.py trains on the defender's rows, attack.py on the attacker's; both score on the
    evaluation prompts, which are never trained on. InputError when an owner has fewer than
    MIN_PROMPTS rows.
    """
    split = {name: [] for name in OWNERS}
    for row in rows:
        split[owner(row["prompt"])].append(row)
    for name, owned in split.items():
        if len(owned) < MIN_PROMPTS:
            raise InputError(
                f"{path} has too few prompts, {len(owned)} of them for {name}; use a larger file"
            )
    return split


def whose(row: dict) -> str:
    """Return the owner of a row of any file.

    A pairs file names it; a row that is marked harmful belongs to the owner of its prompt; every
    other row is the defender's.
    """
    if row.get("harmful"):
        return owner(row["prompt"])
    return row.get("owner", "defender")


def keep_evaluation_out(rows: list[dict], harmful: list[dict]):
    """Raise InputError when a training row's prompt is an evaluation prompt of the harmful file."""
    kept = {prompt_key(row["prompt"]) for row in harmful if owner(row["prompt"]) == "evaluation"}
    for row in rows:
        if prompt_key(row["prompt"]) in kept:
            raise InputError(
                f"{row['file']}, row {row['row']} (from 0): an evaluation prompt of the "
                "harmful file; take it out"
            )


def balance(rows: list[dict], count: int, seed):
    """Draw `count` rows, equally many of each category, in random order, each with its "category".

    A row with several categories counts for the rarest of them in the file. A category with fewer
    prompts than its share repeats them, and a printed line says so. Rows without a category have
    the category "none".
    """
    sizes = Counter(name for row in rows for name in row.get("categories", []))
    groups = defaultdict(list)
    for row in rows:
        name = min(row.get("categories") or ["none"], key=sizes.get)
        groups[name].append(row | {"category": name})
    rng = random.Random(f"balance {seed}")
    chosen = []
    for place, name in enumerate(sorted(groups)):
        group = groups[name]
        share = len(range(place, count, len(groups)))  # the first ones get the remainder
        drawn = rng.sample(group, min(share, len(group)))
        if share > len(group):
            print(f"  category {name!r} repeats its {len(group)} prompts")
        chosen += (drawn * share)[:share]
    rng.shuffle(chosen)
    return chosen
