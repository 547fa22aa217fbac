"""SDD's data on public files: harmful prompts with random, irrelevant benign responses.

    python -m data.pairs --harmful harmful_behaviors.csv --benign alpaca.json --out pairs.jsonl

    sdd         a random benign response whose cosine with the prompt is at most the threshold
    sdd_reject  the same behind a sentence of refusal
    shuffled    control without quality: the same with its words in random order
    align       refusals

Writes one JSON object a line: prompt, response, category, cosine (of prompt and response as drawn)
and owner (of the harmful prompt). At one seed the prompts and the responses drawn are the same in
every mode. The benign rows that the world of these files scores are left out.
"""

import argparse
from collections import Counter

from data.files import Files, write_pairs
from data.worlds import add_source_arguments, sources_of
from nanosdd.errors import InputError, run_script
from nanosdd.runs import check_new

MODES = ("align", "sdd", "sdd_reject", "shuffled")


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m data.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(p)
    p.add_argument("--out", metavar="FILE", required=True, help="new JSONL to write")
    p.add_argument("--mode", choices=MODES, default="sdd", help="(default: sdd)")
    p.add_argument(
        "--prompts",
        choices=["all", "defender"],
        default="all",
        help="harmful prompts to use: all, or those that attack.py leaves to the defender "
        "(default: all; train.py picks the defender's)",
    )
    p.add_argument("--count", type=int, help="pairs, at most 8000 (default: one a harmful prompt)")
    p.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    args = p.parse_args(argv)
    if args.count is not None and args.count < 1:
        raise InputError(f"--count {args.count} must be 1 or more")
    check_new(args.out)
    world = Files(args.seed, sources_of(args))
    rows = world.pairs(args.mode, args.count or len(world.harmful("defender")))
    write_pairs(args.out, rows)
    print(f"{args.out}: {len(rows):,} pairs of mode {args.mode}; of each category:")
    for category, count in sorted(Counter(row["category"] for row in rows).items()):
        print(f"{count:>8,}  {category}")
    if args.mode != "align":
        print(f"highest cosine {max(row['cosine'] for row in rows):.4f}")


if __name__ == "__main__":
    run_script(main)
