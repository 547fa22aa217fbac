"""Measure speed and memory, beside what one would run instead.

    python -m bench.speed --shape smollm2 --harmful harmful_behaviors.csv --benign alpaca.json
    python -m bench.speed decode --benign alpaca.json --tokenizer FOLDER
    python -m bench.speed town

train: steps on harmful prompts with random benign responses, beside trl's SFTTrainer on the same weights and batches.
decode: greedy answers to benign prompts of unequal lengths, beside transformers' generate. Both on the weights of
SmolLM2, or random ones of a --shape with a --tokenizer, in turns, a fresh process each time; model loading and a
warm-up are not timed, and the table holds medians. On a CPU nanoSDD takes its turn in bf16 too.
all: train, decode, the same where no answer stops, and one prompt alone (64 new tokens each).
town: the README's two commands as whole processes, and where their time goes. Figures also go to out/bench.json.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from operator import eq
from pathlib import Path
from statistics import mean, median

import torch

from bench import jobs
from bench.memory import parameter_counts
from data.chat import Example, encode_example, encode_prompt, read_chat
from data.harmful import read_harmful
from data.pairs import read_benign
from data.tokenizer import TOKENIZER_FILES, load_tokenizer
from model import Llama, LlamaConfig
from nanosdd.chat_model import model_folder
from nanosdd.checkpoint import read_config, read_json
from nanosdd.device import Compute, add_compute_arguments, machine, resolve_compute
from nanosdd.errors import InputError, run_script
from nanosdd.folders import write_text
from nanosdd.runs import ROOT

SHAPES = {  # small: about SmolLM2 with a fifth of its layers; 1b: Llama-3.2-1B; 7b: Llama-2-7b
    "small": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "7b": {},
    "smollm2": None,
}  # the real weights
MAX_LENGTH = 512  # longer rows are cut


def in_fresh_process(job) -> dict:
    """What job() returns or raises, in a new process; job: a function of bench/jobs.py with its arguments."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(job).result()


def take_turns(contestants: dict, rounds: int) -> dict[str, list[dict]]:
    """{name: figures of each round} of these jobs, one after the other in each round; [] where a package is missing."""
    found = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, job in contestants.items():
            try:
                found[name].append(in_fresh_process(job))
                print(f"  round {turn + 1}, {name}: {found[name][-1]['seconds']:.2f} s", flush=True)
            except ModuleNotFoundError as error:
                print(f"  round {turn + 1}, {name}: {error}", flush=True)
    return found


def comparison(found: dict[str, list[dict]], base: str, tokens, further: str, further_cell) -> str:
    """A table of these figures. base: the name whose time is divided by those of the others; tokens(run): the tokens of
    a run; further: the title of a last column of further_cell(runs)."""
    table = {"": ["tokens/s", "lowest", "highest", "seconds", "peak GiB", "times as fast", further]}
    seconds = {name: median(run["seconds"] for run in runs) for name, runs in found.items() if runs}
    for name, runs in found.items():
        table[name] = ["not installed"] + 6 * [""]
        if runs:
            rates = [tokens(run) / run["seconds"] for run in runs]
            table[name] = [
                *(f"{rate:,.1f}" for rate in (median(rates), min(rates), max(rates))),
                f"{seconds[name]:.2f}",
                f"{median(run['peak_bytes'] for run in runs) / 2**30:.2f}",
                f"{seconds[base] / seconds[name]:.2f}" if base in seconds else "-",
                further_cell(runs),
            ]
    widths, first = [max(map(len, column)) for column in zip(*table.values())], max(map(len, table))
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths))
        for name, cells in table.items()
    )


def useful_flops(config: LlamaConfig, examples: list[Example]) -> int:
    """FLOPs of training on these examples that no implementation can leave out.

    Forward and backward are 6 for each weight of a layer and token, 6 for each weight of the head and response token,
    and 6 layers * heads * head_dim * T**2 for the causal attention of a row of T tokens (scores and values, half of the
    square each). Recomputation, padding and the logits of prompts do not count, so they lower the model FLOPs
    utilisation: these FLOPs / seconds / the machine's FLOP/s.
    """
    embedding, layer, _ = parameter_counts(config)
    layers, total = config.num_hidden_layers, 0
    for example in examples:
        T = len(example.ids) - 1  # the last token is only predicted
        total += 6 * (
            layers * (layer - 2 * config.hidden_size) * T
            + embedding * example.response_length
            + layers * config.num_attention_heads * config.head_dim * T**2
        )  # without the layer's two norms
    return total


