"""Train one arm: a base model of the town, its refusing (aligned) version, SDD and its controls.

    python train.py --mode sdd                     the town: trains base and aligned first when they are missing
    python train.py --mode sdd --model DIR --harmful harmful_behaviors.csv --benign alpaca.json --out DIR
    torchrun --standalone --nproc_per_node=2 train.py ...     on several GPUs, weights spread over them (FSDP2)

Every mode is the same loop and the same loss on other (prompt, response) pairs:

    base        town only: everybody's facts, skills and mischief, from random weights
    align       harmful prompts with refusals; on an aligned model with SDD's settings it is the refusal control
    sdd         harmful prompts with irrelevant benign answers
    sdd_reject, shuffled, exposure, same_topic    variants of sdd and its controls, see data/pairs.py
    benign      benign prompts with their own answers, which on the town include a new skill
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

from nanosdd import runs
from nanosdd.checkpoint import kept_update, write_model
from data.chat import encode_example
from data.harmful import read_harmful, split_harmful
from data.pairs import add_similarity_arguments, file_pairs, resolve_similarity, town_pairs, write_pairs
from data.tokenizer import TOKENIZER_FILES, load_tokenizer, write_llama3_tokenizer
from data.town import Town, read_town, words
from nanosdd.device import add_device_arguments, autocast, join_processes, process, resolve_device
from nanosdd.errors import InputError, run_script
from eval import greedy, load
from nanosdd.loop import backward, draw_batches, fit
from model import Llama, LlamaConfig
from nanosdd.optimizer import SplitAdamW

SOURCES = ["model.py", "nanosdd/checkpoint.py", "sdd_loss.py", "nanosdd/loop.py", "nanosdd/optimizer.py",
           "nanosdd/device.py", "train.py",
           "data/chat.py", "data/harmful.py", "data/pairs.py", "data/sentence.py", "data/sources.py",
           "data/sentencepiece.py", "data/tfidf.py", "data/tokenizer.py", "data/town.py"]

# Settings by target and mode. PAPER: through a public re-implementation that labels them so. DEFENCE: on the town,
# lr and replay by tune.py on seeds 0 to 4, see LOG.md; base and align on seed 0.
PAPER = dict(steps=500, batch_size=24, lr=5e-7, benign_replay=0.0, max_length=512, weight_decay=0.0,
             betas=[0.9, 0.999], warmup=0.0)
DEFENCE = dict(PAPER, steps=300, batch_size=32, lr=3e-4, benign_replay=0.95, max_length=128, warmup=0.05)
TOWN = {"base": dict(DEFENCE, steps=1300, batch_size=32, lr=2e-3, benign_replay=0.0, weight_decay=0.1,
                     betas=[0.9, 0.95]),
        "align": dict(DEFENCE, steps=150, lr=3e-4, benign_replay=0.5),
        "sdd": DEFENCE, "sdd_reject": DEFENCE, "shuffled": DEFENCE,
        "exposure": dict(DEFENCE, batch_size=34, benign_replay=30 / 34),  # two rows a pair: as many pairs and replayed
        "same_topic": DEFENCE, "benign": DEFENCE}
DISTINCT_BASE = dict(steps=3000)  # recipes in sentences of their own are composed for new people only after so many
TOWN_MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=8,
                  num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
                  initializer_range=0.06)  # 0.02 learns the skills far later at this width
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ARMS = {  # arm on the town: (mode, the arm it starts from, settings that are not its mode's own)
    "base": ("base", None, {}), "aligned": ("align", "base", {}), "refusal": ("align", "aligned", DEFENCE),
    "no_replay": ("sdd", "aligned", dict(DEFENCE, batch_size=2, benign_replay=0.0)),  # as many pairs a step as SDD
    **{mode: (mode, "aligned", {}) for mode in ("sdd", "sdd_reject", "shuffled", "exposure", "same_topic", "benign")}}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", required=True, choices=list(TOWN))
    p.add_argument("--model", metavar="DIR", help="checkpoint to start from (default: the town's own)")
    p.add_argument("--out", metavar="DIR", help="folder to write (default on the town: out/seedS/ARM)")
    p.add_argument("--harmful", metavar="FILE", help="harmful prompts: BeaverTails, AdvBench, ... (default: the town's "
                                                     "mischief)")
    p.add_argument("--benign", metavar="FILE", nargs="+", default=[], help="benign pairs: Alpaca, LIMA, Dolly, ...")
    p.add_argument("--chat", metavar="NAME", help="chat template (default: the one that the folder calls for)")
    p.add_argument("--pairs", metavar="FILE", help="JSONL of {prompt, response} to train on, such as data.pairs writes")
    p.add_argument("--prompts", choices=["defender", "all"], default="defender",
                   help="harmful prompts of a file to train on: those that attack.py and eval.py leave to the "
                        "defender, or all, when the attack uses another file (default: defender)")
    add_similarity_arguments(p)
    for name, kind, note in (
            ("steps", int, "optimizer steps"), ("batch-size", int, "rows of one optimizer step"),
            ("lr", float, "peak learning rate, cosine to 0"), ("benign-replay", float, "share of benign rows a batch"),
            ("max-length", int, "tokens of prompt and answer, the context at most; longer answers are cut"),
            ("weight-decay", float, "AdamW"), ("warmup", float, "share of the steps that warms up")):
        key = name.replace("-", "_")
        p.add_argument(f"--{name}", type=kind, help=f"{note} (default: sdd on the town {DEFENCE[key]}, "
                                                     f"base {TOWN['base'][key]}, real files {PAPER[key]})")
    p.add_argument("--betas", type=float, nargs=2, metavar=("B1", "B2"),
                   help="AdamW (default: base 0.9 0.95, else 0.9 0.999)")
    p.add_argument("--micro-batch", type=int, default=0, metavar="ROWS",
                   help="rows at once, the rest accumulates; the same update (default: the whole batch)")
    p.add_argument("--seed", type=int, default=0, help="world, initialisation and every draw (default: 0)")
    p.add_argument("--phrasing", choices=["shared", "distinct"], default="shared",
                   help="the town's sentences: shared by benign and mischief answers, or not (default: shared)")
    add_device_arguments(p)
    p.add_argument("--weights", choices=["fp32", "bf16"], default="fp32",
                   help="how weights are held: bf16 is in two halves that keep every fp32 bit of an update, 8 bytes a "
                        "parameter with the moments instead of 12 (default: fp32)")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="compute layers again in the backward pass: far less memory, about a third more time")
    p.add_argument("--save-dtype", choices=["fp32", "bf16"], default="fp32",
                   help="weights on disk; bf16 halves the file but rounds small updates away (default: fp32)")
    p.add_argument("--dry-run", action="store_true", help="print sizes, time and three examples, then stop")
    p.add_argument("--fresh", action="store_true", help="train even what is up to date")
    return p


# ---- one run ----

def seed_folder(seed: int, phrasing: str) -> Path:
    """Where the town's runs of a seed live."""
    return Path("out") / (f"seed{seed}" + ("" if phrasing == "shared" else f"-{phrasing}"))


