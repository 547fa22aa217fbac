"""AdamW for weights held in bf16, with fp32's update: 8 bytes a parameter where fp32 takes 12.

At lr 5e-7 a step is far smaller than the gap between two bf16 numbers: of bf16 weights that are
rounded to nearest after every step, only the smallest ever change (docs/precision.md). With split
weights a weight is an fp32 number, the *master*, stored in two parts:

    bytes  what
    2      the parameter: the master rounded to bf16, which the model computes with
    2      low: the master's low 16 bits; parameter and low together are the master, bit by bit
    2      exp_avg, the first moment, bf16
    2      exp_avg_sq, the second, bf16, rounded stochastically: within about 4%, without bias

With the gradient that is 10 bytes a parameter, against 16 for fp32 weights, moments and gradients.

The arithmetic is that of `torch.optim.AdamW` in fp32 (Loshchilov and Hutter 2019, algorithm 2), on
SLICE elements at a time, so that the temporary fp32 tensors take 109 MB (26 bytes an element)
whatever the size of a parameter.
"""

import torch

SLICE = 2**22  # elements of a tensor at once


# ---- an fp32 number as bf16 and 16 more bits ----


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (...) -> bf16 (...), the nearest, and int16 (...), the low 16 bits; `join` undoes it.

    Ties, one number in 2**16, round away from zero. PyTorch rounds them to even, but then
    2**16 + 1 masters share an even nearest bf16 number, one more than 16 bits can tell apart.
    """
    bits = master.view(torch.int32)  # sign and magnitude: adding to the bits moves away from zero
    return ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """bf16 (...) and int16 (...) from `split` -> the fp32 (...) that was split, bit by bit.

    As a signed number, low is negative exactly where the weight was rounded away from zero, so the
    sum undoes that.
    """
    return (weight.view(torch.int16).int() << 16).add_(low).view(torch.float32)


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 (...) -> bf16 (...): a neighbour at random, the nearer one more likely, with mean x."""
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (noise.add_(x.view(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


# ---- AdamW ----


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters with fp32 masters, used like `torch.optim.AdamW`.

    A master starts as its bf16 parameter. To keep the whole update, save `master(parameter)`, not
    the parameter. There is one group. Stochastic rounding is seeded by the step and the index of
    the parameter, so that a run that goes on equals one that never stopped.
    """

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(parameters, defaults)
        self.parameters = self.param_groups[0]["params"]
        self.scale = 1.0

    def clip(self, max_norm: float) -> float:
        """Have the next step scale gradients to a 2-norm of at most max_norm; returns the norm.

        The step does so in fp32, so that gradients are not rounded a second time.
        """
        total = 0.0
        for p in self.parameters:
            if p.grad is not None:
                # Not `.norm()`: on a CPU it is off by up to 0.3% for 4 million numbers (2.13).
                for part in p.grad.reshape(-1).split(SLICE):
                    total += part.float().square().sum()
        norm = float(torch.as_tensor(total).sqrt())
        self.scale = min(1.0, max_norm / (norm + 1e-6))  # as in clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self):
        """One step, in place, on every parameter that has a gradient, scaled as `clip` says."""
        for index, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # a tensor, as in PyTorch's AdamW
                for name in ("low", "exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p)
            state["step"] += 1
            step = int(state["step"])
            generator = torch.Generator(p.device).manual_seed(step * 2**12 + index)
            tensors = (p, p.grad.contiguous(), state["low"], state["exp_avg"], state["exp_avg_sq"])
            slices = [tensor.view(-1).split(SLICE) for tensor in tensors]
            for parts in zip(*slices):
                self.update(*parts, step, generator)
        self.scale = 1.0  # holds for one step

    def update(self, weight, grad, low, exp_avg, exp_avg_sq, step: int, generator):
        """One AdamW step, in place, on slices (n,) in bf16; operations and order are PyTorch's.

        It uses the moments in fp32; they are rounded to bf16 to be stored until the next one.
        """
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        # It is kept as bf16: load_state_dict would convert an int16 to the parameter's type.
        low = low.view(torch.int16)
        master = join(weight, low)
        master.mul_(1 - group["lr"] * group["weight_decay"])
        grad = grad.float().mul_(self.scale)
        mean = exp_avg.float().lerp_(grad, 1 - beta1)
        square = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # To nearest: 0.4% off at beta1 = 0.9 (stochastic rounding 0.5%), up to 11% at 0.99.
        exp_avg.copy_(mean)
        # To nearest, changes of 1/1000 would be lost.
        exp_avg_sq.copy_(round_stochastically(square, generator))
        denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        master.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
        high, rest = split(master)
        weight.copy_(high)
        low.copy_(rest)

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of a parameter, in its shape: what is trained, and what to save."""
        weight = parameter.detach()
        if parameter not in self.state:
            return weight.float()
        return join(weight, self.state[parameter]["low"].view(torch.int16))