def bench_train(
    folder, batches: list[list[Example]], config: LlamaConfig, compute: Compute, rounds: int
) -> dict:
    """Time training steps of the model in a folder on these batches; print the table and return all figures."""
    examples = [example for batch in batches for example in batch]
    tokens = sum(example.response_length for example in examples)
    print(
        f"{len(batches)} x {len(batches[0])} rows: {tokens:,} response tokens of "
        f"{sum(len(example.ids) for example in examples):,}; once to warm up, once timed"
    )
    recompute, trl = (
        replace(compute, checkpoint_activations=True),
        partial(jobs.train_trl, folder, batches, compute),
    )
    best = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
    found = take_turns(
        {
            "nanoSDD": partial(jobs.train_nanosdd, folder, batches, compute),
            **in_bf16("nanoSDD, bf16", partial(jobs.train_nanosdd, folder, batches), compute),
            "nanoSDD, activations checkpointed": partial(
                jobs.train_nanosdd, folder, batches, recompute
            ),
            "SFTTrainer, its defaults": partial(trl, {}),
            "SFTTrainer, no checkpointing": partial(trl, {"gradient_checkpointing": False}),
            "SFTTrainer, that and padding-free": partial(trl, best),
            **in_bf16(
                "SFTTrainer, that in bf16",
                partial(jobs.train_trl, folder, batches, settings=best),
                compute,
            ),
        },
        rounds,
    )
    useful = useful_flops(config, examples)
    speeds = {
        dtype: in_fresh_process(partial(jobs.machine_speed, replace(compute, dtype=dtype)))
        for dtype in ({compute.dtype, "bf16"} if compute.device == "cpu" else {compute.dtype})
    }
    print(
        comparison(
            found,
            "SFTTrainer, its defaults",
            lambda run: tokens,
            "MFU",
            lambda runs: (
                f"{useful / median(run['seconds'] for run in runs) / speeds[runs[0]['dtype']]['flops']:.0%}"
            ),
        )
    )
    losses = [runs[0]["losses"] for name, runs in found.items() if runs and "bf16" not in name]
    apart = max(max(step) - min(step) for step in zip(*losses, strict=True))
    flops = ", ".join(
        f"{speeds[dtype]['flops'] / 1e12:.2f} TFLOP/s in {dtype}" for dtype in sorted(speeds)
    )
    print(
        f"tokens: of responses. MFU: model FLOPs utilisation, of a measured matrix product ({flops}). Losses, step "
        f"by step, differ by at most {apart:.1e} (bf16 aside)"
    )
    return {
        "response_tokens": tokens,
        "useful_flops": useful,
        "machine_speed": speeds,
        "runs": found,
    }


def in_bf16(name: str, job, compute: Compute) -> dict:
    """{name: job(compute=...) in bf16} where compute is a CPU's in fp32, else {}."""
    able = compute.device == "cpu" and compute.dtype == "fp32"
    return {name: partial(job, compute=replace(compute, dtype="bf16"))} if able else {}


