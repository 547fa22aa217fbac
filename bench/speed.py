"""Measure speed and memory, beside what one would run instead.

    python -m bench.speed train --harmful harmful_behaviors.csv --benign alpaca.json --shape smollm2
    python -m bench.speed decode --benign alpaca.json --tokenizer FOLDER

train   a training step on harmful prompts with random responses, beside trl's SFTTrainer
decode  greedy answers to 100 prompts of unequal lengths, beside transformers' generate; the same
        where none stops; one prompt alone

The model is SmolLM2, or has random weights of a --shape and the tokenizer of --tokenizer. All take
turns on the same weights and token ids, each time in a fresh process; loading and a warm-up are not
timed. Lines show the medians of the rounds so far, so the last round's are the result:

    tokens/s  of responses        GiB     the most memory of the process, or allocated on its GPU
    loss      of the timed step   MFU     useful FLOP/s, as a share of those of a matrix product
    attention, loss share, AdamW          shares of another step's CPU time
    answers   a checksum, equal where all answers are

The figures of every round go to out/bench.json.
"""

import argparse
import json
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence

from data.chat import Example, encode_prompt, encode_rows, read_chat
from data.chat_model import Chat, continue_all, load_chat, model_folder, save_chat
from data.sources import read_rows
from data.tokenizer import load_tokenizer
from data.worlds import MAX_PAIRS, named_in
from model import Llama, LlamaConfig
from nanosdd.checkpoint import read_config, read_object
from nanosdd.device import DTYPES, Compute, add_compute_arguments, machine, resolve_compute
from nanosdd.errors import InputError, run_script
from nanosdd.optimizer import make_optimizer
from nanosdd.runs import check_folder, write_text
from train import train_step

