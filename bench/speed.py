"""Measure speed and memory, beside what one would run instead.

    python -m bench.speed train --harmful harmful_behaviors.csv --benign alpaca.json --shape smollm2
    python -m bench.speed decode --benign alpaca.json --tokenizer FOLDER

train   a training step on harmful prompts with random responses, beside trl's SFTTrainer
decode  greedy answers to 100 prompts of unequal lengths, beside transformers' generate; the same
        where none stops; one prompt alone

The model is SmolLM2, or has random weights of a --shape and the tokenizer of --tokenizer. All take
turns on the same weights and token ids, in one --dtype, each time in a fresh process; loading and a
warm-up are not timed. Lines show the medians of the rounds so far, so the last are the result:

    tokens/s  of responses                GiB   the most memory of the process, or on its GPU
    loss      of the timed step           TFLOP/s   useful ones
    answers   a checksum, equal where all answers are
"""

import argparse
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
from data.worlds import named_in
from model import Llama, LlamaConfig
from nanosdd.checkpoint import read_config
from nanosdd.device import DTYPES, Compute, add_compute_arguments, machine, resolve_compute
from nanosdd.errors import run_script
from nanosdd.optimizer import make_optimizer
from train import train_step

SHAPES = {  # hidden size, of the MLP, layers, heads, key-value heads
    "small": (576, 1536, 6, 9, 3),  # about SmolLM2 with a fifth of its layers
    "1b": (2048, 8192, 16, 32, 8),  # Llama-3.2-1B
    "7b": (4096, 11008, 32, 32, 32),  # Llama-2-7b
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


def train_nanosdd(folder, examples: list[Example], compute: Compute) -> dict:
    """The figures of a step of train.py."""
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights])
    optimizer = make_optimizer(model, compute)
    step = partial(train_step, model, optimizer, examples, LR, compute)
    step()
    seconds, done = timed(compute.device, step)
    return step_figures(folder, examples, compute, seconds, done["loss"])


def train_trl(folder, examples, compute: Compute, **settings) -> dict:
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
    return step_figures(folder, examples, compute, ends[1] - ends[0], loss)


def step_figures(folder, examples, compute: Compute, seconds: float, loss: float) -> dict:
    """The figures of a step of training."""
    tokens = sum(example.response_length for example in examples)
    figures = figures_of(seconds, tokens, compute)
    flops = useful_flops(LlamaConfig.from_dict(read_config(folder)), examples)
    return figures | {"TFLOP/s": flops / seconds / 1e12, "loss": loss}


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
    task = (folder, examples, compute)
    best = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
    checkpointed = replace(compute, checkpoint_activations=True)
    contestants = {
        "nanoSDD": partial(train_nanosdd, *task),
        "nanoSDD, activations checkpointed": partial(train_nanosdd, *task[:2], checkpointed),
        "SFTTrainer, its defaults": partial(train_trl, *task),
        "SFTTrainer, the fastest way": partial(train_trl, *task, **best),
    }
    return race(contestants, rounds)


def bench_decode(folder, prompts, stop, limit: int, compute: Compute, rounds: int) -> dict:
    """The figures of all that answer these prompts."""
    contestants = {}
    for name, task in {
        "own stops": (prompts, stop, limit, compute),
        "none stops": (prompts, [], limit // 4, compute),
        "one prompt": (prompts[:1], [], limit // 4, compute),
    }.items():
        contestants[f"nanoSDD, {name}"] = partial(decode_nanosdd, folder, *task)
        contestants[f"generate, {name}"] = partial(decode_transformers, folder, *task)
    return race(contestants, rounds)


# ---- the command ----


def write_random(folder, shape: str, tokenizer_folder):
    """Write a model with random weights and the tokenizer of another folder."""
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(tokenizer.n_vocab, *SHAPES[shape], initializer_range=0.04)
    config.tie_word_embeddings = shape != "7b"
    chat = Chat(Llama(config), tokenizer, read_chat(tokenizer_folder), Compute())
    save_chat(Path(folder), chat, chat.model.state_dict())


def rows_of(args) -> list[dict]:
    """The rows of a step, harmful prompts with random responses; for decode, 100 benign ones."""
    rng = random.Random(0)
    benign = read_rows(args.benign)
    if args.what == "decode":
        return rng.choices(benign, k=100)
    harmful = rng.choices(read_rows(args.harmful), k=args.batch_size)
    answers = rng.choices(benign, k=args.batch_size)
    return [row | {"response": answer["response"]} for row, answer in zip(harmful, answers)]


def bench(args, folder) -> dict:
    """The figures of train or decode, of the model in a folder."""
    compute = resolve_compute(**named_in(args, Compute))
    tokenizer = load_tokenizer(folder)
    template = read_chat(folder)
    rows = rows_of(args)
    if args.what == "train":
        examples = encode_rows(tokenizer, template, rows, MAX_LENGTH)
        return bench_train(folder, examples, compute, args.rounds)
    prompts = [encode_prompt(tokenizer, template, row["prompt"])[:MAX_LENGTH] for row in rows]
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


def main(argv=None) -> dict:
    args = parse(argv)
    print(machine())
    if args.shape == "smollm2":
        return bench(args, model_folder("smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, args.shape, args.tokenizer)
        return bench(args, folder)


if __name__ == "__main__":
    run_script(main)
