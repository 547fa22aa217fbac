"""One step, the learning rate, and a run: what is computed, written, reused and refused."""

import copy
import itertools
import json
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import TINY_SETTINGS, TINY_SHAPE, advbench_file, alpaca_file, public_folder, small_model

import train
from data.chat import Example, draw_batches, encode_rows
from data.files import Files
from data.town import Town
from data.worlds import Sources
from model import Llama
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from sdd_loss import sdd_loss, token_logprobs
from train import Diverged, Settings, learning_rate, train_step


def random_examples(count=11, seed=1):
    """Of unequal lengths, for `small_model`."""
    rng = random.Random(seed)
    return [
        Example([rng.randrange(1, 89) for _ in range(5 + rng.randrange(12))], 1 + i % 4)
        for i in range(count)
    ]


# ---- one step ----


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_a_step_is_a_plain_pytorch_step_whatever_the_micro_batch(micro_batch):
    model, examples = small_model(), random_examples()
    plain = copy.deepcopy(model)
    total = sum(example.response_length for example in examples)
    nll = torch.zeros(())
    for example in examples:
        log_p = plain(torch.tensor([example.ids]))[0].log_softmax(-1)  # (T,V)
        for place in range(example.prompt_length, len(example.ids)):
            nll = nll - log_p[place - 1, example.ids[place]]
    (nll / total).backward()
    norm, nll = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)), float(nll.detach())
    torch.optim.SGD(
        plain.parameters(), lr=0.5
    ).step()  # in AdamW's first step neither scale nor clipping would show

    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    done = train_step(model, optimizer, examples, 0.5, Compute(micro_batch=micro_batch))
    assert norm > 1.5  # or clipping is not tested
    assert done == {
        "loss": pytest.approx(nll / total, rel=1e-5),
        "grad_norm": pytest.approx(norm, rel=1e-4),
        "response_tokens": total,
        "tokens": sum(len(example.ids) for example in examples),
    }
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-6), name
        assert one.grad is None, name


def test_another_loss_is_summed_over_micro_batches(cpu):
    def loss(model, batch, global_tokens):
        return (model.model.norm.weight**2).sum() * batch.loss_mask.sum() / global_tokens

    model = small_model()
    weight, head = model.model.norm.weight.detach().clone(), model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters())
    done = train_step(model, optimizer, random_examples(), 0.3, replace(cpu, micro_batch=3), loss)
    assert done["loss"] == pytest.approx(float(weight.square().sum()), rel=1e-5)
    assert done["grad_norm"] == pytest.approx(2 * float(weight.norm()), rel=1e-5)
    assert torch.allclose(model.model.norm.weight, weight - 0.3 * weight / weight.norm(), atol=1e-6)
    assert torch.equal(model.lm_head.weight, head)


def test_before_clip_adds_to_the_gradient_that_is_clipped(cpu):
    def push(model):
        model.model.norm.weight.grad[5] += 1000.0

    model = small_model()
    before = model.model.norm.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters())
    done = train_step(model, optimizer, random_examples(), 0.3, cpu, before_clip=push)
    moved = before - model.model.norm.weight
    assert done["grad_norm"] == pytest.approx(1000, rel=0.01)
    assert float(moved[5].detach()) == pytest.approx(0.3, rel=0.01) and moved.abs().sum() < 0.35


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight_and_leaves_no_gradient(cpu, value):
    model = small_model()
    before, optimizer = copy.deepcopy(model.state_dict()), make_optimizer(model, cpu)
    with pytest.raises(Diverged, match="lower --lr"):
        train_step(
            model,
            optimizer,
            random_examples(),
            0.1,
            cpu,
            before_clip=lambda model: model.lm_head.weight.grad.fill_(value),
        )
    with pytest.raises(Diverged, match="the loss is (nan|inf)"):
        train_step(
            model, optimizer, random_examples(), 0.1, cpu, lambda *words: value * sdd_loss(*words)
        )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- learning rate and batches ----


