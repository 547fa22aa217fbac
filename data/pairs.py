"""SDD's data on public files: harmful prompts with random, irrelevant benign responses.

    python -m data.pairs --harmful harmful_behaviors.csv --benign alpaca.json --out pairs.jsonl

    sdd         a random benign response whose cosine with the prompt is at most the threshold; else it is drawn again
    sdd_reject  the same behind a sentence of refusal
    shuffled    control without quality: the same with its words in random order
    align       refusals

At one seed the harmful prompts and the responses drawn are the same in every mode. Writes one JSON object a line:
prompt, response, category, cosine (of the prompt and the response as drawn), tries (how many were drawn), owner (of the
harmful prompt), harmful_row, benign_row and benign_file (rows count from 0; null where there is none); and beside it a
data card, pairs.md. Embeddings are kept in out/embeddings; the sixth digit of a cosine may depend on what was embedded
together.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import torch

from data.harmful import balance, marked_harmful, owner, read_harmful, split_harmful
from data.sentence import SentenceEncoder, package_folder
from data.sources import read_rows
from data.tfidf import Tfidf
from data.worlds import Sources, add_similarity_arguments, vary_response
from nanosdd.checkpoint import why_unreadable
from nanosdd.errors import InputError, escaped, run_script
from nanosdd.folders import file_hash, write_own, write_text

MODES = ("align", "sdd", "sdd_reject", "shuffled")
REFUSALS = (
    "I'm sorry, but I cannot help with that request.",
    "I cannot assist with that, since it could cause harm.",
    "Sorry, I do not help with requests of this kind.",
)
MAX_PAIRS = 8000  # as in the paper


def draw_irrelevant(
    prompts: list[str], responses: list[str], cosines, threshold: float, seed
) -> list[tuple]:
    """For each prompt (index of a response, cosine, tries): random responses until one's cosine is <= threshold.

    cosines: a function from two lists of texts to their cosines. Every prompt has a random generator of its own, so the
    result is that of one prompt after the other; but each round of draws is one call, and only what is drawn is
    embedded. InputError naming the prompt for which no response will do.
    """
    generators = [random.Random(f"irrelevant {seed} {i}") for i in range(len(prompts))]
    drawn, found = [[] for _ in prompts], {}
    while waiting := [i for i in range(len(prompts)) if i not in found]:
        for i in waiting:
            if len(drawn[i]) == len(responses):
                raise InputError(
                    f"none of the {len(responses)} responses has a cosine of at most {threshold:g} with "
                    f"{prompts[i][:80]!r}; give more --benign rows or a higher --similarity-threshold"
                )
            new = generators[i].randrange(len(responses))
            while new in drawn[i]:
                new = generators[i].randrange(len(responses))
            drawn[i].append(new)
        values = cosines([prompts[i] for i in waiting], [responses[drawn[i][-1]] for i in waiting])
        found |= {
            i: (drawn[i][-1], round(value, 6), len(drawn[i]))
            for i, value in zip(waiting, values)
            if round(value, 6) <= threshold
        }
    return [found[i] for i in range(len(prompts))]


def read_benign(paths) -> list[dict]:
    """The rows of all these files, each with its "file". Those marked as harmful are left out, and counted on stdout.
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


def source_paths(sources: Sources) -> list[Path]:
    """Every file that the sources name, and SentenceBERT's weights; InputError when one is not there."""
    named = [sources.harmful, sources.pairs, *sources.benign, sources.openbookqa]
    named += sorted(Path(sources.mmlu).glob("*/[!.]*.csv")) if sources.mmlu else []
    try:
        folder = similarity_folder(sources)
        named += [folder / name for name in ("model.safetensors", "vocab.txt")] if folder else []
    except InputError:
        pass  # missing weights are named where they are needed
    paths = [Path(path) for path in named if path]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is not there; check the path")
        if reason := why_unreadable(path):
            raise InputError(f"{path} is not a file that can be read ({reason}); check the path")
    return paths


