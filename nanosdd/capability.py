"""MMLU and OpenBookQA by likelihood: no answer is written, the choice that the model finds likeliest is its answer.

Texts are raw, without a chat template, after the tokenizer's start-of-text token where it has one (as `plain` in
data/chat.py). MMLU's prompt is that of Hendrycks et al. (2021), but for the two spaces which their code writes before
the subject's name: one here, as in most harnesses.
"""

import string
from collections import Counter, defaultdict
from pathlib import Path
from statistics import NormalDist, fmean

import torch
from tqdm import tqdm

from data.chat import Example, collate
from data.sources import read_questions
from nanosdd.generate import KVCache
from nanosdd.device import autocast
from nanosdd.errors import InputError

SUBJECTS = 57  # of MMLU
LETTERS = string.ascii_uppercase
START_TOKENS = ("<|begin_of_text|>", "<s>", "<|endoftext|>")  # the first that the tokenizer has
CACHE_TOKENS = 16384  # in a batch at most: a 7B model without grouped heads needs 1 MB for each in fp32


# --- questions and prompts ---

def read_mmlu(folder, shots: int) -> dict[str, tuple[list[dict], list[dict]]]:
    """subject -> (the first `shots` questions of dev/SUBJECT_dev.csv, all questions of test/SUBJECT_test.csv).

    InputError when test/ holds no or too many subjects, or a dev file fewer than `shots` questions.
    """
    files = sorted((Path(folder) / "test").glob("[!.]*_test.csv"))
    if not 0 < len(files) <= SUBJECTS:
        raise InputError(f"{Path(folder) / 'test'} holds {len(files)} files SUBJECT_test.csv, MMLU has {SUBJECTS}; "
                         "give the folder of its release, with test/ and dev/ inside")
    found = {}
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        dev = Path(folder) / "dev" / f"{subject}_dev.csv"
        examples = read_questions(dev) if shots else []
        if len(examples) < shots:
            raise InputError(f"{dev} holds {len(examples)} questions for {shots} shots; fetch it again or lower "
                             "--mmlu-shots")
        found[subject] = examples[:shots], read_questions(file)
    return found


def mmlu_prompt(subject: str, examples: list[dict], question: dict) -> str:
    """The subject, the examples with their answers, and the question up to "Answer:"."""
    def ask(row):
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"]))
        return f"{row['question']}\n{choices}Answer:"

    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return about + "".join(f"{ask(row)} {LETTERS[row['answer']]}\n\n" for row in examples) + ask(question)


def encode_item(tokenizer, context: str, continuations: list[str]) -> tuple[list[int], list[list[int]]]:
    """(context ids, the ids of each continuation), from the ids of the whole texts.

    The context's ids are those that it has in all of these and alone. Where a tokenizer joins its last characters with
    what follows they are fewer, and every continuation begins with the same characters more.
    """
    start = [tokenizer.special[name] for name in START_TOKENS if name in tokenizer.special][:1]
    wholes = [start + tokenizer.encode(context + text) for text in continuations]
    border = common_length([start + tokenizer.encode(context), *wholes])
    return wholes[0][:border], [whole[border:] for whole in wholes]


def common_length(sequences: list[list[int]]) -> int:
    """How many ids all sequences begin with alike."""
    first, last = min(sequences), max(sequences)  # in alphabetical order, so what these two share all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))


def encode_fitting(tokenizer, name: str, contexts, continuations: list[str], limit: int):
    """(item, how many contexts were passed over): of the first context with which no row has over `limit` tokens."""
    for skipped, context in enumerate(contexts):
        ids, endings = encode_item(tokenizer, context, continuations)
        tokens = len(ids) + max(map(len, endings)) - 1  # the last token is predicted, not read
        if tokens <= limit:
            return (ids, endings), skipped
    raise InputError(f"{name}: {tokens} tokens do not fit this model's context of {limit}; evaluate a model with a "
                     "longer context")


# --- likelihoods ---

