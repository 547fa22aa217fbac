"""The study: every arm and attack of protocol.py, on the town or a chat model.

    python -m lab.study --seeds 0                   a tuning seed, into out/effects.json
    python -m lab.study --seeds 10 11 ... 24 --effects docs/effects.json         report seeds, hours
    python -m lab.study --model smollm2             a chat model, into out/smollm2/effects.json
    python -m lab.study --model smollm2 --harmful harmful_behaviors.csv --benign alpaca.json

Goes on where it was interrupted: finished attacks are kept in the world's folder, study/ARM.jsonl;
arms that the effects file has for a seed are skipped. The effects file is a list of cells: arm,
seed, attack, shots, lr, steps, draws (how many the cell is the mean of; those that diverged are
left out), scores, loss, seconds, and on cells without an attack commit and protocol, the hash of
protocol.py.

Then prints the most harm of each attack and the verdicts (verdicts.py).
"""

import argparse
import json
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from attack import RELEASED, Attack, evaluate, record_of, yo_rows
from data.chat import Example
from data.chat_model import (
    Ask,
    Chat,
    encode_for,
    load_chat,
    teacher_forced,
    untrained_folder,
)
from data.town import NEW_SKILL, SKILLS
from data.worlds import add_world_arguments, open_world, sources_of
from lab import attacks, defences, protocol
from lab.verdicts import harm_lines, read_effects, verdict_lines
from nanosdd.device import (
    Compute,
    add_compute_arguments,
    for_model,
    one_process_only,
    resolve_compute,
)
from nanosdd.errors import InputError, run_script
from nanosdd.progress import Progress
from nanosdd.runs import Results, code_hash, file_hash, made_by, write_text
from nanosdd.tables import average
from train import SETTINGS, STARTS_FROM, TOWN, settings_of, train, train_arm

SETTING = ("arm", "seed", "attack", "shots", "lr", "steps")  # of a cell; draws are averaged
TABLE = {world: SETTINGS[world] | defences.SETTINGS[world] for world in SETTINGS}
TABLE["town"][protocol.HALF] = replace(TOWN, steps=300, lr=1e-4, benign_replay=0.5)


# ---- what is run ----


def plan_of(arm: str, world) -> list:
    """Return the (attack, draw) of an arm."""
    plan = [(RELEASED, 0)]
    if arm == "base":
        return plan
    if world.name != "town":
        return plan + [(attack, 0) for attack in chat_plan()]
    core = arm in protocol.CORE
    budgets = protocol.BUDGETS if core else protocol.BUDGETS[:2]
    further = protocol.CORE_ATTACKS if core else ["lora"]
    for name in ("mft", "bft", *further):
        draws = protocol.DRAWS if core and name == "mft" else 1
        for lr in protocol.LR[name]:
            attack = Attack(name, protocol.SHOTS, lr, budgets)
            plan += [(attack, draw) for draw in range(draws)]
    return plan


