"""Attack released models by fine-tuning, beside the matched benign control, and report what that did to them.

    python attack.py                                         the town, seed 0: aligned, refusal control and SDD
    python attack.py --suite full --seeds 5 6 7 8 9          every arm and attack of protocol.py
    python attack.py --model out/real --harmful harmful_behaviors.csv --benign alpaca.json --shots 10
    python attack.py --model ... --mmlu FOLDER --openbookqa test.jsonl     and with these tests in every cell

Attacks, each from the released weights at a constant lr (so a shorter budget is a point on the longer run's way):

    mft       malicious fine-tuning on the attacker's harmful pairs ("shots")
    lora      the same, through LoRA adapters
    bft       benign control: as many steps and response tokens at the same lr on benign pairs, every other one of
              which, on the town, teaches a new skill
    poisoned  benign rows, a tenth of them harmful
    identity  ten harmless rows behind a system prompt, each obeyed with an opening phrase (Qi et al. 2023); harmful
              prompts are then asked behind the same system prompt
  by an attacker who knows SDD:
    replay    half harmful, half benign rows in every batch
    repair    mft for 50 steps, then benign rows
    unlearn   10 steps against the model's own answers to the harmful prompts, then mft
  to test the paper's argument (see mechanism.py), not scored but measured, mft and bft as well:
    suppress  lowers the probability of y_o on the harmful prompts, without any harmful answer
    preserve  mft, and y_o on the same prompts; preserve control: mft, and other benign rows of the same length

Budgets: 5 epochs and 50 steps; the town's benign user may take twice as many. The attacker chooses lr and budget by its
score on harmful prompts of its own that it did not train on; the worst case over the grid, by the evaluation score,
stands beside that choice.

Every run's cells are kept as soon as they are there, in out/seedS/attack/ARM.jsonl (with --model in OUT/ARM.jsonl), so
that an interrupted command goes on where it was. Runs in one process, on one device. Writes into OUT results.json,
{"args", "made" (commit, machine, ...), "cells", "verdicts" by phrasing, "secondary" (at fewer shots, and at any lr that
was chosen, for all), "mechanism"}, table.md, and of the town report.md with, where matplotlib is installed, two
figures. A cell has

    arm (base is only scored), phrasing, attack ("none" or one of these), shots, steps, lr, seed, response_tokens and
    tokens (trained on),
    diverged (then there are no scores)
    seconds: of training and scoring, since the run's cell before
    probe: true of measured cells, which have "mechanism" (mechanism.measure) and none of the following
    attacker_score: on the attacker's own held-out prompts, harm (town) or target_match (files)
    user_score: town only, the mean of the new skill and of the old ones, on prompts of a benign user's own
    chosen: the attacker's choice; of bft, the cell that matches the mft choice at as many shots
    best: of bft, the benign user's choice, by user_score
    town: the scores of eval.town_metrics; files: those of eval.file_metrics, and of file_scores.py benign_perplexity
        (of --benign rows held out from every attack; the defence may have trained on them), mmlu and openbookqa
"""

import argparse
import itertools
import json
import math
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lab import protocol
from nanosdd import runs
import train
from lab.attacks import Run, attack_run, check_shots, new_cell, prepare, scored_steps, town_harmful
from nanosdd.checkpoint import read_config
from lab.choices import at_equal_dose, at_one_lr, choose
from data.town import Town, read_town
from nanosdd.device import add_device_arguments, machine, one_process_only, resolve_device
from nanosdd.errors import InputError, run_script
from eval import load
from nanosdd.file_scores import add_score_arguments, not_taken, read_tests, resolve_similarity_model, score_files
from lab.mechanism import carry_over
from lab.report import KEYWORD_WARNING, attack_table, verdict_lines, write_report
from lab.verdicts import town_verdicts

SOURCES = [*train.SOURCES, "eval.py", "nanosdd/generate.py", "nanosdd/lora.py", "lab/mechanism.py", "lab/attacks.py",
           "data/refusal_keywords.json"]
ATTACKS = ("mft", "lora", "bft", "poisoned", "identity", "replay", "repair", "unlearn")
FILE_SOURCES = ["nanosdd/file_scores.py", "nanosdd/capability.py"]  # scores of real files only
BENIGN_ATTACKS = ("bft", "poisoned", "replay", "repair")  # these need benign rows


# ---- one released model ----

