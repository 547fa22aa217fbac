"""The training loop that train.py, attack.py and tune.py share: global batches, their gradient, and the steps.

Under torchrun every process draws the same global batches, computes its own rows of each, and holds its own part of the
weights, gradients and moments (PyTorch's FSDP2).
"""

import math
import random
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.chat import Example, collate
from nanosdd.device import autocast, process
from nanosdd.errors import InputError
from nanosdd.optimizer import SplitAdamW, clip_scale, gradient_norm
from sdd_loss import sdd_loss

MAX_NORM = 1.0  # of the gradient of a step


class Diverged(InputError):
    """The loss or its gradient is no longer finite."""


# ---- what is drawn ----

def endless(items: list, rng: random.Random):
    """Items in shuffled epochs, for ever."""
    while items:
        yield from rng.sample(items, len(items))


def draw_batches(main: list[Example], replay: list[Example], share: float, batch_size: int, rng: random.Random):
    """Global batches for ever: round(share * batch_size) rows of replay, the rest of main. Never looks at lengths."""
    main, replay = endless(main, rng), endless(replay, rng)
    from_replay = round(share * batch_size)
    while True:
        yield [next(main) for _ in range(batch_size - from_replay)] + [next(replay) for _ in range(from_replay)]


# ---- one step ----

def backward(model, examples: list[Example], micro_batch: int, device) -> tuple[float, int, int]:
    """Accumulate the gradient of the global batch's mean loss; gives loss, response tokens and all real tokens.

    The batch is sorted by length, so that micro-batches hold little padding for attention, the only layer that sees
    any, and every part is divided by the response tokens of the whole: the split changes nothing but rounding.
    """
    rank, processes = process()
    examples = sorted(examples, key=lambda example: len(example.ids))
    response_tokens = sum(example.response_length for example in examples)
    own = examples[rank::processes]
    micro_batch = micro_batch or len(own)
    total = torch.zeros((), device=device)
    for start in range(0, len(own), micro_batch):
        part = own[start:start + micro_batch]
        batch = collate(part).to(device)
        hidden = model.hidden(batch.tokens, positions=batch.loss_mask, lengths=batch.lengths)  # (N,C)
        down = None
        if any(example.suppress for example in part):
            rows = torch.tensor([example.suppress for example in part], device=device)
            down = rows[:, None].expand_as(batch.loss_mask)[batch.loss_mask]  # (N,)
        loss = sdd_loss(hidden, model.lm_head.weight, batch.targets[batch.loss_mask], response_tokens, down)
        (loss * processes if is_sharded(model) else loss).backward()  # FSDP averages what adds up here
        total += loss.detach()
    if processes > 1:
        dist.all_reduce(total)
    return float(total), response_tokens, sum(len(example.ids) for example in examples)


def learning_rate(step: int, steps: int, peak: float, warmup: float, cosine: bool) -> float:
    """Linear warm-up over a share of the steps, then a cosine to 0 at the last step, or constant."""
    ramp = min(1.0, (step + 1) / max(1, warmup * steps))
    return peak * ramp * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0)


# ---- all steps ----

def is_sharded(model) -> bool:
    """Whether `shard` has been here: it makes the model an FSDPModule."""
    return hasattr(model, "reshard")


def shard(model):
    """Spread the weights over the processes of torchrun: a layer is gathered when it computes."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # slow, and only for several
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "hidden")


def fit(model, batches, *, steps, lr, args, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0, cosine=True,
        micro_batch=0, name="train", log=None, after_step=None):
    """Train in place for `steps` of the global batches; gives the optimizer. Weights in bf16 keep the update of fp32
    ones, see optimizer.py.

    args: has device, dtype and compile, resolved. log: called with each log line's dict. after_step(step), from 1.
    InputError when the loss stops being finite.
    """
    rank, processes = process()
    model.train()
    if args.compile:
        for block in model.model.layers:
            if block._compiled_call_impl is None:  # attack.py comes here once an attack, with the same model
                block.compile(dynamic=True)
    if processes > 1 and not is_sharded(model):
        shard(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_halves = parameters[0].dtype == torch.bfloat16
    options = dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    optimizer = SplitAdamW(parameters, **options) if in_halves else torch.optim.AdamW(parameters, **options, fused=True)
    every = max(1, steps // 10)
    since, counts, start = time.perf_counter(), [0, 0], time.perf_counter()
    for step in (bar := tqdm(range(steps), desc=name, leave=False, disable=True if rank else None)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, cosine)
        with autocast(args):
            loss, response_tokens, tokens = backward(model, next(batches), micro_batch, args.device)
        norm = gradient_norm(parameters) if in_halves else torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        norm = float(norm.full_tensor() if processes > 1 else norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"{name}: the loss is {loss} and its gradient norm {norm} at step {step + 1}; lower --lr")
        optimizer.step(*[clip_scale(norm, MAX_NORM)] * in_halves)
        optimizer.zero_grad()
        counts = [counts[0] + response_tokens, counts[1] + tokens]
        if log and ((step + 1) % every == 0 or step + 1 == steps):
            now = time.perf_counter()
            left = (now - start) / (step + 1) * (steps - step - 1)
            line = dict(step=step + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
                        seconds=now - since, response_tokens=counts[0], tokens=counts[1])
            log(line)
            bar.write(f"  step {step + 1:>5}/{steps}  loss {loss:.4f}  lr {line['lr']:.1e}  grad norm {norm:.2f}  "
                      f"{counts[0] / line['seconds']:,.0f} response tokens/s ({counts[1] / line['seconds']:,.0f} "
                      f"without padding)  ETA {left // 60:.0f}:{left % 60:02.0f}")
            since, counts = now, [0, 0]
        if after_step:
            after_step(step + 1)
    model.eval()
    return optimizer