@torch.no_grad()
def log_likelihoods(model, items, args, batch_size=64, name="") -> list[list[float]]:
    """log p(continuation | context) in nats, summed over the continuation's tokens, for each continuation of each item.

    items: a list of (context ids, [continuation ids, ...]), none of them empty. What all contexts begin with, such as a
    subject's examples, is computed once and its keys and values are copied to the rows of every batch. A row is the
    rest of a context and a continuation without its last token; rows that are the same (one context, continuations of
    one token) are computed once. args: device and dtype. name: of the progress bar.
    """
    contexts = [context for context, _ in items]
    if not all(contexts):
        raise InputError("a question begins with no token of its own; use a tokenizer with a start-of-text token")
    shared = min(common_length(contexts), min(map(len, contexts)) - 1)  # each row needs a token to predict from
    rows = defaultdict(list)  # (rest of the context, what is read of the continuation): [(item, continuation), ...]
    for i, (context, continuations) in enumerate(items):
        for j, continuation in enumerate(continuations):
            rows[tuple(context[shared:]), tuple(continuation[:-1])].append((i, j))
    order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]), reverse=True)  # neighbours need little padding
    size = shared + sum(map(len, order[0]))
    weight = model.lm_head.weight
    prefix = KVCache(model.config, 1, size, weight.device, weight.dtype)
    if shared:
        with autocast(args):
            model.hidden(torch.tensor([contexts[0][:shared]], device=weight.device), cache=prefix)
        prefix.lengths, prefix.longest = prefix.lengths + shared, shared
    found = [[0.0] * len(continuations) for _, continuations in items]
    step = max(1, min(batch_size, CACHE_TOKENS // size))
    for start in tqdm(range(0, len(order), step), desc=name, leave=False, disable=None):
        part = order[start:start + step]
        # The last token of an Example is not read, and the loss mask is true where a continuation is predicted.
        batch = collate([Example([*rest, *read, 0], len(rest)) for rest, read in part]).to(weight.device)
        cache = prefix.take(torch.zeros(len(part), dtype=torch.long, device=weight.device))
        with autocast(args):
            hidden = model.hidden(batch.tokens, positions=batch.loss_mask, cache=cache)  # (N,C)
        # Outside of autocast the head computes in the weights' fp32: in bf16 many logits would tie.
        log_p = model.lm_head(hidden).float().log_softmax(dim=-1)  # (N,V)
        for row, row_log_p in zip(part, log_p.split(batch.loss_mask.sum(1).tolist())):  # (n,V)
            for i, j in rows[row]:
                targets = torch.tensor(items[i][1][j], device=weight.device)[:, None]  # (n,1)
                found[i][j] = float(row_log_p.gather(1, targets).sum())
    if any(score != score for of_item in found for score in of_item):  # NaN would pass for the answer A
        raise InputError("the model's likelihoods are not numbers (NaN): broken weights; train or fetch it again")
    return found


# --- scores ---

def wilson(hits: int, n: int) -> list[float]:
    """Wilson's (1927) 95% interval of a share s = hits/n of independent draws, as two fractions: all p for which
    |s - p| <= z sqrt(p (1-p) / n), that is (s + z^2/2n -+ z sqrt(s (1-s) / n + z^2/4n^2)) / (1 + z^2/n), z = 1.96."""
    z, share = NormalDist().inv_cdf(0.975), hits / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def count_right(scores: list[list[float]], questions: list[dict]) -> int:
    """How many questions have the largest score at the right answer. Of equal scores the first one counts."""
    return sum(of_row.index(max(of_row)) == row["answer"] for of_row, row in zip(scores, questions))


def baselines(questions: list[dict]) -> dict:
    """What needs no reading, as fractions right: a uniform guess, always the one best letter, the choice of fewest
    characters (of k equals, each a k-th)."""
    letter, hits = Counter(LETTERS[row["answer"]] for row in questions).most_common(1)[0]
    shortest = []
    for row in questions:
        lengths = [len(choice) for choice in row["choices"]]
        shortest.append((lengths[row["answer"]] == min(lengths)) / lengths.count(min(lengths)))
    return {"chance": fmean(1 / len(row["choices"]) for row in questions), "best_letter": letter,
            "best_letter_accuracy": hits / len(questions), "shortest_choice": fmean(shortest)}


def mmlu_metrics(model, tokenizer, subjects: dict, shots: int, args) -> dict:
    """Scores of read_mmlu's questions, as fractions of all questions, each counting the same. A question that does not
    fit the model's context has as many examples fewer, from the last, as it takes (fewer_shots: how many questions);
    InputError when it does not fit without any. subjects: the accuracy of each, and its number of questions."""
    hits, fewer, per_subject = 0, 0, {}
    for number, (subject, (examples, questions)) in enumerate(subjects.items(), 1):
        items = []
        for row in questions:
            prompts = (mmlu_prompt(subject, examples[:k], row) for k in range(shots, -1, -1))
            item, skipped = encode_fitting(tokenizer, f"MMLU {subject}, row {row['row']}", prompts,
                                           [f" {letter}" for letter, _ in zip(LETTERS, row["choices"])],
                                           model.config.max_position_embeddings)
            items.append(item)
            fewer += skipped > 0
        scores = log_likelihoods(model, items, args, name=f"{number}/{len(subjects)} {subject}")
        right = count_right(scores, questions)
        per_subject[subject] = {"questions": len(questions), "accuracy": right / len(questions)}
        hits += right
    every = [row for _, questions in subjects.values() for row in questions]
    name = "MMLU" if len(subjects) == SUBJECTS else f"{len(subjects)} of MMLU's {SUBJECTS} subjects"
    return {"name": name, "shots": shots, "questions": len(every), "accuracy": hits / len(every),
            "interval": wilson(hits, len(every)), **baselines(every), "fewer_shots": fewer, "subjects": per_subject}


def openbookqa_metrics(model, tokenizer, questions: list[dict], args) -> dict:
    """Scores of OpenBookQA's questions, as fractions right: the choice as the end of the stem's sentence, by its summed
    log-likelihood (accuracy), and by that over its number of characters (accuracy_per_character). No examples."""
    items = [encode_fitting(tokenizer, f"OpenBookQA, row {row['row']}", [row["question"]],
                            [f" {choice}" for choice in row["choices"]], model.config.max_position_embeddings)[0]
             for row in questions]
    scores = log_likelihoods(model, items, args, name="OpenBookQA")
    normalised = [[score / len(choice) for score, choice in zip(row_scores, row["choices"])]
                  for row_scores, row in zip(scores, questions)]
    n, hits, hits_normalised = len(questions), count_right(scores, questions), count_right(normalised, questions)
    return {"name": "OpenBookQA", "shots": 0, "questions": n, "accuracy": hits / n, "interval": wilson(hits, n),
            "accuracy_per_character": hits_normalised / n, "interval_per_character": wilson(hits_normalised, n),
            **baselines(questions)}
