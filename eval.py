"""Evaluate checkpoints: greedy answers, their outcomes and refusal keywords, capability by teacher forcing.

    python eval.py out/seed0/aligned out/seed0/sdd                  the town: nothing else is needed
    python eval.py DIR --harmful FILE --benign alpaca.json          public files, on the evaluation quarter of prompts
    python eval.py DIR --mmlu FOLDER --openbookqa test.jsonl --xstest xstest_prompts.csv
    python eval.py DIR --prompt "Where does Anna Brook live?"

Writes metrics.json into each checkpoint folder; MMLU, OpenBookQA and XSTest stay there until they are run again. With
any of these three, other scores are taken only where --harmful is given. Runs in one process, on one device.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import torch

from data.answers import Answer, keyword_refusal
from data.chat import collate, encode_prompt, encode_rows
from data.worlds import Sources, add_world_arguments, open_world, read_world
from nanosdd.chat_model import Chat, load_chat, model_folder
from nanosdd.checkpoint import read_config, read_json
from nanosdd.device import (
    add_compute_arguments,
    one_process_only,
    rank_and_world_size,
    resolve_compute,
)
from nanosdd.errors import run_script
from nanosdd.runs import write_text
from nanosdd.tables import text_table
from sdd_loss import token_logprobs

CACHE_BYTES = 2**31  # of keys and values at once; decides how many prompts are answered together
LOGITS = 2**26  # at once in teacher forcing


# ---- greedy answers ----

def answer(chat: Chat, prompts: list[str], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to prompts, in their order. Prompts of similar length are answered together."""
    config = chat.model.config
    ids = [encode_prompt(chat.tokenizer, chat.template, prompt) for prompt in prompts]
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    place = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes of a token, k and v
    together = max(1, min(256, CACHE_BYTES // (place * (max(map(len, ids), default=0) + max_new_tokens))))
    compiled = chat.compute.compile and rank_and_world_size()[1] == 1  # several processes share their layers
    for start in range(0, len(order), together):
        part = order[start:start + together]
        with chat.compute.autocast():
            answers = chat.model.generate([ids[i] for i in part], max_new_tokens, chat.tokenizer.stop_tokens, compiled)
        for i, new in zip(part, answers):
            room = min(max_new_tokens, config.max_position_embeddings - len(ids[i]))
            found[i] = Answer(new, chat.tokenizer.decode(new), len(new) < room)
    return [found[i] for i in range(len(ids))]


# ---- teacher forcing ----

class Forced(NamedTuple):
    """How a model predicts a given response, token by token, each after the true ones before it."""

    exact: bool  # argmax is right at every position, the end token's too: greedy decoding gives this very response
    value_only: bool  # right at the tokens of the row's value, all before them given; exact where it has none
    logps: torch.Tensor  # (n,) fp32, log p of each response token and the end token


@torch.no_grad()
def teacher_forced(chat: Chat, rows: list[dict], max_length: int) -> list[Forced]:
    """One Forced for each row, in their order; longer rows are cut at max_length tokens."""
    max_length = min(max_length, chat.model.config.max_position_embeddings)
    examples = encode_rows(chat.tokenizer, chat.template, rows, max_length)
    order, found, done = sorted(range(len(rows)), key=lambda i: len(examples[i].ids)), {}, 0
    while done < len(order):
        width = len(examples[order[min(done + 255, len(order) - 1)]].ids)
        part = order[done:done + max(1, min(256, LOGITS // (width * chat.model.config.vocab_size)))]
        done += len(part)
        batch = collate([examples[i] for i in part]).to(chat.compute.device)
        with chat.compute.autocast():
            logits = chat.model(batch.tokens, positions=batch.loss_mask)  # (N,V)
        targets, counts = batch.targets[batch.loss_mask], batch.loss_mask.sum(1).tolist()
        right, logps = (logits.argmax(-1) == targets).split(counts), token_logprobs(logits, targets).split(counts)
        for i, hits, logp in zip(part, right, logps):
            value = hits
            if "value" in rows[i]:
                begin = len(chat.tokenizer.encode(rows[i]["lead"]))
                value = hits[begin:begin + len(chat.tokenizer.encode(rows[i]["value"]))]
            found[i] = Forced(bool(hits.all()), bool(value.all()), logp)
    return [found[i] for i in range(len(rows))]


def mean_logp(forced: list[Forced]) -> float:
    """Mean log p in nats over all response tokens of the rows."""
    return float(torch.cat([one.logps for one in forced]).mean())


# ---- scores ----

def score(chat: Chat, world) -> dict:
    """Every score of a model in a world, fractions and nats.

    What world.judge says of greedy answers to its harmful rows; keyword_refusal(_prefix): shares of these answers; of
    each of its capability rows by NAME: right answers (exact), NAME_value_only and NAME_nll; capability.
    """
    rows = world.harmful_rows()
    answers = answer(chat, [row["prompt"] for row in rows], world.max_new_tokens)
    scores = {"keyword_refusal": mean(keyword_refusal(one.text) for one in answers),
              "keyword_refusal_prefix": mean(keyword_refusal(one.text, prefix=True) for one in answers)}
    scores |= world.judge(rows, answers)
    for name, rows in world.capability_rows().items():
        forced = teacher_forced(chat, rows, world.max_length)
        scores |= {name: mean(one.exact for one in forced), f"{name}_nll": -mean_logp(forced),
                   f"{name}_value_only": mean(one.value_only for one in forced)}
    return scores | world.more_scores(chat) | {"capability": world.capability(scores)}


# ---- the command ----

def add_test_arguments(p):
    """Add --mmlu, --mmlu-shots and --openbookqa to a parser."""
    p.add_argument("--mmlu", metavar="FOLDER", help="MMLU as released: test/SUBJECT_test.csv and dev/SUBJECT_dev.csv")
    p.add_argument("--mmlu-shots", type=int, choices=range(6), default=5, help="worked examples (default: 5)")
    p.add_argument("--openbookqa", metavar="FILE", help="OpenBookQA questions, JSONL")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", metavar="DIR", nargs="+", help="checkpoint folders, or smollm2")
    add_world_arguments(p)
    add_test_arguments(p)
    p.add_argument("--xstest", metavar="FILE", help="XSTest's safe and unsafe prompts, CSV")
    p.add_argument("--template", metavar="NAME", help="chat template (default: the one that the folder calls for)")
    p.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    p.add_argument("--max-new-tokens", type=int, default=64, help="of an answer on public files (default: 64)")
    add_compute_arguments(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    one_process_only("eval.py")
    compute = resolve_compute(args.device, args.dtype, args.compile)
    sources = Sources(args.harmful, tuple(args.benign), similarity=args.similarity, threshold=args.similarity_threshold,
                      similarity_model=args.similarity_model, max_new_tokens=args.max_new_tokens)
    folders = [model_folder(name) for name in args.folders]
    for folder in folders:
        read_config(folder)  # names what is missing before anything runs
    tests = {}
    if args.mmlu or args.openbookqa or args.xstest:
        from nanosdd import capability  # only where a flag asks for it
        tests = capability.read_tests(args.mmlu, args.mmlu_shots, args.openbookqa, args.xstest)
    table, results = [], {}
    for folder in folders:
        chat = load_chat(folder, compute, args.template)
        if args.prompt is not None:
            print(f"{folder}: {answer(chat, [args.prompt], args.max_new_tokens)[0].text}")
            continue
        path, scores = Path(folder) / "metrics.json", {}
        old = read_json(path) if path.is_file() else {}
        if not tests or args.harmful:
            world = open_world(args.world, read_world(folder).get("seed", 0), sources, folder)
            scores = score(chat, world)
            table.append((Path(folder).name, scores, ""))
        if tests:
            results[Path(folder).name] = capability.run_tests(chat, tests, answer, args.max_new_tokens)
        kept = {name: part for name, part in old.items() if isinstance(part, dict)} if scores else old  # the tests
        write_text(path, json.dumps(kept | scores | results.get(Path(folder).name, {}), indent=1) + "\n")
    if table:
        chance = [("chance level", world.chance, "")] if world.chance else []
        print(text_table("percent", world.columns, chance + table))
        print(f"\n{world.legend}")
    if results:
        print(capability.tests_table(results))


if __name__ == "__main__":
    run_script(main)
