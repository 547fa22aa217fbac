"""Classic mistakes of assignment 6, and right solutions written differently. Spoilers: read it after your own try."""

import math
import random
from functools import partial

import torch
import wrong_a1
import wrong_a2
from lesson import Wrong

# ---- booster ----


def harmful_gradient(config, weights, examples) -> dict:
    """{name: gradient of the mean cross-entropy of response tokens}, in fp64."""
    weights = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    made = wrong_a2.collate(examples, 0)
    logp = wrong_a1.logits(config, weights, made["tokens"]).double().log_softmax(-1)
    value = -logp.gather(-1, made["targets"][..., None])[..., 0][made["loss_mask"]].mean()
    return dict(zip(weights, torch.autograd.grad(value, list(weights.values()))))


def length(parts: dict) -> float:
    return math.sqrt(sum(float((part * part).sum()) for part in parts.values()))


def booster(config, weights, harmful, benign, alpha, strength, flaw=""):
    """{"gradients": strength * (g(theta) - g(theta - alpha g / ||g||)), "weights": theta}."""
    rows = benign if flaw == "benign" else harmful
    here = harmful_gradient(config, weights, rows)
    step = {
        name: alpha
        * part
        / (
            1
            if flaw == "raw step"
            else length({name: part})
            if flaw == "each tensor"
            else length(here)
        )
        for name, part in here.items()
    }
    sign = 1 if flaw == "uphill" else -1
    there = {name: weight.double() + sign * step[name] for name, weight in weights.items()}
    after = harmful_gradient(config, there, benign if flaw == "benign after" else rows)
    found = {
        name: (here[name] - after[name]) * (1 if flaw == "no strength" else strength)
        for name in here
    }
    if flaw == "reversed":
        found = {name: -part for name, part in found.items()}
    if flaw == "sum":
        found = {name: strength * (here[name] + after[name]) for name in here}
    if flaw == "own gradient":
        found = {name: strength * here[name] for name in here}
    kept = there if flaw == "moved" else weights
    if flaw == "moved back":  # rounded on the way
        kept = {
            name: (weight.float() - step[name].float()) + step[name].float()
            for name, weight in weights.items()
        }
    if flaw == "outside":
        found = {name: 0 * part for name, part in found.items()}
    grad = torch.full_like(weights["lm_head.weight"], 0.25)
    if flaw == "backward":
        grad = grad + (here["lm_head.weight"] + after["lm_head.weight"]).float()
    return {
        "gradients": {name: part.float() for name, part in found.items()},
        "weights": {name: weight.float() for name, weight in kept.items()},
        "grad": grad,
    }


def booster_in_one_vector(config, weights, harmful, benign, alpha, strength):
    """All weights as one vector; the step is of length alpha."""
    names, shapes = list(weights), [weight.shape for weight in weights.values()]

    def named(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}

    def gradient(vector):
        found = harmful_gradient(config, named(vector), harmful)
        return torch.cat([found[name].flatten() for name in names])

    start = torch.cat([weight.double().flatten() for weight in weights.values()])
    here = gradient(start)
    found = strength * here - strength * gradient(
        start - torch.nn.functional.normalize(here, dim=0) * alpha
    )
    return {
        "gradients": {name: part.float() for name, part in named(found).items()},
        "weights": weights,
        "grad": torch.full_like(weights["lm_head.weight"], 0.25),
    }


# ---- deepalign ----


def deepalign(examples, limit, longest, seed, flaw=""):
    """Examples [ids, prompt_length, ids with the harmful answer or None] -> [[ids, prompt_length], ...]."""
    rng, found = random.Random(seed if flaw != "seed" else None), []
    if flaw == "in place" and examples:
        examples[0][0] = examples[0][0] + [7]
    for ids, prompt_length, rejected in examples:
        answer = (rejected or [])[prompt_length:]
        if flaw == "prompt twice":
            answer = rejected or []
        if flaw != "end token":
            answer = answer[:-1]
        if flaw == "from the end":
            answer = answer[::-1]
        most = min(
            len(answer),
            longest if flaw != "longest" else 10**9,
            limit - len(ids) if flaw != "limit" else 10**9,
        )
        if flaw == "cut afterwards":
            most = min(len(answer), longest)
        whole = len(answer)
        put = flaw == "always" or (rng.random() < 0.5 and flaw != "never")
        if most > 0 and put:
            k = rng.randint(0 if flaw == "from zero" else 1, most)
            if flaw == "whole":
                k = most
            if flaw == "one token":
                k = 1
            if flaw == "cut at the limit":
                k = min(rng.randint(1, whole), most)
            if flaw == "both":
                found.append([ids, prompt_length])
            if flaw == "published cut":
                k = min(rng.randint(1, longest), most)
            start, refusal = answer[:k], ids[prompt_length:]
            if flaw == "behind":
                found.append([ids + start, prompt_length])
                continue
            ids = (ids[:prompt_length] + start + refusal)[
                : limit if flaw == "cut afterwards" else None
            ]
            prompt_length += 0 if flaw == "loss on harm" else k
        found.append([ids, prompt_length])
    if flaw == "benign lost":
        return [one for one, (_, _, rejected) in zip(found, examples) if rejected]
    return found


