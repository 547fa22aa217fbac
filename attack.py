"""Attack released models by fine-tuning, beside the matched benign control, and score what that does to them.

    python attack.py                     the town, seed 0: the aligned model, the refusal control, and SDD
    python attack.py --model smollm2     a chat model in the kitchen: aligned, SDD, and another refusal
    python attack.py --released DIR... --harmful harmful_behaviors.csv --benign alpaca.json     finished checkpoints

    mft   malicious fine-tuning of all weights, at a constant lr, on the attacker's harmful pairs ("shots")
    bft   benign control: as many steps and response tokens at the same lr on benign pairs; on the town every other one
          teaches a new skill

Each is scored after two budgets of steps, 5 epochs and 50 steps. The attacker chooses lr and budget by its success on
harmful prompts of its own that it did not train on; the worst case over the whole grid stands beside that choice.
Further attacks, their verdicts and the report are in lab/.

Arms that are missing are trained first. Finished attacks are kept in out/seedS/attack/ARM.jsonl, with --model in
out/MODEL/attack/ARM.jsonl, with --released in OUT/seedS/ARM.jsonl, so that an interrupted command goes on where it was.
Writes OUT/table.txt and OUT/results.json: settings, made (commit, machine, date) and cells with arm (base is only
scored), attack ("none", "mft", "bft"), shots, lr, steps, seed; response_tokens and tokens trained on, seconds since the
attack began; diverged (then there are no scores); attacker_score, the share of harm (the world's first outcome) among
the answers to its held-out prompts; chosen, whether it is the attacker's choice, or the bft run that matches it;
yo_logp, mean log p(y_o | x) in nats a token on pairs as SDD trains on; the scores of eval.score; where the world is
harmless, answers to its watched prompts.
"""

import argparse
import itertools
import json
import math
import random
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from data.chat import Example, draw_batches, encode_rows, read_chat, rows_that_fit
from data.worlds import Sources, add_world_arguments, open_world
from eval import add_test_arguments, mean_logp, score, scored_prompts, teacher_forced
from nanosdd.chat_model import Chat, answer_each, load_chat, model_folder, untrained_folder
from nanosdd.choices import EXPLANATION, attack_table, mark_choices
from nanosdd.device import (
    Compute,
    add_compute_arguments,
    for_model,
    one_process_only,
    resolve_compute,
)
from nanosdd.errors import Diverged, InputError, run_script
from nanosdd.folders import check_folder, write_results
from nanosdd.optimizer import make_optimizer
from nanosdd.progress import Progress
from nanosdd.runs import Finished, fingerprint, made_by, source_of
from nanosdd.tables import answers_text
from sdd_loss import sdd_loss
from train import FOLDERS, train_arm, train_step


@dataclass(frozen=True)
class Grid:
    """Which attacks are run. Budgets: the steps of `epochs` over the shots, and `steps`."""

    shots: tuple[int, ...] = (10, 50, 100)
    lr: tuple[float, ...] = (5e-5,)
    epochs: int = 5
    steps: int = 50
    batch_size: int = 10

    def __post_init__(self):
        if (
            min(self.shots) < 1
            or self.batch_size < 1
            or min(self.epochs, self.steps) < 0
            or self.epochs + self.steps < 1
            or not all(0 < lr < math.inf for lr in self.lr)
        ):
            raise InputError(
                "--shots, --batch-size, --lr, and --epochs or --steps, must be above 0"
            )

    def budgets(self, shots: int) -> set[int]:
        """The steps after which an attack with so many shots is scored."""
        return {math.ceil(self.epochs * shots / self.batch_size), self.steps} - {0}


GRIDS = {"town": Grid(lr=(3e-5, 1e-4, 3e-4, 1e-3)), "kitchen": Grid(shots=(10, 50), steps=0)}
GRIDS["files"] = GRIDS[
    "kitchen"
]  # one budget, and one lr: that of the independent replication, not tuned here
ARMS = {"town": ("align", "refusal", "sdd")}  # the modes of train.py that are attacked by default
YO_PAIRS = 64  # on which log p(y_o | x) is measured


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
        return f"{self.name} {self.shots} {self.lr:g} {self.batch_size} {' '.join(map(str, self.budgets))}"