def test_the_learning_rate_by_hand():
    rates = [learning_rate(step, Settings(steps=20, lr=8.0, warmup=0.2)) for step in (0, 1, 10, 19)]
    assert rates == pytest.approx([2, 2 * (1 + 0.9876883), 4, 4 * (1 - 0.9876883)], rel=1e-4)
    assert learning_rate(0, Settings(steps=20, lr=8.0)) == 8.0  # without warm-up


def test_batches_take_their_share_of_replay_and_every_pair_once_an_epoch():
    def first_ids(pairs, replay, share):
        drawn = draw_batches(pairs, replay, share, 5, random.Random(4))
        return [[example.ids[0] for example in batch] for batch in itertools.islice(drawn, 20)]

    pairs, replay = (
        [Example([i, 1 + i % 3], 1) for i in ids] for ids in (range(10), range(100, 107))
    )
    batches = first_ids(pairs, replay, 0.6)
    assert all(sum(i >= 100 for i in batch) == 3 for batch in batches)
    drawn = [i for batch in batches for i in batch if i < 100]
    assert all(sorted(drawn[n : n + 10]) == list(range(10)) for n in range(0, 40, 10))
    longer = [Example([i] * length, 1) for i, length in enumerate([9, 2, 7, 3, 2, 8, 4, 5, 6, 3])]
    assert drawn[:10] != drawn[10:20] and first_ids(pairs, [], 0) == first_ids(
        longer, [], 0
    )  # lengths decide nothing


# ---- a run ----

QUICK = Settings(steps=4, batch_size=6, lr=1e-3)


SOURCES, CPU = Sources("h.csv", ("b.json",), similarity="tfidf"), Compute()


class Stop(Exception):
    """Ends a run before it trains."""


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A function that trains on public files; with only_say it stops where training begins."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")

    def stop(*words):
        raise Stop

    def run(
        settings=QUICK, seed=0, mode="sdd", sources=SOURCES, compute=CPU, only_say=False, **more
    ):
        world = Files(seed, sources)
        if only_say:
            world.pairs = stop
        with suppress(Stop):
            return train.train(world, mode, "llama", "out/x", settings, compute, **more)

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_is_reused_until_something_it_depends_on_changes(public, capsys):
    def said(*words, only_say=True, **more):
        public(*words, only_say=only_say, **more)
        return capsys.readouterr().out.splitlines()[0]

    assert "not there yet" in said(only_say=False) and said() == "out/x: up to date, reused"
    assert "setting lr changed" in said(replace(QUICK, lr=2e-3)) and "setting mode changed" in said(
        mode="align"
    )
    assert "2 more" in said(replace(QUICK, steps=3, batch_size=5, betas=(0.8, 0.9)))
    assert "setting template changed" in said(template="llama3") and "setting seed changed" in said(
        seed=1
    )
    assert "--fresh" in said(fresh=True)
    for change in {"threshold": 0.1}, {"prompts": "all"}:  # other pairs from the same files
        assert "setting" in said(sources=replace(SOURCES, **change)), change
    public_folder(Path("llama"), num_hidden_layers=1)
    assert "input llama/config.json changed (and 1 more)" in said()
    public_folder(Path("llama"))
    advbench_file(Path("h.csv"), rows=60)
    assert "input h.csv changed" in said() and "input h.csv changed" in said(only_say=False)
    record = json.loads(Path("out/x/run.json").read_text())
    assert "sdd_loss.py" in record["source"] and not any(
        "lab/" in file for file in record["source"]
    )
    record["source"]["sdd_loss.py"] = "of another day"
    Path("out/x/run.json").write_text(json.dumps(record))
    assert "source file sdd_loss.py changed" in said()


def test_the_same_seed_is_the_same_bytes(public):
    first = weights(public())
    assert weights(public(fresh=True)) == first
    assert weights(public(seed=1)) != first


