"""Classic mistakes of assignment 6, and right solutions written differently.

Spoilers: read it after your own try.
"""

import random

import torch
from lesson import mistakes
from torch.nn.functional import softplus
from wrong_a2 import response_logps
from wrong_a4 import mean_logp

# ---- booster ----


def harmful_gradient(config, weights, examples) -> dict:
    """{name: gradient of the mean cross-entropy of response tokens}, in fp64."""
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    loss = -mean_logp(config, weights, examples)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


def booster(config, weights, harmful, benign, alpha, strength, flaw=""):
    """{"gradients": strength * (g(theta) - g(theta - alpha g / ||g||)), "weights": theta}."""
    here = harmful_gradient(config, weights, harmful)
    norm = torch.stack([part.norm() for part in here.values()]).norm()
    there = {}
    for name, part in here.items():
        length = {"raw step": 1, "each tensor": part.norm()}.get(flaw, norm)
        there[name] = weights[name].double() - alpha * part / length
    after = harmful_gradient(config, there, benign if flaw == "benign after" else harmful)
    found = {}
    for name in here:
        change = here[name] - after[name]
        found[name] = (strength * change).float()
    kept = there if flaw == "moved" else weights
    grad = torch.full_like(weights["lm_head.weight"], 0.25)
    if flaw == "backward":
        grad = grad + (here["lm_head.weight"] + after["lm_head.weight"]).float()
    kept = {name: weight.float() for name, weight in kept.items()}
    return {"gradients": found, "weights": kept, "grad": grad}


# ---- deepalign ----


def deepalign(examples, limit, longest, seed, flaw=""):
    """[ids, prompt_length, ids with the harmful answer or None] -> [[ids, prompt_length], ...]."""
    rng = random.Random(seed if flaw != "seed" else None)
    if flaw == "in place":
        examples[0][0] = examples[0][0] + [7]
    found = []
    for ids, prompt_length, rejected in examples:
        answer = (rejected or [])[0 if flaw == "prompt twice" else prompt_length :]
        if flaw != "end token":
            answer = answer[:-1]
        if flaw == "from the end":
            answer = answer[::-1]
        most = len(answer)
        if flaw != "longest":
            most = min(most, longest)
        if flaw not in ("limit", "cut afterwards"):
            most = min(most, limit - len(ids))
        put = flaw == "always" or (rng.random() < 0.5 and flaw != "never")
        if most <= 0 or not put:
            if rejected or flaw != "benign lost":
                found.append([ids, prompt_length])
            continue
        k = rng.randint(flaw != "from zero", most)
        if flaw == "cut at the limit":
            k = min(rng.randint(1, len(answer)), most)
        if flaw == "published cut":
            k = min(rng.randint(1, longest), most)
        k = {"whole": most, "one token": 1}.get(flaw, k)
        if flaw == "both":
            found.append([ids, prompt_length])
        new = ids[:prompt_length] + answer[:k] + ids[prompt_length:]
        if flaw == "behind":
            new = ids + answer[:k]
        if flaw == "cut afterwards":
            new = new[:limit]
        found.append([new, prompt_length + (k if flaw not in ("loss on harm", "behind") else 0)])
    return found


def deepalign_by_choice(examples, limit, longest, seed):
    """The length is drawn first, of a list that is half zeros."""
    rng = random.Random(seed)
    found = []
    for ids, prompt_length, rejected in examples:
        k = 0
        if rejected:
            room = max(0, min(len(rejected) - prompt_length - 1, longest, limit - len(ids)))
            k = rng.choice([*range(1, room + 1), *[0] * max(1, room)])
        end = prompt_length + k
        found.append([(rejected or ids)[:end] + ids[prompt_length:], end])
    return found


# ---- simpo ----