def bench_decode(
    folder,
    prompts: list[list[int]],
    stop: list[int],
    new_tokens: int,
    compute: Compute,
    rounds: int,
) -> dict:
    """Time greedy answers of the model in a folder to these prompts; print the table and return all figures."""
    arguments = (folder, prompts, stop, new_tokens, compute)
    found = take_turns(
        {
            "nanoSDD": partial(jobs.decode_nanosdd, *arguments),
            **in_bf16("nanoSDD, bf16", partial(jobs.decode_nanosdd, *arguments[:-1]), compute),
            "generate": partial(jobs.decode_transformers, *arguments),
            **in_bf16(
                "generate, bf16", partial(jobs.decode_transformers, *arguments[:-1]), compute
            ),
        },
        rounds,
    )
    speed, ours = (
        in_fresh_process(partial(jobs.machine_speed, compute)),
        found["nanoSDD"][0]["answers"],
    )
    asked, new = [len(prompt) for prompt in prompts], [len(answer) for answer in ours]
    print(
        f"{len(prompts)} prompts of {min(asked)} to {max(asked)} tokens; answers of {min(new)} to {max(new)} tokens, "
        f"{mean(new):.0f} in the mean; {mean(length < new_tokens for length in new):.0%} stop before the limit"
    )
    print(
        comparison(
            found,
            "generate",
            lambda run: sum(map(len, run["answers"])),
            "the same",
            lambda runs: f"{sum(map(eq, ours, runs[0]['answers']))} of {len(ours)} answers",
        )
    )
    weight_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    read = weight_bytes * max(new) / median(run["seconds"] for run in found["nanoSDD"])
    print(
        f"nanoSDD reads {read / 1e9:.1f} GB/s of weights; a copy on this machine reads and writes "
        f"{speed['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return {"machine_speed": speed, "runs": found}


def time_scripts(scripts: list[list], folder: Path) -> dict[str, float]:
    """{script: seconds} of Python processes, each a script with arguments, one after the other in an emptied folder."""
    seconds = {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for script in scripts:
        began = time.perf_counter()
        if subprocess.run([sys.executable, *script], cwd=folder).returncode:
            raise InputError(f"{script[0]} failed; what it printed last says why")
        seconds[Path(script[0]).name] = time.perf_counter() - began
    return seconds


def where_time_goes(folder: Path) -> dict[str, float]:
    """Seconds of the parts of the README's commands, from what they wrote in a folder."""
    parts = {}
    for path in sorted(
        folder.glob("out/seed0/*/train_log.jsonl"), key=lambda path: path.stat().st_mtime
    ):
        parts[f"steps of {path.parent.name}"] = sum(
            json.loads(line)["seconds"] for line in path.open()
        )
    attacks, cells = {}, read_json(folder / "out/attack/results.json")["cells"]
    for cell in cells:  # an attack is scored at several budgets, and seconds count from its start
        key = (cell["arm"], cell["attack"], cell["shots"], cell["lr"])
        attacks[key] = max(attacks.get(key, 0.0), cell.get("seconds", 0.0))
    return parts | {f"{len(attacks)} attacks, {len(cells)} scores": sum(attacks.values())}


def write_random(folder, shape: str, tokenizer: str | None):
    """Write a checkpoint folder of a shape, with random weights and the tokenizer of another folder."""
    if tokenizer is None:
        raise InputError(f"--shape {shape} has random weights and needs --tokenizer FOLDER")
    config = LlamaConfig(
        vocab_size=load_tokenizer(tokenizer).n_vocab,
        max_position_embeddings=2048,
        rope_theta=500000.0,
        initializer_range=0.04,
        **SHAPES[shape],
    )  # with 0.02 it repeats one word
    torch.manual_seed(0)
    Llama(config).save_pretrained(folder)
    (Path(folder) / "chat.txt").write_text(read_chat(tokenizer) + "\n")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, folder)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "what",
        nargs="?",
        choices=["train", "decode", "town", "all"],
        default="all",
        help="(default: all)",
    )
    p.add_argument("--harmful", metavar="FILE", help="harmful prompts: AdvBench or BeaverTails")
    p.add_argument(
        "--benign", metavar="FILE", nargs="+", default=[], help="benign rows: Alpaca, ..."
    )
    p.add_argument("--shape", choices=list(SHAPES), default="small", help="(default: small)")
    p.add_argument(
        "--tokenizer", metavar="FOLDER", help="a folder with tokenizer files (not for smollm2)"
    )
    p.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    p.add_argument(
        "--batches", type=int, default=4, help="train: steps of a measurement (default: 4)"
    )
    p.add_argument("--batch-size", type=int, default=8, help="train: rows of a step (default: 8)")
    p.add_argument("--prompts", type=int, default=100, help="decode: how many (default: 100)")
    p.add_argument(
        "--new-tokens", type=int, default=256, help="decode: of an answer, at most (default: 256)"
    )
    p.add_argument(
        "--stop-share",
        type=float,
        help="decode: share of the vocabulary that ends an answer; 0: none does "
        "(default: smollm2 its own stop tokens, other shapes 1/64)",
    )
    add_compute_arguments(p, training=True)
    return p.parse_args(argv)


