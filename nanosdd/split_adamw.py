"""AdamW for weights held in bf16, with the update of fp32 weights: 8 bytes a parameter where fp32 takes 12.

At lr 5e-7 a step is far smaller than the gap between two bf16 numbers: of bf16 weights that are rounded to nearest
after every step, only the smallest ever change (docs/precision.md). With split weights a weight is an fp32 number, the
*master*, stored in two parts:

    bytes  what
    2      the parameter: the master rounded to bf16, which the model computes with
    2      low: the master's low 16 bits; parameter and low together are the master, bit by bit
    2      exp_avg, the first moment, bf16
    2      exp_avg_sq, the second moment, bf16, rounded stochastically: within about 4% of fp32's, without bias

With the bf16 gradient that is 10 bytes a parameter, against 16 for fp32 weights, moments and gradients.

The arithmetic is that of `torch.optim.AdamW` in fp32 (Loshchilov and Hutter 2019, algorithm 2), on SLICE elements at a
time, so that the temporary fp32 tensors take 109 MB (26 bytes an element) whatever the size of a parameter.
"""

import random

import torch

from nanosdd.errors import InputError

SLICE = 2**22  # elements of a tensor at once


# ---- an fp32 number as bf16 and 16 more bits ----


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (...) -> bf16 (...), the nearest, and int16 (...), the low 16 bits; `join` is the inverse.

    Ties, one number in 2**16, round away from zero. PyTorch rounds them to even, but then 2**16 + 1 masters have the
    same even bf16 number as their nearest, one more than 16 bits can tell apart.
    """
    bits = master.view(torch.int32)  # sign and magnitude: adding to the bits moves away from zero
    return ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """bf16 (...) and int16 (...) from `split` -> the fp32 (...) that was split, bit by bit.

    As a signed number, low is negative exactly where the weight was rounded away from zero, so the sum undoes that.
    """
    return (weight.view(torch.int16).int() << 16).add_(low).view(torch.float32)


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 (...) -> bf16 (...): one of the two neighbours at random, the nearer one more likely, with mean x."""
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (noise.add_(x.view(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


# ---- the gradient's norm ----


@torch.no_grad()
def gradient_norm(parameters, slice_size: int = SLICE) -> torch.Tensor:
    """The 2-norm of all gradients together, fp32 (); bf16 gradients are squared and summed in fp32, in slices.

    `.norm()` is not used: on a CPU it is off by up to 0.3% for 4 million fp32 numbers (torch 2.13).
    """
    parts = [
        part.float().square().sum()
        for p in parameters
        if p.grad is not None
        for part in p.grad.reshape(-1).split(slice_size)
    ]
    return torch.stack(parts).sum().sqrt() if parts else torch.zeros(())


# ---- AdamW ----


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters with fp32 masters; lr, betas, eps, weight_decay, groups and state_dict are those of
    `torch.optim.AdamW`.

    A master starts as its bf16 parameter. To keep the whole update, save `master(parameter)`, not the parameter.
    seed: of stochastic rounding, which otherwise depends on the step and the index of the parameter alone, so that a
    run resumed from a state_dict equals one that never stopped. InputError for parameters that are not bf16.
    """

    def __init__(
        self,
        parameters,
        lr: float,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
        slice_size: int = SLICE,
    ):
        self.seed, self.slice_size, self.scale = seed, slice_size, 1.0
        super().__init__(
            parameters, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        )

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype != torch.bfloat16 or not p.is_contiguous():
                raise InputError(
                    f"SplitAdamW is for contiguous bf16 parameters, and one is {p.dtype} of shape "
                    f"{list(p.shape)}; use torch.optim.AdamW for fp32 weights"
                )

    def clip(self, max_norm: float) -> float:
        """Have the next step scale gradients to a 2-norm of at most max_norm, in fp32, so that they are not rounded a
        second time; returns the norm before that."""
        norm = float(
            gradient_norm(
                (p for group in self.param_groups for p in group["params"]), self.slice_size
            )
        )
        self.scale = min(1.0, max_norm / (norm + 1e-6))  # as in clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self):
        """One step, in place, on every parameter that has a gradient, with gradients times `scale` (see clip)."""
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in enumerate(parameters):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(
                    step=0,
                    **{name: torch.zeros_like(p) for name in ("low", "exp_avg", "exp_avg_sq")},
                )
            state["step"] += 1
            generator = torch.Generator(p.device)
            generator.manual_seed(random.Random(f"{self.seed} {state['step']} {i}").getrandbits(32))
            tensors = (p, p.grad, state["low"], state["exp_avg"], state["exp_avg_sq"])
            for parts in zip(
                *(tensor.reshape(-1).split(self.slice_size) for tensor in tensors)
            ):  # views
                _update(parts, group, state["step"], self.scale, generator)
        self.scale = 1.0  # holds for one step

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of a parameter, in its shape: what is trained, and what to save."""
        state = self.state.get(parameter)
        return (
            join(parameter.detach(), state["low"].view(torch.int16))
            if state
            else parameter.detach().float()
        )


def _update(parts: tuple, group: dict, step: int, scale: float, generator: torch.Generator):
    """One AdamW step, in place, on slices (n,) in bf16; the operations and their order are PyTorch's.

    parts: weight, gradient, low, exp_avg and exp_avg_sq. The step uses the moments in fp32; they are rounded to bf16 to
    be stored until the next one.
    """
    weight, grad, low, exp_avg, exp_avg_sq = parts
    beta1, beta2 = group["betas"]
    low = low.view(
        torch.int16
    )  # kept as bf16: load_state_dict would convert an int16 to the parameter's type
    master = join(weight, low)
    master.mul_(1 - group["lr"] * group["weight_decay"])
    grad = grad.float().mul_(scale)
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg.copy_(
        mean
    )  # to nearest: 0.4% off at beta1 = 0.9 (stochastic rounding 0.5%), up to 11% at 0.99
    exp_avg_sq.copy_(
        round_stochastically(square, generator)
    )  # to nearest, changes of 1/1000 would be lost
    denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    master.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
    high, rest = split(master)
    weight.copy_(high)
    low.copy_(rest)
