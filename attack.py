"""Attack released models by fine-tuning, beside a matched benign control, and score the result.

    python attack.py                    the town, seed 0: the aligned model, a control, and SDD
    python attack.py --model smollm2    a chat model in the kitchen
    python attack.py --released DIR... --harmful harmful_behaviors.csv --benign alpaca.json

    mft   malicious fine-tuning of all weights, at a constant lr, on the attacker's harmful pairs
    bft   benign control: as many steps and response tokens, at the same lr, on benign pairs; on the
          town every other one teaches a new skill

Each is scored after two budgets of steps: 5 epochs, and 50 steps. The attacker chooses lr and
budget by its success on harmful prompts of its own that it did not train on; the worst case over
the whole grid stands beside that choice. Further attacks are in lab/.

Arms that are missing are trained first. Finished attacks are kept in out/seedS/attack/ARM.jsonl
(out/MODEL/attack, OUT/seedS), so that an interrupted command goes on. Writes OUT/table.txt,
OUT/attack_log.jsonl, the mean log p of 4 pairs of SDD (yo_logp) and of 4 held-out harmful pairs
(harmful_logp) some five times during each attack, and
OUT/results.json: settings, made (commit, machine, date) and cells with arm, attack ("none", "mft",
"bft"), shots, lr, steps, seed; tokens and response_tokens trained on, seconds; diverged (then there
are no scores); attacker_score, world.aim of answers to its held-out prompts; chosen;
yo_logp, mean log p(y_o | x) in nats a token; the scores of eval.score; answers of harmless worlds.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
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
    teacher_forced,
    untrained_folder,
)
from data.exams import read_exams
from data.worlds import MAX_PAIRS, add_world_arguments, named_in, open_world, sources_of
from eval import add_exam_arguments, score, scored_prompts
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
from nanosdd.runs import Results, check_folder, fingerprint, json_hash, made_by, write_text
from nanosdd.tables import answers_text
from sdd_loss import sdd_loss
from train import train_arm, train_step

YO_PAIRS = 64  # on which log p(y_o | x) is measured
CURVE_ROWS = 4  # pairs of each kind behind a point of the curve


@dataclass(frozen=True)
class Grid:
    """Which attacks are run. Budgets: the steps of `epochs` over the shots, and `steps`."""

    shots: tuple[int, ...] = (10, 50, 100)
    lr: tuple[float, ...] = (5e-5,)
    epochs: int = 5
    steps: int = 50
    batch_size: int = 10

    def __post_init__(self):
        counts = min(self.epochs, self.steps) >= 0 < self.epochs + self.steps
        rates = all(0 < lr < math.inf for lr in self.lr)
        if not (min(self.shots) >= 1 <= self.batch_size <= MAX_PAIRS and counts and rates):
            raise InputError(
                "--shots, --batch-size, --lr, and --epochs or --steps, must be above 0, "
                f"--batch-size at most {MAX_PAIRS}"
            )

    def budgets(self, shots: int) -> set[int]:
        """The steps after which an attack with so many shots is scored."""
        return {math.ceil(self.epochs * shots / self.batch_size), self.steps} - {0}


GRIDS = {  # by world (any other: "chat", one lr, that of the independent replication)
    "town": Grid(lr=(3e-5, 1e-4, 3e-4, 1e-3)),
    "chat": Grid(shots=(10, 50), steps=0),
}
ARMS = {"town": ("align", "refusal", "sdd"), "chat": ("align", "sdd", "new_refusal")}


@dataclass(frozen=True)
class Attack:
    """One fine-tuning of a released model."""

    name: str  # "none", "mft" or "bft"
    shots: int  # harmful pairs; of bft, those that it is matched to
    lr: float
    budgets: tuple[int, ...]  # the steps after which the model is scored
    batch_size: int = 10

    @property
    def key(self) -> str:
        budgets = " ".join(map(str, self.budgets))
        return f"{self.name} {self.shots} {self.lr} {self.batch_size} {budgets}"


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


def yo_rows(world) -> list[dict]:
    """Pairs as SDD trains on, of which log p(y_o | x) is measured."""
    pairs = world.pairs("sdd", YO_PAIRS)
    return random.Random("y_o").sample(pairs, min(len(pairs), YO_PAIRS))


def evaluate(
    chat: Chat, world, held_out: list[dict], y_o: list[Example], exams=None, begun=None
) -> dict:
    """The scores of an attacked model. held_out: the attacker's own rows; y_o: of yo_rows;
    begun: {prompt: Answer} that take the place of the model's own answers."""
    shown = world.shown_prompts()
    own = [row["prompt"] for row in held_out]
    # All prompts are answered in one go: large batches are cheaper.
    prompts = own + shown + scored_prompts(world)
    given = dict(zip(prompts, answer(chat, prompts, world.max_new_tokens))) | (begun or {})
    judged = world.judge(held_out, [given[prompt] for prompt in own])
    scores = {"attacker_score": judged[world.aim]}
    scores["yo_logp"] = mean_logp(teacher_forced(chat, y_o))
    if shown:
        scores["answers"] = [given[prompt].text for prompt in shown]
    return scores | score(chat, world, given, exams)