def test_the_town_starts_each_mode_from_the_one_before(tiny_arms, capsys):
    assert sorted(folder.name for folder in tiny_arms.iterdir()) == [
        "aligned",
        "base",
        "refusal",
        "sdd",
    ]
    assert len({weights(folder) for folder in tiny_arms.iterdir()}) == 4
    sdd, world = tiny_arms / "sdd", Town(0, TINY_SHAPE)
    assert {path.name for path in sdd.iterdir()} == {
        "chat.txt",
        "config.json",
        "model.safetensors",
        "run.json",
        "samples.txt",
        "tokenizer.model",
        "train_log.jsonl",
        "world.json",
    }
    log = [json.loads(line) for line in (sdd / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert set(log[0]) == {
        "step",
        "lr",
        "loss",
        "grad_norm",
        "response_tokens",
        "tokens",
        "seconds",
    }
    samples = (sdd / "samples.txt").read_text()
    assert [
        line[8:] for line in samples.splitlines() if line.startswith("prompt: ")
    ] == world.watched_prompts()
    assert samples.count("before: ") == samples.count("after:  ") == 3

    folder = train.train_arm("sdd", world, tiny_arms, Compute(), table={"town": TINY_SETTINGS})
    said = capsys.readouterr().out.splitlines()[-3:]
    assert [Path(line.split(":")[0]).name for line in said] == [
        "base",
        "aligned",
        "sdd",
    ] and folder == sdd
    assert all("up to date" in line for line in said)


def test_a_run_says_what_bf16_keeps_of_it(public, capsys):
    def kept(lr, dtype):
        public(Settings(steps=2, batch_size=3, lr=lr), mode="align", compute=Compute(dtype=dtype))
        printed = capsys.readouterr().out
        assert ("warning: in bf16 little of this update shows" in printed) == (lr < 1e-6)
        return float(printed.split("has cosine ")[1].split()[0])

    assert kept(5e-7, "bf16") < 0.5 and kept(5e-7, "fp32") < 0.5 and kept(1e-2, "bf16") > 0.95


def test_split_weights_take_the_update_of_fp32_weights(public):
    """At the paper's lr, from bf16 weights on disk. Measured: cosine 0.9998; of weights rounded at each step 0.03."""
    Llama.from_pretrained("llama").save_pretrained("llama", torch.bfloat16)
    start = load_file("llama/model.safetensors")

    def update(weights):
        compute = Compute(dtype="bf16", weights=weights)
        found = load_file(
            public(Settings(steps=8, batch_size=6), mode="align", compute=compute)
            / "model.safetensors"
        )
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        return torch.cat([(found[name] - start[name].float()).flatten() for name in start])

    fp32, split = update("fp32"), update("bf16")
    assert torch.cosine_similarity(split, fp32, dim=0) > 0.999
    assert float(split.norm()) == pytest.approx(float(fp32.norm()), rel=0.01)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("benign_replay", 1.0),
        ("max_length", 1),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)),
        ("warmup", 1.5),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} .*out of range"):
        Settings(**{name: value})


def test_a_preference_loss_needs_a_function_and_rows_with_a_rejected_response(tokenizer, cpu):
    """The README's example: a row's `rejected` reaches the loss, and micro-batches add up."""

    def simpo_loss(model, batch, global_tokens, beta=2.5, gamma=1.375):
        def mean_logp(part):
            logits = model(part.tokens, positions=part.loss_mask)
            logps = token_logprobs(logits, part.targets[part.loss_mask])
            return torch.stack([row.mean() for row in logps.split(part.loss_mask.sum(1).tolist())])

        margin = beta * (mean_logp(batch) - mean_logp(batch.rejected)) - gamma
        return -torch.nn.functional.logsigmoid(margin).sum() / global_tokens

    rows = [
        {
            "prompt": f"Sort {a} {b}.",
            "response": f"In order: {a} {b}.",
            "rejected": f"Rotated: {b} {a}",
        }
        for a, b in (("ash", "cup"), ("bell", "ink"), ("drum", "jar"))
    ]
    examples = encode_rows(tokenizer, "llama3", rows, 60)
    losses = []
    for micro_batch in (0, 2):
        compute = replace(cpu, micro_batch=micro_batch)
        model = small_model(vocab_size=tokenizer.n_vocab)
        optimizer = make_optimizer(model, compute)
        losses.append(
            [
                train_step(model, optimizer, examples, 1e-3, compute, simpo_loss)["loss"]
                for _ in range(8)
            ]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