def simpo(config, weights, pairs, global_tokens, beta, gamma, flaw=""):
    """[ids, prompt_length, ids with the harmful answer] -> [loss, its gradient by lm_head (V,C)].

    "InputError" where there is no harmful answer.
    """
    if flaw == "pairs left out":
        pairs = [pair for pair in pairs if pair[2]]
    if any(rejected is None for _, _, rejected in pairs):
        return "InputError"
    weights = {name: weight.double() for name, weight in weights.items()}
    head = weights["lm_head.weight"].requires_grad_()

    def logp(ids, first):
        found = response_logps(config, weights, ids, 1 if flaw == "prompt" else first)
        return found.sum() if flaw == "sum" else found.mean()

    total = 0
    own = 0
    for ids, first, rejected in pairs:
        tokens = len(ids) - first
        own += tokens
        chosen = logp(ids, first)
        other = logp(rejected, first)
        if flaw == "detached":
            other = other.detach()
        margin = beta * (chosen - other) - gamma
        if flaw == "gamma times beta":
            margin = beta * (chosen - other - gamma)
        cost = softplus(-margin)
        if flaw == "log of sigmoid":
            cost = -torch.sigmoid(margin.float()).log().double()
        total = total + cost * (1 if flaw == "unweighted" else tokens)
    total = total / (own if flaw == "own tokens" else global_tokens)
    return [float(total.detach()), torch.autograd.grad(total, head)[0].float()]


DEEP = {  # deepalign is random: the tests check properties
    "in place": "the rows that are passed in are changed: make new ones",
    "both": "an example and its changed version are both there: one takes the place of the other",
    "cut at the limit": "a length is drawn and then cut: draw it from what fits",
    "always": "every pair gets a harmful start: one in two stays as it is",
    "never": "no pair gets a harmful start",
    "loss on harm": "the harmful start carries loss: the prompt has to end behind it",
    "end token": "the token that ends the harmful answer is put in too: leave it out",
    "prompt twice": "the prompt is there twice: `rejected` holds the prompt too",
    "from the end": "what is put in is not the start of the harmful answer",
    "behind": "the harmful start stands behind the refusal: it belongs between prompt and refusal",
    "whole": "the whole harmful answer is put in each time: its length is random",
    "one token": "only one token is put in: lengths go up to the whole answer",
    "from zero": "lengths are uniform from 1: with 0 fewer than half of the pairs change",
    "published cut": "lengths above the answer's own are cut: most starts are the whole answer",
    "longest": "more than `longest` tokens are put in",
    "limit": "the example is longer than `limit`",
    "cut afterwards": "the refusal is cut at the limit: put in fewer tokens instead",
    "benign lost": "rows without a harmful answer are lost: they stay as they are",
    "seed": "the generator that is passed in is not used",
}
BOOSTER = {
    "raw step": "the simulated step is alpha * g: divide by the norm of g",
    "each tensor": "every tensor is divided by its own norm: take that of all as one vector",
    "benign after": "the second gradient is that of the benign rows: both are of the harmful ones",
    "backward": ".grad is changed: it holds the gradient of alignment, to which yours is added",
    "moved": "the weights stay where the simulated step led: take it in a copy",
}
SIMPO = {
    "sum": "log p is summed over a response: SimPO takes the mean, so that length does not decide",
    "prompt": "the prompt's tokens are in the mean",
    "gamma times beta": "gamma is multiplied by beta: it stands outside of beta's bracket",
    "detached": "the harmful answer's log p carries no gradient: half of a preference",
    "log of sigmoid": "the logarithm of a sigmoid is -inf where that is 0: logsigmoid is stable",
    "own tokens": "divided by the tokens of this micro-batch: that is a mean of means",
    "unweighted": "a pair is not weighted by its refusal's tokens, as global_tokens demands",
    "pairs left out": "a pair without a harmful answer is skipped: raise InputError",
}
WRONG = mistakes({booster: BOOSTER, deepalign: DEEP, simpo: SIMPO})
RIGHT = [("deepalign", deepalign), ("deepalign", deepalign_by_choice)]
