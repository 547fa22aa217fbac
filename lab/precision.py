"""How much of a small update survives when weights are held in bf16: the same AdamW steps in four schemes.

    python precision.py                            a layer of random weights, and the town if its aligned model is there
    python precision.py --model out/seed0/aligned

    fp32             weights and moments fp32: the intended update
    bf16 nearest     weights rounded to the nearest bf16 after every step, moments fp32
    bf16 AdamW       torch.optim.AdamW on a model that was loaded as bf16: its moments are bf16 too
    split            optimizer.py: bf16 weights with the low half of their fp32 master beside them
    split, as bf16   the same run, saved as bf16 at its end

*layer*: weights of standard deviation 0.02, about as Llama's have; at step t the gradient of a weight is
3e-5 (signal * s + n_t), where s and every n_t are from N(0, 1): a constant wish under noise. AdamW treats each weight
alone, so 256 x 256 of them tell as much as a whole model. *town*: SDD's own steps. All schemes start from the same bf16
weights and compute in fp32; only what is kept differs, and in the bf16 schemes gradients are bf16. The learning rate
goes to 0 along a cosine.

Prints a table and writes out/precision.json:

    moved    share of the weights that differ from the start
    cosine   of the whole update with that of fp32; 0 where nothing moved
    norm     of the whole update, divided by that of fp32
    loss     town: change of the mean negative log-likelihood, nats a token, of irrelevant answers to harmful prompts,
             which SDD lowers
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

import torch

from nanosdd import runs
from data.chat import collate, encode_example, read_chat
from data.pairs import town_pairs
from data.tokenizer import load_tokenizer
from data.town import read_town
from nanosdd.errors import InputError, run_script
from model import Llama
from nanosdd.optimizer import SplitAdamW
from sdd_loss import response_nll
from nanosdd.loop import backward, draw_batches, learning_rate
from train import DEFENCE, seed_folder

SCHEMES = ("fp32", "bf16 nearest", "bf16 AdamW", "split")
LRS = (5e-7, 2e-5, 5e-5)  # the paper's, an independent replication's, and an attacker's
SIZE = 256
EVALUATED = 128  # rows of the town whose loss is measured


def follow(scheme: str, start: list[torch.Tensor], gradients, steps: int, lr: float) -> list[torch.Tensor]:
    """Weights after `steps` AdamW steps in a scheme: fp32, in the shapes of `start`, which holds fp32 tensors.

    gradients: a function of (step from 0, the weights that the model computes with) -> one fp32 tensor a weight.
    """
    dtype = torch.float32 if scheme in ("fp32", "bf16 nearest") else torch.bfloat16
    weights = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in start]
    if scheme == "split":
        optimizer = SplitAdamW(weights, lr=lr)
    else:
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, 0.0, cosine=True)
        for weight, gradient in zip(weights, gradients(step, weights), strict=True):
            weight.grad = gradient if scheme == "fp32" else gradient.bfloat16().to(dtype)
        optimizer.step()
        if scheme == "bf16 nearest":
            for weight in weights:
                weight.data.copy_(weight.data.bfloat16())
    return [optimizer.master(weight) if scheme == "split" else weight.detach().float() for weight in weights]


def compare(start: list[torch.Tensor], end: list[torch.Tensor], intended: list[torch.Tensor]) -> dict:
    """{moved, cosine, norm} of the update end - start beside intended - start; see the top of this file."""
    moved = dot = norm = wanted = total = 0
    for old, new, want in zip(start, end, intended, strict=True):
        update, want = new.double() - old, want.double() - old
        moved, total = moved + int(update.count_nonzero()), total + old.numel()
        dot += float((update * want).sum())
        norm += float(update.square().sum())
        wanted += float(want.square().sum())
    return {"moved": moved / total, "cosine": dot / max((norm * wanted) ** 0.5, 1e-300),
            "norm": (norm / max(wanted, 1e-300)) ** 0.5}


def measure(start: list[torch.Tensor], gradients, steps: int, lr: float, loss=None):
    """Yield a row of the table for each scheme, a dict; loss: a function of weights, whose change is measured too."""
    begin = loss(start) if loss else None
    for scheme in SCHEMES:
        end = follow(scheme, start, gradients, steps, lr)
        if scheme == "fp32":
            intended = end
        ends = {scheme: end}
        if scheme == "split":
            ends["split, as bf16"] = [weight.bfloat16().float() for weight in end]
        for name, weights in ends.items():
            row = {"lr": lr, "scheme": name, **compare(start, weights, intended)}
            yield row | ({"loss": loss(weights) - begin} if loss else {})


# ---- a layer of random weights ----

def layer(signal: float, seed: int) -> tuple[list[torch.Tensor], object]:
    """(weights [(SIZE,SIZE)] fp32 that bf16 can hold, their `gradients` for `follow`); see the top of this file."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, SIZE, generator=generator).mul_(0.02).bfloat16().float()
    constant = signal * torch.randn(SIZE, SIZE, generator=generator)

    def gradients(step, weights):
        noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2**16 * (seed + 1) + step))
        return [noise.add_(constant).mul_(3e-5)]

    return [weight], gradients


