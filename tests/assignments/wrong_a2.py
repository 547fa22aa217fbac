"""Classic mistakes of assignment 2, and right solutions written differently.

Spoilers: read it after your own try.
"""

import functools
import math
import re
import tempfile

import torch
import wrong_a1
from lesson import Wrong, mistakes

from data.tokenizer import load_tokenizer, write_llama3_tokenizer

BOS = "<|begin_of_text|>"
START = "<|start_header_id|>"
END = "<|end_header_id|>"
EOT = "<|eot_id|>"
ENDS = {"llama3": EOT, "plain": "<|end_of_text|>"}  # of a response


@functools.cache
def tokenizer(words: tuple):
    with tempfile.TemporaryDirectory() as folder:
        write_llama3_tokenizer(folder, list(words))
        return load_tokenizer(folder)


# ---- chat encoding ----


def pieces(template, prompt, system, flaw="") -> list:
    """[(text, whether it is a special token), ...] before a response."""
    found = [(BOS, True)]
    for role, said in (("system", system), ("user", prompt)):
        if said is None:
            continue
        if template == "plain":
            found.append((said.strip() + "\n", False))
            continue
        head = [(START, True), (role, False), (END, True)]
        found += [*head, ("\n\n" + said.strip(), False), (EOT, True)]
    if template == "llama3" and flaw != "no assistant header":
        found += [(START, True), ("assistant", False), (END, True), ("\n\n", False)]
    return found


def encode_prompt(words, template, prompt, system=None, flaw=""):
    """The ids of everything before a response, for the templates llama3 and plain."""
    t = tokenizer(tuple(words))
    ids = []
    written = ""
    for text, is_special in [*pieces(template, prompt, system, flaw), ("", None)]:
        if is_special is False and flaw != "part by part":
            written += text
            continue
        ids += t.encode(written)
        written = ""
        ids += [t.special[text]] if is_special else t.encode(text)
    return ids


def encode_prompt_by_splitting(words, template, prompt, system=None):
    """A mistake: the rendered text, cut at the names of special tokens, wherever they come from."""
    t = tokenizer(tuple(words))
    text = "".join(text for text, _ in pieces(template, prompt, system))
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        ids += [t.special[part]] if part in t.special else t.encode(part)
    return ids


def encode_example(words, template, prompt, response, max_length, system=None, flaw=""):
    """[ids, prompt_length] of one pair."""
    t = tokenizer(tuple(words))
    before = encode_prompt(words, template, prompt, None if flaw == "no system" else system)
    if len(before) >= max_length and flaw != "no room is no error":
        return "InputError"
    ids = before + t.encode(response if flaw == "not stripped" else response.strip())
    if flaw != "no end token":
        ids.append(t.special[ENDS[template]])
    length = 0 if flaw == "no prompt" else len(before)
    if flaw == "end kept" and len(ids) > max_length:
        return [ids[: max_length - 1] + ids[-1:], length]
    return [ids[:max_length], length]


# ---- batches ----


def collate(examples, flaw=""):
    """Row by row and token by token."""
    made = {name: [] for name in ("tokens", "positions", "targets", "where")}
    lengths = []
    response_lengths = []
    for ids, prompt_length in examples:
        start = len(made["tokens"])
        count = len(ids) - 1
        lengths.append(count)
        made["tokens"] += ids[:count]
        first = start if flaw == "positions run on" else 0
        made["positions"] += range(first, first + count)
        carries_loss = 1 if flaw == "all" else prompt_length
        response_lengths.append(len(ids) - carries_loss)
        for place in range(carries_loss, len(ids)):
            made["targets"].append(ids[place - 1] if flaw == "not shifted" else ids[place])
            made["where"].append(place - 1 + (0 if flaw == "places in rows" else start))
    tensors = {name: torch.tensor(made[name]) for name in made}
    both = {"lengths": lengths, "response_lengths": response_lengths}
    return both | tensors | {"rejected": None}


# ---- the loss ----


def loss(hidden, head, where, targets, global_tokens, flaw=""):
    """[loss, gradient by the hidden states]."""
    hidden = hidden.clone().requires_grad_()
    if flaw == "where not used":
        where = torch.arange(len(targets))
    logits = hidden[where] @ head.T  # (M,V)
    logp = logits.log_softmax(1)
    if flaw == "log of softmax":
        logp = logits.softmax(1).log()
    if flaw == "softmax twice":
        logp = logits.softmax(1).log_softmax(1)
    total = -logp.gather(1, targets[:, None]).sum()
    value = total / (len(targets) if flaw == "own tokens" else global_tokens)
    value.backward()
    return [float(value.detach()), hidden.grad]


