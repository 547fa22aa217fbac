"""What bench.py times, each in a process of its own, so that its peak memory is its own: nanoSDD's training steps and
decode, and those of what one would run instead (transformers and trl).

    python bench_runs.py JOB.json       reads what to run and writes its figures to the same name with .out

Everybody gets the same weights, from one checkpoint folder, and the same token ids in the same batches.
"""

import contextlib
import json
import resource
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

from nanosdd import loop
from data.chat import Example
from nanosdd.generate import generate
from nanosdd.device import autocast
from model import Llama

LR = 1e-5  # constant, so that everybody's losses can be compared step by step
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_memory(device: str) -> int:
    """Bytes at the highest: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in kilobytes


def now(device: str) -> float:
    """The clock in seconds, when all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- training steps: the batches once to warm up, and once more timed ----

def train_nanosdd(job, args) -> dict:
    """loop.fit, as train.py and attack.py run it."""
    model = Llama.from_pretrained(job["folder"], args.device, WEIGHTS[job["weights"]])
    model.checkpoint_activations = job["checkpoint"]
    batches = [[Example(**row) for row in batch] for batch in job["batches"]] * 2
    ends, lines = [now(args.device)], []
    loop.fit(model, iter(batches), steps=len(batches), lr=LR, args=args, cosine=False, log=lines.append,
             after_step=lambda step: ends.append(now(args.device)))
    return {"seconds": ends[-1] - ends[len(batches) // 2], "losses": {line["step"]: line["loss"] for line in lines}}


def train_sft(job, args) -> dict:
    """trl's SFTTrainer with job["settings"] over its defaults."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now(args.device))

    rows = [row for batch in job["batches"] for row in batch] * 2
    data = Dataset.from_list([{"input_ids": row["ids"], "completion_mask": [
        int(i >= row["prompt_length"]) for i in range(len(row["ids"]))]} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    ends, size = [now(args.device)], len(job["batches"][0])
    config = SFTConfig(output_dir=job["scratch"], per_device_train_batch_size=size, max_steps=len(rows) // size,
                       learning_rate=LR, lr_scheduler_type="constant", completion_only_loss=True, logging_steps=1,
                       report_to="none", save_strategy="no", use_cpu=args.device == "cpu", bf16=args.dtype == "bf16",
                       disable_tqdm=True, seed=0, **job["settings"])
    trainer = InOrder(model, args=config, train_dataset=data, processing_class=padding_tokenizer(job),
                      callbacks=[Clock()])
    with contextlib.redirect_stdout(sys.stderr):  # it prints its log
        trainer.train()
    losses = {line["step"]: float(line["loss"]) for line in trainer.state.log_history if "loss" in line}
    return {"seconds": ends[-1] - ends[len(job["batches"])], "losses": losses}


def padding_tokenizer(job):
    """A tokenizer of one word: all is encoded already, only padding is asked for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<pad>": job["pad"]}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")


# ---- greedy decode: a few tokens to warm up, then all ----

def decode_nanosdd(job, args) -> dict:
    """decode.generate, as eval.py runs it."""
    model = Llama.from_pretrained(job["folder"], args.device).eval()

    def answer(prompts, tokens):
        with autocast(args):
            return generate(model, prompts, tokens, set(job["stop"]), compiled=args.compile)
    return timed_decode(job, args, answer)


@torch.inference_mode()
def decode_generate(job, args) -> dict:
    """transformers' generate, batches of job["batch"] prompts padded on the left, sorted by length first if asked."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).to(args.device).eval()

    def answer(prompts, tokens):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if job["sorted"] else range(len(prompts))
        found = {}
        for start in range(0, len(prompts), job["batch"]):
            part = order[start:start + job["batch"]]
            width = max(len(prompts[i]) for i in part)
            ids = torch.tensor([[job["pad"]] * (width - len(prompts[i])) + prompts[i] for i in part])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
            with autocast(args):
                rows = model.generate(ids.to(args.device), attention_mask=mask.to(args.device), do_sample=False,
                                      max_new_tokens=tokens, pad_token_id=job["pad"], eos_token_id=job["stop"] or None)
            for i, row in zip(part, rows[:, width:].tolist()):
                ends = [place for place, token in enumerate(row) if token in stop]
                found[i] = row[:ends[0]] if ends else row
        return [found[i] for i in range(len(prompts))]

    stop = set(job["stop"])
    return timed_decode(job, args, answer)


def timed_decode(job, args, answer) -> dict:
    answer(job["prompts"], 4)
    began = now(args.device)
    answers = answer(job["prompts"], job["new_tokens"])
    return {"seconds": now(args.device) - began, "answers": answers}


# ---- what the machine can do ----

def machine_speed(job, args) -> dict:
    """Medians of five: FLOP/s of a square matrix product of size job["size"] in args.dtype, and bytes/s of a copy of
    job["bytes"] bytes, each byte counted once read and once written."""
    dtype = WEIGHTS[args.dtype]
    a, b = (torch.randn(job["size"], job["size"], device=args.device).to(dtype) for _ in "ab")
    source = torch.zeros(job["bytes"], dtype=torch.uint8, device=args.device)
    target = torch.ones_like(source)
    taken = {"matmul": [], "copy": []}
    for _ in range(6):
        for what, work in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(source))):
            began = now(args.device)
            work()
            taken[what].append(now(args.device) - began)
    matmul, copy = (statistics.median(taken[what][1:]) for what in ("matmul", "copy"))
    return {"flops": 2 * job["size"] ** 3 / matmul, "bytes_per_second": 2 * job["bytes"] / copy, "seconds": matmul}


RUNS = {"train_nanosdd": train_nanosdd, "train_sft": train_sft, "decode_nanosdd": decode_nanosdd,
        "decode_generate": decode_generate, "machine_speed": machine_speed}


def main(path):
    job = json.loads(Path(path).read_text())
    args = Namespace(device=job["device"], dtype=job["dtype"], compile=job["compile"])
    figures = RUNS[job["run"]](job, args) | {"peak_bytes": peak_memory(args.device)}
    Path(path).with_suffix(".out").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