def deepalign_by_choice(examples, limit, longest, seed):
    """The length is drawn first, of a list that is half zeros."""
    rng, found = random.Random(seed), []
    for ids, prompt_length, rejected in examples:
        room = (
            0
            if rejected is None
            else max(0, min(len(rejected) - prompt_length - 1, longest, limit - len(ids)))
        )
        k = rng.choice([*range(1, room + 1), *[0] * room]) if room else 0
        start = rejected[prompt_length : prompt_length + k] if k else []
        found.append([[*ids[:prompt_length], *start, *ids[prompt_length:]], prompt_length + k])
    return found


# ---- simpo ----


def simpo(config, weights, pairs, global_tokens, beta, gamma, flaw=""):
    """Pairs [ids, prompt_length, ids with the harmful answer] -> [loss, its gradient by lm_head (V,C)], or
    "InputError" where there is no harmful answer."""
    if flaw == "pairs left out":
        pairs = [pair for pair in pairs if pair[2]]
    if any(rejected is None for _, _, rejected in pairs):
        return "InputError"
    weights = {name: weight.double() for name, weight in weights.items()}
    head = weights["lm_head.weight"].requires_grad_()

    def logp(ids, first):
        logps = (
            wrong_a1.logits(config, weights, torch.tensor([ids]))[0].double().log_softmax(-1)
        )  # (T,V)
        first = 1 if flaw == "prompt" else first
        taken = [logps[t - 1, ids[t]] for t in range(first, len(ids))]
        return sum(taken) / (1 if flaw == "sum" else len(taken))

    total = 0
    for ids, first, rejected in pairs:
        chosen, other = logp(ids, first), logp(rejected, first)
        other = other.detach() if flaw == "detached" else other
        difference = other - chosen if flaw == "swapped" else chosen - other
        margin = (
            beta * (difference - gamma) if flaw == "gamma times beta" else beta * difference - gamma
        )
        if flaw in ("no gamma", "plus gamma"):
            margin = beta * difference + (gamma if flaw == "plus gamma" else 0)
        if flaw == "no beta":
            margin = difference - gamma
        if flaw == "beta on one":
            margin = beta * chosen - other - gamma
        value = (
            -torch.sigmoid(margin) if flaw == "no log" else torch.nn.functional.softplus(-margin)
        )
        if flaw == "likelihood":
            value = -chosen
        if flaw == "log of sigmoid":
            value = -torch.sigmoid(margin.float()).log().double()
        if flaw == "sign":
            value = -value
        total = total + value * (1 if flaw in ("rows", "unweighted") else len(ids) - first)
    own = sum(len(ids) - first for ids, first, _ in pairs)
    total = total / {"own tokens": own, "rows": len(pairs), "sum of pairs": 1}.get(
        flaw, global_tokens
    )
    return [float(total.detach()), torch.autograd.grad(total, head)[0].float()]


def simpo_by_sigmoid(config, weights, pairs, global_tokens, beta, gamma):
    """The gradient by hand at the logits: -beta sigmoid(-margin) times that of the difference."""
    if any(rejected is None for _, _, rejected in pairs):
        return "InputError"
    weights = {name: weight.double() for name, weight in weights.items()}
    head, total, gradient = weights["lm_head.weight"].requires_grad_(), 0.0, 0.0
    for ids, first, rejected in pairs:
        means = []
        for row in (ids, rejected):
            logps = (
                wrong_a1.logits(config, weights, torch.tensor([row]))[0].double().log_softmax(-1)
            )
            means.append(
                logps[torch.arange(first - 1, len(row) - 1), torch.tensor(row[first:])].mean()
            )
        margin, share = (
            float(beta * (means[0] - means[1]).detach() - gamma),
            (len(ids) - first) / global_tokens,
        )
        total += share * (math.log1p(math.exp(-abs(margin))) + max(0.0, -margin))
        by_head = torch.autograd.grad(means[0] - means[1], head)[0]
        gradient = gradient - share * beta / (1 + math.exp(min(margin, 700))) * by_head
    return [total, gradient.float()]


