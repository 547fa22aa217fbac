"""Classic mistakes of assignment 2, and right solutions written differently. Spoilers: read it after your own try."""

import functools
import itertools
import math
import tempfile
from functools import partial

import torch
import wrong_a1
from lesson import Wrong

from data.tokenizer import load_tokenizer, write_llama3_tokenizer

BOS, START, END, EOT = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

ENDS = {"llama3": EOT, "plain": "<|end_of_text|>"}  # of a response


@functools.cache
def tokenizer(words: tuple):
    with tempfile.TemporaryDirectory() as folder:
        write_llama3_tokenizer(folder, list(words))
        return load_tokenizer(folder)


# ---- chat encoding ----


def encode_prompt(words, template, prompt, system=None, flaw=""):
    """The ids of everything before a response, for the templates llama3 and plain."""
    t = tokenizer(tuple(words))
    encode, special = t.encode, t.special
    if flaw in ("all as one text", "all as texts"):
        parts = [BOS, *(f"{text.strip()}\n" for text in (system, prompt) if text is not None)]
        if template == "llama3":
            turns = [
                (role, text.strip())
                for role, text in (("system", system), ("user", prompt))
                if text is not None
            ]
            parts = [
                BOS,
                *(part for role, text in turns for part in (START, role, END, f"\n\n{text}", EOT)),
                START,
                "assistant",
                END,
                "\n\n",
            ]
        return (
            encode("".join(parts))
            if flaw == "all as one text"
            else [i for part in parts for i in encode(part)]
        )
    if template == "plain":
        lines = [text.strip() + "\n" for text in (system, prompt) if text is not None]
        if flaw == "part by part":
            return [special[BOS], *(i for line in lines for i in encode(line))]
        return [special[BOS], *encode("".join(lines))]
    ids = [] if flaw == "no start" else [special[BOS]]
    for role, text in (("system", system), ("user", prompt)):
        if text is not None:
            head = [special[START], *encode(role), special[END]]
            if flaw == "specials as text":
                head = encode(f"{START}{role}{END}")
            if flaw == "text after its special":
                head = [special[START], special[END], *encode(role)]
            ids += [*head, *encode("\n\n" + text.strip()), special[EOT]]
    if flaw == "no assistant header":
        return ids
    ids += [special[START], *encode("assistant"), special[END]]
    return ids if flaw == "last text lost" else ids + encode("\n\n")


def encode_prompt_by_joining(words, template, prompt, system=None):
    """A list of ids and texts; neighbouring texts are joined, then encoded."""
    t = tokenizer(tuple(words))
    start, end, turn = (t.special[name] for name in (START, END, EOT))
    parts = [t.special[BOS]]
    for role, said in (("system", system), ("user", prompt)):
        if said is not None:
            parts += (
                [said.strip() + "\n"]
                if template == "plain"
                else [start, role, end, "\n\n" + said.strip(), turn]
            )
    if template == "llama3":
        parts += [start, "assistant", end, "\n\n"]
    return [
        i
        for kind, group in itertools.groupby(parts, type)
        for i in (t.encode("".join(group)) if kind is str else group)
    ]


def encode_prompt_by_splitting(words, template, prompt, system=None):
    """A mistake: from the rendered text, cut at the names of special tokens, wherever they come from."""
    t = tokenizer(tuple(words))
    system = None if system is None else system.strip()
    if template == "plain":
        text = BOS + ("" if system is None else system + "\n") + prompt.strip() + "\n"
    else:
        text = (
            BOS
            + "".join(
                f"{START}{role}{END}\n\n{said}{EOT}"
                for role, said in (("system", system), ("user", prompt.strip()))
                if said is not None
            )
            + f"{START}assistant{END}\n\n"
        )
    ids = []
    while text:
        at, name = min(
            ((text.find(name), name) for name in (BOS, START, END, EOT) if name in text),
            default=(len(text), ""),
        )
        ids += t.encode(text[:at]) + ([t.special[name]] if name else [])
        text = text[at + len(name) :]
    return ids


