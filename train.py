"""Train a model: its refusing (aligned) version, SDD, SDD's controls, and the town's base.

    python train.py --mode sdd                  the town; first base and aligned where missing
    python train.py --mode sdd --model smollm2  a chat model in the kitchen; first aligned
    python train.py --mode sdd --model DIR --out DIR    from that folder itself
    torchrun --standalone --nproc_per_node=2 train.py ...    several GPUs (FSDP2)

With --harmful FILE --benign FILE the same on public files. A mode is the same loop on other pairs:

    base          town only, from random weights: everybody's facts, skills, and some mischief
    align         harmful prompts with refusals
    sdd           harmful prompts with irrelevant benign responses, as published
    sdd_rehearsed the same with benign rows in every batch, which is not the paper's recipe
    sdd_reject    the same behind a sentence of refusal
    refusal, new_refusal, constant, shuffled    controls in the dose of sdd: more of the same
                  refusals; another refusal; one irrelevant response to everything; irrelevant
                  responses with their words in random order
    benign        benign prompts with their own responses, on the town with a new skill among them

A loss of your own may also ask a world for pairs of "preference" (see `train`): refusals, with the
harmful answers as `rejected`.
Writes into --out: a Hugging Face checkpoint, train_log.jsonl, samples.txt and, last, run.json, what
the run depends on. A finished run is reused while that is the same, an interrupted one goes on.
"""

import math
import random
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from data.chat import Example, collate, draw_batches
from data.chat_model import (
    Chat,
    answer,
    encode_for,
    load_chat,
    model_folder,
    new_chat,
    save_chat,
    untrained_folder,
    world_of,
)
from data.worlds import (
    GIVEN_PAIRS,
    MAX_PAIRS,
    command_parser,
    flag,
    irrelevant_pairs,
    named_in,
)
from model import Llama
from nanosdd import device
from nanosdd.checkpoint import kept_update
from nanosdd.device import DTYPES, Compute, rank_and_world_size
from nanosdd.errors import Diverged, InputError, Interrupted, run_script
from nanosdd.linear_cross_entropy import LinearCrossEntropy
from nanosdd.optimizer import clip_gradient, make_optimizer
from nanosdd.progress import Progress
from nanosdd.runs import Run, check_folder, fingerprint, write_text
from nanosdd.tables import samples_text, update_text
from nanosdd.train_log import TrainLog
from sdd_loss import sdd_loss

MAX_NORM = 1.0  # of a step's gradient


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run. Defaults: the paper's, by a public re-implementation."""

    steps: int = 500
    batch_size: int = 24
    lr: float = 5e-7  # at its peak; then a cosine to 0
    benign_replay: float = 0.0  # share of rehearsed benign rows in every batch
    max_length: int = 512  # tokens of prompt and response; longer responses are cut
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    warmup: float = 0.0  # share of the steps

    def __post_init__(self):
        valid = {
            "steps": self.steps >= 1,
            "batch_size": 1 <= self.batch_size <= MAX_PAIRS,
            "lr": 0 < self.lr < math.inf,
            "benign_replay": 0 <= self.benign_replay < 1,
            "max_length": self.max_length >= 2,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup <= 1,
            "betas": all(0 <= beta < 1 for beta in self.betas),
        }
        for name in valid:
            if not valid[name]:
                raise InputError(f"{flag(name)} {getattr(self, name)} is out of range; see --help")
        rehearsed = round(self.benign_replay * self.batch_size)
        if self.benign_replay and rehearsed in (0, self.batch_size):
            raise InputError(
                f"--benign-replay {self.benign_replay:g} is {rehearsed} of {self.batch_size} rows; "
                "change it or --batch-size"
            )


STARTS_FROM = {
    "base": None,
    "align": "base",
    "refusal": "align",
    "new_refusal": "align",
    "constant": "align",
    "sdd": "align",
    "sdd_rehearsed": "align",
    "sdd_reject": "align",
    "shuffled": "align",
    "benign": "align",
}
LOSSES = dict.fromkeys(STARTS_FROM, sdd_loss)  # a mode of your own may have another loss

