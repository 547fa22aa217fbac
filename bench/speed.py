"""Measure speed and memory, beside what one would run instead.

    python bench.py train --harmful harmful_behaviors.csv --benign alpaca.json --tokenizer FOLDER
    python bench.py decode --benign alpaca.json --tokenizer FOLDER
    python bench.py town
    python bench.py pairs --harmful harmful_behaviors.csv --benign alpaca.json

train: steps on harmful prompts with random benign answers, beside trl's SFTTrainer on the same weights and batches.
decode: greedy answers to 100 benign prompts of unequal lengths, beside transformers' generate; then one prompt alone,
beside the speed at which this machine copies memory. Both on random weights, of --shape; peers that are not installed
are said to be so. town: line 1 of the README, whole processes. pairs: data.pairs, see bench_pairs.py.

Whoever is compared takes turns, a fresh process each time; model loading and a warm-up are not timed. Prints a table of
medians (lowest to highest) and writes it to out/bench.json. Compare figures of one run only.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench.pairs import bench_pairs
from nanosdd.checkpoint import read_json
from data.chat import encode_example, encode_prompt
from data.harmful import read_harmful
from data.pairs import MOST, add_similarity_arguments, read_benign
from data.tokenizer import load_tokenizer
from nanosdd.device import add_device_arguments, machine, resolve_device
from nanosdd.errors import InputError, run_script
from model import Llama, LlamaConfig
from nanosdd.runs import write_text

ROOT = Path(__file__).parent.parent
SHAPES = {  # small: about SmolLM2 with a fifth of its layers and the vocabulary of Llama 3
    "small": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
                  num_key_value_heads=3, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, tie_word_embeddings=True),  # Llama-3.2-1B
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)}  # Llama-2-7b
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # bf16 without sparsity, as the data sheets say


# ---- what is run ----

def measure(job: dict, args) -> dict:
    """The figures of one job of bench_runs.py, run in a fresh process; InputError with its last line when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job | {"scratch": folder, "device": args.device, "dtype": args.dtype,
                                          "compile": args.compile}))
        done = subprocess.run([sys.executable, "-m", "bench.jobs", path], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise InputError(f"{job['run']}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
        return json.loads(path.with_suffix(".out").read_text())


def take_turns(jobs: dict[str, dict], args) -> dict[str, list[dict]]:
    """The figures of every job, args.rounds of them, one after the other in each round; none for those that need a
    package which is not installed."""
    found = {}
    for turn in range(args.rounds):
        for name, job in jobs.items():
            if any(importlib.util.find_spec(package) is None for package in job["needs"]):
                found[name] = []
                continue
            found.setdefault(name, []).append(measure(job, args))
            print(f"  round {turn + 1}, {name}: {found[name][-1]['seconds']:.2f} s", flush=True)
    return found


def spread(values: list[float], form: str) -> str:
    """Median and, in brackets, lowest and highest."""
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def table(columns: list[str], rows: list[tuple[str, list[str]]]):
    """Print rows of text under their columns."""
    widths = [max(map(len, cells)) for cells in zip(columns, *(cells for _, cells in rows))]
    first = max(len(name) for name, _ in rows)
    for name, cells in [("", columns), *rows]:
        print("  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths))]).rstrip())


def random_llama(args, tokenizer, folder) -> LlamaConfig:
    """Save a Llama of args.shape with random weights for this tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.n_vocab, max_position_embeddings=2048, rope_theta=500000.0,
                         initializer_range=0.04, **SHAPES[args.shape])  # with 0.02 it repeats one word for ever
    Llama(config).save_pretrained(folder)
    return config


# ---- train ----

def useful_flops(config: LlamaConfig, batches: list[list]) -> float:
    """FLOPs of one pass over these batches that no implementation can leave out: forward and backward are 6 for each
    weight of a layer and token, 6 for each weight of the head and response token, and 6 layers * heads * head_dim *
    T**2 for the causal attention of a row of T tokens (scores and values, half of the square each).

    Recomputing, padding and logits of prompts do not count, so who does those has a lower model FLOPs utilisation:
    these FLOPs / seconds / the machine's FLOP/s.
    """
    C, D = config.hidden_size, config.head_dim
    H, G, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    layer_weights = layers * (2 * C * H * D + 2 * C * G * D + 3 * C * config.intermediate_size)
    total = 0
    for example in (example for batch in batches for example in batch):
        T = len(example.ids) - 1  # the last token is only predicted
        total += 6 * (layer_weights * T + config.vocab_size * C * example.response_length) + 6 * layers * H * D * T**2
    return total


def bench_train(args) -> dict:
    """Steps of SDD's data at args.batch_size and at most args.max_length tokens."""
    tokenizer, rng = load_tokenizer(args.tokenizer), random.Random(0)
    prompts, benign = read_harmful(args.harmful), read_benign(args.benign)
    batches = [[encode_example(tokenizer, "llama3", rng.choice(prompts)["prompt"], rng.choice(benign)["response"],
                               args.max_length) for _ in range(args.batch_size)] for _ in range(args.batches)]
    tokens = sum(len(example.ids) for batch in batches for example in batch)
    responses = sum(example.response_length for batch in batches for example in batch)
    padded = sum(args.batch_size * max(len(example.ids) for example in batch) for batch in batches)
    print(f"{args.batches} x {args.batch_size} rows: {responses:,} response tokens of {tokens:,}, {padded:,} "
          "with padding; once to warm up, once timed")
    with tempfile.TemporaryDirectory() as folder:
        config = random_llama(args, tokenizer, folder)
        shared = dict(folder=folder, batches=[[asdict(example) for example in batch] for batch in batches],
                      pad=tokenizer.n_vocab - 1)
        ours = dict(shared, run="train_nanosdd", needs=[], checkpoint=False, weights=args.weights)
        peer = dict(shared, run="train_sft", needs=["trl", "transformers", "datasets"])
        plain = {"gradient_checkpointing": False}
        jobs = {"nanoSDD": ours, "nanoSDD, activations checkpointed": dict(ours, checkpoint=True),
                "SFTTrainer, its defaults": dict(peer, settings={}),
                "SFTTrainer, no checkpointing": dict(peer, settings=plain),
                "SFTTrainer, that and padding-free": dict(peer, settings=plain | {
                    "padding_free": True, "max_length": None})}
        found = take_turns(jobs, args)
        speed = measure(dict(run="machine_speed", size=8192 if args.device != "cpu" else 2048, bytes=2**29), args)
    peak, whose = speed["flops"], f"of {speed['flops'] / 1e12:.2f} TFLOP/s, a measured matrix product"
    if args.device != "cpu" and args.dtype == "bf16":
        peak, whose = next(((flops, f"of {flops / 1e12:.0f} TFLOP/s, the data sheet's") for name, flops in
                            PEAK_FLOPS.items() if name in machine()), (peak, whose))
    useful, base = useful_flops(config, batches), found["SFTTrainer, its defaults"]
    rows, losses = [], {}
    for name, runs in found.items():
        if not runs:
            rows.append((name, ["not installed"]))
            continue
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        losses[name] = runs[0]["losses"]
        rows.append((name, [
            spread([responses / s for s in seconds], ",.0f"), f"{tokens / middle:,.0f}",
            spread([s / args.batches for s in seconds], ".2f"),
            f"{statistics.median(run['peak_bytes'] for run in runs) / 2**30:.2f}", f"{useful / middle / peak:.0%}",
            f"{statistics.median(run['seconds'] for run in base) / middle:.2f}" if base else "-"]))
    table(["response tokens/s", "all tokens/s", "s a step", "peak GiB", "MFU", "times as fast"],
          [(name, cells + [""] * (6 - len(cells))) for name, cells in rows])
    first = losses["nanoSDD"]
    apart = max((abs(loss - first[step]) for other in losses.values() for step, loss in other.items() if step in first),
                default=0.0)
    print(f"MFU: model FLOPs utilisation, {whose}. Everybody's losses, step by step, differ by at most {apart:.1e}")
    return {"response_tokens": responses, "tokens": tokens, "useful_flops": useful, "machine_speed": speed,
            "runs": found}


# ---- decode ----

def same_answers(model, prompts, ours: list[list[int]], others: list[list[int]]) -> tuple[int, float]:
    """(how many answers are the same, the largest distance of the two logits where one first differs): a tie within
    rounding may go either way."""
    widest, same = 0.0, 0
    for prompt, a, b in zip(prompts, ours, others):
        if a == b:
            same += 1
            continue
        i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if i is None:
            widest = float("inf")  # one goes on where the other has stopped
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + a[:i]]))[0, -1]
        widest = max(widest, float((logits[a[i]] - logits[b[i]]).abs()))
    return same, widest