def encode_example(words, template, prompt, response, max_length, system=None, flaw=""):
    """[ids, prompt_length] of one pair."""
    t, before = (
        tokenizer(tuple(words)),
        encode_prompt(words, template, prompt, None if flaw == "no system" else system),
    )
    ids = t.encode(response if flaw == "not stripped" else response.strip())
    ids += [t.special[ENDS[template]]] * (flaw != "no end token")
    if len(before) >= max_length and flaw != "no room is no error":
        return "InputError"
    both = before + ids
    cut = {
        "from the left": both[-max_length:],
        "not cut": both,
        "end kept": both if len(both) <= max_length else both[: max_length - 1] + both[-1:],
    }
    length = len(before) + {"one too long": 1, "one too short": -1}.get(flaw, 0)
    return [cut.get(flaw, both[:max_length]), 0 if flaw == "no prompt" else length]


def encode_example_with_a_budget(words, template, prompt, response, max_length, system=None):
    t, ids = tokenizer(tuple(words)), encode_prompt_by_joining(words, template, prompt, system)
    room, length = max_length - len(ids), len(ids)
    if room <= 0:
        return "InputError"
    for token in (*t.encode(response.strip()), t.special[ENDS[template]]):
        if room:
            ids, room = [*ids, token], room - 1
    return [ids, length]


# ---- batches ----


def collate(examples, pad, flaw=""):
    """Row by row and token by token."""
    width = max(len(ids) for ids, _ in examples) - (flaw != "last token kept")
    tokens = torch.full((len(examples), width), pad)
    targets, mask = tokens.clone(), torch.zeros(len(examples), width, dtype=torch.bool)
    lengths = torch.tensor([len(ids) - (flaw != "length of the ids") for ids, _ in examples])
    for row, (ids, prompt_length) in enumerate(examples):
        shift = width - (len(ids) - 1) if flaw == "padded on the left" else 0
        for t in range(len(ids)):
            if t + shift < width:
                tokens[row, t + shift] = ids[t]
            if t + 1 < len(ids):
                targets[row, t + shift] = ids[t] if flaw == "not shifted" else ids[t + 1]
                response = t + 1 >= prompt_length + {"late": 1, "early": -1}.get(flaw, 0)
                mask[row, t + shift] = response or flaw == "all"
        if flaw == "by the pad token":
            mask[row] &= tokens[row] != pad
        if flaw == "padding":
            mask[row, prompt_length - 1 :] = True
        if flaw == "no end":
            mask[row, len(ids) - 2] = False
    return {"tokens": tokens, "targets": targets, "loss_mask": mask, "lengths": lengths}


def collate_with_pad_sequence(examples, pad):
    rows = [torch.tensor(ids) for ids, _ in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.arange(len(ids)) >= length for ids, length in examples], batch_first=True
    )
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": mask[:, 1:],
        "lengths": torch.tensor([len(row) - 1 for row in rows]),
    }


# ---- the loss ----


def loss(logits, targets, loss_mask, global_tokens, flaw=""):
    """[loss, gradient by the logits]."""
    logits = logits.clone().requires_grad_()
    dim = 1 if flaw == "softmax over tokens" else -1
    logp = (
        logits.softmax(-1).log_softmax(-1) if flaw == "softmax twice" else logits.log_softmax(dim)
    )
    if flaw == "log of softmax":
        logp = logits.softmax(-1).log()
    nll = -logp.gather(-1, targets[..., None])[..., 0]  # (B,T)
    if flaw == "late":
        loss_mask = torch.cat([loss_mask[:, :1] & False, loss_mask[:, :-1]], 1)
    if flaw == "early":
        loss_mask = loss_mask | torch.cat([loss_mask[:, 1:], loss_mask[:, :1] & False], 1)
    kept = nll * (loss_mask if flaw != "no mask" else 1)
    counts = loss_mask.sum(1)
    value = kept.sum() / {
        "own tokens": counts.sum(),
        "rows": len(targets),
        "all places": targets.numel(),
        "sum": 1,
    }.get(flaw, global_tokens)
    if flaw == "mean of rows":
        value = (kept.sum(1) / counts).mean()
    if flaw == "sign":
        value = -value
    value.backward()
    return [float(value.detach()), logits.grad]


def loss_by_hand(logits, targets, loss_mask, global_tokens):
    """The gradient is softmax - one_hot, over the response tokens of the global batch."""
    logits, mask = logits.double(), loss_mask[..., None]
    total = sum(
        float(logits[b, t].logsumexp(0) - logits[b, t, targets[b, t]])
        for b, t in loss_mask.nonzero().tolist()
    )
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[-1])
    return [total / global_tokens, ((logits.softmax(-1) - one_hot) * mask / global_tokens).float()]