# ---- the town ----

def town(folder, steps: int, seed: int) -> tuple:
    """(weights, `gradients`, `loss` for `measure`) of SDD's steps on a checkpoint of the town, as train.py takes them.

    InputError when the folder holds no model of the town.
    """
    world = read_town(folder)
    if world is None:
        raise InputError(f"{folder} is no model of the town; give one that train.py --mode align wrote")
    model, tokenizer, chat = Llama.from_pretrained(folder), load_tokenizer(folder), read_chat(folder)
    main, replay = ([encode_example(tokenizer, chat, row["prompt"], row["response"], DEFENCE["max_length"])
                     for row in rows] for rows in town_pairs(world, "sdd", seed, 0))
    rng = random.Random(f"batches {seed}")
    batches = list(islice(draw_batches(main, replay, DEFENCE["benign_replay"], DEFENCE["batch_size"], rng), steps))
    evaluated = collate(random.Random(f"evaluated {seed}").sample(main, min(EVALUATED, len(main))))
    parameters = list(model.parameters())  # a tied head once

    @torch.no_grad()
    def use(weights):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)

    def gradients(step, weights):
        use(weights)
        model.zero_grad()
        backward(model, batches[step], 0, "cpu")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return [parameter.grad for parameter in parameters]

    @torch.no_grad()
    def loss(weights):
        use(weights)
        total, tokens = response_nll(model(evaluated.tokens, evaluated.loss_mask),
                                     evaluated.targets[evaluated.loss_mask])
        return float(total) / tokens

    return [parameter.detach().bfloat16().float() for parameter in parameters], gradients, loss


# ---- the table ----

def line(row: dict) -> str:
    """A row of the table."""
    loss = f"  {row['loss']:+9.4f}" if "loss" in row else ""
    return (f"  {row['lr']:<7.0e}{row['scheme']:<16}{row['moved']:>8.1%}  {row['cosine']:>7.3f}  {row['norm']:>7.3f}"
            f"{loss}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", metavar="DIR", help="checkpoint of the town (default: out/seed0/aligned, if it is there)")
    p.add_argument("--steps", type=int, default=500, help="of the layer (default: 500, as the paper)")
    p.add_argument("--town-steps", type=int, default=60, help="of the town (default: 60)")
    p.add_argument("--signal", type=float, default=0.1, help="of the layer's gradient, noise is 1 (default: 0.1)")
    p.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    args = p.parse_args(argv)
    if min(args.steps, args.town_steps) < 1:
        raise InputError("--steps and --town-steps must be 1 or more")
    folder = Path(args.model or seed_folder(0, "shared") / "aligned")
    with_town = args.model is not None or folder.is_dir()
    header = f"  {'lr':<7}{'scheme':<16}{'moved':>8}  {'cosine':>7}  {'norm':>7}"
    found = {"layer": [], "town": []}
    if with_town:  # first, so that a wrong folder is named at once
        start, gradients, loss = town(folder, args.town_steps, args.seed)
        print(f"town: SDD from {folder}, {args.town_steps} steps of {DEFENCE['batch_size']} rows, of which "
              f"{DEFENCE['benign_replay']:.0%} replay; the loss starts at {loss(start):.4f}\n{header}  {'loss':>9}")
        for lr in LRS:
            for row in measure(start, gradients, args.town_steps, lr, loss):
                found["town"].append(row)
                print(line(row), flush=True)
    else:
        print(f"town: left out, since {folder} is not there; python train.py --mode align trains it")
    print(f"\nlayer: {SIZE} x {SIZE} weights of standard deviation 0.02, {args.steps} steps, signal {args.signal:g}, "
          f"noise 1\n{header}")
    start, gradients = layer(args.signal, args.seed)
    for lr in LRS:
        for row in measure(start, gradients, args.steps, lr):
            found["layer"].append(row)
            print(line(row), flush=True)
    settings = vars(args) | {"model": str(folder) if with_town else None, "torch": torch.__version__}
    runs.write_text("out/precision.json", json.dumps({"settings": settings, **found}, indent=1) + "\n")
    print("\nwritten: out/precision.json")


if __name__ == "__main__":
    run_script(main)