def bench_decode(args) -> dict:
    """Answers to args.prompts prompts that may stop at one of --stop-share of the vocabulary, and one prompt alone."""
    tokenizer, rng = load_tokenizer(args.tokenizer), random.Random(0)
    rows = read_benign(args.benign)
    texts = [row["prompt"] for row in rng.sample(rows, min(args.prompts, len(rows)))]
    prompts = [encode_prompt(tokenizer, "llama3", text)[:args.max_length] for text in texts]
    stop = rng.sample(range(tokenizer.n_vocab), round(args.stop_share * tokenizer.n_vocab))
    with tempfile.TemporaryDirectory() as folder:
        random_llama(args, tokenizer, folder)
        shared = dict(folder=folder, prompts=prompts, stop=stop, new_tokens=args.new_tokens, pad=tokenizer.n_vocab - 1)
        ours = dict(shared, run="decode_nanosdd", needs=[])
        peer = dict(shared, run="decode_generate", needs=["transformers"], sorted=False, batch=len(prompts))
        one = dict(prompts=prompts[:1], stop=[])
        several = {"nanoSDD": ours, "generate, one batch": peer,
                   "generate, sorted, batches of 25": dict(peer, batch=25, sorted=True)}
        found = take_turns(several, args)
        single = take_turns({"nanoSDD, one prompt": ours | one, "generate, one prompt": peer | one}, args)
        speed = measure(dict(run="machine_speed", size=2048, bytes=2**29), args)
        model = Llama.from_pretrained(folder).eval()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        answers = {name: runs[0]["answers"] for name, runs in (found | single).items() if runs}
        lengths = sorted(map(len, answers["nanoSDD"]))
        print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; answers of "
              f"{lengths[0]} to {lengths[-1]} tokens, {statistics.mean(lengths):.0f} in the mean")
        rows = []
        for name, runs in (found | single).items():
            if not runs:
                rows.append((name, ["not installed", "", "", "", ""]))
                continue
            alone = name in single
            base = (single["generate, one prompt"] if alone else found["generate, one batch"])
            reference = answers["nanoSDD, one prompt" if alone else "nanoSDD"]
            seconds, tokens = [run["seconds"] for run in runs], sum(map(len, answers[name]))
            middle = statistics.median(seconds)
            same, gap = same_answers(model, prompts, reference, answers[name])
            rows.append((name, [
                spread([tokens / s for s in seconds], ",.1f"), f"{middle:.2f}",
                f"{statistics.median(run['peak_bytes'] for run in runs) / 2**30:.2f}",
                f"{statistics.median(run['seconds'] for run in base) / middle:.2f}" if base else "-",
                f"{same} of {len(reference)}" + f", else ties within {gap:.0e}" * (same < len(reference))]))
    table(["new tokens/s", "seconds", "peak GiB", "times as fast", "the same answers"], rows)
    alone = statistics.median(run["seconds"] for run in single["nanoSDD, one prompt"])
    read = weights * len(answers["nanoSDD, one prompt"][0]) / alone
    print(f"one prompt: {read / 1e9:.1f} GB/s of weights are read; a copy on this machine reads and writes "
          f"{speed['bytes_per_second'] / 1e9:.1f} GB/s")
    return {"weight_bytes": weights, "machine_speed": speed, "runs": {
        name: [{key: run[key] for key in ("seconds", "peak_bytes")} for run in runs]
        for name, runs in (found | single).items()}}