# ---- one step ----


def response_logps(config, weights, ids, prompt_length):
    """log p of each response token of one row, fp64."""
    logits = wrong_a1.row_logits(config, weights, torch.tensor(ids[:-1]))
    places = torch.arange(prompt_length - 1, len(ids) - 1)
    return logits.double().log_softmax(-1)[places, torch.tensor(ids[prompt_length:])]


def count(rows) -> int:
    return sum(len(ids) - prompt_length for ids, prompt_length in rows)


def train_step(config, weights, batches, lr, micro_batch, scale=1.0, added=0.0, flaw=""):
    """SGD on the mean nll of a global batch's response tokens, its gradient clipped to norm 1."""
    if not math.isfinite(scale) and flaw != "not checked":
        return "Diverged"
    weights = {name: weight.double() for name, weight in weights.items()}
    nothing = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    grads = nothing
    steps = []
    most = 0

    def clipped():
        norm = math.sqrt(sum(float((grad * grad).sum()) for grad in grads.values()))
        factor = min(1.0, 1 / norm)
        return norm, {name: grad * factor for name, grad in grads.items()}

    for batch in batches:
        if flaw != "no zero_grad":
            grads = nothing
        rows = micro_batch if micro_batch and flaw != "not split" else len(batch)
        batch = sorted(batch, key=lambda example: len(example[0]))
        parts = [batch[start : start + rows] for start in range(0, len(batch), rows)]
        total = 0.0
        for part in parts:
            most = max(most, len(part))
            own = count(part)
            tokens = own * len(parts) if flaw == "mean of means" else count(batch)
            leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
            logps = torch.cat([response_logps(config, leaves, *example) for example in part])
            value = -scale * logps.sum() / tokens
            new = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
            weights = {name: weight.detach() for name, weight in weights.items()}
            total += float(value.detach())
            grads = {name: grads[name] + new[name] for name in new}
            if flaw == "clips each part":
                grads = clipped()[1]
        if flaw != "no before_clip":
            head = grads["lm_head.weight"] + added
            grads = grads | {"lm_head.weight": head}
        norm, grads = clipped()
        weights = {name: weights[name] - lr * grads[name] for name in weights}
        steps.append([total, min(1.0, norm) if flaw == "norm after clipping" else norm])
    weights = {name: weight.float() for name, weight in weights.items()}
    return {"loss, grad_norm": steps, "rows": most, "weights": weights}


MISTAKES = {
    encode_prompt: {
        "part by part": "neighbouring texts are encoded apart; join them, then encode",
        "no assistant header": "the header of the answer is missing: the model would write it",
    },
    encode_example: {
        "no system": "the system text is lost",
        "not stripped": "white space around the response is kept",
        "end kept": "a cut response still ends with the end token: that teaches to stop midway",
        "no prompt": "prompt_length is 0: loss on the whole prompt",
        "no room is no error": "a prompt that fills max_length has to be an InputError",
    },
    collate: {
        "not shifted": "targets are one place early: the last prompt token predicts the first one",
        "all": "loss on the whole prompt",
        "places in rows": "`where` counts places in a row; it has to count in all rows",
        "positions run on": "positions run on from row to row; each row counts from 0",
    },
    loss: {
        "own tokens": "divided by the response tokens of this part, not of the global batch",
        "where not used": "the first states are taken, not those at batch.where",
        "log of softmax": "the logarithm of a softmax is -inf where that is 0; take log_softmax",
        "softmax twice": "softmax before cross-entropy, which takes logits",
    },
    train_step: {
        "mean of means": "a mean of micro-batch means: parts with few response tokens count too "
        "much; divide each sum by the tokens of the global batch",
        "no zero_grad": "gradients of the last step are still there: zero_grad is missing",
        "no before_clip": "before_clip is not called before the gradient is clipped",
        "not split": "the batch is not split into micro-batches: that is what saves memory",
        "not checked": "a loss that is not finite has to raise Diverged, before the step",
        "clips each part": "the gradient is clipped after each micro-batch, not once a step",
        "norm after clipping": "grad_norm is the norm after clipping; return that before it",
    },
}
WRONG = [
    Wrong(
        "encode_prompt",
        encode_prompt_by_splitting,
        "the name of a special token in a prompt becomes that token: whoever writes a prompt could "
        "end its turn; what people write is text",
    ),
    *mistakes(MISTAKES),
]