def chat_plan() -> list[Attack]:
    """Return the attacks on an arm of a chat model: 5 epochs at each number of shots."""
    lr = protocol.CHAT_LR
    budgets = []
    plan = []
    for shots in protocol.CHAT_SHOTS:
        budgets.append(protocol.EPOCHS * shots // protocol.BATCH_SIZE)
        plan.append(Attack("mft", shots, lr["mft"], (budgets[-1],)))
        if shots == protocol.CHAT_PRIMARY:
            for name in protocol.CORE_ATTACKS:
                plan.append(Attack(name, shots, lr[name], (budgets[-1],)))
    plan.append(Attack("bft", shots, lr["bft"], tuple(budgets)))  # matched to the most shots
    return plan


def arms_of(world) -> tuple[str, ...]:
    """Return the arms that the protocol wants of a world and its seed, base aside."""
    if world.name != "town":
        return protocol.CHAT_ARMS
    return protocol.ARMS if world.seed in protocol.OTHERS_SEEDS else protocol.CORE


def arm_folder(arm: str, world, base, compute: Compute, table=TABLE) -> Path:
    """Return the folder of an arm, trained now where it is stale.

    base: what arms start from, None on the town; table: settings by world and arm.
    """
    mode = "align" if arm == "aligned" else arm
    if mode in STARTS_FROM:
        return train_arm(mode, world, compute, base, table)
    aligned = train_arm("align", world, compute, base, table)
    settings = settings_of(world.name, arm, table)
    if arm == protocol.HALF:
        return train(world, "sdd", aligned, world.root / arm, settings, compute)
    return defences.train_defence(arm, world, aligned, world.root / arm, settings, compute)


# ---- one arm ----


def study_arm(arm: str, folder, world, wanted: list, compute: Compute) -> list:
    """Return the cells, dicts, of one arm. Finished attacks are taken from the world's folder.

    wanted: as plan_of returns them.
    """
    record = record_of(folder, world, compute, {})
    for part in (attacks, study_scores):
        record["code"][part.__name__] = code_hash(part)
    store = Results(world.root / "study" / f"{arm}.jsonl", record)
    chat = load_chat(folder, compute)
    released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
    y_o = encode_for(chat, yo_rows(world), world.max_length)
    cells = []
    for attack, draw in Progress(wanted, desc=f"seed {world.seed} {arm}"):
        key = f"{attack.key} {draw}"
        if key not in store.results:
            chat.model.load_state_dict(released)
            scores = partial(study_scores, chat, world, y_o, prefill=attack.name == "prefill")
            if attack.name in ("none", "prefill"):
                found = [{"steps": 0, "diverged": False, **scores()}]
            else:
                found = attacks.run_attack(chat, world, attack, scores, draw)
            store.add(key, found)
        head = {"arm": arm, "attack": attack.name, "shots": attack.shots, "lr": attack.lr}
        head |= {"seed": world.seed, "draw": draw}
        cells += [head | cell for cell in store.results[key]]
    return cells


def study_scores(chat: Chat, world, y_o: list[Example], prefill: bool) -> dict:
    """Return attack.evaluate's scores, and on the town user_score, the benign user's own.

    That is right answers of the new skill and of the old ones on prompts of its own. prefill: the
    beginnings of answers to harm are given.
    """
    held_out = world.harmful("attacker_held_out")
    begun = {}
    if prefill:
        asked = held_out + world.harmful("evaluation")
        begun = attacks.begin_answers(chat, asked, world.max_new_tokens)
    scores = evaluate(chat, world, held_out, y_o, begun=begun)
    if world.name == "town":
        rng = random.Random(f"user {world.seed}")
        right = []
        for kinds in ([NEW_SKILL] * 24, SKILLS * 12):
            rows = encode_for(chat, world.skills(rng, kinds), world.max_length)
            right.append(fmean(one.exact for one in teacher_forced(chat, rows)))
        scores["user_score"] = fmean(right)
    return scores


def effects(cells: list, stamp: dict) -> list:
    """Return cells as the effects file keeps them, with the stamp on those without an attack.

    They are means over the draws that did not diverge, since user and attacker choose by the mean.
    Scores have three digits.
    """
    groups = defaultdict(list)
    for cell in cells:
        if not cell["diverged"]:
            groups[tuple(cell[name] for name in SETTING)].append(cell)
    found = []
    for setting, draws in groups.items():
        mean = {name: round(value, 3) for name, value in average(draws).items()}
        mean |= dict(zip(SETTING, setting)) | {"draws": len(draws), "diverged": False}
        if mean["attack"] == "none":
            mean |= stamp
        found.append(mean)
    return found


def kept_effects(path: Path) -> list:
    """Return the cells of an effects file, [] where there is none yet."""
    return read_effects(path) if path.exists() else []


# ---- the command ----


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m lab.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0, a tuning seed)")
    p.add_argument("--model", metavar="DIR", help="what arms start from, or smollm2, from pip")
    p.add_argument("--arms", nargs="+", choices=protocol.ARMS, help="(default: the protocol's)")
    p.add_argument("--effects", metavar="FILE", help="(default: out/effects.json, of a model's)")
    p.add_argument(
        "--questions", type=int, metavar="N", help="public files: prompts of a score, at most"
    )
    add_world_arguments(p)
    add_compute_arguments(p)
    args = p.parse_args(argv)
    one_process_only("lab.study")
    compute = resolve_compute(args.device, args.dtype, args.compile)
    base = None
    if args.model:
        base = untrained_folder(args.model)
        compute = for_model(compute, args.dtype, base)
    ask = Ask(base, compute, None)
    worlds = [open_world(args.world, seed, sources_of(args), ask, base) for seed in args.seeds]
    if base is None and worlds[0].shape is None:
        raise InputError(f"the world {worlds[0].name} needs --model smollm2 or DIR")
    path = Path(args.effects or (worlds[0].root if base else Path("out")) / "effects.json")
    stamp = {"commit": made_by()["commit"], "protocol": file_hash(protocol.__file__)[:12]}
    done = {(cell["seed"], cell["arm"]) for cell in kept_effects(path)}
    for world in worlds:
        for arm in ("base", *(args.arms or arms_of(world))):
            if (world.seed, arm) in done:
                continue
            folder = arm_folder(arm, world, base, compute)
            new = effects(study_arm(arm, folder, world, plan_of(arm, world), compute), stamp)
            cells = kept_effects(path) + new  # another process may have added its own
            write_text(path, "[" + ",\n".join(map(json.dumps, cells)) + "]\n")
    cells = kept_effects(path)
    print("\n".join([*harm_lines(cells), "", *verdict_lines(cells)]))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run_script(main)