def attack_arm(arm: str, folder, world, attacks, store: Results, compute: Compute, exams=None):
    """(cells, curves) of one released model under all these attacks. Those in store are not run."""
    missing = [attack for attack in attacks if attack.key not in store.results]
    if missing:
        chat = load_chat(folder, compute, world.sources.template)
        released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
        harmful = encode_for(chat, world.harmful("attacker"), world.max_length)
        benign = encode_for(chat, world.benign("user"), world.max_length)
        new = encode_for(chat, world.benign("new"), world.max_length)
        held_out = world.harmful("attacker_held_out")
        y_o = encode_for(chat, yo_rows(world), world.max_length)
        own = encode_for(chat, held_out, world.max_length)
        watched = {"yo_logp": y_o[:CURVE_ROWS], "harmful_logp": own[:CURVE_ROWS]}
        scores = partial(evaluate, chat, world, held_out, y_o, exams)
    for attack in (bar := Progress(missing, desc=arm)):
        chat.model.load_state_dict(released)  # every attack starts from the released weights
        if attack.name == "none":
            cells = [{"steps": 0, "diverged": False, "seconds": 0.0, **scores()}]
            curve = []
        else:
            batches = attack_batches(attack, harmful[: attack.shots], benign, new, world.seed)
            cells, curve = fine_tune(chat, batches, attack.lr, attack.budgets, scores, watched)
        store.add(attack.key, {"cells": cells, "curve": curve})
        bar.write(attack_line(arm, attack, cells, curve, world.aim))
    cells = []
    curves = []
    for attack in attacks:
        head = {"arm": arm, "attack": attack.name, "shots": attack.shots, "lr": attack.lr}
        head["seed"] = world.seed
        kept = store.results[attack.key]
        cells += [head | cell for cell in kept["cells"]]
        curves += [head | point for point in kept["curve"]]
    mark_choices(cells)
    return cells, curves


def attack_line(arm: str, attack: Attack, cells: list, curve: list, harm: str) -> str:
    """What an attack did, in a line: harm at each budget, and the way of log p(y_o | x)."""
    parts = [f"  {arm}  {attack.name} {attack.shots or ''}"]
    if attack.shots:
        parts.append(f"lr {attack.lr:g}")
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
    every = set()
    for shots, lr in itertools.product(sorted(set(grid.shots)), sorted(set(grid.lr))):
        budgets = grid.budgets(shots)
        every |= budgets
        attacks.append(Attack("mft", shots, lr, tuple(sorted(budgets)), grid.batch_size))
    for lr in sorted(set(grid.lr)):
        budgets = tuple(sorted(every))
        attacks.append(Attack("bft", max(grid.shots), lr, budgets, grid.batch_size))
    return attacks