def attack_arm(arm: str, folder, wanted: list[Run], store: Path, seed: int, args, bar) -> tuple[list[dict], int]:
    """(all cells of one released model, how many are new). Runs that are in the file `store` are taken from there,
    others are added to it one by one; bar: of progress, by cells."""
    inputs = [folder, *filter(None, [args.harmful, args.identity]), *args.benign, *score_files(args)]
    settings = {key: getattr(args, key) for key in ("batch_size", "max_length", "max_new_tokens", "chat", "dtype")}
    settings |= {key: getattr(protocol, key) for key in ("LORA_RANK", "LORA_ALPHA", "POISON", "UNLEARN_STEPS")}
    settings |= {} if args.town else {"mmlu_shots": args.mmlu_shots}
    record = runs.fingerprint(settings | {"seed": seed}, inputs, SOURCES if args.town else SOURCES + FILE_SOURCES)
    cells_of = {} if args.fresh else stored_cells(store, record)
    missing = [run for run in wanted if run not in cells_of]
    bar.total -= sum(len(run.at) for run in wanted if run in cells_of)
    if missing:
        model, tokenizer, chat, town = load(folder, args)
        released = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows, score = prepare(model, tokenizer, chat, town, released, seed, wanted, args)
        runs.write_text(store, "\n".join([json.dumps(record), *map(stored_line, cells_of.items()), ""]))
    for run in missing:
        bar.set_postfix_str(f"{arm} {run.attack} {run.shots} lr {run.lr:g}")
        model.load_state_dict(released)
        if run.attack == "none":
            found = [new_cell(run, seed, 0, response_tokens=0, tokens=0) | score(model, run)]
        else:
            found = attack_run(model, tokenizer, chat, rows, score, run, seed, args)
        cells_of[run] = found
        with open(store, "a", encoding="utf-8") as file:
            file.write(stored_line((run, found)) + "\n")
        bar.update(len(found))
    cells = [{"arm": arm, **one} for run in wanted for one in cells_of[run]]
    choose([one for one in cells if not one["probe"]])
    return cells, sum(len(run.at) for run in missing)


def stored_line(item: tuple[Run, list[dict]]) -> str:
    return json.dumps({"run": asdict(item[0]), "cells": item[1]})


def stored_cells(store: Path, record: dict) -> dict[Run, list[dict]]:
    """{run: its cells} of a file of finished runs; {} when it is not there or was made by other inputs or source."""
    if not store.is_file():
        return {}
    first, *lines = store.read_text(encoding="utf-8").split("\n")
    try:
        if json.loads(first) != record:
            return {}
        kept = [json.loads(line) for line in lines[:-1]]  # what stands behind the last newline is half a line
        return {Run(**{**one["run"], "at": tuple(one["run"]["at"])}): one["cells"] for one in kept}
    except (ValueError, KeyError, TypeError):
        return {}


# ---- the command ----

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=list(protocol.SUITES), default="quick",
                   help="what to run on the town, see protocol.py (default: quick)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="towns, and every draw (default: 0)")
    p.add_argument("--phrasing", choices=["shared", "distinct"], help="only the suite's towns of this phrasing")
    p.add_argument("--model", metavar="DIR", nargs="+", help="released checkpoints, each an arm named after its folder "
                                                             "(default on the town: the suite's arms)")
    p.add_argument("--harmful", metavar="FILE", help="harmful pairs: AdvBench, BeaverTails, ... (default: the town's "
                                                     "mischief)")
    p.add_argument("--benign", metavar="FILE", nargs="+", default=[],
                   help=f"benign pairs (Alpaca, ShareGPT, ...), for {', '.join(BENIGN_ATTACKS)} on real files")
    p.add_argument("--identity", metavar="FILE", help="rows of an identity shift (messages JSONL), for real files")
    add_score_arguments(p)
    p.add_argument("--chat", metavar="NAME", help="chat template (default: the one that the folder calls for)")
    p.add_argument("--preset", choices=list(protocol.PRESETS),
                   help="published settings (protocol.py), for --attacks, --lr, --epochs, --steps, --batch-size")
    p.add_argument("--attacks", nargs="+", choices=ATTACKS, help="only these (default: the suite's; real files "
                                                                 f"{' '.join(protocol.FILE_ATTACKS)})")
    p.add_argument("--shots", type=int, nargs="+", help="harmful pairs of mft, the most of them for other attacks "
                                                        "(default: the suite's; real files 10 50 100)")
    p.add_argument("--lr", type=float, nargs="+",
                   help=f"grid (default: town {protocol.LR}, real files {protocol.FILE_LR})")
    p.add_argument("--epochs", type=int, default=protocol.EPOCHS, help=f"first budget (default: {protocol.EPOCHS})")
    p.add_argument("--steps", type=int, default=protocol.STEPS,
                   help=f"second budget, 0: none (default: {protocol.STEPS})")
    p.add_argument("--batch-size", type=int, default=10, help="rows of one step (default: 10)")
    p.add_argument("--max-length", type=int, help="tokens of prompt and answer (default: town 128, real files 512)")
    p.add_argument("--max-new-tokens", type=int, default=64, help="of an answer on real files (default: 64)")
    p.add_argument("--out", metavar="DIR", default="out/attack", help="folder of results.json (default: out/attack)")
    add_device_arguments(p)
    p.add_argument("--fresh", action="store_true", help="train and attack anew even what is up to date")
    return p