SHAPES = {
    "small": {  # about SmolLM2 with a fifth of its layers
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "360m": {  # SmolLM2-360M
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "1.7b": {  # SmolLM2-1.7B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7b": {},  # Llama-2-7b, LlamaConfig's defaults
}
PARTS = {  # of a step, by the beginning of the profiler's names
    "attention": "aten::_scaled_dot_product",
    "loss share": "LinearCrossEntropy",
    "AdamW": "Optimizer.step",
}
MAX_LENGTH = 512  # longer rows and prompts are cut
LR = 2e-5  # SFTConfig's default


def now(device: str) -> float:
    """The clock in seconds, once the device has done all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: str, work, *arguments) -> tuple:
    """(seconds, what work(*arguments) returns)."""
    began = now(device)
    result = work(*arguments)
    return now(device) - began, result


def figures_of(seconds: float, tokens: int, compute: Compute) -> dict:
    """What every job returns. GiB: the most memory so far, on the GPU or resident here."""
    if compute.device.startswith("cuda"):
        kib = torch.cuda.max_memory_allocated(compute.device) / 1024
    else:  # not ru_maxrss, which Linux passes on from the parent process
        status = Path("/proc/self/status").read_text()
        kib = int(status.split("VmHWM:")[1].split()[0])
    return {"seconds": seconds, "tokens/s": tokens / seconds, "GiB": kib / 2**20}


# ---- a training step: the second of two ----


def train_nanosdd(folder, examples: list[Example], ideal: dict, compute: Compute) -> dict:
    """The figures of a step of train.py. ideal: the seconds for an MFU of 1, by dtype."""
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights])
    optimizer = make_optimizer(model, compute)
    step = partial(train_step, model, optimizer, examples, LR, compute)
    step()
    seconds, done = timed(compute.device, step)
    figures = step_figures(examples, ideal, compute, seconds, done["loss"])
    return figures | shares_of(step) if compute.device == "cpu" else figures


def shares_of(step) -> dict:
    """What each of PARTS takes of the CPU time of a step, from 0 to 1."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    shares = {}
    for name, beginning in PARTS.items():
        parts = [event for event in events if event.key.startswith(beginning)]
        shares[name] = sum(event.cpu_time_total for event in parts) / whole
    return shares


def train_trl(folder, examples, ideal: dict, compute: Compute, **settings) -> dict:
    """The same of trl's SFTTrainer. settings: of its SFTConfig, over the defaults."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(compute.device))

    rows = []
    for example in examples + examples:
        mask = [0] * example.prompt_length + [1] * example.response_length
        rows.append({"input_ids": example.ids, "completion_mask": mask})
    trainer = SFTTrainer(
        folder,
        SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(examples),
            max_steps=2,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            use_cpu=compute.device == "cpu",
            bf16=compute.dtype == "bf16",
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(  # all is encoded already
            tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="<pad>"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    loss = float(trainer.state.log_history[1]["loss"])
    return step_figures(examples, ideal, compute, ends[1] - ends[0], loss)


def step_figures(examples, ideal: dict, compute: Compute, seconds: float, loss: float) -> dict:
    tokens = sum(example.response_length for example in examples)
    figures = figures_of(seconds, tokens, compute)
    return figures | {"MFU": ideal[compute.dtype] / seconds, "loss": loss}


def useful_flops(config: LlamaConfig, examples: list[Example]) -> int:
    """FLOPs of a training step that no implementation can leave out.

    Forward and backward are 6 for each weight of a layer and token, 6 for each weight of the head
    and response token, and 6 * layers * heads * head_dim * T**2 for the causal attention of a row
    of T tokens (scores and values, half of the square each). Recomputation, padding and the logits
    of prompts do not count.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    columns = 2 * queries + 2 * keys + 3 * config.intermediate_size
    flops = 0
    for example in examples:
        T = len(example.ids) - 1  # the last token is only predicted
        layer = config.hidden_size * columns * T + queries * T**2
        head = config.hidden_size * config.vocab_size * example.response_length
        flops += 6 * (config.num_hidden_layers * layer + head)
    return flops


def matrix_product(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices, the median of five after one to warm up."""
    size = 2048 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = [timed(device, torch.mm, matrix, matrix)[0] for _ in range(6)]
    return 2 * size**3 / median(seconds[1:])


# ---- greedy answers: of at most `limit` tokens, after four to warm up ----


def decode_nanosdd(folder, prompts, stop, limit: int, compute: Compute) -> dict:
    """The figures of answers as eval.py gets them. stop: the tokens that end an answer."""
    chat = load_chat(folder, compute)
    chat.tokenizer.stop_tokens = stop

    def answer(limit):
        return [found.ids for found in continue_all(chat, prompts, limit)]

    return answer_figures(answer, stop, limit, compute)


def decode_transformers(folder, prompts, stop, limit: int, compute: Compute) -> dict:
    """The same of transformers' generate, on one batch."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[compute.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(compute.device)
    rows = [torch.tensor(prompt, device=compute.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")

    def answer(limit):
        found = model.generate(
            ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=0,
            eos_token_id=list(stop) or None,
        )
        return found[:, ids.shape[1] :].tolist()

    return answer_figures(answer, stop, limit, compute)


def answer_figures(answer, stop, limit: int, compute: Compute) -> dict:
    """The figures of `answer`, a function (limit) -> new ids of each prompt, maybe padded."""
    answer(4)
    seconds, found = timed(compute.device, answer, limit)
    answers = [tuple(takewhile(lambda token: token not in stop, row)) for row in found]
    figures = figures_of(seconds, sum(map(len, answers)), compute)
    return figures | {"answers": hash(tuple(answers)) % 100000}


# ---- what is measured ----


def race(contestants: dict, rounds: int) -> dict[str, list[dict]]:
    """{name: figures of each round} of these jobs; prints medians. [] for a missing package."""
    found = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, job in contestants.items():
            runs = found[name]
            fresh = ProcessPoolExecutor(1, get_context("spawn"))
            with suppress(ModuleNotFoundError), fresh:
                runs.append(fresh.submit(job).result())
            cells = [] if runs else ["not installed"]
            for key in runs[0] if runs else []:
                cells.append(f"{key} {median(run[key] for run in runs):<7.5g}")
            print(f"{name:<34}", *cells, sep="  ", flush=True)
    return found


def bench_train(folder, examples: list[Example], compute: Compute, rounds: int) -> dict:
    """The figures of all that train on these examples, from the model in a folder."""
    flops = useful_flops(LlamaConfig.from_dict(read_config(folder)), examples)
    ideal = {}
    for name, dtype in DTYPES.items():
        speed = matrix_product(compute.device, dtype)
        print(f"a matrix product in {name}: {speed / 1e12:.2f} TFLOP/s")
        ideal[name] = flops / speed
    ours = partial(train_nanosdd, folder, examples, ideal)
    trl = partial(train_trl, folder, examples, ideal)
    whole = partial(trl, gradient_checkpointing=False)
    best = partial(whole, padding_free=True, max_length=None)
    bf16 = replace(compute, dtype="bf16")
    contestants = {
        "nanoSDD": partial(ours, compute),
        "nanoSDD, bf16": partial(ours, bf16),
        "nanoSDD, activations checkpointed": partial(
            ours, replace(compute, checkpoint_activations=True)
        ),
        "SFTTrainer, its defaults": partial(trl, compute),
        "SFTTrainer, no checkpointing": partial(whole, compute),
        "SFTTrainer, that and padding-free": partial(best, compute),
        "SFTTrainer, that in bf16": partial(best, bf16),
    }
    return race(contestants, rounds)


def bench_decode(folder, prompts, stop, limit: int, compute: Compute, rounds: int) -> dict:
    """The figures of all that answer these prompts, by task."""
    tasks = {
        "own stops": (prompts, stop, limit),
        "none stops": (prompts, [], limit // 4),
        "one prompt": (prompts[:1], [], limit // 4),
    }
    figures = {}
    for name, task in tasks.items():
        print(name)
        ours = partial(decode_nanosdd, folder, *task)
        theirs = partial(decode_transformers, folder, *task)
        contestants = {}
        for dtype in DTYPES:
            at = replace(compute, dtype=dtype)
            contestants[f"nanoSDD, {dtype}"] = partial(ours, at)
            contestants[f"generate, {dtype}"] = partial(theirs, at)
        figures[name] = race(contestants, rounds)
    return figures


# ---- the command ----


def write_random(folder, shape: str, tokenizer_folder):
    """Write a model with random weights and the tokenizer of another folder."""
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(tokenizer.n_vocab, initializer_range=0.04, **SHAPES[shape])
    chat = Chat(Llama(config), tokenizer, read_chat(tokenizer_folder), Compute())
    save_chat(Path(folder), chat, chat.model.state_dict())


def bench_model(folder, args) -> dict:
    """The figures of train or decode, of the model in a folder."""
    compute = resolve_compute(**named_in(args, Compute))
    tokenizer = load_tokenizer(folder)
    template = read_chat(folder)
    rng = random.Random(0)
    rows = read_rows(args.benign)
    if args.what == "train":
        asked = rng.choices(read_rows(args.harmful), k=args.batch_size)
        answers = rng.choices(rows, k=args.batch_size)
        rows = [row | {"response": answer["response"]} for row, answer in zip(asked, answers)]
        examples = encode_rows(tokenizer, template, rows, MAX_LENGTH)
        return bench_train(folder, examples, compute, args.rounds)
    asked = rng.choices(rows, k=100)
    prompts = [encode_prompt(tokenizer, template, row["prompt"])[:MAX_LENGTH] for row in asked]
    stop = tokenizer.stop_tokens
    if args.shape != "smollm2":  # random weights hardly ever stop: one token in 64 ends an answer
        stop = range(tokenizer.n_vocab // 64)
    return bench_decode(folder, prompts, stop, 256, compute, args.rounds)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["train", "decode"])
    p.add_argument("--harmful", default="harmful_behaviors.csv", help="train: prompts, AdvBench")
    p.add_argument("--benign", default="alpaca.json", help="prompts and responses, Alpaca")
    p.add_argument("--shape", choices=["smollm2", *SHAPES], default="small")
    p.add_argument("--tokenizer", default="llama3", help="its folder (not for smollm2)")
    p.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    p.add_argument("--batch-size", type=int, default=8, help="rows of a step (default: 8)")
    add_compute_arguments(p, training=True)
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.rounds < 1 or not 1 <= args.batch_size <= MAX_PAIRS:
        raise InputError(f"--rounds and --batch-size must be 1 or more, at most {MAX_PAIRS} rows")
    path = Path("out/bench.json")
    check_folder(path.parent)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if args.shape == "smollm2":
            folder = model_folder("smollm2")
        else:
            write_random(folder, args.shape, args.tokenizer)
        figures = bench_model(folder, args)
    kept = read_object(path)
    kept[args.what] = {"machine": machine(), "settings": vars(args), **figures}
    write_text(path, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