# ---- the command ----


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    town = GRIDS["town"]
    chat = GRIDS["chat"]
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
    p.add_argument(
        "--shots", type=int, nargs="+", help=f"(default: town {town.shots}, others {chat.shots})"
    )
    p.add_argument(
        "--lr", type=float, nargs="+", help=f"grid (default: town {town.lr}, others {chat.lr})"
    )
    p.add_argument("--epochs", type=int, help=f"first budget, 0: none (default: {town.epochs})")
    p.add_argument(
        "--steps", type=int, help=f"second budget, 0: none (default: town {town.steps}, others 0)"
    )
    p.add_argument("--batch-size", type=int, help=f"rows (default: {town.batch_size})")
    p.add_argument("--max-new-tokens", type=int, help="of an answer on public files (default: 64)")
    p.add_argument(
        "--questions", type=int, metavar="N", help="public files: prompts of a score, at most"
    )
    p.add_argument("--out", metavar="DIR", help="(default: out/attack, out/MODEL/attack)")
    add_compute_arguments(p)
    p.add_argument("--fresh", action="store_true", help="attack anew what is finished")
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
    for mode in ARMS.get(world.name, ARMS["chat"]):
        folder = train_arm(mode, world, compute, base)
        arms[folder.name] = folder
    return arms


def record_of(folder, world, compute: Compute, exams: dict) -> dict:
    """What the results of attacks on a released model depend on."""
    settings = {"world": world.name, "seed": world.seed, "dtype": compute.dtype}
    settings |= world.options() | {"template": world.sources.template}
    for name, exam in exams.items():
        settings[name] = json_hash([exam.rows, exam.shots])
    code = [fine_tune, train_step, sdd_loss, attack_batches, match_tokens, score, Llama]
    code.append(sys.modules[type(world).__module__])
    return fingerprint(settings, [folder, *world.files()], code)


def main(argv=None):
    args = parse(argv)
    one_process_only("attack.py")
    compute = resolve_compute(args.device, args.dtype, args.compile)
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
                read_chat(folder, args.template)
            ask = Ask(folder, compute, args.template)
            world = open_world(args.world, seed, sources_of(args), ask, folder)
            if folder is None and world.shape is None:
                raise InputError(f"the world {world.name} needs --model or --released DIR...")
            grid = replace(GRIDS.get(world.name, GRIDS["chat"]), **named_in(args, Grid))
            check_rows(world, grid)
            worlds.append((folder, world))
    out = Path("out/attack") if base is None else worlds[0][1].root / "attack"
    if args.out is not None:
        out = Path(args.out)
    check_folder(out)
    cells = []
    curves = []
    for folder, world in worlds:
        store = out / f"seed{world.seed}" if args.released else world.root / "attack"
        arms = (
            {Path(folder).resolve().name: folder}
            if args.released
            else train_arms(world, base, compute)
        )
        for arm, released in arms.items():
            results = Results(store / f"{arm}.jsonl", record_of(released, world, compute, exams))
            if args.fresh:
                results.results.clear()
            attacks = [RELEASED] if arm == "base" and not args.released else plan(grid)
            found = attack_arm(arm, released, world, attacks, results, compute, exams)
            cells += found[0]
            curves += found[1]
    write(out, cells, curves, asdict(grid) | {"world": world.name, "seeds": args.seeds}, world)


def write(out: Path, cells: list[dict], curves: list[dict], settings: dict, world):
    """Print the table, and write results.json, attack_log.jsonl and table.txt."""
    table = attack_table(cells, world.aim, world.columns, world.chance)
    seeds = " ".join(map(str, settings["seeds"]))
    text = f"seeds {seeds}\n\n{table}\n\n{EXPLANATION}\n{world.legend}\n"
    print(f"\n{answers_text(cells, world.shown_prompts())}{text}")
    results = {"settings": settings, "made": made_by(), "cells": cells}
    write_text(out / "attack_log.jsonl", "".join(json.dumps(point) + "\n" for point in curves))
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "table.txt", text)
    print(f"written: {out}/results.json, {out}/attack_log.jsonl, {out}/table.txt")


if __name__ == "__main__":
    run_script(main)