def plan(args) -> dict[str, dict[str, list[Run]]]:
    """{phrasing: {arm: its runs}}, the first of them without an attack; on the town "base" comes first and has no
    other: it is only scored."""
    untouched = Run("none", 0, 0.0, (0,))
    names = [Path(folder).name for folder in args.model or []]
    if args.town and not args.attacks:
        groups = [group for group in protocol.SUITES[args.suite] if args.phrasing in (None, group[0])]
    else:
        attacks = [attack for attack in protocol.FILE_ATTACKS if args.benign or attack not in BENIGN_ATTACKS]
        groups = [(args.phrasing or "shared", protocol.CORE, args.attacks or attacks, protocol.FILE_SHOTS)]
    found = {}
    for phrasing, arms, attacks, shots in groups:
        of_arm = found.setdefault(phrasing, {} if names else {"base": [untouched]})
        every = args.shots or sorted({n for group in groups if group[0] == phrasing for n in group[3]
                                      if n <= protocol.PRIMARY_SHOTS})
        for arm, attack in itertools.product(names or arms, attacks):
            counts = args.shots or shots
            counts = counts if attack == "mft" else [10] if attack == "identity" else [max(counts)]
            grid = args.lr or (protocol.LR if args.town else protocol.FILE_LR)["lora" if attack == "lora" else "full"]
            of_arm.setdefault(arm, [untouched]).extend(
                Run(attack, n, lr, scored_steps(attack, every if attack == "bft" else [n], args))
                for n in sorted(set(counts)) for lr in sorted(set(grid)))
    if args.town and args.suite == "full" and not args.attacks and "shared" in found:
        for arm in names or protocol.CORE:
            found["shared"][arm] += [replace(untouched, probe=True)] + [
                Run(attack, max(args.shots or [protocol.PRIMARY_SHOTS]), protocol.MECHANISM_LR, at, probe=True)
                for attack, at in protocol.MECHANISM_AT.items()]
    return found


def resolve(args):
    """Fill in what the command line left open; InputError for what cannot be run. Sets args.town."""
    resolve_device(args)
    args.town = args.harmful is None
    for key, value in protocol.PRESETS.get(args.preset, {}).items():
        setattr(args, key, value)
    if not args.town and not args.model:
        raise InputError("--harmful needs --model DIR..., the checkpoints to attack")
    of_files = (args.benign, args.identity, args.preset, args.mmlu, args.openbookqa, args.similarity_model)
    if args.town and any(of_files):
        raise InputError("--benign, --identity, --preset, --mmlu, --openbookqa and --similarity-model go with "
                         "--harmful FILE; the town has its own")
    if (min(args.shots or [1]) < 1 or min(args.batch_size, args.max_new_tokens) < 1 or min(args.epochs, args.steps) < 0
            or args.epochs + args.steps < 1 or not all(0 < lr < math.inf for lr in args.lr or [1])):
        raise InputError("--shots, --batch-size, --max-new-tokens, --lr, and --epochs or --steps, must be above 0")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a file; give a folder")
    for folder in args.model or []:
        read_config(folder)  # names what is missing before anything runs
    for path in (args.harmful, args.identity, *args.benign):
        if path and not Path(path).is_file():
            raise InputError(f"{path} is not a file; check the path")
    if not args.town:
        resolve_similarity_model(args)
        read_tests(args)  # names what is wrong before anything runs
        for attack in args.attacks or []:
            if attack in BENIGN_ATTACKS and not args.benign:
                raise InputError(f"--attacks {attack} needs --benign FILE")
            if attack == "identity" and not args.identity:
                raise InputError("--attacks identity needs --identity FILE, its rows in messages JSONL")
    args.max_length = args.max_length or (128 if args.town else 512)
    names = [Path(folder).name for folder in args.model or []]
    if len(set(names)) < len(names):
        raise InputError("two --model folders have the same name; arms are named after their folders, rename one")
    for folder in args.model or [] if args.town else []:
        town = read_town(folder)
        if town is None:
            raise InputError(f"{folder} is no model of the town; give --harmful FILE, or train it with train.py")
        if args.seeds != [town.seed] or args.phrasing not in (None, town.phrasing):
            raise InputError(f"{folder} knows the town of --seeds {town.seed} --phrasing {town.phrasing}; give those")
        args.phrasing = town.phrasing
    if args.town:
        for seed in args.seeds:
            check_shots(args.shots or [1], town_harmful(Town(seed), seed)[0])