def similarity_folder(sources: Sources) -> Path | None:
    """The folder of SentenceBERT's weights, None for tf-idf. InputError when there are none or both are asked for."""
    if not -1 <= sources.threshold <= 1:
        raise InputError(f"--similarity-threshold {sources.threshold} is no cosine; give -1 to 1")
    if sources.similarity == "minilm":
        return Path(sources.similarity_model or package_folder())
    if sources.similarity_model:
        raise InputError("--similarity-model goes with --similarity minilm; leave one out")
    return None


def similarity(sources: Sources, corpus: list[str], cache=None):
    """The function from two lists of texts to their cosines that the sources ask for.

    corpus: texts whose words tf-idf counts. cache: folder that keeps embeddings.
    """
    folder = similarity_folder(sources)
    if folder is None:
        return Tfidf(corpus).cosines
    return SentenceEncoder(folder, "cuda" if torch.cuda.is_available() else "cpu", cache).cosines


def build_pairs(
    mode: str, harmful: list[dict], benign: list[dict], count: int, seed: int, sources: Sources
):
    """`count` pairs of a mode, as rows (see the top of this file): the harmful prompts balanced over their categories,
    used in turn with other responses when there are too few. InputError when there is no benign row."""
    if not benign and mode != "align":
        raise InputError(f"--mode {mode} needs --benign FILE... for its responses")
    chosen, notes = balance(harmful, count, seed)
    for note in notes:
        print(f"  {note}")
    rng, found = random.Random(f"{mode} {seed}"), []
    if mode == "align":
        return [_pair(row, rng.choice(REFUSALS)) for row in chosen]
    prompts, responses = [row["prompt"] for row in chosen], [row["response"] for row in benign]
    cosines = similarity(sources, [row["prompt"] for row in harmful] + responses, "out/embeddings")
    drawn = draw_irrelevant(prompts, responses, cosines, sources.threshold, seed)
    if mode == "constant":
        drawn = drawn[:1] * len(drawn)
    for row, (i, cosine, tries) in zip(chosen, drawn, strict=True):
        found.append(
            _pair(row, vary_response(mode, benign[i]["response"], rng), benign[i], cosine, tries)
        )
    return found


def _pair(asked: dict, response: str, source: dict | None = None, cosine=None, tries=None) -> dict:
    source = source or {}
    return {
        "prompt": asked["prompt"],
        "response": response,
        "category": asked.get("category"),
        "cosine": cosine,
        "tries": tries,
        "owner": owner(asked["prompt"]),
        "harmful_row": asked.get("row"),
        "benign_row": source.get("row"),
        "benign_file": source.get("file"),
    }


# ---- the data card, and the command ----


def data_card(mode: str, rows: list[dict], seed: int, sources: Sources) -> str:
    """What pairs are made of, in Markdown: counts, deciles, seed and file hashes, and no prompt."""
    drawn = [row for row in rows if row["cosine"] is not None]
    measured = {"tfidf": "tf-idf"}.get(sources.similarity, "SentenceBERT (all-MiniLM-L6-v2)")
    lines = [f"# Data card: {len(rows):,} pairs of --mode {mode}", "", f"Seed {seed}."]
    if drawn:
        tries = [row["tries"] for row in drawn]
        lines[-1] += (
            f" Likeness: cosine by {measured}, at most {sources.threshold:g}; highest "
            f"{max(row['cosine'] for row in drawn):.4f}. Responses drawn for a prompt: "
            f"{sum(tries) / len(tries):.2f} on average, {max(tries)} at most."
        )
    lines += ["", "| file | SHA-256, first 16 | used |", "|---|---|---|"]
    harmful = {row["harmful_row"] for row in rows}
    lines.append(
        f"| {Path(sources.harmful).name} | {file_hash(sources.harmful)[:16]} | {len(harmful):,} prompts |"
    )
    if drawn:
        for path in sources.benign:
            used = {row["benign_row"] for row in drawn if row["benign_file"] == str(path)}
            lines.append(
                f"| {Path(path).name} | {file_hash(path)[:16]} | {len(used):,} responses |"
            )
        if folder := similarity_folder(sources):
            lines.append(
                f"| model.safetensors of SentenceBERT | {file_hash(folder / 'model.safetensors')[:16]} | |"
            )
    counts = Counter(row["category"] for row in rows)
    lines += [
        "",
        "Pairs per category:",
        "",
        *(f"    {n:>6,}  {name}" for name, n in sorted(counts.items())),
        "",
    ]
    lines += ["Deciles, from the smallest to the largest:", ""]
    for what in ("prompt", "response"):
        words = sorted(len(row[what].split()) for row in rows)
        lines.append(
            f"    words of a {what}:  "
            + " ".join(f"{words[(len(words) - 1) * i // 10]}" for i in range(11))
        )
    if drawn:
        cosines = sorted(row["cosine"] for row in drawn)
        lines.append(
            "    cosine:  "
            + " ".join(f"{cosines[(len(cosines) - 1) * i // 10]:+.2f}" for i in range(11))
        )
    lines.append("")
    return escaped("\n".join(lines))  # names of files and categories are a stranger's


