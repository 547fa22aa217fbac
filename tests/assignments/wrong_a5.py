"""Classic mistakes of assignment 5, and right solutions written differently. Spoilers: read it after your own try."""

import math
from functools import partial

import numpy as np
import torch
from lesson import Wrong

# ---- an fp32 number in two halves, through numpy's integers ----


def halves(master: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """fp32 -> the bits (int64) of the nearest bf16, ties away from zero, and what is missing to the fp32 bits."""
    bits = master.numpy().view(np.uint32).astype(np.int64)
    high = (bits + 2**15) // 2**16
    return high, bits - high * 2**16


def as_bf16(high: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((high % 2**16).astype(np.uint16).view(np.int16).copy()).view(
        torch.bfloat16
    )


def split(master, flaw=""):
    """fp32 (n,) -> [bf16 (n,), int16 (n,)]."""
    high, low = halves(master)
    bits = master.numpy().view(np.uint32).astype(np.int64)
    if flaw == "cut":
        high, low = bits // 2**16, bits % 2**16 - 2**15
    if flaw == "no low":
        low = low * 0
    if flaw == "low as value":  # the difference of the two numbers, rounded
        low = (
            (master - as_bf16(high).float())
            .round()
            .nan_to_num()
            .clamp(-(2**15), 2**15 - 1)
            .numpy()
            .astype(np.int64)
        )
    if flaw == "low unsigned":
        low = np.minimum(bits % 2**16, 2**15 - 1)
    if flaw == "to even":
        return [
            master.bfloat16(),
            torch.from_numpy(((bits + 2**15) % 2**16 - 2**15).astype(np.int16)),
        ]
    return [as_bf16(high), torch.from_numpy(low.astype(np.int16))]


def split_with_nextafter(master):
    """Cut, then one step away from zero where at least half a step was cut off."""
    bits = master.view(torch.int32)
    rest = bits & 0xFFFF
    up = (rest >= 2**15).int()
    return [
        ((bits >> 16) + up).to(torch.int16).view(torch.bfloat16),
        (rest - up * 2**16).to(torch.int16),
    ]


def join(weight, low, flaw=""):
    """bf16 (n,) and int16 (n,) -> fp32 (n,)."""
    high = weight.view(torch.int16).numpy().astype(np.int64) % 2**16
    rest = low.numpy().astype(np.int64)
    if flaw == "or":
        bits = high * 2**16 | rest % 2**16
    elif flaw == "no low":
        bits = high * 2**16
    else:
        bits = high * 2**16 + (-rest if flaw == "minus" else rest)
    return torch.from_numpy((bits % 2**32).astype(np.uint32).view(np.float32).copy())


def join_by_struct(weight, low):
    import struct

    found = []
    for high, rest in zip(weight.view(torch.int16).tolist(), low.tolist()):
        found.append(struct.unpack("<f", struct.pack("<I", ((high << 16) + rest) % 2**32))[0])
    return torch.tensor(found)


def round_stochastically(x, seed, flaw=""):
    """fp32 (n,) -> bf16 (n,)."""
    bits = x.numpy().view(np.uint32).astype(np.int64)
    rng = np.random.default_rng(seed if flaw != "seed" else None)
    noise = rng.integers(2**16, size=bits.shape)
    if flaw == "nearest":
        noise = noise * 0 + 2**15
    if flaw == "cut":
        noise = noise * 0
    if flaw == "reversed":
        noise = np.where(rng.integers(2**16, size=bits.shape) < bits % 2**16, 0, 2**16 - 1)
    if flaw == "few bits":
        noise = noise // 2
    if flaw == "coin":
        noise = np.where(bits % 2**16 > 0, rng.integers(2, size=bits.shape) * (2**16 - 1), 0)
    if flaw == "one draw":
        noise = noise * 0 + rng.integers(2**16)
    if flaw == "twice":
        noise = noise + 2**15
    return as_bf16((bits + noise) // 2**16)


def round_by_share(x, seed):
    """The upper neighbour with the probability of the share that was cut off."""
    bits = x.view(torch.int32)
    below = (bits >> 16 << 16).view(torch.float32)
    above = ((bits >> 16) + 1 << 16).view(torch.float32)
    share = (x.double() - below.double()) / (above.double() - below.double())
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(drawn < share, above, below).bfloat16()


# ---- AdamW ----


def adamw(values, grads, lr, betas, eps, weight_decay, max_norm=None, flaw=""):
    """bf16 weights (n,) and the gradients (n,) of some steps -> the fp32 master (n,), moments kept in bf16.

    The second moment is rounded stochastically: pass gradients for which its bf16 numbers are exact.
    """
    master, m, v = values.float(), torch.zeros(len(values)), torch.zeros(len(values))
    for t, grad in enumerate(grads, 1):
        grad = grad.float()
        if max_norm is not None and flaw != "not scaled":
            grad = grad * min(1.0, max_norm / (float(grad.double().norm()) + 1e-6))
        if flaw == "moments lost":
            m, v = m * 0, v * 0
        if flaw == "coupled":
            grad = grad + weight_decay * master
        elif flaw not in ("no decay", "decay after the step"):
            master = master * (1 - weight_decay * (lr if flaw != "decay without lr" else 1))
        m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad * grad
        first = m if flaw in ("no correction", "no first correction") else m / (1 - betas[0] ** t)
        second = v if flaw in ("no correction", "no second correction") else v / (1 - betas[1] ** t)
        root = (second + eps).sqrt() if flaw == "eps inside" else second.sqrt() + eps
        if flaw == "no root":
            root = second + eps
        if flaw == "eps before correction":
            root = (v.sqrt() + eps) / math.sqrt(1 - betas[1] ** t)
        master = master - lr * first / root * (-1 if flaw == "uphill" else 1)
        if flaw == "decay after the step":
            master = master * (1 - weight_decay * lr)
        if flaw == "rounded":
            master = master.bfloat16().float()
        if flaw == "v to nearest":
            v = v.bfloat16().float()
    return values.float() if flaw == "not in place" else master


def adamw_of_torch(values, grads, lr, betas, eps, weight_decay, max_norm=None):
    master = torch.nn.Parameter(values.float())
    optimizer = torch.optim.AdamW(
        [master], lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay
    )
    for grad in grads:
        master.grad = grad.float()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([master], max_norm)
        optimizer.step()
    return master.detach()


def adamw_in_scalars(values, grads, lr, betas, eps, weight_decay, max_norm=None):
    found = []
    if max_norm is not None:
        grads = [grad.float() * min(1.0, max_norm / math.hypot(*grad.tolist())) for grad in grads]
    for i, weight in enumerate(values.tolist()):
        m = v = 0.0
        for t, grad in enumerate(grads, 1):
            g = float(grad[i])
            m, v = m + (1 - betas[0]) * (g - m), v + (1 - betas[1]) * (g * g - v)
            weight -= lr * (
                weight_decay * weight
                + (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
            )
        found.append(weight)
    return torch.tensor(found)


def drift(values, grad, lr, steps, flaw=""):
    """[mean change of the master in units of lr, share of bf16 weights that moved], after steps with one gradient.

    With a constant gradient AdamW moves lr a step.
    """
    master = adamw(
        values,
        [grad] * (1 if flaw == "one step" else steps),
        lr,
        (0.5, 0.5),
        1e-12,
        0.0,
        flaw="rounded" if flaw == "rounded" else "",
    )
    moved = float((split(master)[0] != values).float().mean())
    return [float((master - values.float()).abs().mean()) / lr, moved]


MOMENTS = "the second moment is rounded to nearest: a change of 1/1000 is lost, so it never falls"
ROUNDS = {  # the tests check properties
    "nearest": "rounded to nearest: a change below half a step is lost every time",
    "cut": "rounded towards zero: the mean shrinks",
    "reversed": "the farther neighbour is the more likely one",
    "few bits": "the noise has less than 16 bits: what lies below the middle never rises",
    "coin": "both neighbours are equally likely: the nearer one has to be more likely",
    "one draw": "one draw of noise serves all elements",
    "twice": "noise is added and then rounded to nearest: half a step too much",
    "seed": "the generator that is passed in is not used",
}
WRONG = [
    Wrong("split", partial(split, flaw=flaw), message)
    for flaw, message in {
        "cut": "the low bits are cut off: the bf16 weight has to be the nearest one",
        "no low": "the low bits are dropped: that is rounding, and the update vanishes",
        "low as value": "low is the difference of two numbers; it has to be that of their bits",
        "low unsigned": "low is not the signed distance from the rounded bits: it is negative where the weight was rounded "
        "away from zero",
        "to even": "ties are rounded to even: one tie in two cannot be told from its neighbour",
    }.items()
]
WRONG += [
    Wrong("join", partial(join, flaw=flaw), message)
    for flaw, message in {
        "or": "low is put behind the high bits; as a signed number it is added to them",
        "no low": "the low bits are not used",
        "minus": "low is subtracted; it is added",
    }.items()
]
WRONG += [
    Wrong("round_stochastically", partial(round_stochastically, flaw=flaw), cause)
    for flaw, cause in ROUNDS.items()
]
WRONG += [
    Wrong("adamw", partial(adamw, flaw=flaw), message)
    for flaw, message in {
        "coupled": "weight decay is added to the gradient: that is Adam with L2; AdamW shrinks the weight itself",
        "not scaled": "gradients are not multiplied by `scale`: clipping does nothing",
        "moments lost": "the moments are not stored for the next step",
        "not in place": "nothing is left of the step: write into weight, low and moments in place, with copy_",
        "eps before correction": "eps is added before the second moment is corrected for its start at 0",
        "decay after the step": "weight decay comes before the step, not after it",
        "v to nearest": MOMENTS,
        "no decay": "weight decay is missing",
        "decay without lr": "weight decay is not multiplied by lr",
        "no correction": "moments are not corrected for their start at 0",
        "no first correction": "the first moment is not divided by 1 - beta1^t",
        "no second correction": "the second moment is not divided by 1 - beta2^t",
        "eps inside": "eps is added inside the root",
        "no root": "divided by the second moment without its root",
        "uphill": "the step goes up the gradient",
        "rounded": "the master is rounded to bf16 after every step: small updates vanish",
    }.items()
]
WRONG += [
    Wrong("drift", partial(drift, flaw=flaw), message)
    for flaw, message in {
        "rounded": "the update vanished: weights are rounded to bf16 after every step",
        "one step": "only one step's update is left",
    }.items()
]

RIGHT = [
    ("split", split),
    ("split", split_with_nextafter),
    ("join", join),
    ("join", join_by_struct),
    ("round_stochastically", round_stochastically),
    ("round_stochastically", round_by_share),
    ("adamw", adamw_of_torch),
    ("adamw", adamw_in_scalars),
    ("drift", drift),
]