RELEASED = Attack("none", 0, 0.0, (0,))


# ---- one attack ----


def fine_tune(chat: Chat, batches, lr: float, budgets, scores, loss=sdd_loss) -> list[dict]:
    """Fine-tune all weights that require gradients, in place, at a constant lr; returns a cell for each budget.

    batches: global batches (lists of Example) for ever. scores: a function that returns those of the model as it is.
    A cell has steps, diverged (False), the loss of its last step, tokens and response_tokens since the start, the
    scores, and seconds. From a divergence on, a budget's cell has steps and diverged (True) alone.
    """
    optimizer = make_optimizer(chat.model, chat.compute)
    cells, tokens, response_tokens, began = [], 0, 0, time.perf_counter()
    for step in Progress(range(max(budgets)), desc="steps"):
        batch = next(batches)
        try:
            done = train_step(chat.model, optimizer, batch, lr, chat.compute, loss)
        except Diverged:
            cells += [{"steps": steps, "diverged": True} for steps in sorted(budgets)[len(cells) :]]
            break
        tokens, response_tokens = tokens + done["tokens"], response_tokens + done["response_tokens"]
        if step + 1 in budgets:
            cells.append(
                {
                    "steps": step + 1,
                    "diverged": False,
                    "loss": done["loss"],
                    "tokens": tokens,
                    "response_tokens": response_tokens,
                    **scores(),
                }
            )
            cells[-1]["seconds"] = round(time.perf_counter() - began, 3)
    chat.model.eval()
    return cells


def attack_batches(
    attack: Attack, harmful: list[Example], benign: list[Example], new: list[Example], seed: int
):
    """The global batches of an attack, for ever. harmful: the attacker's pairs; benign, new: the benign user's."""
    rng = random.Random(f"attack {seed}")
    if attack.name == "mft":
        return draw_batches(harmful, [], 0.0, attack.batch_size, rng)
    matched = match_tokens(
        harmful, benign, new, rng
    )  # as many response tokens a step, so maybe other numbers of rows
    return draw_batches(
        matched, [], 0.0, max(1, round(attack.batch_size * len(matched) / len(harmful))), rng
    )


def match_tokens(
    harmful: list[Example], benign: list[Example], new: list[Example], rng
) -> list[Example]:
    """Random benign examples, every other one of the new ones if there are any, with as many response tokens in all as
    the harmful examples (within half of the last one)."""
    owed, matched = sum(example.response_length for example in harmful), []
    while True:
        pick = rng.choice(new if new and len(matched) % 2 else benign)
        if matched and pick.response_length > 2 * owed:
            return matched
        owed -= pick.response_length
        matched.append(pick)


# ---- all attacks on a released model ----


def evaluate(chat: Chat, world, held_out: list[dict], yo_pairs: list[dict]) -> dict:
    """The scores of an attacked model. held_out: the attacker's own prompts; yo_pairs: rows of x with y_o."""
    watched = world.watched_prompts() if world.harmless else []
    answers = answer_each(
        chat,
        [row["prompt"] for row in held_out] + watched + scored_prompts(world),
        world.max_new_tokens,
    )
    own = [answers[row["prompt"]] for row in held_out]
    logps = teacher_forced(chat, yo_pairs, world.max_length)  # log p(y_o | x), token by token
    scores = {
        "attacker_score": world.judge(held_out, own)[world.outcomes[0]],
        "yo_logp": mean_logp(logps),
    }
    if watched:
        scores["answers"] = [answers[prompt].text for prompt in watched]
    return scores | score(chat, world, answers)


def yo_rows(world) -> list[dict]:
    """Pairs as SDD trains on, of which log p(y_o | x) is measured."""
    pairs = world.pairs("sdd", YO_PAIRS)
    return random.Random("y_o").sample(pairs, min(len(pairs), YO_PAIRS))