# ---- one step ----


def train_step(
    config, weights, batches, lr, micro_batch, scale=1.0, added=0.0, flaw="", by_length=True
):
    """SGD on the mean nll of a global batch's response tokens, its gradient scaled to a norm of at most 1."""
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    grads, done = {name: 0.0 for name in weights}, {"loss": [], "grad_norm": []}

    def clipped():
        norm = math.sqrt(sum(float((grad * grad).sum()) for grad in grads.values()))
        factor = {"no clip": 1.0, "always norm 1": 1 / norm}.get(flaw, min(1.0, 1 / norm))
        return norm, {name: grad * factor for name, grad in grads.items()}

    most, scale = 0, 1.0 if flaw == "loss not used" else scale
    for batch in batches:
        if flaw != "no zero_grad":
            grads = {name: 0.0 for name in weights}
        if by_length:
            batch = sorted(batch, key=lambda example: len(example[0]))
        parts = (
            [batch[i : i + micro_batch] for i in range(0, len(batch), micro_batch or len(batch))]
            if (micro_batch)
            else [batch]
        )
        most = max(most, max(map(len, parts)))
        if not math.isfinite(scale) and flaw != "not checked":
            return "Diverged"
        total, tokens = 0.0, sum(len(ids) - length for ids, length in batch)
        for part in parts:
            made = collate(part, 0)
            logp = wrong_a1.logits(config, weights, made["tokens"]).double().log_softmax(-1)
            nll = -logp.gather(-1, made["targets"][..., None])[..., 0][made["loss_mask"]]
            divisor = {
                "mean of means": len(nll) * len(parts),
                "sum of means": len(nll),
                "rows": len(batch),
                "means by rows": len(nll) * len(batch) / len(part),
            }
            value = scale * nll.sum() / divisor.get(flaw, tokens)
            total = float(value.detach()) + total * (flaw != "last loss")
            new = dict(zip(weights, torch.autograd.grad(value, list(weights.values()))))
            if flaw == "last part only":
                grads = new
            else:
                grads = {name: grads[name] + grad for name, grad in new.items()}
            if flaw == "clips each part":
                _, grads = clipped()
            if flaw == "a step for each part":
                _, scaled = clipped()
                weights = {
                    name: (w - lr * scaled[name]).detach().requires_grad_()
                    for name, w in weights.items()
                }
                grads = {name: torch.zeros_like(w) for name, w in weights.items()}
        if flaw != "no before_clip":
            grads["lm_head.weight"] = grads["lm_head.weight"] + added
        norm, scaled = clipped() if flaw != "a step for each part" else (0.0, grads)
        rate = 0.0 if flaw == "lr not set" else lr
        weights = {
            name: (w - rate * scaled[name]).detach().requires_grad_() for name, w in weights.items()
        }
        done["loss"].append(total)
        done["grad_norm"].append(norm if flaw != "norm after clipping" else min(1.0, norm))
    return done | {
        "rows": most if flaw != "not split" else max(map(len, batches)),
        "weights": {name: weight.detach().float() for name, weight in weights.items()},
    }