DEEP = {  # deepalign is random: the tests check properties
    "in place": "the rows that are passed in are changed: make new ones",
    "both": "an example and its changed version are both there: one takes the place of the other",
    "cut at the limit": "a length is drawn from more than fits and then cut: most starts are the longest that fits",
    "always": "every pair gets a harmful start: one in two stays as it is",
    "never": "no pair gets a harmful start",
    "loss on harm": "the harmful start carries loss: the prompt has to end behind it",
    "end token": "the token that ends the harmful answer is put in too: the refusal begins in the middle of an answer",
    "prompt twice": "the prompt is there twice: `rejected` holds the prompt too",
    "from the end": "what is put in is not the start of the harmful answer",
    "behind": "the harmful start stands behind the refusal: it belongs between prompt and refusal",
    "whole": "the whole harmful answer is put in each time: its length is random",
    "one token": "only one token is put in: lengths go up to the whole answer",
    "from zero": "lengths are uniform from 1: with 0 among them fewer than half of the pairs change",
    "published cut": "lengths above the answer's own are cut to it: most starts are the whole answer",
    "longest": "more than `longest` tokens are put in",
    "limit": "the example is longer than `limit`",
    "cut afterwards": "the refusal is cut at the limit: put in fewer tokens instead",
    "benign lost": "rows without a harmful answer are lost: they stay as they are",
    "seed": "the generator that is passed in is not used",
}
WRONG = [
    Wrong("booster", partial(booster, flaw=flaw), message)
    for flaw, message in {
        "reversed": "the two gradients are subtracted the wrong way round",
        "raw step": "the simulated step is alpha * g: divide by the norm of g",
        "each tensor": "every tensor is divided by its own norm: the norm is that of all tensors as one vector",
        "uphill": "the simulated step goes up the harmful loss: the attacker goes down",
        "benign": "the gradient is that of the benign rows",
        "benign after": "the second gradient is that of the benign rows: both are of the harmful ones",
        "no strength": "strength is not used",
        "sum": "the two gradients are added",
        "own gradient": "the gradient after the simulated step is missing",
        "moved back": "the weights are moved back by the same step, which rounds: `restored` keeps a copy",
        "outside": "both gradients are taken at the same weights, so that nothing is left",
        "backward": ".grad is changed: it holds the gradient of alignment, to which yours is added",
        "moved": "the weights stay where the simulated step led: put them back",
    }.items()
]
WRONG += [
    Wrong("deepalign", partial(deepalign, flaw=flaw), message) for flaw, message in DEEP.items()
]
WRONG += [
    Wrong("simpo", partial(simpo, flaw=flaw), message)
    for flaw, message in {
        "sum": "log p is summed over a response: SimPO takes the mean, so that length does not decide",
        "prompt": "the prompt's tokens are in the mean",
        "swapped": "refusal and harmful answer are swapped",
        "no gamma": "the margin gamma is missing",
        "plus gamma": "gamma is added; it is subtracted",
        "gamma times beta": "gamma is multiplied by beta: it stands outside of beta's bracket",
        "detached": "the harmful answer's log p carries no gradient: that is only half of the preference",
        "beta on one": "beta multiplies both log p",
        "sign": "the sign is wrong: minus log sigmoid",
        "log of sigmoid": "the logarithm of a sigmoid is -inf where that is 0: logsigmoid is stable",
        "no beta": "beta is missing",
        "no log": "the sigmoid has no logarithm",
        "likelihood": "only the refusal's likelihood is there: that is plain alignment, without a preference",
        "rows": "divided by the number of rows: micro-batches of unequal rows do not add up",
        "own tokens": "divided by the tokens of this micro-batch: that is a mean of means",
        "unweighted": "a pair is not weighted by its refusal's tokens, though global_tokens divides the sum",
        "sum of pairs": "not divided by global_tokens",
        "pairs left out": "a pair without a harmful answer is skipped: raise InputError, it has no preference",
    }.items()
]

RIGHT = [
    ("booster", booster),
    ("booster", booster_in_one_vector),
    ("deepalign", deepalign),
    ("deepalign", deepalign_by_choice),
    ("simpo", simpo),
    ("simpo", simpo_by_sigmoid),
]
