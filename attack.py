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

import itertools
import json
import math
import random
import sys
import time
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

from data.answers import Answer
from data.chat import Example, draw_batches, read_chat
from data.chat_model import (
    Chat,
    answer,
    encode_for,
    load_chat,
    mean_logps,
    model_folder,
    save_chat,
    untrained_folder,
    world_of,
)
from data.exams import read_exams
from data.sources import read_rows
from data.worlds import MAX_PAIRS, World, command_parser, flag, named_in
from eval import (
    add_exam_arguments,
    answer_rows,
    check_answers_file,
    lines_of,
    score,
    scored_prompts,
)
from model import Llama
from nanosdd.checkpoint import read_object
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
    check_new,
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
MOST = 100_000  # epochs, steps or draws


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
        rates = all(0 < lr < math.inf for lr in self.lr)
        least = min(*self.shots, self.batch_size, self.draws, self.epochs + self.steps)
        most = max(self.epochs, self.steps, self.draws)
        counts = least > 0 <= min(self.epochs, self.steps) and self.batch_size <= MAX_PAIRS
        counts = counts and most <= MOST
        if not (rates and counts):
            raise InputError(
                "--shots, --batch-size, --lr, --draws, and --epochs or --steps, must be above 0, "
                f"--batch-size at most {MAX_PAIRS}, the others at most {MOST}"
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
        return str(astuple(self))


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
    last = max(budgets)
    every = max(1, last // 5)  # the paper's central quantity is a curve of some five points
    cells = []
    curve = []
    seen = {"tokens": 0, "response_tokens": 0}
    began = time.perf_counter()
    for step in Progress(range(last), desc="steps"):
        if watched and step % every == 0:
            curve += likelihoods(chat, watched, step)
        batch = next(batches)
        try:
            done = train_step(chat.model, optimizer, batch, lr, chat.compute, loss)
        except Diverged:  # a result: the attacker has broken the model
            break
        except RuntimeError as error:  # most often PyTorch's out of memory
            error.add_note(f"in batches of {len(batch)} rows; try a smaller --micro-batch")
            raise
        for name in seen:
            seen[name] += done[name]
        # Each budget is scored on the way: a longer attack begins like a shorter one.
        if step + 1 in budgets:
            cell = {"steps": step + 1, "diverged": False, "loss": done["loss"], **seen, **scores()}
            cell["seconds"] = round(time.perf_counter() - began, 3)
            cells.append(cell)
    left = sorted(budgets)[len(cells) :]
    if watched and not left:
        curve += likelihoods(chat, watched, last)
    cells += [{"steps": steps, "diverged": True} for steps in left]
    chat.model.eval()
    return cells, curve


def likelihoods(chat: Chat, watched: dict[str, list[Example]], step: int) -> list[dict]:
    """A point of the curve, the mean log p by name in nats; none where one is not finite."""
    point = {"step": step, **mean_logps(chat, watched)}
    return [point] if all(map(math.isfinite, point.values())) else []


def attack_batches(attack: Attack, harmful: list, benign: list, new: list, seed):
    """The global batches of an attack, for ever, of examples of the attacker and of a benign user.

    bft has as many response tokens a step as mft, so maybe other numbers of rows.
    """
    rng = random.Random(f"attack {seed}")
    harmful = harmful[: attack.shots]
    if attack.name == "mft":
        return draw_batches(harmful, [], 0.0, attack.batch_size, rng)
    if "bft" not in attack.name:
        raise InputError(f"no attack is called {attack.name}; make its batches yourself")
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


@dataclass(frozen=True)
class Target:
    """A released model that is attacked, and what else the results depend on."""

    arm: str
    folder: Path
    world: World
    compute: Compute
    exams: dict  # of data.exams
    pairs: Path | None = None  # of taught_pairs


def record_of(target: Target) -> dict:
    """What the results of attacks on a target depend on, as of nanosdd.runs."""
    world = target.world
    settings = world.options() | {"dtype": target.compute.dtype, "weights": target.compute.weights}
    for name, exam in target.exams.items():
        settings[name] = json_hash([exam.rows, exam.shots])
    inputs = filter(None, [target.folder, target.pairs, *world.files()])
    own = sys.modules[type(world).__module__]
    code = [fine_tune, train_step, sdd_loss, attack_batches, match_tokens, draw_batches]
    code += [run_attack, evaluate, encode_all, score, Llama, own]
    return fingerprint(settings, inputs, code)


def taught_pairs(folders) -> Path | None:
    """The first pairs.jsonl that a mode of SDD left in its run folder."""
    for folder in folders:
        file = Path(folder, "pairs.jsonl")
        run = Path(folder, "run.json")
        if file.exists() and run.exists() and '"mode": "sdd' in run.read_text():
            return file


def yo_rows(world, file=None) -> list[dict]:
    """Pairs of which log p(y_o | x) is measured: of a file, else as SDD trains on."""
    pairs = read_rows(file) if file else world.pairs("sdd", YO_PAIRS)
    return random.Random("y_o").sample(pairs, min(len(pairs), YO_PAIRS))


def encode_all(chat: Chat, target: Target) -> tuple[list, dict, dict]:
    """Examples: of attacker, user and the new skill; {score: those whose mean log p it is}; {name:
    those whose mean log p makes a curve}."""
    world = target.world
    encode = partial(encode_for, chat, max_length=world.max_length)
    rows = [world.harmful("attacker"), world.benign("user"), world.benign("new")]
    taught = yo_rows(world, target.pairs)
    y_o = {"yo_logp": encode(taught)}
    if target.pairs:  # and the same responses to prompts that nobody trains on
        pairs = zip(world.harmful("evaluation"), taught)
        moved = [row | {"response": pair["response"]} for row, pair in pairs]
        y_o["yo_held_out_logp"] = encode(moved)
    held_out = encode(world.harmful("attacker_held_out"))
    watched = {"yo_logp": y_o["yo_logp"][:CURVE_ROWS], "harmful_logp": held_out[:CURVE_ROWS]}
    return list(map(encode, rows)), y_o, watched


def answers_of(chat: Chat, world) -> dict[str, Answer]:
    """{prompt: greedy answer} of all prompts that `evaluate` needs."""
    prompts = [row["prompt"] for row in world.harmful("attacker_held_out")]
    prompts += world.shown_prompts() + scored_prompts(world)
    # All in one go: large batches are cheaper.
    return dict(zip(prompts, answer(chat, prompts, world.max_new_tokens, world.sources.harmful)))


def evaluate(chat: Chat, world, given: dict[str, Answer], y_o: dict, exams=None) -> dict:
    """The scores of an attacked model. given: of answers_of; y_o: {score: the examples whose mean
    log p it is}."""
    held_out = world.harmful("attacker_held_out")
    judged = world.judge(held_out, [given[row["prompt"]] for row in held_out])
    scores = {"attacker_score": judged[world.aim]}
    scores["answers"] = [given[prompt].text for prompt in world.shown_prompts()]
    return scores | mean_logps(chat, y_o) | score(chat, world, given, exams)


def attack_arm(target: Target, attacks: list[Attack], results: Results, keep):
    """Yield {"cells", "curve"} of each attack on a target. Those in results are not run.

    keep: a function (chat, world, cell, answers) that is called whenever the model is scored.
    """
    missing = [attack for attack in attacks if attack.key not in results.results]
    if missing:
        chat = load_chat(target.folder, target.compute, target.world.sources.template)
        weights = chat.model.state_dict()
        # Not on a GPU, where 7B parameters and their optimizer may leave no room.
        released = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        examples = encode_all(chat, target)
    for attack in (bar := Progress(attacks, desc=target.arm)):
        if attack in missing:
            chat.model.load_state_dict(released)  # every attack starts from the released weights
            found = run_attack(chat, target, attack, keep, *examples)
            results.add(attack.key, found)
            bar.write(attack_line(**found, harm=target.world.aim))
        yield results.results[attack.key]


def run_attack(
    chat: Chat, target: Target, attack: Attack, keep, rows: list, y_o: dict, watched: dict
) -> dict:
    """{"cells", "curve"} of an attack on the model as it is. rows, y_o, watched: of encode_all."""
    world = target.world
    head = {"arm": target.arm, "attack": attack.name, "shots": attack.shots, "lr": attack.lr}
    head |= {"draw": attack.draw, "seed": world.seed}
    budgets = iter(attack.budgets)

    def scores():
        """Of the model after the next budget."""
        given = answers_of(chat, world)
        keep(chat, world, head | {"steps": next(budgets)}, given)
        return evaluate(chat, world, given, y_o, target.exams)

    if attack == RELEASED:
        cells = [{"steps": 0, "diverged": False, "seconds": 0.0, **scores()}]
        curve = []
    else:
        seed = f"{world.seed} draw {attack.draw}" if attack.draw else world.seed
        batches = attack_batches(attack, *rows, seed)
        cells, curve = fine_tune(chat, batches, attack.lr, attack.budgets, scores, watched)
    cells = [head | {"yo_pairs": target.pairs and target.pairs.as_posix()} | cell for cell in cells]
    return {"cells": cells, "curve": [head | point for point in curve]}


def keep_model(file, models, chat: Chat, world, cell: dict, given: dict[str, Answer]):
    """Add the answers to evaluation's prompts to a file, and write an attacked model into a folder
    in `models`; nothing where these are None."""
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as lines:
            lines.write(lines_of(answer_rows(world, given, cell)))
    if models and cell["steps"]:
        folder = Path(models) / "-".join(map(str, cell.values()))
        world.save(folder, [])
        save_chat(folder, chat, chat.model.state_dict())


def attack_line(cells: list[dict], curve: list[dict], harm: str) -> str:
    """What an attack did, in a line: harm at each budget, and the two curves."""
    text = "  {arm}  {attack} {shots}  lr {lr:g}  draw {draw}".format(**cells[0])
    for cell in cells:
        found = "diverged" if cell["diverged"] else f"{harm} {cell[harm]:.0%}"
        text += f"  {cell['steps']} steps: {found}"
    if curve:
        text += "  log p of y_o/harmful answers"
    for point in curve:
        text += f" {point['yo_logp']:.2f}/{point['harmful_logp']:.2f}"
    return text


def plan(grid: Grid) -> list[Attack]:
    """Every attack of a grid, first none at all; bft is matched to the most shots."""
    budgets = {}
    for shots in sorted(set(grid.shots)):
        budgets["mft", shots] = {math.ceil(grid.epochs * shots / grid.batch_size), grid.steps} - {0}
    budgets["bft", shots] = set.union(*budgets.values())
    attacks = [RELEASED]
    for lr, draw in itertools.product(sorted(set(grid.lr)), range(grid.draws)):
        for (name, shots), steps in budgets.items():
            attacks.append(Attack(name, shots, lr, tuple(sorted(steps)), grid.batch_size, draw))
    return attacks


# ---- the command ----


def parse(argv=None):
    p = command_parser(__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="worlds (default: 0)")
    p.add_argument("--model", metavar="DIR", help="what arms start from, or smollm2, from pip")
    p.add_argument(
        "--released",
        metavar="DIR",
        nargs="+",
        default=[],
        help="finished checkpoints to attack, arms named after their folders",
    )
    add_exam_arguments(p)
    for name, default in asdict(Grid()).items():
        many = isinstance(default, tuple)
        p.add_argument(
            flag(name),
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
        help="a new folder that keeps each attacked model, as ARM-ATTACK-SHOTS-LR-DRAW-SEED-STEPS; "
        "implies --fresh",
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


def main(argv=None):
    args = parse(argv)
    one_process_only("attack.py")
    compute = resolve_compute(**named_in(args, Compute))
    if args.model and args.released:
        raise InputError("--model names what arms start from, --released the arms: give one")
    base = untrained_folder(args.model) if args.model else None
    released = {Path(name).resolve().name: name for name in map(model_folder, args.released)}
    if len(released) < len(args.released):
        raise InputError("two --released folders have one name, which arms get; rename one")
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError("--seeds names one twice; give each once")
    exams = read_exams(args.mmlu, args.mmlu_shots, args.openbookqa)

    worlds = []  # all are opened and checked before anything runs
    for seed in args.seeds:
        for arm, folder in (released or {None: base}).items():
            if folder:
                compute = for_model(compute, args.dtype, folder)
                check_finished(folder)
                read_chat(folder, args.template)
            world = world_of(args, seed, compute, folder)
            grid = Grid(**world.settings.get("attack", {}) | named_in(args, Grid))
            check_rows(world, grid)
            worlds.append((world, {arm: folder} if arm else None))
    out = Path(args.out or (worlds[0][0].root / "attack" if base else "out/attack"))
    check_folder(out)
    if args.save_models:
        check_new(args.save_models)
    if (out / "results.json").exists() and "cells" not in read_object(out / "results.json"):
        raise InputError(f"{out}/results.json is of another program; choose another --out")
    if args.save_answers:
        check_answers_file(args.save_answers)
    keep = partial(keep_model, args.save_answers, args.save_models)
    worlds = [(world, arms or train_arms(world, base, compute)) for world, arms in worlds]

    cells = []
    curves = []
    try:
        for world, arms in worlds:
            for arm, folder in arms.items():
                pairs = taught_pairs([folder, *arms.values(), *args.released])
                target = Target(arm, folder, world, compute, exams, pairs)
                results = Results(out / f"seed{world.seed}" / f"{arm}.jsonl", record_of(target))
                if args.fresh or args.save_answers or args.save_models:
                    results.results.clear()
                print(f"{arm}: log p(y_o) of {pairs or 'pairs drawn here, as SDD draws its own'}")
                attacks = [RELEASED] if arm == "base" and not released else plan(grid)
                for found in attack_arm(target, attacks, results, keep):
                    cells += found["cells"]
                    curves += found["curve"]
    finally:  # what is finished is written also when something fails
        if cells:
            write(out, cells, curves, asdict(grid) | {"seeds": args.seeds}, world)


def write(out: Path, cells: list[dict], curves: list[dict], settings: dict, world):
    """Print the table, and write results.json, attack_log.jsonl and table.txt."""
    mark_choices(cells)
    table = attack_table(cells, world.aim, world.columns, world.chance)
    text = f"seeds {settings['seeds']}\n\n{table}\n\n{EXPLANATION}\n{world.legend}\n"
    print(f"\n{answers_text(cells, world.shown_prompts())}{text}")
    settings = settings | {"world": world.name}
    results = {"settings": settings, "made": made_by(), "cells": cells}
    write_text(out / "attack_log.jsonl", lines_of(curves))
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "table.txt", text)
    print(f"written: {out}/results.json, {out}/attack_log.jsonl, {out}/table.txt")


if __name__ == "__main__":
    run_script(main)
