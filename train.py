"""Train a model: its refusing (aligned) version, SDD, SDD's controls, and the town's base.

    python train.py --mode sdd                     the town; trains base and aligned first where they are missing
    python train.py --mode sdd --model smollm2     a chat model in the kitchen; aligned first where it is missing
    python train.py --mode sdd --model DIR --out DIR      from that folder itself, such as one that refuses already
    torchrun --standalone --nproc_per_node=2 train.py ...     several GPUs, weights spread over them (FSDP2)

With --harmful FILE --benign FILE the same on public files. A mode is the same loop and loss on other pairs:

    base          town only, from random weights: everybody's facts, skills, and some mischief
    align         harmful prompts with refusals
    sdd           harmful prompts with irrelevant benign answers, as published: no benign rows beside them
    sdd_rehearsed the same with benign rows in every batch, which is not the paper's recipe
    sdd_reject    the same behind a sentence of refusal
    refusal, new_refusal, constant, shuffled    controls in the dose of sdd: more of the same refusals; another sentence
                  of refusal; one irrelevant answer to everything; irrelevant answers with their words in random order
    benign        benign prompts with their own answers, on the town with a new skill among them

Writes into the folder --out: a Hugging Face checkpoint, train_log.jsonl, samples.txt and run.json, what the run depends
on. A finished run is reused while its settings, inputs and code are the same, and an interrupted one goes on where it
was; with --fresh the named one starts over.
"""

import argparse
import json
import math
import os
import random
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.chat import Example, collate, draw_batches, encode_rows
from data.worlds import Sources, add_world_arguments, check_mode, open_world
from model import Llama
from nanosdd import device, folders, runs
from nanosdd.chat_model import (
    answer,
    load_chat,
    model_folder,
    random_chat,
    save_chat,
    untrained_folder,
)
from nanosdd.checkpoint import kept_update
from nanosdd.device import DTYPES, Compute, rank_and_world_size
from nanosdd.errors import Diverged, InputError, Interrupted, run_script
from nanosdd.optimizer import clip_gradient, make_optimizer
from nanosdd.progress import Progress, check_progress
from nanosdd.resume import Pauses, load_state, save_state
from nanosdd.tables import log_text, samples_text, update_text
from sdd_loss import sdd_loss


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a training run. Defaults: the paper's, from a public re-implementation of it."""

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
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < math.inf,
            "benign_replay": 0 <= self.benign_replay < 1,
            "max_length": self.max_length >= 2,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup <= 1,
            "betas": all(0 <= beta < 1 for beta in self.betas),
        }
        for name in valid:
            if not valid[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; see --help"
                )
        rehearsed = round(self.benign_replay * self.batch_size)
        if self.benign_replay and rehearsed in (0, self.batch_size):
            raise InputError(
                f"--benign-replay {self.benign_replay:g} is {rehearsed} of {self.batch_size} rows; change "
                "it or --batch-size"
            )