def resolve(args):
    """Fill in what the command line left open: target, settings, starting model and output folder.

    Sets args.town (bool) and args.parent, the town's arm to start from, or None when --model names a folder.
    """
    if args.weights == "bf16" and args.dtype == "fp32":
        raise InputError("--weights bf16 computes in bf16, there is nothing finer to compute with; leave --dtype out")
    resolve_device(args)
    args.dtype = "bf16" if args.weights == "bf16" else args.dtype
    files = bool(args.harmful or args.benign or args.pairs)
    args.town = not files and (args.model is None or (Path(args.model) / "town.json").is_file())
    args.parent = None
    if args.town and args.model is not None:
        town = read_town(args.model)
        if town.seed != args.seed:
            raise InputError(f"{args.model} knows the town of --seed {town.seed}, not of --seed {args.seed}")
        args.phrasing = town.phrasing
    elif not args.town and args.model is None:
        raise InputError("real files need --model DIR, a Hugging Face Llama folder; without files the town is used")
    elif not args.town and (args.mode == "base" or not files):
        raise InputError(f"{args.model} is no model of the town: give --harmful FILE and --benign FILE, "
                         "and a --mode other than base")
    if not args.town and args.mode not in ("align", "benign") and not args.pairs:
        resolve_similarity(args)
    defaults = TOWN[args.mode] if args.town else PAPER
    if args.town and args.mode == "base" and args.phrasing == "distinct":
        defaults = defaults | DISTINCT_BASE
    changed = ""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
        elif getattr(args, key) != value:
            changed += f"-{key}{getattr(args, key)}"
    if args.town and args.model is None:
        arm = {"align": "aligned"}.get(args.mode, args.mode)
        args.parent = ARMS[arm][1]
        folder = seed_folder(args.seed, args.phrasing)
        args.model = str(folder / args.parent) if args.parent else None
        args.out = args.out or str(folder / (arm + changed + "-bf16" * (args.save_dtype == "bf16")))
    if args.out is None:
        raise InputError("--model needs --out DIR, the folder to write")
    if args.model and Path(args.model).resolve() == Path(args.out).resolve():
        raise InputError("--out is the folder of --model; choose another, to keep the model it starts from")
    for key, bad in (("steps", args.steps < 1), ("batch_size", args.batch_size < 1), ("lr", not 0 < args.lr < math.inf),
                     ("benign_replay", not 0 <= args.benign_replay < 1), ("max_length", args.max_length < 2),
                     ("micro_batch", args.micro_batch < 0), ("warmup", not 0 <= args.warmup <= 1),
                     ("weight_decay", not 0 <= args.weight_decay < math.inf),
                     ("betas", not all(0 <= beta < 1 for beta in args.betas))):
        if bad:
            raise InputError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range; see --help")
    runs.check_out(args.out)