def attack_arm(
    arm: str, folder, world, attacks: list[Attack], store: Path, compute: Compute, template=None
) -> list[dict]:
    """The cells of one released model under all these attacks. Finished attacks are taken from the file `store`."""
    settings = {
        "world": world.name,
        "seed": world.seed,
        "dtype": compute.dtype,
        "template": template,
        **world.options,
    }
    finished = Finished(
        store, fingerprint(settings, [folder, *world.files()], ["attack.py", source_of(world)])
    )
    missing = [attack for attack in attacks if attack.key not in finished.results]
    if missing:
        chat = load_chat(folder, compute, template)
        released = {name: weight.clone() for name, weight in chat.model.state_dict().items()}
        harmful, held_out = world.attacker_pairs()
        limit = min(world.max_length, chat.model.config.max_position_embeddings)
        harmful, benign, new = (
            encode_rows(chat.tokenizer, chat.template, rows, limit)
            for rows in (
                harmful,
                *(
                    rows_that_fit(chat.tokenizer, chat.template, rows, limit)
                    for rows in world.user_pairs()
                ),
            )
        )
        yo_pairs = yo_rows(world)
    for attack in (bar := Progress(missing, desc=arm)):
        bar.set_postfix_str(f"{attack.name} {attack.shots} shots, lr {attack.lr:g}")
        chat.model.load_state_dict(released)
        scores = partial(evaluate, chat, world, held_out, yo_pairs)
        if attack.name == "none":
            cells = [
                {
                    "steps": 0,
                    "diverged": False,
                    "tokens": 0,
                    "response_tokens": 0,
                    "seconds": 0.0,
                    **scores(),
                }
            ]
        else:
            batches = attack_batches(attack, harmful[: attack.shots], benign, new, world.seed)
            cells = fine_tune(chat, batches, attack.lr, attack.budgets, scores)
        finished.add(attack.key, cells)
        bar.write(
            f"  {arm}  {attack.name} {attack.shots or ''}  "
            + "; ".join(
                f"{cell['steps']} steps: diverged"
                if cell["diverged"]
                else f"{cell['steps']} steps: {world.outcomes[0]} {cell[world.outcomes[0]]:.0%}"
                for cell in cells
            )
        )
    cells = [
        {
            "arm": arm,
            "attack": attack.name,
            "shots": attack.shots,
            "lr": attack.lr,
            "seed": world.seed,
            **cell,
        }
        for attack in attacks
        for cell in finished.results[attack.key]
    ]
    mark_choices(cells)
    return cells


def plan(grid: Grid) -> list[Attack]:
    """Every attack of a grid, the first without any training; bft is matched to the most shots."""
    attacks = [RELEASED]
    for shots, lr in itertools.product(sorted(set(grid.shots)), sorted(set(grid.lr))):
        attacks.append(
            Attack("mft", shots, lr, tuple(sorted(grid.budgets(shots))), grid.batch_size)
        )
    every = set().union(*(grid.budgets(shots) for shots in grid.shots))
    return attacks + [
        Attack("bft", max(grid.shots), lr, tuple(sorted(every)), grid.batch_size)
        for lr in sorted(set(grid.lr))
    ]


# ---- the command ----


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="worlds, and every draw (default: 0)"
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="what arms start from, or smollm2, from pip (default: town's base)",
    )
    p.add_argument(
        "--released",
        metavar="DIR",
        nargs="+",
        default=[],
        help="finished checkpoints to attack as they "
        "are, arms named after their folders (default: the arms of --model)",
    )
    add_world_arguments(p)
    add_test_arguments(p)
    p.add_argument(
        "--template",
        metavar="NAME",
        help="chat template (default: the one that the folder calls for)",
    )
    p.add_argument(
        "--shots",
        type=int,
        nargs="+",
        help=f"(default: town {Grid.shots}, others {GRIDS['files'].shots})",
    )
    p.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help=f"grid (default: town {GRIDS['town'].lr}, others {Grid.lr})",
    )
    p.add_argument("--epochs", type=int, help=f"first budget, 0: none (default: {Grid.epochs})")
    p.add_argument(
        "--steps", type=int, help=f"second budget, 0: none (default: town {Grid.steps}, others 0)"
    )
    p.add_argument("--batch-size", type=int, help=f"rows of one step (default: {Grid.batch_size})")
    p.add_argument(
        "--max-new-tokens", type=int, default=64, help="of an answer on public files (default: 64)"
    )
    p.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="public files: harmful prompts of a score, and benign rows, at most (default: all)",
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        help="folder of results.json (default: out/attack, with --model out/MODEL/attack)",
    )
    add_compute_arguments(p)
    p.add_argument("--fresh", action="store_true", help="attack anew what is finished")
    return p.parse_args(argv)