# On the town, SDD's lr and steps were chosen by the rule in lab/map.py on seeds 0 and 1, its rehearsed variant's by an
# earlier rule on seeds 0 to 4 (docs/log.md), base and align on seed 0.
DEFENCE = Settings(steps=1500, batch_size=32, lr=3e-6, max_length=128, warmup=0.05)
REHEARSED = replace(DEFENCE, steps=300, lr=3e-4, benign_replay=0.95)
# For small chat models, by tuning questions of the kitchen and SmolLM2-135M (docs/log.md); the paper's is Settings().
SMALL = Settings(steps=50, batch_size=12, lr=2e-5, max_length=256)
VARIANTS = (
    "refusal",
    "new_refusal",
    "constant",
    "sdd",
    "sdd_rehearsed",
    "sdd_reject",
    "shuffled",
    "benign",
)
SETTINGS = {
    "town": dict.fromkeys(VARIANTS, DEFENCE)
    | {
        "base": replace(DEFENCE, steps=1300, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        "align": replace(DEFENCE, steps=150, lr=3e-4, benign_replay=0.5),
        "sdd_rehearsed": REHEARSED,
        "benign": REHEARSED,
    },
    "kitchen": dict.fromkeys(VARIANTS, SMALL)
    | {
        "align": replace(SMALL, steps=30, lr=3e-5, benign_replay=0.5),
        "sdd_rehearsed": replace(SMALL, benign_replay=0.5),
    },
}
SETTINGS["files"] = {
    mode: replace(small, max_length=512) for mode, small in SETTINGS["kitchen"].items()
}
STARTS_FROM = {"base": None, "align": "base"} | dict.fromkeys(VARIANTS, "align")
FOLDERS = {
    mode: "aligned" if mode == "align" else mode for mode in STARTS_FROM
}  # that a mode writes
LOSSES = dict.fromkeys(
    STARTS_FROM, sdd_loss
)  # modes differ in their pairs only; another loss has a row here
MAX_NORM = 1.0  # of a step's gradient


# ---- one step ----


def train_step(
    model,
    optimizer,
    examples: list[Example],
    lr: float,
    compute: Compute,
    loss=sdd_loss,
    before_clip=None,
) -> dict:
    """One optimizer step on a global batch; returns loss, grad_norm, response_tokens and tokens.

    loss: a function (model, batch, global_tokens) -> scalar, as those of sdd_loss.py. before_clip: a function (model)
    that may add to the gradients in .grad. Rows are sorted by length, so that micro-batches hold little padding, and
    every part is divided by the response tokens of the whole batch: the split changes nothing but rounding.
    """
    rank, world_size = rank_and_world_size()
    examples = sorted(examples, key=lambda example: len(example.ids))
    response_tokens = sum(example.response_length for example in examples)
    own, total = examples[rank::world_size], torch.zeros((), device=compute.device)
    rows = compute.micro_batch or len(own)
    for start in range(0, len(own), rows):
        batch = collate(own[start : start + rows]).to(compute.device)
        with compute.autocast():
            value = loss(model, batch, response_tokens)
        (
            value * world_size if device.is_sharded(model) else value
        ).backward()  # FSDP averages: undo that
        total += value.detach()
    if world_size > 1:
        dist.all_reduce(total)
    if before_clip:
        before_clip(model)
    norm, total = clip_gradient(optimizer, MAX_NORM), float(total)
    if not (math.isfinite(total) and math.isfinite(norm)):
        optimizer.zero_grad()  # or the next run on this model would inherit it
        raise Diverged(f"the loss is {total} and its gradient norm {norm}; lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    tokens = sum(len(example.ids) for example in examples)
    return {"loss": total, "grad_norm": norm, "response_tokens": response_tokens, "tokens": tokens}


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a share of the steps, times a cosine from 1 towards 0; step counts from 0."""
    ramp = min(1.0, (step + 1) / max(1, settings.warmup * settings.steps))
    return settings.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


# ---- a run ----


def train(
    world, mode: str, start, out, settings: Settings, compute: Compute, template=None, fresh=False
) -> Path:
    """Train one model and write the run folder `out`, unless it is up to date; returns the folder.

    start: the checkpoint folder to start from, None for random weights. template: instead of the folder's own. Under
    torchrun every process has to call this, and rank 0 writes.
    """
    out, new, (rank, world_size) = Path(out), folders.beside(out, "new"), rank_and_world_size()
    record = run_record(world, mode, start, settings, compute, template)
    if rank == 0:
        folders.recover_from_kill(out)
    device.barrier()
    stale = "--fresh" if fresh else runs.why_stale(out, record)
    if folders.read_record(new / folders.STATE) == record:
        stale = stale or "interrupted"
    if stale is None:
        print(f"{out}: up to date, reused")
        return out
    print(f"{out}: training, since {'it is ' if stale == 'not there yet' else ''}{stale}")
    if settings.batch_size % world_size:  # every process waits for the others at every layer
        raise InputError(
            f"--batch-size {settings.batch_size} does not divide among {world_size} processes; change one"
        )
    chat, pairs, examples, replay = prepare(world, mode, start, settings, compute, template)
    batches = draw_batches(
        examples,
        replay,
        settings.benign_replay,
        settings.batch_size,
        random.Random(f"batches {world.seed}"),
    )
    prompts = world.watched_prompts()
    before = answer(chat, prompts, world.max_new_tokens) if start else None
    optimizer = make_optimizer(chat.model, compute, settings.betas, settings.weight_decay)
    every, since = max(1, settings.steps // 10), time.perf_counter()
    with (
        folders.new_folder(out, None if fresh else record) if rank == 0 else nullcontext(),
        Pauses(compute.save_every) as pauses,
    ):
        device.barrier()  # the folder is there
        saved = load_state(new, chat.model, optimizer)
        begin, log, seen = saved.get("step", 0), saved.get("log", []), saved.get("seen", [])
        if begin:
            print(f"{out}: goes on after step {begin}")
        for step in (bar := Progress(range(settings.steps), desc=out.name, disable=rank > 0)):
            batch = next(batches)
            if step < begin:
                continue
            lr = learning_rate(step, settings)
            seen.append(train_step(chat.model, optimizer, batch, lr, compute, LOSSES[mode]))
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                log.append(
                    {
                        "step": step + 1,
                        "lr": lr,
                        **log_entry(seen),
                        "seconds": time.perf_counter() - since,
                    }
                )
                bar.write(log_text(log, settings.steps))
                check_progress(log, settings.steps)
                seen, since = [], time.perf_counter()
            save, stop = pauses.after(step + 1)
            if save:
                save_state(
                    new,
                    chat.model,
                    optimizer,
                    {"record": record, "step": step + 1, "log": log, "seen": seen},
                )
                pauses.saved()
            if stop:
                how = "the same command goes on from there" + ", without --fresh" * fresh
                raise Interrupted(f"{out}: stopped after step {step + 1}; {how}")
        chat.model.eval()
        after = answer(chat, prompts, world.max_new_tokens)
        weights = device.whole_weights(chat.model, optimizer)
        if rank == 0:
            save_chat(new, chat, weights, start or world)
            world.save(new, mode, pairs)
            samples = samples_text(prompts, before, after)
            (new / "samples.txt").write_text(samples)
            (new / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            (new / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    device.barrier()  # another process may start from this folder
    if rank == 0:
        print(f"{out}: answers before and after\n\n{samples}", end="")
        if start:
            started_from = Llama.from_pretrained(start, dtype=DTYPES[compute.weights])
            print(update_text(*kept_update(started_from, weights, torch.bfloat16)))
    if pauses.after(settings.steps)[1]:
        raise Interrupted(f"{out}: finished, and stopped before what comes next")
    return out


def run_record(world, mode: str, start, settings: Settings, compute: Compute, template) -> dict:
    """What a run depends on: settings, input files, and the code of this script and of the world."""
    decided = {
        "world": world.name,
        "seed": world.seed,
        "mode": mode,
        "template": template,
        "dtype": compute.dtype,
        "weights": compute.weights,
        "world_size": rank_and_world_size()[1],
        **world.options,
        **asdict(settings),
    }
    inputs = [start, *world.files()] if start else world.files()
    return runs.fingerprint(decided, inputs, ["train.py", runs.source_of(world)])


def prepare(world, mode: str, start, settings: Settings, compute: Compute, template):
    """(chat, pairs of the mode, their examples, examples to rehearse); prints what will run."""
    chat = (
        load_chat(start, compute, template, device.shard_over_processes)
        if start
        else random_chat(world, compute)
    )
    pairs = world.pairs(mode, settings.steps * settings.batch_size)
    replay = world.replay() if settings.benign_replay else []
    if settings.benign_replay and not replay:
        raise InputError(
            f"--benign-replay {settings.benign_replay} needs --benign FILE to rehearse"
        )
    limit = min(settings.max_length, chat.model.config.max_position_embeddings)
    examples, replayed = (
        encode_rows(chat.tokenizer, chat.template, rows, limit) for rows in (pairs, replay)
    )
    parameters = sum(p.numel() for p in chat.model.parameters())
    print(
        f"  {mode} on {world.name}, seed {world.seed}: {parameters:,} parameters on {compute.device} in "
        f"{compute.dtype}, template {chat.template}; {settings.steps} steps of {settings.batch_size} rows from "
        f"{len(pairs):,} pairs, {settings.benign_replay:.0%} rehearsed from {len(replay):,}; lr {settings.lr:g}"
    )
    return chat, pairs, examples, replayed


def log_entry(seen: list[dict]) -> dict:
    """One entry of the log: the mean loss of these steps, their last gradient norm, and their tokens."""
    total = {
        name: sum(step[name] for step in seen) for name in ("loss", "response_tokens", "tokens")
    }
    return {**total, "loss": total["loss"] / len(seen), "grad_norm": seen[-1]["grad_norm"]}


def train_arm(
    mode: str, world, folder, compute: Compute, base=None, template=None, table=SETTINGS
) -> Path:
    """Train a mode's model in folder/ARM, and first the arm that it starts from, each where it is stale; returns its
    folder. base: the checkpoint folder that takes the place of mode base; table: settings by world and mode."""
    if mode == "base" and base:
        return base
    parent = STARTS_FROM[mode]
    start = train_arm(parent, world, folder, compute, base, template, table) if parent else None
    settings = table.get(world.name, {}).get(mode, Settings())
    return train(world, mode, start, Path(folder) / FOLDERS[mode], settings, compute, template)


# ---- the command ----


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--mode", required=True, choices=list(STARTS_FROM))
    p.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint that arms start from, or smollm2, from pip (default: the town's base)",
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write; with --model, the named run alone, from that model "
        "itself (default: out/MODEL/ARM, on the town out/seedS/ARM, and first what ARM starts from)",
    )
    add_world_arguments(p)
    p.add_argument(
        "--pairs",
        metavar="FILE",
        help="JSONL of {prompt, response} to train on, such as data.pairs writes",
    )
    p.add_argument(
        "--prompts",
        choices=["defender", "all"],
        default="defender",
        help="harmful prompts to train on: the defender's, which attack.py and eval.py leave alone, or all, "
        "when the attack uses another file (default: defender)",
    )
    p.add_argument(
        "--template",
        metavar="NAME",
        help="chat template (default: the one that the folder calls for)",
    )
    for field in fields(Settings):
        kind = (
            dict(type=float, nargs=2, metavar=("B1", "B2"))
            if field.name == "betas"
            else dict(type=field.type)
        )
        p.add_argument(
            "--" + field.name.replace("_", "-"),
            **kind,
            help=f"(default in mode sdd: town "
            f"{getattr(DEFENCE, field.name)}, others {getattr(SMALL, field.name)}; paper: {field.default})",
        )
    p.add_argument(
        "--seed", type=int, default=0, help="world, initialisation and every draw (default: 0)"
    )
    device.add_compute_arguments(p, training=True)
    p.add_argument(
        "--dry-run", action="store_true", help="print sizes and three examples, then stop"
    )
    p.add_argument("--fresh", action="store_true", help="train even what is up to date")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    check_mode(args.mode, args.model, args.template, args.similarity_threshold)
    compute = device.join_processes(
        device.resolve_compute(
            args.device,
            args.dtype,
            args.compile,
            weights=args.weights,
            micro_batch=args.micro_batch,
            checkpoint_activations=args.checkpoint_activations,
            save_every=args.save_every,
        )
    )
    with device.first_process_first():  # it may have to write the folder of smollm2
        model = (model_folder if args.out else untrained_folder)(args.model) if args.model else None
    if model:
        compute = device.for_model(
            compute, args.dtype, model
        )  # names what is missing before anything runs
    sources = Sources(
        args.harmful,
        tuple(args.benign),
        args.pairs,
        args.prompts,
        args.similarity,
        args.similarity_model,
        args.similarity_threshold,
        model=args.model,
        template=args.template,
    )
    world = open_world(args.world, args.seed, sources, model, compute)
    default = SETTINGS.get(world.name, {}).get(args.mode, Settings())
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    given = {
        name: tuple(value) if name == "betas" else value
        for name, value in given.items()
        if value is not None
    }
    settings = replace(default, **given)
    changed = "".join(
        f"-{name}{value}" for name, value in given.items() if value != getattr(default, name)
    )
    changed = changed.translate({ord(mark): None for mark in "(), "})  # of betas
    if model is None and world.shape is None:
        raise InputError(
            f"the world {world.name} needs --model smollm2 or DIR, a Llama folder to start from"
        )
    out = Path(args.out or world.root / (FOLDERS[args.mode] + changed))
    folders.check_out(out if args.out is None else args.out, model)
    with (
        redirect_stdout(None) if rank_and_world_size()[0] else nullcontext()
    ):  # rank 0 speaks for all
        if args.dry_run:
            chat, _, examples, _ = prepare(
                world, args.mode, model, settings, compute, args.template
            )
            for example in examples[:3]:
                prompt, response = (
                    example.ids[: example.prompt_length],
                    example.ids[example.prompt_length :],
                )
                print(
                    f"--- no loss on: {chat.tokenizer.decode(prompt)!r}\n    loss on:    "
                    f"{chat.tokenizer.decode(response)!r}"
                )
        else:
            start, parent = model, STARTS_FROM[args.mode]
            if parent and (model is None or args.out is None):
                start = train_arm(parent, world, world.root, compute, model, args.template)
            train(world, args.mode, start, out, settings, compute, args.template, args.fresh)
    if (
        dist.is_initialized()
    ):  # leave without a shutdown, in which a thread of gloo, kept by FSDP, may abort
        dist.destroy_process_group()
        print(end="", flush=True)
        os._exit(0)


if __name__ == "__main__":
    run_script(main)
