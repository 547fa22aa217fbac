"""What bench/speed.py times: training steps and greedy answers, of nanoSDD and of what one would run instead.

All functions get the same weights, from one checkpoint folder, and the same token ids; each runs in a process of its
own. They return figures by name, among them seconds (without loading and warm-up) and peak_bytes.
"""

import contextlib
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch

from data.chat import Example
from model import Llama
from nanosdd.device import DTYPES, Compute
from nanosdd.optimizer import make_optimizer
from train import train_step

LR = 1e-5  # constant, so that losses can be compared step by step


def peak_bytes(device: str) -> int:
    """The most memory so far: allocated on the GPU, or resident in this process. (Linux passes ru_maxrss on from the
    process that started this one, so it is of no use.)"""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def now(device: str) -> float:
    """The clock in seconds, once the device has done all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- training steps: the batches once to warm up, and once more timed; losses: of every step ----


def train_nanosdd(folder, batches: list[list[Example]], compute: Compute) -> dict:
    """The steps of train.py."""
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights])
    optimizer, losses, ends = make_optimizer(model, compute), [], []
    for batch in batches + batches:
        losses.append(train_step(model, optimizer, batch, LR, compute)["loss"])
        ends.append(now(compute.device))
    return {
        "seconds": ends[-1] - ends[len(batches) - 1],
        "losses": losses,
        "peak_bytes": peak_bytes(compute.device),
        "dtype": compute.dtype,
    }


def train_trl(folder, batches: list[list[Example]], compute: Compute, settings: dict) -> dict:
    """The same steps of trl's SFTTrainer. settings: of its SFTConfig, over the defaults."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(compute.device))

    ends, examples = [], [example for batch in batches + batches for example in batch]
    data = Dataset.from_list(
        [
            {
                "input_ids": example.ids,
                "completion_mask": ([0] * example.prompt_length + [1] * example.response_length),
            }
            for example in examples
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = Tokenizer(
        models.WordLevel({"<pad>": 0}, unk_token="<pad>")
    )  # everything is encoded already
    padding = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>"
    )
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=len(batches[0]),
        max_steps=2 * len(batches),
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="constant",
        completion_only_loss=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=compute.device == "cpu",
        bf16=compute.dtype == "bf16",
        disable_tqdm=True,
        **settings,
    )
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, processing_class=padding, callbacks=[Clock()]
    )
    with contextlib.redirect_stdout(sys.stderr):  # it prints its log
        trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return {
        "seconds": ends[-1] - ends[len(batches) - 1],
        "losses": losses,
        "peak_bytes": peak_bytes(compute.device),
        "dtype": compute.dtype,
    }


# ---- greedy answers: a few tokens to warm up, then all; answers: the new token ids of every prompt ----


def decode_nanosdd(
    folder, prompts: list[list[int]], stop: list[int], new_tokens: int, compute: Compute
) -> dict:
    """model.generate, as eval.py calls it."""
    model, stop = Llama.from_pretrained(folder, compute.device).eval(), set(stop)
    return time_answers(
        lambda limit: model.generate(prompts, limit, stop, compute.compile), new_tokens, compute
    )


@torch.inference_mode()
def decode_transformers(
    folder, prompts: list[list[int]], stop: list[int], new_tokens: int, compute: Compute
) -> dict:
    """transformers' generate on one batch, padded on the left."""
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[compute.dtype])
        .to(compute.device)
        .eval()
    )
    longest, stop_set, device = max(map(len, prompts)), set(stop), compute.device
    ids = torch.tensor(
        [[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device
    )
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )

    def answer(limit):
        rows = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=0,
            eos_token_id=stop or None,
        )[:, longest:].tolist()
        ends = [
            next((i for i, token in enumerate(row) if token in stop_set), len(row)) for row in rows
        ]
        return [row[:end] for row, end in zip(rows, ends)]

    return time_answers(answer, new_tokens, compute)


def time_answers(answer, new_tokens: int, compute: Compute) -> dict:
    """Time `answer`, a function (most new tokens) -> answers."""
    with compute.autocast():
        answer(4)
        began = now(compute.device)
        answers = answer(new_tokens)
    return {
        "seconds": now(compute.device) - began,
        "answers": answers,
        "peak_bytes": peak_bytes(compute.device),
    }


def machine_speed(compute: Compute) -> dict:
    """Medians of five, the first try aside: flops, the FLOP/s of a product of square matrices in the compute dtype;
    bytes_per_second, of a copy of 512 MB, where each byte counts once read and once written."""
    size, nbytes = 2048 if compute.device == "cpu" else 8192, 2**29
    matrix = torch.randn(size, size, device=compute.device).to(DTYPES[compute.dtype])
    product = seconds_of(lambda: torch.mm(matrix, matrix), compute.device)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=compute.device)
    target = torch.ones_like(source)
    copy = seconds_of(lambda: target.copy_(source), compute.device)
    return {"flops": 2 * size**3 / product, "bytes_per_second": 2 * nbytes / copy}


def seconds_of(work, device: str) -> float:
    """The median time of five calls of `work` after one to warm up."""
    taken = []
    for _ in range(6):
        began = now(device)
        work()
        taken.append(now(device) - began)
    return median(taken[1:])