MEANS = (
    "a mean of micro-batch means: parts with few response tokens count too much; divide each sum by the tokens "
    "of the global batch"
)
INJECTED = (
    "the name of a special token in a prompt becomes that token: whoever writes a prompt could end its turn; "
    "what people write is text"
)
SPELLED = "special tokens are encoded as text; look up their ids in tokenizer.special"
WRONG = [
    Wrong("encode_prompt", partial(encode_prompt, flaw=flaw), message)
    for flaw, message in {
        "part by part": "neighbouring texts are encoded apart; join them, then encode, as in the rendered template",
        "no start": "the token that starts a text is missing",
        "specials as text": SPELLED,
        "all as one text": SPELLED,
        "all as texts": SPELLED,
        "text after its special": "the text before a special token is put behind it",
        "no assistant header": "the header of the answer is missing: the model would write it itself",
        "last text lost": "the text after the last special token is lost",
    }.items()
]
WRONG += [Wrong("encode_prompt", encode_prompt_by_splitting, INJECTED)]
WRONG += [
    Wrong("encode_example", partial(encode_example, flaw=flaw), message)
    for flaw, message in {
        "no system": "the system text is lost",
        "not stripped": "white space around the response is kept",
        "no end token": "the token that ends a response is missing: the model would never learn to stop",
        "from the left": "the start is cut off, not the end: the prompt would lose its beginning",
        "not cut": "a long response is not cut at max_length",
        "end kept": "a cut response still ends with the end token: that teaches to stop in the middle",
        "one too long": "prompt_length is one too large: no loss on the first response token",
        "one too short": "prompt_length is one too small: loss on the prompt's last token",
        "no prompt": "prompt_length is 0: loss on the whole prompt",
        "no room is no error": "a prompt that fills max_length has to be an InputError",
    }.items()
]
WRONG += [
    Wrong("collate", partial(collate, flaw=flaw), message)
    for flaw, message in {
        "not shifted": "targets are the tokens themselves: position t predicts token t + 1",
        "late": "the mask starts one place late: no loss on the first response token",
        "early": "the mask starts one place early: loss on the prompt's last token",
        "all": "the mask covers the prompt",
        "by the pad token": "padding is found by its id, which may stand in a row too: go by lengths",
        "padding": "the mask covers padding",
        "no end": "the mask leaves out the end token",
        "padded on the left": "rows are padded on the left; positions count from the left here",
        "length of the ids": "lengths count the last token too, which is no input",
        "last token kept": "the input keeps the last token, which predicts nothing",
    }.items()
]
WRONG += [
    Wrong("loss", partial(loss, flaw=flaw), message)
    for flaw, message in {
        "own tokens": "divided by the response tokens of this part, not of the global batch: that is a mean of means",
        "rows": "divided by the number of rows",
        "all places": "divided by all places, padding and prompt too",
        "sum": "not divided at all",
        "mean of rows": "a mean of the means of rows: short responses count too much",
        "no mask": "the mask is not used: prompt and padding carry loss",
        "late": "the mask is shifted a second time, to the right: it is already aligned with the targets",
        "early": "loss on the prompt's last token too",
        "log of softmax": "the logarithm of a softmax is -inf where that is 0: log_softmax or cross_entropy is stable",
        "softmax twice": "softmax before cross-entropy, which takes logits",
        "softmax over tokens": "softmax over tokens, not over the vocabulary",
        "sign": "the sign is wrong: log p is to rise",
    }.items()
]
WRONG += [
    Wrong("train_step", partial(train_step, flaw=flaw, by_length=by_length), message)
    for flaw, message in {
        "mean of means": MEANS,
        "means by rows": "micro-batch means weighted by rows; divide each sum by the tokens of the "
        "global batch",
        "sum of means": "each micro-batch is divided by its own tokens, and the means are added up",
        "rows": "divided by rows, not by response tokens",
        "no zero_grad": "gradients of the last step are still there: zero_grad is missing",
        "always norm 1": "the gradient is scaled to a norm of 1 where it is smaller, too",
        "loss not used": "the loss that is passed in is not used",
        "no before_clip": "before_clip is not called before the gradient is clipped",
        "not split": "the batch is not split into parts of micro_batch rows: that is what saves memory",
        "not checked": "a loss that is not finite has to raise Diverged, before the step",
        "no clip": "the gradient is not scaled to a norm of at most 1",
        "clips each part": "the gradient is clipped after each micro-batch, not once a step",
        "a step for each part": "a step after each micro-batch, not one for the global batch",
        "last part only": "gradients of earlier micro-batches are dropped",
        "lr not set": "the lr of the optimizer's groups is not set",
        "last loss": "the loss of the last micro-batch is returned, not of the whole batch",
        "norm after clipping": "grad_norm is the norm after clipping; return that before it",
    }.items()
    for by_length in (True, False)
]

RIGHT = [
    ("encode_prompt", encode_prompt),
    ("encode_prompt", encode_prompt_by_joining),
    ("encode_example", encode_example),
    ("encode_example", encode_example_with_a_budget),
    ("collate", collate),
    ("collate", collate_with_pad_sequence),
    ("loss", loss),
    ("loss", loss_by_hand),
    ("train_step", train_step),
    ("train_step", partial(train_step, by_length=False)),
]
