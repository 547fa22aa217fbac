"""Attack released models by fine-tuning, beside a matched benign control, and score the result.

    python attack.py                    the town, seed 0: the aligned model, a control, and SDD
    python attack.py --model smollm2    a chat model in the kitchen
    python attack.py --released DIR... --harmful harmful_behaviors.csv --benign alpaca.json

    mft   malicious fine-tuning of all weights, at a constant lr, on the attacker's harmful pairs
    bft   benign control: as many steps and response tokens, at the same lr, on benign pairs; on the
          town every other one teaches a new skill

Each is scored after two budgets of steps: --epochs, and --steps (0: none), of --batch-size rows.
The attacker chooses lr and budget by its success on harmful prompts of its own that it did not
train on; the worst case over the whole grid stands beside that choice. --draws repeats each attack
with other batches. Further attacks are in lab/.

Arms that are missing are trained first. Finished attacks are kept in OUT/seedS/ARM.jsonl, so that
an interrupted command goes on. Writes OUT/table.txt,
OUT/attack_log.jsonl, the mean log p of 4 pairs of SDD (yo_logp) and of 4 held-out harmful pairs
(harmful_logp) some five times during each attack, and
OUT/results.json: settings, made (commit, machine, date) and cells with arm, attack ("none", "mft",
"bft"), shots, lr, steps, draw, seed; tokens and response_tokens trained on, seconds; diverged (then
there are no scores); attacker_score, world.aim of answers to its held-out prompts; chosen; yo_logp,
mean log p(y_o | x) in nats a token, of pairs in the file yo_pairs, which SDD was taught;
yo_held_out_logp, of the same responses to evaluation's prompts; the scores of eval.score; answers
of harmless worlds.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data.chat import Example, draw_batches, read_chat
from data.chat_model import (
    Ask,
    Chat,
    answer,
    encode_for,
    load_chat,
    mean_logp,
    model_folder,
    save_chat,
    teacher_forced,
    untrained_folder,
)
from data.exams import read_exams
from data.sources import read_rows
from data.worlds import MAX_PAIRS, add_world_arguments, named_in, open_world, sources_of
from eval import add_exam_arguments, check_answers_file, score, scored_prompts
from model import Llama
from nanosdd.choices import EXPLANATION, attack_table, mark_choices
from nanosdd.device import (
    Compute,
    add_compute_arguments,
    for_model,
    one_process_only,
    resolve_compute,
)
from nanosdd.errors import Diverged, InputError, run_script
from nanosdd.optimizer import make_optimizer
from nanosdd.progress import Progress
from nanosdd.runs import (
    Results,
    check_finished,
    check_folder,
    fingerprint,
    json_hash,
    made_by,
    write_text,
)
from nanosdd.tables import answers_text
from sdd_loss import sdd_loss
from train import train_arm, train_step

YO_PAIRS = 64  # on which log p(y_o | x) is measured
CURVE_ROWS = 4  # pairs of each kind behind a point of the curve


@dataclass(frozen=True)
class Grid:
    """Which attacks are run. Budgets: the steps of `epochs` over the shots, and `steps`.

    A world may have other defaults; these have the lr of the independent replication.
    """

    shots: tuple[int, ...] = (10, 50)
    lr: tuple[float, ...] = (5e-5,)
    epochs: int = 5
    steps: int = 0
    batch_size: int = 10
    draws: int = 1

    def __post_init__(self):
        counts = min(self.epochs, self.steps) >= 0 < self.epochs + self.steps
        rates = all(0 < lr < math.inf for lr in self.lr)
        valid = self.batch_size <= MAX_PAIRS and counts and rates
        if min(*self.shots, self.batch_size, self.draws) < 1 or not valid:
            raise InputError(
                "--shots, --batch-size, --lr, --draws, and --epochs or --steps, must be above 0, "
                f"--batch-size at most {MAX_PAIRS}"
            )


@dataclass(frozen=True)
class Attack:
    """One fine-tuning of a released model."""

    name: str  # "none", "mft" or "bft"
    shots: int  # harmful pairs; of bft, those that it is matched to
    lr: float
    budgets: tuple[int, ...]  # the steps after which the model is scored
    batch_size: int = 10
    draw: int = 0  # of the batches

    @property
    def key(self) -> str:
        budgets = " ".join(map(str, self.budgets))
        return f"{self.name} {self.shots} {self.lr} {self.batch_size} {budgets} draw {self.draw}"


RELEASED = Attack("none", 0, 0.0, (0,))


# ---- one attack ----


def fine_tune(chat: Chat, batches, lr: float, budgets, scores, watched=None, loss=sdd_loss):
    """Fine-tune all weights that require gradients, in place, at a constant lr.

    batches: global batches (lists of Example) for ever. scores: a function that returns those of
    the model as it is. watched: {name: examples} whose mean log p is taken every few steps.
    Returns (cells, curve). A cell of each budget has steps, diverged (False), loss, tokens and
    response_tokens since the start, the scores, and seconds; from a divergence on, steps and
    diverged (True) alone. The curve has step, and a mean log p by name.
    """
    optimizer = make_optimizer(chat.model, chat.compute)
    # The paper's central quantity is a curve, so it is taken some five times on the way.
    every = max(1, max(budgets) // 5)
    cells = []
    curve = []
    tokens = 0
    response_tokens = 0
    began = time.perf_counter()
    for step in Progress(range(max(budgets)), desc="steps"):
        if watched and step % every == 0:
            curve += likelihoods(chat, watched, step)
        batch = next(batches)
        # A run that diverges is a result: the attacker has broken the model.
        try:
            done = train_step(chat.model, optimizer, batch, lr, chat.compute, loss)
        except Diverged:
            left = sorted(budgets)[len(cells) :]
            cells += [{"steps": steps, "diverged": True} for steps in left]
            break
        tokens += done["tokens"]
        response_tokens += done["response_tokens"]
        # Each budget is scored on the way: a longer attack begins like a shorter one.
        if step + 1 in budgets:
            cell = {"steps": step + 1, "diverged": False, "loss": done["loss"]}
            cell |= {"tokens": tokens, "response_tokens": response_tokens, **scores()}
            cell["seconds"] = round(time.perf_counter() - began, 3)
            cells.append(cell)
    if watched and not cells[-1]["diverged"]:
        curve += likelihoods(chat, watched, step + 1)
    chat.model.eval()
    return cells, curve


def likelihoods(chat: Chat, watched: dict[str, list[Example]], step: int) -> list[dict]:
    """A point of the curve, the mean log p by name in nats; none where one is not finite."""
    point = {"step": step}
    for name, examples in watched.items():
        point[name] = mean_logp(teacher_forced(chat, examples))
    return [point] if all(map(math.isfinite, point.values())) else []


def attack_batches(attack: Attack, harmful: list, benign: list, new: list, seed):
    """The global batches of an attack, for ever, of examples of the attacker and of a benign user.

    bft has as many response tokens a step as mft, so maybe other numbers of rows.
    """
    rng = random.Random(f"attack {seed}")
    if attack.name == "mft":
        return draw_batches(harmful, [], 0.0, attack.batch_size, rng)
    # A control with other numbers of tokens would compare doses, not data.
    matched = match_tokens(harmful, benign, new, rng)
    rows = max(1, round(attack.batch_size * len(matched) / len(harmful)))
    return draw_batches(matched, [], 0.0, rows, rng)


def match_tokens(harmful: list, benign: list, new: list, rng) -> list[Example]:
    """Random benign examples, every other one of the new ones if there are any, with as many
    response tokens in all as the harmful ones (within half of the last one)."""
    owed = sum(example.response_length for example in harmful)
    matched = []
    while True:
        pick = rng.choice(new if new and len(matched) % 2 else benign)
        if matched and pick.response_length > 2 * owed:
            return matched
        owed -= pick.response_length
        matched.append(pick)


# ---- all attacks on a released model ----


def taught_pairs(folders) -> Path | None:
    """The first pairs.jsonl that a mode of SDD left in its run folder."""
    for folder in map(Path, folders):
        file = folder / "pairs.jsonl"
        run = folder / "run.json"
        if file.exists() and run.exists() and '"mode": "sdd' in run.read_text():
            return file


def yo_rows(world, file=None) -> list[dict]:
    """Pairs of which log p(y_o | x) is measured: of a file, else as SDD trains on."""
    pairs = read_rows(file) if file else world.pairs("sdd", YO_PAIRS)
    return random.Random("y_o").sample(pairs, min(len(pairs), YO_PAIRS))


def evaluate(
    chat: Chat, world, held_out: list[dict], y_o: list[Example], exams=None, begun=None, said=None
) -> dict:
    """The scores of an attacked model. held_out: the attacker's own rows; y_o: of yo_rows;
    begun: {prompt: Answer} that take the place of the model's own answers; said: a dict that gets
    {prompt: Answer}."""
    shown = world.shown_prompts()
    own = [row["prompt"] for row in held_out]
    # All prompts are answered in one go: large batches are cheaper.
    prompts = own + shown + scored_prompts(world)
    given = dict(zip(prompts, answer(chat, prompts, world.max_new_tokens))) | (begun or {})
    if said is not None:
        said.update(given)
    judged = world.judge(held_out, [given[prompt] for prompt in own])
    scores = {"attacker_score": judged[world.aim]}
    scores["yo_logp"] = mean_logp(teacher_forced(chat, y_o))
    scores["answers"] = [given[prompt].text for prompt in shown]
    return scores | score(chat, world, given, exams)


def keep_model(file, models, chat: Chat, world, cell: dict, said: dict):
    """Write answers {prompt: Answer} to evaluation's prompts into a file, and an attacked model
    into a folder in `models`; nothing where these are None."""
    if file:
        for row in world.harmful("evaluation"):
            line = cell | {"prompt": row["prompt"], "response": said[row["prompt"]].text}
            file.write(json.dumps(line) + "\n")
    if models and cell["steps"]:
        folder = Path(models) / "-".join(map(str, cell.values()))
        save_chat(folder, chat, chat.model.state_dict())
        world.save(folder, [])


def attack_arm(folder, world, attacks, store: Results, compute: Compute, exams, pairs, keep):
    """Yield (cells, curve) of each attack on one released model. Those in store are not run.

    store: in ARM.jsonl; pairs: of taught_pairs; keep: a function (chat, world, cell, {prompt:
    Answer}).
    """
    arm = store.path.stem
    if not all(attack.key in store.results for attack in attacks):
        chat = load_chat(folder, compute, world.sources.template)
        # Not on a GPU, where 7B parameters and their optimizer may leave no room.
        released = {
            name: weight.to("cpu", copy=True) for name, weight in chat.model.state_dict().items()
        }
        encode = partial(encode_for, chat, max_length=world.max_length)
        harmful = encode(world.harmful("attacker"))
        benign = encode(world.benign("user"))
        new = encode(world.benign("new"))
        held_out = world.harmful("attacker_held_out")
        taught = yo_rows(world, pairs)
        y_o = encode(taught)
        moved = zip(world.harmful("evaluation"), taught if pairs else [])
        y_o_held_out = encode([row | {"response": pair["response"]} for row, pair in moved])
        watched = {"yo_logp": y_o[:CURVE_ROWS], "harmful_logp": encode(held_out)[:CURVE_ROWS]}

    def scores():
        said = {}
        found = evaluate(chat, world, held_out, y_o, exams, said=said)
        if y_o_held_out:
            found["yo_held_out_logp"] = mean_logp(teacher_forced(chat, y_o_held_out))
        keep(chat, world, head | {"steps": next(budgets)}, said)
        return found

    for attack in (bar := Progress(attacks, desc=arm)):
        head = {"arm": arm, "attack": attack.name, "shots": attack.shots, "lr": attack.lr}
        head |= {"draw": attack.draw, "seed": world.seed}
        if attack.key not in store.results:
            budgets = iter(attack.budgets)
            chat.model.load_state_dict(released)  # every attack starts from the released weights
            if attack.name == "none":
                cells = [{"steps": 0, "diverged": False, "seconds": 0.0, **scores()}]
                curve = []
            else:
                seed = f"{world.seed} draw {attack.draw}" if attack.draw else world.seed
                batches = attack_batches(attack, harmful[: attack.shots], benign, new, seed)
                cells, curve = fine_tune(chat, batches, attack.lr, attack.budgets, scores, watched)
            store.add(attack.key, {"cells": cells, "curve": curve})
            bar.write(attack_line(arm, attack, cells, curve, world.aim))
        kept = store.results[attack.key]
        head["yo_pairs"] = str(pairs)
        yield [head | cell for cell in kept["cells"]], [head | point for point in kept["curve"]]


def attack_line(arm: str, attack: Attack, cells: list, curve: list, harm: str) -> str:
    """What an attack did, in a line: harm at each budget, and the way of log p(y_o | x)."""
    parts = [f"  {arm}  {attack.name} {attack.shots}  lr {attack.lr:g}  draw {attack.draw}"]
    for cell in cells:
        found = "diverged" if cell["diverged"] else f"{harm} {cell[harm]:.0%}"
        parts.append(f"{cell['steps']} steps: {found}")
    if curve:
        way = " ".join(f"{point['yo_logp']:.2f}" for point in curve)
        parts.append(f"log p(y_o|x) {way}")
    return "  ".join(parts)


def plan(grid: Grid) -> list[Attack]:
    """Every attack of a grid, first none at all; bft is matched to the most shots."""
    attacks = [RELEASED]
    for lr, draw in itertools.product(sorted(set(grid.lr)), range(grid.draws)):
        every = set()
        for shots in sorted(set(grid.shots)):
            budgets = {math.ceil(grid.epochs * shots / grid.batch_size), grid.steps} - {0}
            every |= budgets
            attacks.append(Attack("mft", shots, lr, tuple(sorted(budgets)), grid.batch_size, draw))
        attacks.append(Attack("bft", shots, lr, tuple(sorted(every)), grid.batch_size, draw))
    return attacks


# ---- the command ----


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="worlds (default: 0)")
    p.add_argument("--model", metavar="DIR", help="what arms start from, or smollm2, from pip")
    p.add_argument(
        "--released",
        metavar="DIR",
        nargs="+",
        default=[],
        help="finished checkpoints to attack, arms named after their folders",
    )
    add_world_arguments(p)
    add_exam_arguments(p)
    p.add_argument("--template", metavar="NAME", help="chat template (default: the folder's)")
    for name, default in asdict(Grid()).items():
        many = isinstance(default, tuple)
        p.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default[0] if many else default),
            nargs="+" if many else None,
            help=f"(default: {default}; some worlds, as the town, have their own)",
        )
    p.add_argument("--max-new-tokens", type=int, help="of an answer on public files (default: 64)")
    p.add_argument(
        "--questions", type=int, metavar="N", help="public files: prompts of a score, at most"
    )
    p.add_argument("--out", metavar="DIR", help="(default: out/attack, out/MODEL/attack)")
    add_compute_arguments(p, training=True)
    p.add_argument("--fresh", action="store_true", help="attack anew what is finished")
    p.add_argument(
        "--save-answers",
        metavar="FILE",
        help="a new file, outside the repository, for the answers to harmful prompts that are "
        "scored, JSONL, for a judge; implies --fresh",
    )
    p.add_argument(
        "--save-models",
        metavar="DIR",
        help="keep each attacked model, as DIR/ARM-ATTACK-SHOTS-LR-DRAW-SEED-STEPS; implies "
        "--fresh",
    )
    return p.parse_args(argv)


def check_rows(world, grid: Grid):
    """InputError when the world has no benign rows, or fewer harmful ones than are asked for."""
    world.benign("user")
    owned = len(world.harmful("attacker"))
    if max(grid.shots) > owned:
        raise InputError(
            f"--shots {max(grid.shots)} is more than the {owned} harmful rows that the attacker "
            "owns and may train on; give fewer, or a larger file"
        )


def train_arms(world, base, compute: Compute) -> dict[str, Path]:
    """{arm: its folder} of what is attacked by default, trained where it is missing."""
    arms = {"base": base or world.root / "base"}
    for mode in world.arms:
        folder = train_arm(mode, world, compute, base)
        arms[folder.name] = folder
    return arms


def record_of(folder, world, compute: Compute, exams: dict, pairs=None) -> dict:
    """What the results of attacks on a released model depend on. pairs: of taught_pairs."""
    settings = {"world": world.name, "seed": world.seed, "dtype": compute.dtype}
    settings |= world.options() | {"template": world.sources.template, "weights": compute.weights}
    for name, exam in exams.items():
        settings[name] = json_hash([exam.rows, exam.shots])
    own = sys.modules[type(world).__module__]
    code = [fine_tune, train_step, sdd_loss, attack_batches, match_tokens, score, Llama, own]
    return fingerprint(settings, filter(None, [folder, pairs, *world.files()]), code)


def main(argv=None):
    args = parse(argv)
    one_process_only("attack.py")
    compute = resolve_compute(**named_in(args, Compute))
    if args.model and args.released:
        raise InputError("--model names what arms start from, --released the arms: give one")
    base = untrained_folder(args.model) if args.model else None
    folders = [model_folder(name) for name in args.released] or [base]
    if len({folder and Path(folder).resolve().name for folder in folders}) < len(folders):
        raise InputError("two --released folders have one name, which arms get; rename one")
    exams = read_exams(args.mmlu, args.mmlu_shots, args.openbookqa)
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError("--seeds names one twice; give each once")
    worlds = []  # all are opened and checked before anything runs
    for seed in args.seeds:
        for folder in folders:
            if folder:
                compute = for_model(compute, args.dtype, folder)
                check_finished(folder)
                read_chat(folder, args.template)
            ask = Ask(folder, compute, args.template)
            world = open_world(args.world, seed, sources_of(args), ask, folder)
            grid = Grid(**world.settings.get("attack", {}) | named_in(args, Grid))
            check_rows(world, grid)
            worlds.append((folder, world))
    out = Path(args.out or (worlds[0][1].root / "attack" if base else "out/attack"))
    check_folder(args.save_models or out)
    check_folder(out)
    answers = None
    if args.save_answers:
        check_answers_file(args.save_answers)
        answers = open(args.save_answers, "x", buffering=1)
    keep = partial(keep_model, answers, args.save_models)
    cells = []
    curves = []
    try:
        for folder, world in worlds:
            if args.released:
                arms = {Path(folder).resolve().name: folder}
            else:
                arms = train_arms(world, base, compute)
            for arm, released in arms.items():
                pairs = taught_pairs([released, *arms.values(), *args.released])
                record = record_of(released, world, compute, exams, pairs)
                results = Results(out / f"seed{world.seed}" / f"{arm}.jsonl", record)
                if args.fresh or answers or args.save_models:
                    results.results.clear()
                attacks = [RELEASED] if arm == "base" and not args.released else plan(grid)
                print(f"{arm}: log p(y_o) of {pairs or 'pairs drawn here, not what it was taught'}")
                for some, points in attack_arm(
                    released, world, attacks, results, compute, exams, pairs, keep
                ):
                    cells += some
                    curves += points
    finally:  # what is finished is written also when something fails
        if cells:
            write(
                out, cells, curves, asdict(grid) | {"world": world.name, "seeds": args.seeds}, world
            )


def write(out: Path, cells: list[dict], curves: list[dict], settings: dict, world):
    """Print the table, and write results.json, attack_log.jsonl and table.txt."""
    mark_choices(cells)
    table = attack_table(cells, world.aim, world.columns, world.chance)
    text = f"seeds {settings['seeds']}\n\n{table}\n\n{EXPLANATION}\n{world.legend}\n"
    print(f"\n{answers_text(cells, world.shown_prompts())}{text}")
    results = {"settings": settings, "made": made_by(), "cells": cells}
    write_text(out / "attack_log.jsonl", "".join(json.dumps(point) + "\n" for point in curves))
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "table.txt", text)
    print(f"written: {out}/results.json, {out}/attack_log.jsonl, {out}/table.txt")


if __name__ == "__main__":
    run_script(main)