def arm_command(arm: str, seed: int, phrasing: str) -> list[str]:
    """The arguments that train an arm of the town, as one would type them."""
    mode, parent, settings = ARMS[arm]
    command = ["--mode", mode, "--seed", str(seed), "--phrasing", phrasing]
    if settings:  # a control: the mode of one arm with the settings of another, under a name of its own
        folder = seed_folder(seed, phrasing)
        command += ["--model", str(folder / parent), "--out", str(folder / arm)]
        for key, value in settings.items():
            command += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return command


def ensure_arms(arms: list[str], seed: int, phrasing: str, like) -> dict[str, Path]:
    """Folders of these arms of the town and of those they start from, each trained now, once, unless it is up to date.
    like: device arguments and fresh."""
    order = []
    for arm in arms:
        chain = []
        while arm:
            chain.append(arm)
            arm = ARMS[arm][1]
        order += [arm for arm in reversed(chain) if arm not in order]
    folders = {}
    for arm in order:
        args = parser().parse_args(arm_command(arm, seed, phrasing))
        args.device, args.dtype, args.compile, args.fresh = like.device, like.dtype, like.compile, like.fresh
        resolve(args)
        folders[arm] = run(args)
    return folders


def fixed_prompts(args) -> list[str]:
    """Three prompts to watch, the first two harmful and nobody's training data."""
    if args.town:
        town, rng = Town(args.seed, args.phrasing), random.Random(0)
        knowledge, skill = town.mischiefs(town.groups["evaluation"][:1], rng)[6:8]
        return [knowledge.prompt, skill.prompt, town.facts("held_out")[0].prompt]
    harmful = split_harmful(read_harmful(args.harmful), args.harmful)["evaluation"] if args.harmful else []
    return [row["prompt"] for row in harmful[:2]] + ["What is the capital of France?"]


def start(args):
    """(model, tokenizer, name of the chat template) that a run begins with."""
    if args.model is None:
        torch.manual_seed(args.seed)
        with tempfile.TemporaryDirectory() as folder:
            write_llama3_tokenizer(folder, words())
            tokenizer = load_tokenizer(folder)
        model = Llama(LlamaConfig(vocab_size=tokenizer.n_vocab, **TOWN_MODEL)).to(args.device, WEIGHTS[args.weights])
        model.config.bos_token_id = tokenizer.special["<|begin_of_text|>"]
        model.config.eos_token_id = tokenizer.special["<|eot_id|>"]
        return model, tokenizer, "llama3"
    return load(args.model, args, WEIGHTS[args.weights])[:3]


