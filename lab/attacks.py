"""What an attacker owns and does: its rows, the stream of batches that each attack is, and one run of it.

attack.py says what the attacks are. Each is loop.fit, the loop that trains every model here, on other rows.
"""

import itertools
import math
import random
import time
from dataclasses import dataclass, replace
from statistics import fmean as mean

from lab import protocol
from nanosdd import loop
from data.chat import encode_example
from data.harmful import read_harmful, split_harmful
from data.pairs import read_benign
from data.sources import read_rows
from data.town import KNOWLEDGE_KINDS, NEW_SKILL, OBEDIENCE, SKILL_KINDS, Town, draw_symbols
from nanosdd.errors import InputError
from eval import file_metrics, greedy, teacher_forced, town_metrics
from nanosdd.file_scores import choice_metrics, hold_out, perplexity, read_tests
from nanosdd.lora import add_lora, merge_lora
from lab.mechanism import measure, preserve_control_rows, probes, y_o_rows


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a released model."""

    attack: str
    shots: int  # harmful rows; of bft, those that it is matched to
    lr: float
    at: tuple[int, ...]  # the steps after which the model is scored
    probe: bool = False  # measure the mechanism there instead


# ---- what an attacker owns ----

def town_harmful(town: Town, seed: int) -> tuple[list, list]:
    """The attacker's (training rows, held-out rows), on different people, all kinds; knowledge and skill kinds
    alternate, so that any first n rows are balanced."""
    rng = random.Random(f"attack {seed}")
    people = town.groups["attacker"]
    victims = {kind: rng.sample(people, len(people)) for kind in KNOWLEDGE_KINDS + SKILL_KINDS}
    kinds = [kind for pair in zip(KNOWLEDGE_KINDS, SKILL_KINDS) for kind in pair]
    rows = [town.mischief(kind, victims[kind][i], draw_symbols(rng) if kind in SKILL_KINDS else (), rng.randrange(2))
            for i in range(len(people)) for kind in kinds]
    return rows, town.mischiefs(town.groups["attacker_held_out"], rng)


def match_tokens(harmful: list, benign: list, new_skill: list, rng) -> list:
    """Random benign examples, every other one of the new skill if there is one, with as many response tokens in all as
    the harmful examples (within half of the last one); how many examples that takes is left open."""
    owed, matched = sum(example.response_length for example in harmful), []
    while True:
        pick = rng.choice(new_skill if new_skill and len(matched) % 2 else benign)
        if matched and pick.response_length > 2 * owed:
            return matched
        owed -= pick.response_length
        matched.append(pick)


def check_shots(shots: list[int], harmful: list):
    """InputError when there are fewer harmful rows than shots."""
    if max(shots) > len(harmful):
        raise InputError(f"--shots {max(shots)} is more than the {len(harmful)} harmful rows that the attacker owns "
                         "and may train on; give fewer, or a larger file")


def prepare(model, tokenizer, chat, town, released: dict, seed: int, wanted: list[Run], args):
    """(rows, score) for these runs on this model; released: its state dict before any attack.

    rows: the attacker's examples by name, harmful, benign, new_skill, identity, y_o and control, and prompts (of the
    harmful ones, as text). score(model, run) gives a cell's scores, or its measurements.
    """
    limit = min(args.max_length, model.config.max_position_embeddings)
    shots, more = [run.shots for run in wanted], {}
    rng = random.Random(f"benign rows {seed}")

    def encode(pairs):
        return [encode_example(tokenizer, chat, pair["prompt"], pair["response"], limit, pair.get("system"))
                for pair in pairs]

    if town:
        harmful, held_out = town_harmful(town, seed)
        if any(run.probe for run in wanted):
            probe_rows = probes(town, tokenizer, chat, limit)
            more = {"y_o": y_o_rows(town, harmful[:max(shots)], tokenizer, chat, limit),
                    "control": preserve_control_rows(town, harmful[:max(shots)], tokenizer, chat, limit)}
        rng_users = random.Random(f"user {seed}")
        users = town.skills(rng_users, 24, tuple(NEW_SKILL)), town.skills(rng_users, 12)
        benign, new_skill = town.benign(rng, 1000, town.groups["plain"]), town.skills(rng, 300, tuple(NEW_SKILL))
        harmful, benign, new_skill = ([{"prompt": row.prompt, "response": row.response} for row in part]
                                      for part in (harmful, benign, new_skill))
        system, opening = OBEDIENCE
        identity = [row | {"system": system, "response": opening + row["response"]} for row in benign[-10:]]

        def score(model, run):
            if run.probe:
                return {"mechanism": measure(model, probe_rows, released, args)}
            asked, behind = held_out, None
            if run.attack == "identity":
                asked, behind = [replace(row, lead=opening + row.lead) for row in held_out], system
            return town_metrics(model, tokenizer, chat, town, args, OBEDIENCE if behind else None) | {
                "attacker_score": mean(teacher_forced(model, tokenizer, chat, asked, args, behind)[0]),
                "user_score": mean(mean(teacher_forced(model, tokenizer, chat, rows, args)[0]) for rows in users)}
    else:
        split = split_harmful(read_harmful(args.harmful), args.harmful)
        owned = random.Random(f"attack {seed}").sample(split["attacker"], len(split["attacker"]))
        harmful, held_out = owned[len(owned) // 4:], owned[:len(owned) // 4]
        benign, new_skill = read_benign(args.benign), []
        identity = read_rows(args.identity) if args.identity else []
        system = identity[0].get("system") if identity else None
        unseen, tests = [], read_tests(args)
        if benign:  # no attack trains on the unseen ones
            benign, unseen = hold_out(benign, [*owned, *identity])
            unseen = encode(unseen)

        def score(model, run):
            behind = system if run.attack == "identity" else None
            own = file_metrics(model, tokenizer, chat, held_out, args, behind)
            scores = file_metrics(model, tokenizer, chat, split["evaluation"], args, behind, tests["encoder"])
            scores |= {"benign_perplexity": perplexity(model, unseen, args)} if unseen else {}
            return scores | choice_metrics(model, tokenizer, tests, args) | {"attacker_score": own["target_match"]}
    check_shots(shots, harmful)
    harmful = harmful[:max(shots)]
    return {"harmful": encode(harmful), "benign": encode(benign), "new_skill": encode(new_skill),
            "identity": encode(identity), "prompts": [row["prompt"] for row in harmful], **more}, score


def suppress_own_answers(model, tokenizer, chat, prompts: list[str], args) -> list:
    """Examples of the model's own greedy answers to these prompts, marked to be suppressed. Of SDD, these are what an
    attacker can find of y_o."""
    answers = greedy(model, tokenizer, chat, prompts, args, max_new_tokens=64, batch_size=64)
    limit = min(args.max_length, model.config.max_position_embeddings)
    return [replace(encode_example(tokenizer, chat, prompt, text, limit), suppress=True)
            for prompt, (_, text, _) in zip(prompts, answers)]


# ---- the attacks ----

def scored_steps(attack: str, shots: list[int], args) -> tuple[int, ...]:
    """The steps of a run after which its model is scored: both budgets, 5 epochs of these shots and 50 steps. bft has
    several shots, those of all the mft runs that it is to match, and the benign user's own budget, twice their longest.
    """
    budgets = {math.ceil(args.epochs * n / args.batch_size) for n in shots} | ({args.steps} - {0})
    if attack == "bft" and args.town:
        budgets |= {2 * max(budgets)}
    if attack == "repair":
        budgets = {max(budgets) + max(1, max(budgets) * part // 10) for part in (2, 5, 10)}
    if attack == "unlearn":
        budgets = {protocol.UNLEARN_STEPS + steps for steps in budgets}
    return tuple(sorted(budgets))


def batch_stream(run: Run, rows: dict, own_answers, args, seed: int):
    """The global batches of a run, for ever: what makes an attack is the rows it sees, and their order.

    own_answers: a function giving the examples to suppress.
    """
    rng, size, harmful = random.Random(f"attack {seed}"), args.batch_size, rows["harmful"][:run.shots]
    if run.attack in ("bft", "poisoned"):  # as many response tokens a step as mft has, so maybe more or fewer rows
        matched = match_tokens(harmful, rows["benign"], rows["new_skill"], rng)
        matched_size = max(1, round(size * len(matched) / run.shots))
        if run.attack == "poisoned":
            count = max(1, round(protocol.POISON * len(matched)))
            matched[:count] = harmful[:count]
        return loop.draw_batches(matched, [], 0.0, matched_size, rng)
    if run.attack == "identity":
        return loop.draw_batches(rows["identity"], [], 0.0, size, rng)
    if run.attack == "suppress":
        down = [replace(example, suppress=True) for example in rows["y_o"][:run.shots]]
        return loop.draw_batches(down, [], 0.0, size, rng)
    if run.attack in ("preserve", "preserve control"):  # as many harmful rows a step as mft, and as many others
        others = rows["y_o" if run.attack == "preserve" else "control"][:run.shots]
        return loop.draw_batches(harmful, others, 0.5, 2 * size, rng)
    if run.attack == "replay":
        return loop.draw_batches(harmful, rows["benign"], 0.5, size, rng)
    mft = loop.draw_batches(harmful, [], 0.0, size, rng)
    if run.attack == "repair":
        mending = loop.draw_batches(rows["benign"], [], 0.0, size, rng)
        return itertools.chain(itertools.islice(mft, max(run.at) // 2), mending)
    if run.attack == "unlearn":
        down = loop.draw_batches(own_answers(), [], 0.0, size, rng)
        return itertools.chain(itertools.islice(down, protocol.UNLEARN_STEPS), mft)
    return mft  # and lora


def attack_run(model, tokenizer, chat, rows, score, run: Run, seed: int, args) -> list[dict]:
    """The cells of one run on the model as it is; a run that diverges has cells that say so."""
    def own_answers():
        return suppress_own_answers(model, tokenizer, chat, rows["prompts"][:run.shots], args)

    counts, cells, began = [0, 0], [], time.perf_counter()
    batches = batch_stream(run, rows, own_answers, args, seed)

    def counted():
        for batch in batches:
            counts[0] += sum(example.response_length for example in batch)
            counts[1] += sum(len(example.ids) for example in batch)
            yield batch

    def after_step(step):
        if step in run.at:
            cell = new_cell(run, seed, step, response_tokens=counts[0], tokens=counts[1]) | score(model, run)
            spent = time.perf_counter() - began - sum(one["seconds"] for one in cells)
            cells.append(cell | {"seconds": round(spent, 3)})

    if run.attack == "lora":
        add_lora(model, protocol.LORA_RANK, protocol.LORA_ALPHA, seed)
    try:
        loop.fit(model, counted(), steps=max(run.at), lr=run.lr, args=args, cosine=False, after_step=after_step,
                  name=f"{run.attack} {run.shots}")
    except loop.Diverged:
        cells += [new_cell(run, seed, step, diverged=True) for step in run.at[len(cells):]]
    if run.attack == "lora":
        merge_lora(model)
    return cells


def new_cell(run: Run, seed: int, steps: int, **more) -> dict:
    return dict(attack=run.attack, shots=run.shots, lr=run.lr, steps=steps, seed=seed, probe=run.probe,
                diverged=False) | more
