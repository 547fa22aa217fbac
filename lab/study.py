"""The study: every arm and attack of protocol.py, on the town or on a chat model, and the effects file.

    python -m lab.study --seeds 0                      a tuning seed, into out/effects.json
    python -m lab.study --seeds 10 11 ... 24 --effects docs/effects.json        the report seeds, hours
    python -m lab.study --model smollm2                a chat model in the kitchen, into out/smollm2/effects.json
    python -m lab.study --model smollm2 --harmful harmful_behaviors.csv --benign alpaca.json      on public files

Goes on where it was interrupted: finished attacks are kept in the world's folder, study/ARM.jsonl; arms that the
effects file has for a seed are skipped. The effects file is a list of cells: arm, seed, attack, shots, lr, steps, draws
(how many the cell is the mean of; those that diverged are left out), coefficient (of interpolation), scores, and on
cells without an attack commit and protocol, the hash of protocol.py; measured cells have mechanism (mechanism.measure)
in the place of scores.

Then prints the most harm of each attack and the verdicts (verdicts.py).
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from attack import RELEASED, Attack, evaluate, yo_rows
from data.town import NEW_SKILL, Town
from data.worlds import Sources, add_world_arguments, open_world
from eval import score, scored_prompts, teacher_forced
from lab import defences, protocol
from lab.attacks import begin_answers, owned_by_attacker, run_attack, soft_prompt
from lab.mechanism import measure, probes
from lab.verdicts import harm_lines, mean_over_draws, read_effects, verdict_lines, verdicts
from nanosdd.chat_model import Chat, answer_each, load_chat, untrained_folder
from nanosdd.device import (
    Compute,
    add_compute_arguments,
    for_model,
    one_process_only,
    resolve_compute,
)
from nanosdd.errors import run_script
from nanosdd.folders import write_text
from nanosdd.progress import Progress
from nanosdd.runs import Finished, fingerprint, made_by, source_hash, source_of
from train import DEFENCE, SETTINGS, train, train_arm

IDENTITY = ("arm", "seed", "attack", "shots", "lr", "steps", "coefficient", "draws", "diverged")
SCORES = (
    "capability",
    "facts",
    "facts_evaluation",
    "skills",
    "facts_value_only",
    "skills_value_only",
    "facts_nll",
    "skills_nll",
    "harm",
    "content_knowledge",
    "content_skill",
    "recipe_knowledge_value_only",
    "recipe_skill_value_only",
    "off_topic",
)
MORE_SCORES = {
    "none": ("known_triples", "new_skill", "refuse", "told", "yo_logp"),
    "bft": ("new_skill", "user_score"),
}
MEASURED = (
    "logp_yo_own",
    "logp_yo_harmful",
    "facts_value_only",
    "distance",
    "nll_benign",
)  # as carry_over reads them
TABLE = {
    world: own
    | defences.SETTINGS.get(world, defences.SETTINGS["kitchen"])
    | {protocol.HALF: replace(own["sdd_rehearsed"], benign_replay=0.5)}
    for world, own in SETTINGS.items()
}
TABLE["town"][protocol.HALF] = replace(DEFENCE, steps=300, lr=1e-4, benign_replay=0.5)


# ---- what is run ----


def town_plan(arm: str) -> list[tuple[Attack, int, bool]]:
    """(attack, draw, whether it is measured instead of scored) of an arm of the town."""
    core = arm in protocol.CORE
    budgets = protocol.BUDGETS if core else protocol.BUDGETS[:2]
    draws = {"mft": protocol.DRAWS if core else 1, "bft": 1}
    draws |= dict.fromkeys(protocol.CORE_ATTACKS if core else ["lora"], 1)
    found = [(RELEASED, 0, False)]
    for name, count in draws.items():
        own = {"prefill": (0,), "interpolation": budgets[:2]}.get(name, budgets)
        found += [
            (Attack(name, protocol.SHOTS, lr, own, protocol.BATCH_SIZE), draw, False)
            for lr in protocol.LR[name]
            for draw in range(count)
        ]
    if arm in (*protocol.REFERENCES, "sdd"):
        measured = {
            name: Attack(name, protocol.SHOTS, protocol.MECHANISM_LR["full"], steps)
            for name, steps in protocol.MECHANISM.items()
        }
        lora = Attack(
            "lora", protocol.SHOTS, protocol.MECHANISM_LR["lora"], protocol.MECHANISM["mft"]
        )
        found += [(attack, 0, True) for attack in (RELEASED, *measured.values(), lora)]
    return found


def chat_plan(arm: str) -> list[tuple[Attack, int, bool]]:
    """The same of an arm of a chat model: 5 epochs at each number of shots."""
    steps = {shots: protocol.EPOCHS * shots // protocol.BATCH_SIZE for shots in protocol.CHAT_SHOTS}
    found, primary = [(RELEASED, 0, False)], protocol.CHAT_PRIMARY
    for shots in protocol.CHAT_SHOTS:
        found.append((Attack("mft", shots, protocol.CHAT_LR["mft"], (steps[shots],)), 0, False))
    found.append(
        (Attack("bft", max(steps), protocol.CHAT_LR["bft"], tuple(steps.values())), 0, False)
    )
    return found + [
        (
            Attack(
                name,
                primary,
                protocol.CHAT_LR[name],
                (0,) if name == "prefill" else (steps[primary],),
            ),
            0,
            False,
        )
        for name in protocol.CHAT_ATTACKS
    ]


def arms_of(world) -> tuple[str, ...]:
    """The arms that the protocol wants of a world and its seed, base aside."""
    if not isinstance(world, Town):
        return protocol.CHAT_ARMS
    return protocol.ARMS if world.seed in protocol.OTHERS_SEEDS else protocol.CORE


def arm_folder(arm: str, world, base, compute: Compute, table=TABLE) -> Path:
    """The folder of an arm, trained now where it is stale. base: what arms start from, None on the town; table:
    settings by world and arm."""
    if arm not in (*defences.DEFENCES, protocol.HALF):
        return train_arm(
            {"aligned": "align"}.get(arm, arm), world, world.root, compute, base, table=table
        )
    aligned = train_arm("align", world, world.root, compute, base, table=table)
    if arm == protocol.HALF:
        return train(world, "sdd", aligned, world.root / arm, table[world.name][arm], compute)
    return defences.train_defence(
        arm, world, aligned, world.root / arm, table[world.name][arm], compute
    )


# ---- one arm ----


def study_arm(
    arm: str, folder, world, wanted: list[tuple[Attack, int, bool]], store: Path, compute: Compute
) -> Iterator[dict]:
    """The cells of one arm. Finished attacks are taken from the file `store`."""
    settings = {"seed": world.seed, "dtype": compute.dtype, **world.options}
    record = fingerprint(settings, [folder, *world.files()], ["lab/study.py", source_of(world)])
    finished, chat, keys = (
        Finished(store, record),
        None,
        [f"{attack.key} {draw} {measured}" for attack, draw, measured in wanted],
    )
    missing = [(key, one) for key, one in zip(keys, wanted) if key not in finished.results]
    for key, (attack, draw, measured) in (
        bar := Progress(missing, desc=f"seed {world.seed} {arm}")
    ):
        bar.set_postfix_str(key)
        if chat is None:
            chat = load_chat(folder, compute)
            own = owned_by_attacker(chat, world, argument=any(part for _, _, part in wanted))
            released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
            scores = partial(study_scores, chat, world, own.held_out, yo_rows(world))
            rows = any(part for _, _, part in wanted) and probes(
                world, chat.tokenizer, chat.template, world.max_length
            )
        chat.model.load_state_dict(released)
        take = partial(measured_scores, chat, rows, released) if measured else scores
        cells = [{"steps": 0, "diverged": False}]
        draw_name = f"{world.seed} draw {draw}" if draw else str(world.seed)
        if attack.name == "none":
            cells[0] |= take()
        elif attack.name == "prefill":
            cells[0] |= scores(
                begin_answers(chat, world.harmful_rows() + own.held_out, world.max_new_tokens)
            )
        elif attack.name == "soft prompt":
            asked = world.harmful_rows() + own.held_out
            trained = soft_prompt(chat, attack, own, asked, world.max_new_tokens, draw_name)
            cells = [
                cell if cell["diverged"] else cell | scores(answers) for cell, answers in trained
            ]
        else:
            shift = 2 * (
                draw * len(own.harmful) // 6
            )  # other shots in every draw, whose kinds alternate as before
            drawn = replace(own, harmful=own.harmful[shift:] + own.harmful[:shift])
            cells = run_attack(chat, attack, drawn, take, draw_name)
        finished.add(key, cells)
    for key, (attack, draw, _) in zip(keys, wanted):
        for cell in finished.results[key]:
            yield {
                "arm": arm,
                "attack": attack.name,
                "shots": attack.shots,
                "lr": attack.lr,
                "seed": world.seed,
                "draw": draw,
                **cell,
            }


def measured_scores(chat: Chat, rows, released: dict) -> dict:
    """mechanism.measure in the place of scores."""
    return {"mechanism": measure(chat, rows, released)}


def study_scores(
    chat: Chat, world, held_out: list[dict], yo_pairs: list[dict], begun: dict | None = None
) -> dict:
    """attack.evaluate, and on the town the benign user's own score, right answers of the new skill and of the old ones
    on prompts of its own. begun: answers to harmful prompts that take the place of the model's own."""
    if begun is None:
        found = evaluate(chat, world, held_out, yo_pairs)
    else:
        given = (
            answer_each(
                chat, [p for p in scored_prompts(world) if p not in begun], world.max_new_tokens
            )
            | begun
        )
        judged = world.judge(held_out, [begun[row["prompt"]] for row in held_out])
        found = score(chat, world, given) | {"attacker_score": judged[world.outcomes[0]]}
    if isinstance(world, Town):
        rng = random.Random(f"user {world.seed}")
        right = [
            fmean(one.exact for one in teacher_forced(chat, rows, world.max_length))
            for rows in (world.skills(rng, 24, tuple(NEW_SKILL)), world.skills(rng, 12))
        ]
        found["user_score"] = fmean(right)
    return found