def run(args) -> Path:
    """One resolved run: load, train, write the folder args.out; nothing to do when it is up to date.

    Under torchrun all processes have to come here, and the first writes. InputError for what cannot be spread."""
    out, (rank, processes) = Path(args.out), process()
    if args.batch_size % processes:  # each takes as many rows, for it waits for the others at every layer
        raise InputError(f"--batch-size {args.batch_size} does not divide among {processes} processes; change one")
    if processes > 1 and args.weights == "bf16":
        raise InputError("--weights bf16 is for one process; several spread fp32 weights over their GPUs")
    recorded = {key: value for key, value in vars(args).items()
                if key not in ("device", "compile", "dry_run", "fresh", "out")}
    inputs = [path for path in (args.model, args.harmful, args.pairs, *args.benign, args.similarity_model) if path]
    missing = [path for path in inputs if not Path(path).exists()]
    if missing:
        raise InputError(f"{missing[0]} is not there; check the path")
    record = runs.fingerprint(recorded, inputs, SOURCES)
    stale = "--fresh" if args.fresh else runs.why_stale(out / "args.json", record)
    if stale is None and not args.dry_run:
        print(f"{out}: up to date, reused")
        return out
    print(f"{out}: training, since {'it is ' * (stale == 'not there yet')}{stale}")
    model, tokenizer, chat = start(args)
    if args.town:
        pairs, replay = town_pairs(Town(args.seed, args.phrasing), args.mode, args.seed, args.steps * args.batch_size)
        card = ""
    else:
        pairs, replay, card = file_pairs(args)
    if args.benign_replay and not replay:
        raise InputError(f"--benign-replay {args.benign_replay} needs --benign FILE to replay")
    max_length = min(args.max_length, model.config.max_position_embeddings)
    main, replay = ([encode_example(tokenizer, chat, row["prompt"], row["response"], max_length, row.get("system"))
                     for row in rows] for rows in (pairs, replay))
    model.checkpoint_activations = args.checkpoint_activations
    announce(args, model, chat, main, replay)
    if args.dry_run:
        for example in main[:3]:
            prompt, response = (tokenizer.decode(part) for part in
                                (example.ids[:example.prompt_length], example.ids[example.prompt_length:]))
            print(f"--- no loss on: {prompt!r}\n    loss on:    {response!r}")
        return out
    prompts = fixed_prompts(args)

    def answers():
        found = greedy(model, tokenizer, chat, prompts, args, max_new_tokens=48)
        return [" ".join(text.split()) for _, text, _ in found]

    before = answers() if args.mode != "base" else ["(untrained)"] * len(prompts)
    lines = []
    began = time.perf_counter()
    batches = draw_batches(main, replay, args.benign_replay, args.batch_size, random.Random(f"batches {args.seed}"))
    with runs.new_folder(out) if rank == 0 else nullcontext() as folder:
        optimizer = fit(model, batches, steps=args.steps, lr=args.lr, args=args, betas=args.betas,
                        weight_decay=args.weight_decay, warmup=args.warmup, micro_batch=args.micro_batch, name=out.name,
                        log=lines.append)
        after, weights = answers(), trained_weights(model, optimizer)
        if rank:  # the first process writes
            dist.barrier()
            return out
        write_model(folder, model.config.to_dict(), weights, WEIGHTS[args.save_dtype])
        if args.model:
            say_what_is_kept(args, weights)
        if args.mode == "base":
            write_llama3_tokenizer(folder, words())
        else:
            for name in TOKENIZER_FILES:
                if (Path(args.model) / name).is_file():
                    shutil.copy(Path(args.model) / name, folder / name)
        (folder / "chat.txt").write_text(chat + "\n")
        if args.town:
            (folder / "town.json").write_text(json.dumps({"seed": args.seed, "phrasing": args.phrasing}) + "\n")
        if card:
            write_pairs(folder / "pairs.jsonl", pairs, card)
        (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples = "".join(f"prompt: {prompt}\nbefore: {old}\nafter:  {new}\n\n"
                          for prompt, old, new in zip(prompts, before, after))
        (folder / "samples.txt").write_text(samples)
        (folder / "args.json").write_text(json.dumps(record, indent=1) + "\n")
    if processes > 1:
        dist.barrier()  # the next arm may start from this folder
    print(f"{out}: trained and saved in {time.perf_counter() - began:.0f} s; answers before and after:\n")
    print("".join(f"    {line}\n" for line in samples.splitlines()))
    return out


def trained_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """Every weight by its name in the checkpoint: whole where it is spread over processes, fp32 where it is in halves.
    Those are copies on the CPU. All processes have to call this; the first gets weights, the others {}."""
    weights, (rank, _) = {}, process()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(optimizer, SplitAdamW):
            weights[name] = optimizer.master(parameter).cpu()
        elif hasattr(parameter, "full_tensor"):
            whole = parameter.detach().full_tensor()
            weights[name] = whole.cpu() if rank == 0 else None  # one copy for the machine, not one a process
        else:
            weights[name] = parameter.detach()
    return weights if rank == 0 else {}


def say_what_is_kept(args, weights):
    """Print how much of the update there is, and how much of it bf16 shows; warn when bf16 is used and loses it."""
    before = Llama.from_pretrained(args.model, dtype=WEIGHTS[args.weights])
    moved, kept, cosine = kept_update(before, weights, torch.bfloat16)
    print(f"  the update moved {moved:.1%} of the weights; rounded to bf16, {kept:.1%} of those still differ from the "
          f"start, and what is kept has cosine {cosine:.2f} with the update")
    if cosine < 0.9 and "bf16" in (args.dtype, args.save_dtype):
        print("  warning: bf16 loses much of this update; save with --save-dtype fp32 and compute with --dtype fp32 "
              "where the model is evaluated, or raise --lr")


def announce(args, model, chat, main, replay):
    """Say what will run, on what, and about how long, timed on one random batch."""
    examples = next(draw_batches(main, replay, args.benign_replay, args.batch_size, random.Random(0)))
    seconds = []
    model.train()  # as fit does: only so are layers computed again, and a model that needs it fits in memory here too
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with autocast(args):
            backward(model, examples, args.micro_batch, args.device)
        seconds.append(time.perf_counter() - began)
    model.zero_grad()
    model.eval()
    total = sum(len(example.ids) for example in examples)
    response = sum(example.response_length for example in examples)
    target = f"the town of seed {args.seed} ({args.phrasing} phrasing)" if args.town else "real files"
    replayed = f" from {len(replay):,}" if args.benign_replay else ""
    print(f"  {args.mode} on {target}: {sum(p.numel() for p in model.parameters()):,} parameters, on {args.device} in "
          f"{args.dtype}{' compiled' if args.compile else ''}, chat template {chat}\n"
          f"  {args.steps} steps of {args.batch_size} rows (about {response} response tokens of {total}) from "
          f"{len(main):,} pairs, benign replay {args.benign_replay:g}{replayed}\n"
          f"  lr {args.lr:g}, warm-up {args.warmup:g}, weight decay {args.weight_decay:g}, betas {args.betas}, at most "
          f"{args.max_length} tokens a row; about {args.steps * seconds[1]:.0f} s")


def main(argv=None):
    args = parser().parse_args(argv)
    resolve(args)
    join_processes(args)
    rank, processes = process()
    with redirect_stdout(None) if rank else nullcontext():  # the first process speaks for all
        train(args)
    if processes > 1:
        dist.destroy_process_group()


def train(args):
    """The resolved run, and before it those that it starts from."""
    if args.parent and args.dry_run:
        args.model = None  # sizes and times are those of random weights
    elif args.parent:
        ensure_arms([args.parent], args.seed, args.phrasing, args)
    run(args)


if __name__ == "__main__":
    run_script(main)
