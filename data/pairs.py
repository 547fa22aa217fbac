"""Who owns which harmful prompt, and the (prompt, response) pairs that each mode of train.py trains on.

What the responses are makes the arm: refusals (align, and the refusal control), irrelevant benign answers (SDD), the
same behind a sentence of refusal (SDD_reject).
"""

import hashlib
import random

from data.sources import read_jsonl, read_rows
from data.town import NEW_SKILL, REFUSALS as TOWN_REFUSALS, REJECT_PREFIX, Town
from errors import InputError

OWNERS = ("defender", "defender", "attacker", "evaluation")  # 50/25/25 by hash
REFUSALS = ("I'm sorry, but I cannot help with that request.", "I cannot assist with that, since it could cause harm.",
            "Sorry, I do not help with requests of this kind.")


def owner(prompt: str) -> str:
    """Whose a harmful prompt is, by a hash of its letters and digits: one prompt, one owner, in every file."""
    return OWNERS[hashlib.sha256(_letters(prompt).encode()).digest()[0] % 4]


def _letters(prompt: str) -> str:
    return "".join(ch for ch in prompt.casefold() if ch.isalnum())


def split_harmful(rows: list[dict], path, least: int = 4) -> dict[str, list[dict]]:
    """{"defender", "attacker", "evaluation"} -> their rows; InputError when an owner gets fewer than `least`.

    train.py takes the defender's, attack.py the attacker's, and both judge on the evaluation prompts, which nobody
    trains on.
    """
    split = {name: [row for row in rows if owner(row["prompt"]) == name] for name in dict.fromkeys(OWNERS)}
    for name, owned in split.items():
        if len(owned) < least:
            raise InputError(f"{path}: {len(rows)} rows are too few, {name} owns only {len(owned)} of them "
                             f"and needs {least}; use a larger file")
    return split


def keep_evaluation_out(rows: list[dict], harmful: list[dict], path):
    """InputError when a training row asks what an evaluation prompt of the harmful file asks."""
    evaluation = {_letters(row["prompt"]) for row in harmful if owner(row["prompt"]) == "evaluation"}
    for number, row in enumerate(rows, 1):
        if _letters(row["prompt"]) in evaluation:
            raise InputError(f"{path}, row {number}: an evaluation prompt of the harmful file; take it out")


def pair(prompts: list[str], responses, count: int, seed, prefix: str = "") -> list[dict]:
    """`count` rows {"prompt", "response"}: the prompts in turn, each with a random response, seeded.

    prefix: put before every response.
    """
    rng = random.Random(f"pair {seed}")
    responses = list(responses)
    return [{"prompt": prompts[i % len(prompts)], "response": f"{prefix} {rng.choice(responses)}".strip()}
            for i in range(count)]


def town_pairs(town: Town, mode: str, seed: int, base_count: int) -> tuple[list[dict], list[dict]]:
    """The town's (main rows, replay rows) of a mode; base_count: rows of pre-training. The harmful prompts, the benign
    answers and the replay are the same for every mode: arms differ in how they are put together."""
    def plain_rows(rows):
        return [{"prompt": row.prompt, "response": row.response} for row in rows]

    if mode == "base":
        return plain_rows(town.base_rows(random.Random(f"base {seed}"), base_count)), []
    rng = random.Random(f"pairs {seed}")
    defender, plain = town.groups["defender"], town.groups["plain"]
    harmful = [row.prompt for _ in range(4) for row in town.mischiefs(defender, rng, forms=(0, 1))]
    replay = plain_rows(town.benign(rng, 4000, plain + defender))
    benign = town.benign(rng, 2000, plain)
    if mode == "benign":
        return plain_rows(benign + town.skills(rng, 1000, tuple(NEW_SKILL))), replay
    responses = TOWN_REFUSALS if mode == "align" else [row.response for row in benign]
    return pair(harmful, responses, len(harmful), seed, REJECT_PREFIX if mode == "sdd_reject" else ""), replay


def file_pairs(mode: str, harmful, benign: list, pairs, seed: int, most: int) -> tuple[list[dict], list[dict]]:
    """(main rows, replay rows) of a mode from files: `pairs` as it is, or made from `harmful` and `benign`.

    At most `most` pairs are made, and 8,000, as many as in the paper, the defender's harmful prompts in turn.
    """
    benign_rows = [row for path in benign for row in read_rows(path)]
    if pairs:
        rows = read_jsonl(pairs)
        for number, row in enumerate(rows, 1):
            if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "response"))):
                raise InputError(f"{pairs}, row {number}: needs the strings prompt and response")
        if harmful:
            keep_evaluation_out(rows, read_rows(harmful), pairs)
        return rows, benign_rows
    if mode != "align" and not benign_rows:
        raise InputError(f"--mode {mode} on real files needs --benign FILE (Alpaca JSON) for its responses")
    if mode == "benign":
        return benign_rows, benign_rows
    if not harmful:
        raise InputError(f"--mode {mode} on real files needs --harmful FILE (AdvBench CSV) or --pairs FILE")
    prompts = [row["prompt"] for row in split_harmful(read_rows(harmful), harmful)["defender"]]
    responses = REFUSALS if mode == "align" else [row["response"] for row in benign_rows]
    prefix = REJECT_PREFIX if mode == "sdd_reject" else ""
    return pair(prompts, responses, min(8000, most), seed, prefix), benign_rows