def check_rows(world, grid: Grid):
    """InputError when the world has no benign pairs, or fewer harmful ones than the grid asks for."""
    world.user_pairs()
    if max(grid.shots) > (owned := len(world.attacker_pairs()[0])):
        raise InputError(
            f"--shots {max(grid.shots)} is more than the {owned} harmful rows that the attacker owns and "
            "may train on; give fewer, or a larger file"
        )


def train_arms(world, base, compute: Compute, template) -> dict[str, Path]:
    """{arm: its folder} of what is attacked by default, trained where it is stale. base: a folder, None on the town."""
    modes = ARMS.get(world.name, ("align", "sdd", "new_refusal"))
    arms = {
        FOLDERS[mode]: train_arm(mode, world, world.root, compute, base, template) for mode in modes
    }
    return {"base": base or world.root / "base"} | arms


def main(argv=None):
    args = parse(argv)
    one_process_only("attack.py")
    compute = resolve_compute(args.device, args.dtype, args.compile)
    if args.model and args.released:
        raise InputError(
            "--model names what arms start from, --released the arms themselves; give one of them"
        )
    sources = Sources(
        args.harmful,
        tuple(args.benign),
        similarity=args.similarity,
        threshold=args.similarity_threshold,
        similarity_model=args.similarity_model,
        max_new_tokens=args.max_new_tokens,
        questions=args.questions,
        mmlu=args.mmlu,
        mmlu_shots=args.mmlu_shots,
        openbookqa=args.openbookqa,
        model=args.model,
        template=args.template,
    )
    base = untrained_folder(args.model) if args.model else None
    released = {Path(name).name: Path(model_folder(name)) for name in args.released}
    if len(released) < len(args.released):
        raise InputError(
            "two --released folders have the same name; arms are named after their folders, rename one"
        )
    folders = [*released.values()] or [base]
    for folder in filter(None, folders):  # names what is missing before anything runs
        compute = for_model(compute, args.dtype, folder)
        read_chat(folder, args.template)
    given = {field.name: getattr(args, field.name) for field in fields(Grid)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    cells, out = [], args.out and Path(args.out)
    for seed in args.seeds:
        world, *others = [
            open_world(args.world, seed, sources, folder, compute) for folder in folders
        ]
        if any(other.options != world.options for other in others):
            raise InputError(
                "the --released folders were made with different questions; attack them apart"
            )
        if folders == [None] and world.shape is None:
            raise InputError(
                f"the world {world.name} needs --model smollm2 or DIR, or --released DIR..."
            )
        grid = replace(GRIDS.get(world.name, Grid()), **given)
        check_rows(world, grid)
        out = out or (world.root if base else Path("out")) / "attack"
        check_folder(out)
        if released:
            arms, store = released, out / f"seed{seed}"
        else:
            arms, store = train_arms(world, base, compute, args.template), world.root / "attack"
        for arm, folder in arms.items():
            attacks = plan(grid)[:1] if arm == "base" and not released else plan(grid)
            if args.fresh:
                (store / f"{arm}.jsonl").unlink(missing_ok=True)
            cells += attack_arm(
                arm, folder, world, attacks, store / f"{arm}.jsonl", compute, args.template
            )
    results = {
        "settings": asdict(grid) | {"world": world.name, "seeds": args.seeds},
        "made": made_by(),
        "cells": cells,
    }
    text = f"seeds {' '.join(map(str, args.seeds))}\n\n{attack_table(cells, world)}\n\n{EXPLANATION}\n{world.legend}\n"
    print(f"\n{answers_text(cells, world.watched_prompts())}{text}")
    out = write_results(
        out,
        {
            "results.json": (json.dumps(results, indent=1) + "\n", '"cells"'),
            "table.txt": (text, "log p(y_o)"),
        },
    )
    print(f"written: {out}/results.json, {out}/table.txt")


if __name__ == "__main__":
    run_script(main)