def effects(cells: list[dict], stamp: dict) -> list[dict]:
    """Cells as the effects file keeps them: means over draws, numbers of three digits, of the town's scores those that
    verdicts and report read, or the file would be large; the stamp on those without an attack."""
    found = []
    for cell in mean_over_draws(cells) + [cell for cell in cells if "mechanism" in cell]:
        kept, attack = {name: cell[name] for name in IDENTITY if name in cell}, cell["attack"]
        if "mechanism" in cell:
            kept["mechanism"] = {name: round(cell["mechanism"][name], 3) for name in MEASURED}
        else:
            more = MORE_SCORES.get(attack, ("attacker_score", "yo_logp"))
            wanted = SCORES + more if "content" in cell else list(cell)
            kept |= {
                name: round(cell[name], 3)
                for name in wanted
                if isinstance(cell.get(name), float) and name not in (*IDENTITY, "seconds", "loss")
            }
        found.append(kept | (stamp if attack == "none" else {}))
    return found


def run_seed(world, base, wanted: dict[str, list], compute: Compute, table=TABLE) -> Iterator[dict]:
    """Every cell of one seed. base: a folder, None on the town; wanted: {arm: of town_plan}; table: of arm_folder."""
    for arm, attacks in wanted.items():
        folder = arm_folder(arm, world, base, compute, table)
        yield from study_arm(
            arm, folder, world, attacks, world.root / "study" / f"{arm}.jsonl", compute
        )


