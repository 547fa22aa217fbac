"""AdamW for weights held in bf16, with the update of fp32 weights: 8 bytes a parameter where fp32 takes 12.

At lr 5e-7 a step is far smaller than the distance of two bf16 numbers, and of bf16 weights that are rounded to nearest
after every step only the smallest move (`python precision.py`). Here a weight is an fp32 number, the *master*, in two
halves:

    bytes  what
    2      the parameter: the master rounded to bf16, which the model computes with
    2      low: the master's low 16 bits, which with the parameter give every bit of the master back
    2      exp_avg, the first moment, bf16
    2      exp_avg_sq, the second moment, bf16, rounded stochastically: about 4% around fp32's, without bias

and a bf16 gradient while there is one: 10 bytes against 16 with fp32 weights, moments and gradients.

The arithmetic is that of `torch.optim.AdamW` in fp32 (Loshchilov and Hutter 2019, algorithm 2), on SLICE elements at a
time: 26 bytes each, 109 MB in all, whatever the size of a tensor.
"""

import random

import torch

from nanosdd.errors import InputError

SLICE = 2**22  # elements of a tensor at once


# ---- an fp32 number in two halves of 16 bits ----

def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (...) -> (bf16, the nearest one; int16, the low 16 bits), both (...), from which `join` gives it back.

    A tie rounds away from zero, where PyTorch rounds to even: an even bf16 number would be the nearest of 2**16 + 1
    masters, one more than 16 bits can tell apart. One number in 2**16 is a tie.
    """
    bits = master.view(torch.int32)  # sign and magnitude: adding to the bits moves away from zero
    return ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 (...) that was split into bf16 (...) and int16 (...), bit by bit.

    Read as signed, low is negative where the weight was rounded away from zero, by as much: the sum undoes it.
    """
    return (weight.view(torch.int16).int() << 16).add_(low).view(torch.float32)


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 (...) -> bf16 (...): up or down, each as likely as the other is near, so that the mean is x."""
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (noise.add_(x.view(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


# ---- the gradient's norm ----

@torch.no_grad()
def gradient_norm(parameters) -> torch.Tensor:
    """The 2-norm of all gradients together, fp32 and 0-dim; bf16 ones are squared and summed in fp32, by slices.

    Not by `.norm()`, which on a CPU is off by up to 0.3% for 4 million fp32 numbers (torch 2.13).
    """
    parts = [part.float().square().sum() for p in parameters if p.grad is not None
             for part in p.grad.reshape(-1).split(SLICE)]
    return torch.stack(parts).sum().sqrt() if parts else torch.zeros(())


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm with, for `SplitAdamW.step`; as `torch.nn.utils.clip_grad_norm_` does."""
    return min(1.0, max_norm / (norm + 1e-6))


# ---- AdamW ----

class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters whose masters are fp32; groups, state and state_dict as in `torch.optim.AdamW`.

    lr, betas, eps and weight_decay (decoupled) mean what they mean there. The master begins as the parameter: load
    weights that were fp32 on disk, and what bf16 cannot hold of them is gone. Save `master(parameter)`, not the
    parameter, to keep the whole update. seed: of the second moment's rounding, which depends on nothing else but the
    step and the place of the parameter, so a run that goes on from a state_dict is the run that never stopped.
    InputError for parameters that are not bf16: those need no such care, or another kind.
    """

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed=0):
        self.seed = seed
        super().__init__(parameters, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype != torch.bfloat16 or not p.is_contiguous():
                raise InputError(f"SplitAdamW is for contiguous bf16 parameters, and one is {p.dtype} of shape "
                                 f"{list(p.shape)}; use torch.optim.AdamW for fp32 weights")

    @torch.no_grad()
    def step(self, scale: float = 1.0):
        """One step, in place, on every parameter that has a gradient; the gradient counts `scale` times, unchanged."""
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in enumerate(parameters):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, **{name: torch.zeros_like(p) for name in ("low", "exp_avg", "exp_avg_sq")})
            state["step"] += 1
            generator = torch.Generator(p.device)
            generator.manual_seed(random.Random(f"{self.seed} {state['step']} {i}").getrandbits(32))
            tensors = (p, p.grad, state["low"], state["exp_avg"], state["exp_avg_sq"])
            for parts in zip(*(tensor.reshape(-1).split(SLICE) for tensor in tensors)):  # views: all are contiguous
                _update(*parts, group, state["step"], scale, generator)

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of a parameter, in its shape: what was trained, and what to save."""
        state = self.state.get(parameter)
        return join(parameter.detach(), state["low"].view(torch.int16)) if state else parameter.detach().float()


def _update(weight, grad, low, exp_avg, exp_avg_sq, group, step: int, scale: float, generator):
    """One AdamW step in place on equal slices (n,), all bf16; the operations and their order are PyTorch's.

    The step is taken with the moments in fp32; only what is kept of them until the next step is rounded.
    """
    beta1, beta2 = group["betas"]
    low = low.view(torch.int16)  # kept as bf16: load_state_dict would convert an int16 to the parameter's type
    master = join(weight, low)
    master.mul_(1 - group["lr"] * group["weight_decay"])
    grad = grad.float().mul_(scale)
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg.copy_(mean)  # to nearest: off by 0.4% at beta1 = 0.9, stochastically 0.5%; at 0.99 it would be up to 11%
    exp_avg_sq.copy_(round_stochastically(square, generator))  # a step's 1/1000 is less than half of bf16's 1/256
    denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    master.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
    high, rest = split(master)
    weight.copy_(high)
    low.copy_(rest)