# ---- the town ----

def bench_town(args) -> dict:
    """Line 1 of the README, its two commands in out/bench_town, which stays to look at."""
    found, folder = {"train.py --mode sdd": [], "attack.py": []}, Path("out/bench_town")
    for turn in range(args.rounds):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for command, seconds in found.items():
            script, *words = command.split()
            began = time.perf_counter()
            done = subprocess.run([sys.executable, ROOT / script, *words], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"{command}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
            seconds.append(time.perf_counter() - began)
            print(f"  round {turn + 1}, {command}: {seconds[-1]:.0f} s", flush=True)
    found["both"] = [sum(pair) for pair in zip(*found.values())]
    parts = {}
    for path in sorted(folder.glob("out/seed0/*/train_log.jsonl"), key=lambda path: path.stat().st_mtime):
        parts[f"  the steps of {path.parent.name}"] = sum(json.loads(line)["seconds"] for line in path.open())
    cells = json.loads((folder / "out/attack/results.json").read_text())["cells"]
    parts[f"  attacks and scores of {len(cells)} cells"] = sum(cell.get("seconds", 0) for cell in cells)
    table(["seconds"], [(command, [spread(seconds, ".0f")]) for command, seconds in found.items()]
          + [(part, [f"{seconds:.0f}"]) for part, seconds in parts.items()])
    return {"runs": found, "parts": parts}


# ---- the command ----

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "decode", "town", "pairs"])
    p.add_argument("--harmful", metavar="FILE", help="train, pairs: harmful prompts, AdvBench or BeaverTails")
    p.add_argument("--benign", metavar="FILE", nargs="+", default=[], help="train, decode, pairs: benign rows, Alpaca")
    p.add_argument("--tokenizer", metavar="FOLDER", help="train, decode: a folder with Llama 3's tokenizer.model")
    p.add_argument("--shape", choices=list(SHAPES), default="small",
                   help="train, decode: 6 layers x 576, Llama-3.2-1B or Llama-2-7b, random weights (default: small)")
    p.add_argument("--rounds", type=int, default=3, help="times that everybody is measured (default: 3)")
    p.add_argument("--batches", type=int, default=4, help="train: steps of a measurement (default: 4)")
    p.add_argument("--batch-size", type=int, default=8, help="train: rows of a step (default: 8)")
    p.add_argument("--weights", choices=["fp32", "bf16"], default="fp32",
                   help="train: how nanoSDD holds its weights, as in train.py (default: fp32)")
    p.add_argument("--max-length", type=int, default=512, help="train, decode: longer rows are cut (default: 512)")
    p.add_argument("--prompts", type=int, default=100, help="decode: how many (default: 100)")
    p.add_argument("--new-tokens", type=int, default=256, help="decode: of an answer, at most (default: 256)")
    p.add_argument("--stop-share", type=float, default=1 / 64,
                   help="decode: share of the vocabulary that ends an answer; 0: none does (default: 1/64)")
    p.add_argument("--pairs", type=int, default=MOST, help=f"pairs: how many to draw (default: {MOST})")
    p.add_argument("--responses", type=int, default=52000, help="pairs: size of the pool (default: 52000)")
    add_similarity_arguments(p)
    add_device_arguments(p)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    resolve_device(args)
    needed = {"train": ("harmful", "benign", "tokenizer"), "decode": ("benign", "tokenizer"),
              "pairs": ("harmful", "benign"), "town": ()}[args.what]
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        raise InputError(f"bench.py {args.what} needs {' and '.join(missing)}; see --help")
    for name in ("rounds", "batches", "batch_size", "prompts", "new_tokens", "pairs", "responses"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more")
    if not 0 <= args.stop_share <= 1:
        raise InputError(f"--stop-share {args.stop_share} must be from 0 to 1")
    print(f"{machine()}, {args.dtype}{', compiled' * args.compile}")
    figures = {"train": bench_train, "decode": bench_decode, "town": bench_town, "pairs": bench_pairs}[args.what](args)
    path = Path("out/bench.json")
    kept = read_json(path) if path.is_file() else {}
    write_text(path, json.dumps(kept | {args.what: {"machine": machine(), "args": vars(args), **figures}}, indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run_script(main)
