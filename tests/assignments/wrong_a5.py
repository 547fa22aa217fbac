"""Classic mistakes of assignment 5, and right solutions written differently.

Spoilers: read it after your own try.
"""

import math

import numpy as np
import torch
from lesson import mistakes

# ---- an fp32 number in two halves, through numpy's integers ----


def bits_of(master: torch.Tensor) -> np.ndarray:
    return master.numpy().view(np.uint32).astype(np.int64)


def as_bf16(high: np.ndarray) -> torch.Tensor:
    bits = (high % 2**16).astype(np.uint16).view(np.int16)
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def split(master, flaw=""):
    """fp32 (n,) -> [the nearest bf16 (n,), ties away from zero; int16 (n,), what is missing]."""
    bits = bits_of(master)
    high = (bits + 2**15) // 2**16
    low = (bits + 2**15) % 2**16 - 2**15
    if flaw == "low unsigned":
        low = np.minimum(bits % 2**16, 2**15 - 1)
    weight = master.bfloat16() if flaw == "to even" else as_bf16(high)
    return [weight, torch.from_numpy(low.astype(np.int16))]


def join(weight, low, flaw=""):
    """bf16 (n,) and int16 (n,) -> fp32 (n,)."""
    bits = weight.view(torch.int16).numpy().astype(np.int64) * 2**16
    rest = low.numpy().astype(np.int64)
    if flaw == "or":
        rest = rest % 2**16
    return torch.from_numpy(((bits + rest) % 2**32).astype(np.uint32).view(np.float32).copy())


def round_stochastically(x, seed, flaw=""):
    """fp32 (n,) -> bf16 (n,)."""
    bits = bits_of(x)
    rng = np.random.default_rng(None if flaw == "seed" else seed)
    noise = rng.integers(2**16, size=bits.shape)
    coin = np.where(noise % 2, 2**16 - 1, 0)
    flaws = {
        "nearest": noise * 0 + 2**15,
        "cut": noise * 0,
        "reversed": np.where(noise < bits % 2**16, 0, 2**16 - 1),
        "few bits": noise // 2,
        "coin": np.where(bits % 2**16 > 0, coin, 0),
        "one draw": noise * 0 + noise[0],
        "twice": noise + 2**15,
    }
    return as_bf16((bits + flaws.get(flaw, noise)) // 2**16)


def round_by_share(x, seed):
    """The upper neighbour with the probability of the share that was cut off."""
    bits = x.view(torch.int32)
    draw = torch.Generator().manual_seed(seed)
    up = torch.rand(x.shape, generator=draw, dtype=torch.float64) < (bits & 0xFFFF) / 2**16
    return (((bits >> 16) + up.int()) << 16).view(torch.float32).bfloat16()


# ---- AdamW ----


def adamw(values, grads, lr, betas, eps, weight_decay, max_norm=None, flaw=""):
    """Steps on bf16 weights (n,) -> [the fp32 master, the bf16 weights].

    The second moment is not rounded: pass gradients for which its bf16 numbers are exact.
    """
    master = values.float()
    m = torch.zeros(len(values))
    v = torch.zeros(len(values))
    for t, grad in enumerate(grads, 1):
        grad = grad.float()
        if max_norm is not None and flaw != "not scaled":
            grad = grad * min(1.0, max_norm / (float(grad.double().norm()) + 1e-6))
        if flaw == "moments lost":
            m = m * 0
            v = v * 0
        if flaw == "coupled":
            grad = grad + weight_decay * master
        else:
            master = master * (1 - weight_decay * (1 if flaw == "decay without lr" else lr))
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad * grad
        first = m / (1 - betas[0] ** t)
        second = v if flaw == "second not corrected" else v / (1 - betas[1] ** t)
        root = second.sqrt() + eps
        if flaw == "eps before correction":
            root = (v.sqrt() + eps) / math.sqrt(1 - betas[1] ** t)
        master = master - lr * first / root
        if flaw == "rounded":
            master = master.bfloat16().float()
        if flaw == "v to nearest":
            v = v.bfloat16().float()
    if flaw == "not in place":
        master = values.float()
    return [master, split(master)[0]]


CAUSES = {
    split: {
        "low unsigned": "low is the signed distance from the rounded bits: it is negative where "
        "the weight was rounded away from zero",
        "to even": "ties are rounded to even: one tie in two cannot be told from its neighbour",
    },
    join: {"or": "low is put behind the high bits; as a signed number it is added to them"},
    round_stochastically: {  # the tests check properties
        "nearest": "rounded to nearest: a change below half a step is lost every time",
        "cut": "rounded towards zero: the mean shrinks",
        "reversed": "the farther neighbour is the more likely one",
        "few bits": "the noise has less than 16 bits: what lies below the middle never rises",
        "coin": "both neighbours are equally likely: the nearer one has to be more likely",
        "one draw": "one draw of noise serves all elements",
        "twice": "noise is added and then rounded to nearest: half a step too much",
        "seed": "the generator that is passed in is not used",
    },
    adamw: {
        "coupled": "weight decay is added to the gradient: that is Adam with L2; AdamW shrinks the "
        "weight itself",
        "not scaled": "gradients are not multiplied by `self.scale`: clipping does nothing",
        "moments lost": "the moments are not stored for the next step",
        "not in place": "nothing is left of the step: write weight, low and moments with copy_",
        "eps before correction": "eps is added before the second moment is corrected",
        "v to nearest": "the second moment is rounded to nearest: a change of 1/1000 is lost, so "
        "it never falls",
        "decay without lr": "weight decay is not multiplied by lr",
        "second not corrected": "the second moment is not divided by 1 - beta2^t",
        "rounded": "the master is rounded to bf16 after every step: small updates vanish",
    },
}
WRONG = mistakes(CAUSES)

RIGHT = [("round_stochastically", round_stochastically), ("round_stochastically", round_by_share)]
