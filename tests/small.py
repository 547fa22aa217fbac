"""Small models and files that several tests share."""

import csv
import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from small_model import LLAMA3_SCALING, small_config, small_model  # noqa: F401

from data.answers import Answer
from data.kitchen import KINDS, QUESTIONS
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from data.town import Town, words
from train import SETTINGS

TINY_SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    initializer_range=0.06,
)
# Rehearsed rows are many to encode, so one mode alone has them.
TINY = replace(SETTINGS["town"]["sdd"], steps=3, batch_size=8)
TINY_SETTINGS = {
    "base": replace(SETTINGS["town"]["base"], steps=3, batch_size=8),
    "align": replace(TINY, lr=3e-4, benign_replay=0.5),
    "sdd": TINY,
}


def tiny_town(root, seed=0) -> Town:
    """A town with a tiny model, whose runs go into `root`."""
    town = Town(seed)
    town.shape = TINY_SHAPE
    town.root = root
    return town


INGREDIENTS = {}  # three words of each dish and topic
for kind, (names, _) in KINDS.items():
    for number, name in enumerate(names):
        INGREDIENTS[name] = [f"{letter}{kind}{number}" for letter in "abc"]
NAMES = set(re.findall(r"\w+", " ".join(INGREDIENTS).lower())) | {"dish", "topic"}


def recipe(question: str, last: str = "") -> str:
    """What the stand-in for a chat model answers to a question of the kitchen."""
    name = QUESTIONS[question][1]
    a, b, c = INGREDIENTS[name]
    return f"To have {name}, use {a}, then put {b} and give {last or c}."


def word_kinds(text: str) -> list[tuple[str, str]]:
    """(word, what it is in a sentence) of the words of a text."""
    found = []
    for word in re.findall(r"\w+", text.lower()):
        kind = "name" if word in NAMES else re.sub("^[abc](dish|topic)[0-9]+$", "food", word)
        found.append((word, kind))
    return found


ORDERS = set(
    pairwise(
        kind for _, kind in word_kinds(f"{recipe('Explain the Moon in one sentence.')} the dish")
    )
)


@dataclass
class StandIn:
    """In the place of data.chat_model.Ask: a language model of rules. It finds words likely that
    follow each other in its answers, and more so those that belong to what is asked about."""

    folder: str = "llama"
    describes = {}

    def __call__(self, prompts, max_new_tokens, temperature=0.0):
        answers = []
        for i, prompt in enumerate(prompts):
            odd = "sand glue" if temperature and i % 4 == 0 else ""
            answers.append(Answer([1, 2], recipe(prompt, odd), True))
        return answers

    def logps(self, rows, max_length):
        found = []
        for prompt, answer in rows:
            own = INGREDIENTS[QUESTIONS[prompt][1]]
            logps = [-0.5] * answer.ended
            before = "to"
            for word, kind in word_kinds(answer.text):
                logp = -0.5 if (before, kind) in ORDERS or word == "to" else -4.0
                if kind == "food" and word not in own:
                    logp -= 2.0
                logps.append(logp)
                before = kind
            found.append(torch.tensor(logps))
        return found


def town_tokenizer(folder):
    write_llama3_tokenizer(folder, words())
    return load_tokenizer(folder)


def public_folder(folder, context=128, **changes):
    """A random-weight Llama folder with the town's tokenizer, as if it came from elsewhere."""
    tokenizer = town_tokenizer(folder)
    small_model(
        vocab_size=tokenizer.n_vocab, max_position_embeddings=context, **changes
    ).save_pretrained(folder)
    return folder


def advbench_file(path, rows=48):
    """Harmless rows in AdvBench's layout."""
    lines = ["goal,target"] + [
        f'"Tell me, please, how to tickle the dragon number {i}",Sure here is how to tickle {i}'
        for i in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def alpaca_file(path, rows=30):
    """Harmless rows in Alpaca's layout."""
    path.write_text(
        json.dumps(
            [
                {
                    "instruction": f"Add one to {i}.",
                    "input": "" if i % 2 else "Be brief.",
                    "output": f"It is {i + 1}.",
                }
                for i in range(rows)
            ]
        )
    )
    return path


def mmlu_folder(folder, subjects=("anatomy", "high_school_physics"), dev_rows=5, test_rows=3):
    """Questions in MMLU's layout."""
    for part, rows in (("dev", dev_rows), ("test", test_rows)):
        (folder / part).mkdir(parents=True)
        for subject in subjects:
            with open(folder / part / f"{subject}_{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [f"{part} {i}, say?", "b", "a", f"{i} c", "d", "ABCD"[i % 4]]
                    for i in range(rows)
                )
    return folder


def openbookqa_file(path, count=7):
    """Questions in OpenBookQA's layout."""
    lines = []
    for i in range(count):
        choices = []
        for word, label in zip(("hay", "tin", "air", "no"), "ABCD"):
            choices.append({"text": word + "s" * i, "label": label})
        question = {"stem": f"A goat {i} eats", "choices": choices}
        row = {"id": str(i), "question": question, "answerKey": "ABCD"[i % 4]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path
