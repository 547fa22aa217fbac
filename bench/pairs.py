"""python bench.py pairs: data.pairs, beside the obvious way on the same encoder.

8,000 pairs from a pool of 52,000 responses, as many as in the paper and in Alpaca. Files with fewer rows are grown to
that size by mixing their sentences. Whole `python -m data.pairs` processes, with an empty cache and again; the obvious
way embeds the whole pool, then one prompt at a time.
"""

import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data.harmful import read_harmful
from data.pairs import read_benign, resolve_similarity
from data.sentence import SentenceEncoder
from nanosdd.errors import InputError
from nanosdd.runs import write_text

ROOT = Path(__file__).parent.parent


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for: less moved than the clock by what else is running."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def grow(texts: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` texts: the first are these, the rest have their sentences mixed, as many as a random one of them has."""
    sentences = [re.split(r"(?<=[.!?])\s+", text) for text in texts]
    every = [sentence for part in sentences for sentence in part]
    mixed = [" ".join(rng.choices(every, k=len(rng.choice(sentences)))) for _ in range(count - len(texts))]
    return (texts + mixed)[:count]


def obvious_pairs(prompts: list[str], responses: list[str], threshold: float, encoder) -> list[tuple]:
    """What draw_irrelevant gives at seed 0, the obvious way: all responses embedded, then prompt after prompt."""
    pool = dict(zip(responses, encoder.embed(responses)))
    found = []
    for i, prompt in enumerate(prompts):
        vector = encoder.embed([prompt])[0]
        rng, tried = random.Random(f"irrelevant 0 {i}"), []
        while True:
            pick = rng.randrange(len(responses))
            if pick in tried:
                continue
            tried.append(pick)
            cosine = round(float(vector @ pool[responses[pick]]), 6)
            if cosine <= threshold:
                found.append((pick, cosine, len(tried)))
                break
    return found


def bench_pairs(args) -> dict:
    """Runs of {"what", "seconds", "cpu_seconds", "pairs_per_second"}; says whether both ways give the same pairs."""
    if args.similarity != "minilm":
        raise InputError("bench.py pairs needs --similarity minilm")
    resolve_similarity(args)
    print(f"{args.pairs:,} pairs from {args.responses:,} responses")
    rng = random.Random(0)
    prompts = [row["prompt"] for row in read_harmful(args.harmful)]
    more = (f"{' '.join(first[:len(first) // 2] + second[len(second) // 2:])} {number}" for number in range(args.pairs)
            for first, second in [(rng.choice(prompts).split(), rng.choice(prompts).split())])
    prompts = (prompts + list(more))[:args.pairs]  # numbered, so that no two are the same
    responses = grow([row["response"] for row in read_benign(args.benign)], args.responses, rng)
    taken = {}

    def timed(what, function):
        began, cpu = time.perf_counter(), cpu_seconds()
        result = function()
        taken[what] = time.perf_counter() - began, cpu_seconds() - cpu
        print(f"  {what}: {taken[what][0]:.1f} s", flush=True)
        return result

    with tempfile.TemporaryDirectory() as folder:
        for name, texts in (("harmful", [(text, "Sure.") for text in prompts]),
                            ("benign", [("Tell me.", text) for text in responses])):
            write_text(Path(folder) / f"{name}.jsonl", "".join(
                json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in texts))
        command = [sys.executable, "-m", "data.pairs", "--harmful", "harmful.jsonl", "--benign", "benign.jsonl",
                   "--out", "pairs.jsonl", "--similarity-model", str(Path(args.similarity_model).resolve()),
                   "--similarity-threshold", str(args.similarity_threshold)]
        for what in ("data.pairs", "data.pairs again, embeddings cached"):
            result = timed(what, lambda: subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL,
                                                        env=os.environ | {"PYTHONPATH": str(ROOT)}))
            if result.returncode:
                raise InputError("data.pairs failed, see its error above; mend that")
        rows = [json.loads(line) for line in (Path(folder) / "pairs.jsonl").read_text().split("\n") if line]
    encoder = SentenceEncoder(args.similarity_model, "cuda" if torch.cuda.is_available() else "cpu")
    found = timed("the obvious way: whole pool, then one prompt at a time", lambda: obvious_pairs(
        [row["prompt"] for row in rows], responses, args.similarity_threshold, encoder))
    same = sum((row["benign_row"], row["tries"]) == (pick, tries) for row, (pick, _, tries) in zip(rows, found))
    print(f"  {same:,} of {len(rows):,} pairs are the same both ways; highest cosine "
          f"{max(row['cosine'] for row in rows):.4f}")
    slowest = max(wall for wall, _ in taken.values())
    print(f"\n{'':<56}{'seconds':>9}{'of CPU':>9}{'pairs/s':>9}{'times as fast':>15}")
    for what, (wall, cpu) in taken.items():
        print(f"{what:<56}{wall:>9.1f}{cpu:>9.1f}{len(rows) / wall:>9.0f}{slowest / wall:>15.1f}")
    return {"runs": [{"what": what, "seconds": wall, "cpu_seconds": cpu, "pairs_per_second": len(rows) / wall}
                     for what, (wall, cpu) in taken.items()]}