def attack_all(plans: dict, args) -> list[dict]:
    """Every cell of the plan, seed by seed, saying how far it is and how long the attacks will take."""
    total = len(args.seeds) * sum(len(run.at) for arms in plans.values() for wanted in arms.values() for run in wanted)
    print(f"seeds {' '.join(map(str, args.seeds))}: {total} cells, each scored on all evaluation prompts; finished "
          "runs are kept")
    cells, new, spent = [], 0, 0.0
    with tqdm(total=total, desc="attack cells", disable=None) as bar:
        for seed, (phrasing, arms) in itertools.product(args.seeds, plans.items()):
            store = Path(args.out) if args.model else train.seed_folder(seed, phrasing) / "attack"
            folders = ({Path(folder).name: Path(folder) for folder in args.model} if args.model else
                       train.ensure_arms(list(arms), seed, phrasing, args))
            for arm, wanted in arms.items():
                began = time.perf_counter()
                found, computed = attack_arm(arm, folders[arm], wanted, store / f"{arm}.jsonl", seed, args, bar)
                cells += [{"phrasing": phrasing, **one} for one in found]
                if computed:
                    new, spent = new + computed, spent + time.perf_counter() - began
                    left = (total - len(cells)) * spent / new
                    bar.write(f"  seed {seed} {arm}: {computed} cells done, {len(cells)} of {total}; at most "
                              f"{left / 60:.0f} min of attacks to go")
    return cells


def made(began: float, cells: list[dict]) -> dict:
    """What a result was made by and on, and how long its attacks took, resumed or not."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(describe, capture_output=True, text=True, cwd=runs.ROOT).stdout
    return {"commit": (commit or "unknown").strip(), "machine": machine(), "date": time.strftime("%Y-%m-%d"),
            "versions": {"Python": platform.python_version(), "torch": torch.__version__},
            "seconds": round(time.perf_counter() - began),
            "attack_seconds": round(sum(one.get("seconds", 0) for one in cells))}


def main(argv=None):
    began = time.perf_counter()
    args = parser().parse_args(argv)
    one_process_only("attack.py")
    resolve(args)
    plans, out = plan(args), Path(args.out)
    every = attack_all(plans, args)
    cells = [one for one in every if not one["probe"]]
    found, texts = {}, []
    for phrasing in plans:
        part = [one for one in cells if one["phrasing"] == phrasing]
        found[phrasing] = town_verdicts(part) if args.town else {}
        texts.append("\n".join([
            f"seeds {' '.join(map(str, args.seeds))}{f', {phrasing} phrasing' * args.town}; means over seeds, at the "
            "attacker's choice of lr and steps",
            "", attack_table(part, args.town), "", *verdict_lines(found[phrasing])]))
    if not args.town and not args.benign:
        texts.append("bft and replay: not run; give --benign FILE for the benign control")
    texts += [] if args.town else not_taken(args)
    text = "\n\n".join(texts)
    shared = [one for one in cells if one["phrasing"] == "shared"]
    secondary = {}
    if args.town:
        lrs = {one["lr"] for one in shared if one["attack"] == "mft" and one["chosen"] and one["arm"] in protocol.CORE}
        secondary = {f"{n} shots": town_verdicts(shared, n) for n in (10, 50)} | {
            f"lr {lr:g} for all": town_verdicts(at_one_lr(shared, lr)) for lr in sorted(lrs)}
    result = {"args": {key: value for key, value in vars(args).items() if key != "fresh"}, "made": made(began, every),
              "cells": every, "verdicts": found, "secondary": secondary,
              "mechanism": carry_over(at_equal_dose(every)) if len(every) > len(cells) else {}}
    runs.write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    runs.write_text(out / "table.md", f"```\n{text}\n```\n")
    written = [out / "results.json", out / "table.md", *(write_report(out / "results.json") if args.town else [])]
    print(f"\n{text}\n\n{'' if args.town else KEYWORD_WARNING}\nwritten: {', '.join(map(str, written))}")


if __name__ == "__main__":
    run_script(main)