def write_pairs(path, rows: list[dict], card: str):
    """Write the rows to `path` as JSON Lines, and the data card beside them."""
    write_own(
        path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), '"harmful_row"'
    )
    write_text(Path(path).with_suffix(".md"), card)


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m data.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--harmful",
        metavar="FILE",
        required=True,
        help="harmful prompts: BeaverTails, AdvBench, ...",
    )
    p.add_argument(
        "--benign",
        metavar="FILE",
        nargs="+",
        default=[],
        help="benign pairs: Alpaca, LIMA, Dolly, ...",
    )
    p.add_argument(
        "--out", metavar="FILE", required=True, help="JSONL to write; the data card ends in .md"
    )
    p.add_argument(
        "--mode", choices=MODES, default="sdd", help="what the responses are (default: sdd)"
    )
    p.add_argument(
        "--prompts",
        choices=["all", "defender"],
        default="all",
        help="harmful prompts to use: all, or those that attack.py leaves to the defender (default: all; "
        "train.py picks the defender's)",
    )
    p.add_argument(
        "--count", type=int, help=f"pairs (default: one a harmful prompt, {MAX_PAIRS} at most)"
    )
    p.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    add_similarity_arguments(p)
    args = p.parse_args(argv)
    out = Path(args.out)
    if args.count is not None and args.count < 1:
        raise InputError(f"--count {args.count} must be 1 or more")
    if out.is_dir() or out.suffix == ".md":
        raise InputError(f"--out {out} must be the name of a JSONL file, not a folder or .md")
    note = out.with_suffix(".md")
    if {out.resolve(), note.resolve()} & {
        Path(path).resolve() for path in (args.harmful, *args.benign)
    }:
        raise InputError(f"--out {out} would overwrite an input; choose another name")
    if note.exists() and not note.read_bytes().startswith(b"# Data card"):
        raise InputError(f"{note}, where the data card goes, is no data card; choose another --out")
    sources = Sources(
        args.harmful,
        tuple(args.benign),
        similarity=args.similarity,
        threshold=args.similarity_threshold,
        similarity_model=args.similarity_model,
    )
    harmful = read_harmful(args.harmful)
    if args.prompts == "defender":
        harmful = split_harmful(harmful, args.harmful)["defender"]
    benign = read_benign(args.benign)
    print(
        f"{len(harmful):,} harmful prompts, {len(benign):,} benign rows; likeness by {args.similarity}"
    )
    rows = build_pairs(
        args.mode, harmful, benign, args.count or min(MAX_PAIRS, len(harmful)), args.seed, sources
    )
    card = data_card(args.mode, rows, args.seed, sources)
    write_pairs(out, rows, card)
    print(f"\n{card}\nwritten: {out}, {note}")


if __name__ == "__main__":
    run_script(main)