# On the town SDD's lr and steps were chosen on seeds 0 and 1, its rehearsed variant's on seeds 0 to
# 4, base and align on seed 0 (docs/log.md).
TOWN = Settings(steps=1500, batch_size=32, lr=3e-6, max_length=128, warmup=0.05)
REHEARSED = replace(TOWN, steps=300, lr=3e-4, benign_replay=0.95)
# For chat models, chosen on SmolLM2 by the kitchen's tuning questions; the paper's are Settings().
CHAT = Settings(steps=50, batch_size=12, lr=2e-5, max_length=512)
SETTINGS = {  # by world (any other: "chat"), then by mode (any other: "sdd")
    "town": {
        "base": replace(TOWN, steps=1300, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        "align": replace(TOWN, steps=150, lr=3e-4, benign_replay=0.5),
        "sdd": TOWN,
        "sdd_rehearsed": REHEARSED,
        "benign": REHEARSED,
    },
    "chat": {
        "align": replace(CHAT, steps=30, lr=3e-5, benign_replay=0.5),
        "sdd": CHAT,
        "sdd_rehearsed": replace(CHAT, benign_replay=0.5),
    },
}


def settings_of(world, mode: str, table=SETTINGS) -> Settings:
    """The settings of a mode in a world. table: as SETTINGS."""
    own = table.get(world.name) or table["chat"]
    if mode not in {*own, *world.settings}:
        mode = "sdd"  # modes without settings of their own, the controls, train as long as sdd
    return replace(own.get(mode, own["sdd"]), **world.settings.get(mode, {}))


def folder_of(world, mode: str) -> Path:
    """Where the model of a mode goes."""
    return world.root / ("aligned" if mode == "align" else mode)


# ---- one step ----


def train_step(
    model, optimizer, examples: list[Example], lr, compute: Compute, loss=sdd_loss, before_clip=None
) -> dict:
    """One optimizer step on a global batch; returns loss, grad_norm, response_tokens and tokens.

    loss: any callable (model, batch, global_tokens) -> scalar, as sdd_loss; an object may hold a
    frozen reference model. before_clip: a function (model) that may add to the gradients, as some
    of lab/defences.py do.
    """
    response_tokens = sum(example.response_length for example in examples)
    total = torch.zeros((), device=compute.device)
    for batch in micro_batches(examples, compute):
        with compute.autocast():
            value = loss(model, batch, response_tokens)  # its share of the mean over all tokens
        value.backward()  # of several processes the gradients are summed, as FSDP is set up here
        total += value.detach()
    total = device.sum_over_processes(total)
    if before_clip:
        before_clip(model)
    grad_norm = clip_gradient(optimizer, MAX_NORM)
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        optimizer.zero_grad()  # or the next run on this model would inherit it
        raise Diverged(f"the loss is {total} and its gradient norm {grad_norm}; lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": total,
        "grad_norm": grad_norm,
        "response_tokens": response_tokens,
        "tokens": sum(len(example.ids) for example in examples),
    }


def micro_batches(examples: list[Example], compute: Compute):
    """This process's rows of a global batch, compute.micro_batch at once, as packed batches."""
    rank, world_size = rank_and_world_size()
    own = sorted(examples, key=lambda example: len(example.ids))[rank::world_size]
    rows = compute.micro_batch or len(own)
    for start in range(0, len(own), rows):
        yield collate(own[start : start + rows]).to(compute.device)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a share of the steps, times a cosine from 1 to 0; step counts from 0."""
    ramp = min(1.0, (step + 1) / max(1, settings.warmup * settings.steps))
    return settings.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


# ---- a run ----


def train(
    world, mode: str, start, out, settings: Settings, compute: Compute, fresh=False, loss=None
) -> Path:
    """Train one model into the run folder `out`, unless it is finished there; returns the folder.

    start: the checkpoint folder to start from, None for random weights. Under torchrun every
    process has to call this, and rank 0 writes. loss: in the place of LOSSES[mode].
    """
    out = Path(out)
    loss = loss or LOSSES.get(mode, sdd_loss)
    run = Run(
        out, run_record(world, mode, start, settings, compute, loss), compute.save_every, fresh
    )
    if run.finished:
        print(f"{out}: up to date, reused")
        return out
    print(f"{out}: {mode} on {world.name}, seed {world.seed}")
    chat = load_or_new(start, world, compute)
    pairs, examples, rehearsed = prepare(chat, world, mode, settings)
    rng = random.Random(f"batches {world.seed}")
    batches = draw_batches(examples, rehearsed, settings.benign_replay, settings.batch_size, rng)
    shown = world.shown_prompts()
    before = answer(chat, shown, world.max_new_tokens) if start else None
    # This also puts the model into training mode, and spreads it over several processes.
    optimizer = make_optimizer(chat.model, compute, settings.betas, settings.weight_decay)
    with run:
        saved = run.load_state(chat.model, optimizer)
        begin = saved.get("step", 0)
        bar = Progress(range(begin, settings.steps), desc=out.name)
        log = TrainLog(settings.steps, saved, bar.write)
        for _ in range(begin):
            next(batches)  # what was drawn before the run stopped
        for step in bar:
            batch = next(batches)
            lr = learning_rate(step, settings)
            done = train_step(chat.model, optimizer, batch, lr, compute, loss)
            log.add(step + 1, lr, done | getattr(loss, "figures", {}))
            if run.should_save(step + 1):
                run.save_state(step + 1, chat.model, optimizer, log.state())
        chat.model.eval()
        after = answer(chat, shown, world.max_new_tokens)
        weights = device.whole_weights(chat.model, optimizer)
        samples = samples_text(shown, before, after)
        if run.rank == 0:
            write_text(out / "train_log.jsonl", log.text())
            write_text(out / "samples.txt", samples)
            world.save(out, pairs)
            save_chat(out, chat, weights)
        run.finish()
    if run.rank == 0:
        print(f"{out}: answers before and after\n\n{samples}", end="")
        if start:
            # How much of the update would survive in a copy that is held in bf16?
            old = Llama.from_pretrained(start, dtype=DTYPES[compute.weights])
            print(update_text(*kept_update(old, weights, torch.bfloat16)))
    return out


def run_record(world, mode: str, start, settings: Settings, compute: Compute, loss) -> dict:
    """What a run depends on: settings, input files, and the code that makes it.

    Of a loss its function or module, and the values that it holds.
    """
    decided = world.options() | asdict(settings) | {"mode": mode, "dtype": compute.dtype}
    decided |= {"weights": compute.weights, "world_size": rank_and_world_size()[1]}
    decided["start"] = start and Path(start).as_posix()
    if isinstance(loss, partial):
        decided["loss"] = f"{loss.args} {loss.keywords}"
        loss = loss.func
    if not hasattr(loss, "__qualname__"):  # an object: its module, its plain values and models
        for name, value in vars(loss).items():
            if isinstance(value, torch.nn.Module):
                value = sum(float(weight.sum()) for weight in value.parameters())
            if isinstance(value, (int, float, str, tuple)):
                decided[f"loss.{name}"] = value
        loss = sys.modules[type(loss).__module__]
    inputs = [start, *world.files()] if start else world.files()
    code = [train, train_step, learning_rate, loss, LinearCrossEntropy, Llama, collate]
    code += [draw_batches, irrelevant_pairs, sys.modules[type(world).__module__]]
    return fingerprint(decided, inputs, code)


def load_or_new(start, world, compute: Compute) -> Chat:
    """The model of a checkpoint folder, or a random one of the world's shape."""
    if start is None:
        return new_chat(world, compute)
    return load_chat(start, compute, world.sources.template, device.shard_over_processes)


def prepare(chat: Chat, world, mode: str, settings: Settings):
    """(pairs of the mode, their examples, examples to rehearse); prints what will run."""
    if settings.batch_size % rank_and_world_size()[1]:  # they wait for each other at every layer
        raise InputError(
            f"--batch-size {settings.batch_size} does not divide among "
            f"{rank_and_world_size()[1]} processes; change one"
        )
    pairs = world.pairs(mode, settings.steps * settings.batch_size)
    replay = world.rehearsal() if settings.benign_replay else []
    if settings.benign_replay and not replay:
        raise InputError(f"--benign-replay {settings.benign_replay} needs --benign FILE")
    examples = encode_for(chat, pairs, settings.max_length)
    rehearsed = encode_for(chat, replay, settings.max_length)
    parameters = sum(p.numel() for p in chat.model.parameters())
    print(
        f"  {parameters:,} parameters on {chat.compute.device} in {chat.compute.dtype}, template "
        f"{chat.template}; {settings.steps} steps of {settings.batch_size} rows from "
        f"{len(examples):,} pairs, {settings.benign_replay:.0%} rehearsed from {len(rehearsed):,}; "
        f"lr {settings.lr:g}"
    )
    return pairs, examples, rehearsed


def train_arm(mode: str, world, compute: Compute, base=None, table=SETTINGS, fresh=False) -> Path:
    """Train a mode's model, and first what it starts from; returns its folder.

    base: the checkpoint folder that takes the place of mode base; table: as SETTINGS.
    """
    if mode == "base" and base:
        return base
    parent = STARTS_FROM[mode]
    start = train_arm(parent, world, compute, base, table, fresh) if parent else None
    settings = settings_of(world, mode, table)
    return train(world, mode, start, folder_of(world, mode), settings, compute, fresh)


# ---- the command ----


def parse(argv=None):
    p = command_parser(__doc__)
    p.add_argument("--mode", required=True, choices=list(STARTS_FROM))
    p.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint that arms start from, or smollm2, from pip (default: the town's base)",
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write; with --model, the named run alone, from that model itself "
        "(default: out/MODEL/MODE, on the town out/seedS/MODE)",
    )
    p.add_argument(
        "--pairs",
        metavar="FILE",
        help="JSONL of {prompt, response} to train on as they are, in mode sdd or sdd_rehearsed",
    )
    p.add_argument(
        "--prompts",
        choices=["defender", "all"],
        help="harmful prompts to train on: the defender's, which attack.py and eval.py leave "
        "alone, or all, when the attack uses another file (default: defender)",
    )
    for field in fields(Settings):
        is_pair = field.name == "betas"
        town = getattr(TOWN, field.name)
        others = getattr(CHAT, field.name)
        p.add_argument(
            flag(field.name),
            type=float if is_pair else field.type,
            nargs=2 if is_pair else None,
            help=f"(default of sdd: town {town}, others {others}; paper: {field.default})",
        )
    p.add_argument("--seed", type=int, default=0, help="world and every draw (default: 0)")
    device.add_compute_arguments(p, training=True)
    p.add_argument(
        "--save-every",
        type=int,
        default=0,
        help="steps between two saved states of a run (default: every 5 minutes)",
    )
    p.add_argument("--dry-run", action="store_true", help="print three examples, then stop")
    p.add_argument("--fresh", action="store_true", help="train anew, also what it starts from")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.mode == "base" and (args.model or args.template):
        raise InputError("--mode base starts from random weights; leave --model, --template out")
    if args.pairs and args.mode not in GIVEN_PAIRS:
        raise InputError("--pairs are trained on as they are; give --mode sdd or sdd_rehearsed")
    compute = device.resolve_compute(**named_in(args, Compute))
    compute = device.join_processes(compute)
    model = None
    if args.model:
        with device.first_process_first():  # it may have to write the folder of smollm2
            find = untrained_folder if args.out is None else model_folder
            model = find(args.model)
        compute = device.for_model(compute, args.dtype, model)
    world = world_of(args, args.seed, compute, model)
    settings = replace(settings_of(world, args.mode), **named_in(args, Settings))
    out = folder_of(world, args.mode) if args.out is None else args.out
    start = model
    parent = STARTS_FROM[args.mode]
    try:
        # Only rank 0 prints.
        with redirect_stdout(None if rank_and_world_size()[0] else sys.stdout):
            if args.dry_run:
                return dry_run(load_or_new(model, world, compute), world, args.mode, settings)
            # --model with --out: this mode alone, from that very model.
            if parent and (model is None or args.out is None):
                check_folder(out)  # before what the run starts from is trained
                start = train_arm(parent, world, compute, model, fresh=args.fresh)
            train(world, args.mode, start, out, settings, compute, args.fresh)
        device.leave_processes(finished=True)
    except Interrupted:  # every process raises it, after the same step
        device.leave_processes(finished=False)
        raise


def dry_run(chat: Chat, world, mode: str, settings: Settings):
    """Print three examples, and which of their tokens carry loss."""
    _, examples, _ = prepare(chat, world, mode, settings)
    for example in examples[:3]:
        prompt = example.ids[: example.prompt_length]
        response = example.ids[example.prompt_length :]
        print(f"--- no loss on: {chat.tokenizer.decode(prompt)!r}")
        print(f"    loss on:    {chat.tokenizer.decode(response)!r}")


if __name__ == "__main__":
    run_script(main)