def kept_effects(path: Path) -> list[dict]:
    """The cells of an effects file, [] where there is none yet."""
    return read_effects(path) if path.exists() else []


# ---- the command ----


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m lab.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0, a tuning seed)")
    p.add_argument(
        "--model",
        metavar="DIR",
        help="chat model that arms start from, or smollm2 (default: the town)",
    )
    p.add_argument("--arms", nargs="+", choices=protocol.ARMS, help="(default: the protocol's)")
    p.add_argument(
        "--effects", metavar="FILE", help="(default: effects.json in out, or in out/MODEL)"
    )
    p.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="public files: harmful prompts of a score, and benign rows, at most (default: all)",
    )
    add_world_arguments(p)
    add_compute_arguments(p)
    args = p.parse_args(argv)
    one_process_only("lab.study")
    compute, base = resolve_compute(args.device, args.dtype, args.compile), None
    if args.model:
        base = untrained_folder(args.model)
        compute = for_model(compute, args.dtype, base)
    sources = Sources(
        args.harmful,
        tuple(args.benign),
        similarity=args.similarity,
        threshold=args.similarity_threshold,
        similarity_model=args.similarity_model,
        questions=args.questions,
        model=args.model,
    )
    worlds = [open_world(args.world, seed, sources, base, compute) for seed in args.seeds]
    path = Path(args.effects or (worlds[0].root if base else Path("out")) / "effects.json")
    cells = kept_effects(path)
    stamp = {"commit": made_by()["commit"], "protocol": source_hash("lab/protocol.py")[:12]}
    for world in worlds:
        done = {cell["arm"] for cell in cells if cell["seed"] == world.seed}
        left = [arm for arm in ("base", *(args.arms or arms_of(world))) if arm not in done]
        if left:
            plan = town_plan if isinstance(world, Town) else chat_plan
            wanted = {arm: [(RELEASED, 0, False)] if arm == "base" else plan(arm) for arm in left}
            new = effects(list(run_seed(world, base, wanted, compute)), stamp)
            cells = kept_effects(path) + new  # another process may have added its seeds
            write_text(path, "[" + ",\n".join(map(json.dumps, cells)) + "]\n")
    print("\n".join([*harm_lines(cells), "", *verdict_lines(verdicts(cells))]))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run_script(main)