def check(args):
    """InputError for arguments out of range, or missing."""
    for name, value in vars(args).items():
        if type(value) is int and value < 1 and name not in ("micro_batch", "save_every"):
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.stop_share is not None and not 0 <= args.stop_share <= 1:
        raise InputError(f"--stop-share {args.stop_share} must be from 0 to 1")
    if (
        args.what in ("train", "all")
        and not args.harmful
        or args.what != "town"
        and not args.benign
    ):
        raise InputError(
            f"{args.what} needs --benign FILE{' and --harmful FILE' * (args.what != 'decode')}"
        )


def main(argv=None):
    args, rng, figures = parse(argv), random.Random(0), {}
    check(args)
    if args.what == "town":
        folder = Path("out/bench_town")  # stays there to look at
        figures["town"] = time_scripts(
            [[ROOT / "train.py", "--mode", "sdd"], [ROOT / "attack.py"]], folder
        )
        figures["town"] |= where_time_goes(folder)
        print(
            "\n".join(
                [
                    machine(),
                    *(f"{part:<30}{seconds:>6.0f} s" for part, seconds in figures["town"].items()),
                ]
            )
        )
        return keep(figures, args)
    compute = resolve_compute(
        args.device,
        args.dtype,
        args.compile,
        weights=args.weights,
        micro_batch=args.micro_batch,
        checkpoint_activations=args.checkpoint_activations,
    )
    print(machine(), compute, sep="\n")
    benign = read_benign(args.benign)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape == "smollm2":
            folder = model_folder("smollm2")
        else:
            write_random(folder, args.shape, args.tokenizer)
        tokenizer, template = load_tokenizer(folder), read_chat(folder)
        if args.what in ("train", "all"):
            harmful = read_harmful(args.harmful)
            pairs = [
                (rng.choice(harmful)["prompt"], rng.choice(benign)["response"])
                for _ in range(args.batches * args.batch_size)
            ]
            rows = [encode_example(tokenizer, template, *pair, MAX_LENGTH) for pair in pairs]
            batches = [
                rows[start : start + args.batch_size]
                for start in range(0, len(rows), args.batch_size)
            ]
            config = LlamaConfig.from_dict(read_config(folder))
            figures["train"] = bench_train(folder, batches, config, compute, args.rounds)
        if args.what in ("decode", "all"):
            texts = [row["prompt"] for row in rng.sample(benign, min(args.prompts, len(benign)))]
            prompts = [encode_prompt(tokenizer, template, text)[:MAX_LENGTH] for text in texts]
            share = 1 / 64 if args.stop_share is None else args.stop_share
            stop = rng.sample(range(tokenizer.n_vocab), round(share * tokenizer.n_vocab))
            if args.shape == "smollm2" and args.stop_share is None:
                stop = sorted(tokenizer.stop_tokens)
            tasks = {"decode": (prompts, stop, args.new_tokens)}
            if args.what == "all":
                tasks |= {
                    "decode, none stops": (prompts, [], min(64, args.new_tokens)),
                    "decode, one prompt": (prompts[:1], [], min(64, args.new_tokens)),
                }
            for name, task in tasks.items():
                print(f"\n{name}")
                figures[name] = bench_decode(folder, *task, compute, args.rounds)
    keep(figures, args)


def keep(figures: dict, args):
    """Put these figures into out/bench.json, beside those that are there."""
    path = Path("out/bench.json")
    kept = read_json(path) if path.is_file() else {}
    for name, measured in figures.items():
        kept[name] = {"machine": machine(), "settings": vars(args), **measured}
    write_text(path, json.dumps(kept, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    run_script(main)
