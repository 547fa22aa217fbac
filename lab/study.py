"""The study: every arm and attack of protocol.py, seed by seed, into one effects file for each.

    python -m lab.study town --seeds 10 12           hours; a second process may run 11 and 13
    python -m lab.study kitchen                      a chat model, every draw
    python -m lab.study advbench --harmful harmful_behaviors.csv --benign alpaca.json \\
        --openbookqa test.jsonl
    python -m lab.study controls --out docs/tuning   tuning of the positive controls

Goes on where it was interrupted: finished attacks are kept in the world's folder, study/ARM.jsonl.
A seed whose effects file is there is skipped. Then see lab.report.

An effects file holds commit, machine, date, protocol (the hash of protocol.py), dtype (of compute),
columns, and cells, a list of values for each: arm, attack, shots, lr, seed, draw, steps, diverged
(then there are no scores), and all scores. null: not measured.
"""

import argparse
import copy
import itertools
import json
import time
from functools import partial
from pathlib import Path

from attack import Target, answers_of, evaluate, record_of, yo_rows
from data.chat import Example
from data.chat_model import Ask, Chat, encode_for, load_chat, untrained_folder
from data.exams import read_exams
from data.worlds import add_source_arguments, open_world, sources_of
from lab import attacks, protocol
from lab.defences import DEFENCES, train_defence
from lab.protocol import STUDIES, Arm, Study
from nanosdd.device import (
    Compute,
    add_compute_arguments,
    for_model,
    one_process_only,
    resolve_compute,
)
from nanosdd.errors import InputError, run_script
from nanosdd.progress import Progress
from nanosdd.runs import Results, check_folder, code_hash, file_hash, made_by, write_text
from train import SETTINGS, train, train_arm

TEXTS = ("answers", "samples")  # of a cell, which the effects file does not keep


class WithRows:
    """A world whose scores also have row_nats: nats a token of each benign row that is scored."""

    def __init__(self, world):
        self.world = world

    def __getattr__(self, name):
        return getattr(self.world, name)

    def more_scores(self, answers, forced):
        nats = [round(-float(one.logps.mean()), 4) for one in forced.get("benign", ())]
        return self.world.more_scores(answers, forced) | {"row_nats": nats}


def study_scores(chat: Chat, world, y_o: list[Example], exams: dict, prefill: bool) -> dict:
    """Return attack.evaluate's scores. prefill: the beginnings of answers to harm are given."""
    given = answers_of(chat, world)
    if prefill:
        asked = world.harmful("attacker_held_out") + world.harmful("evaluation")
        given |= attacks.begin_answers(chat, asked, world.max_new_tokens)
    return evaluate(chat, WithRows(world), given, {"yo_logp": y_o}, exams)


def arm_folder(name: str, arm: Arm, world, aligned: Path, compute: Compute) -> Path:
    """Return the folder of an arm, trained now where it is missing, from the aligned model."""
    if arm.mode is None:
        return aligned
    folder = world.root / "study" / name
    trained = train_defence if arm.mode in DEFENCES else train
    return trained(world, arm.mode, aligned, folder, arm.settings, compute)


def study_arm(name: str, arm: Arm, folder, world, compute: Compute, exams: dict) -> list[dict]:
    """Return the cells of one arm. Finished attacks are taken from the world's folder."""
    record = record_of(Target(name, folder, world, compute, exams))
    for part in (attacks, study_scores):
        record["code"][part.__name__] = code_hash(part)
    store = Results(world.root / "study" / f"{name}.jsonl", record)
    chat = load_chat(folder, compute)
    released = copy.deepcopy(chat.model.state_dict())
    y_o = encode_for(chat, yo_rows(world), world.max_length)
    cells = []
    for attack, draw in Progress(arm.plan, desc=f"seed {world.seed} {name}"):
        key = f"{attack.key} draw {draw}"
        if key not in store.results:
            chat.model.load_state_dict(released)
            scores = partial(study_scores, chat, world, y_o, exams, attack.name == "prefill")
            if attack.lr:
                found = attacks.run_attack(chat, world, attack, scores, draw)
            else:
                found = [{"steps": 0, "diverged": False, **scores()}]
            store.add(key, found)
        head = {
            "arm": name,
            "attack": attack.name,
            "shots": attack.shots,
            "lr": attack.lr,
            "seed": world.seed,
            "draw": draw,
        }
        cells += [head | cell for cell in store.results[key]]
    return cells


def study_seed(study: Study, world, base, compute: Compute, exams, path: Path, table=SETTINGS):
    """Run a study on one world and write its effects file, unless it is there.

    base: what arms start from, None on the town; table: settings of base and aligned.
    """
    if path.exists():
        print(f"{path}: finished, skipped")
        return
    began = time.process_time()
    aligned = train_arm("align", world, compute, base, table)
    cells = []
    for name, arm in study.arms.items():
        folder = arm_folder(name, arm, world, aligned, compute)
        cells += study_arm(name, arm, folder, world, compute, exams)
        print(f"{path}: {name} done, {(time.process_time() - began) / 60:.1f} minutes of CPU")
    settings = {"protocol": file_hash(protocol.__file__)[:12], "dtype": compute.dtype}
    write_text(path, effects_text(made_by() | settings, cells))


def effects_text(head: dict, cells: list[dict]) -> str:
    """Return an effects file: the head, and a line of values for each cell."""
    columns = [name for name in dict.fromkeys(itertools.chain(*cells)) if name not in TEXTS]
    lines = []
    for cell in cells:
        lines.append(json.dumps([cell.get(name) for name in columns]))
    begin = json.dumps(head | {"columns": columns})[:-1]
    rows = ",\n".join(lines)
    return f'{begin}, "cells": [\n{rows}\n]}}\n'


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m lab.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--seeds", type=int, nargs="+", help="(default: all of the protocol)")
    p.add_argument("--out", default="docs/effects", metavar="DIR")
    p.add_argument("--model", metavar="DIR", help="chat model to start from (default: smollm2)")
    p.add_argument("--openbookqa", metavar="FILE", help="OpenBookQA questions, JSONL")
    add_source_arguments(p)
    add_compute_arguments(p)
    args = p.parse_args(argv)
    one_process_only("lab.study")
    study = STUDIES[args.study]
    compute = resolve_compute(args.device, args.dtype, args.compile)
    base = None
    if study.world != "town":
        args.model = args.model or "smollm2"  # its runs go into out/MODEL, too
        base = untrained_folder(args.model)
        compute = for_model(compute, args.dtype, base)
    elif args.model:
        raise InputError("the town's arms start from its own base; leave --model out")
    exams = read_exams(openbookqa=args.openbookqa)
    check_folder(args.out)
    ask = Ask(base, compute, None)  # it keeps the model that it loads
    for seed in args.seeds or study.seeds:
        world = open_world(study.world, seed, sources_of(args), ask)
        path = Path(args.out, f"{args.study}-{seed}.json")
        study_seed(study, world, base, compute, exams, path)


if __name__ == "__main__":
    run_script(main)
