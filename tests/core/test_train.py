"""One step, the learning rate, and a run: what is computed, written, reused and refused."""

import copy
import json
import os
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import (
    TINY,
    TINY_SETTINGS,
    advbench_file,
    alpaca_file,
    public_folder,
    small_model,
    tiny_town,
)

from data.chat import Example, collate, draw_batches
from data.files import Files
from data.worlds import Sources
from nanosdd.device import Compute
from nanosdd.errors import Diverged, InputError
from nanosdd.optimizer import make_optimizer
from sdd_loss import sdd_loss
from train import STARTS_FROM, Settings, learning_rate, train, train_arm, train_step

# ---- one step ----


def random_examples():
    """Of unequal lengths, for `small_model`."""
    rng = random.Random(1)
    examples = []
    for i in range(11):
        ids = [rng.randrange(1, 89) for _ in range(5 + rng.randrange(12))]
        examples.append(Example(ids, 1 + i % 4))
    return examples


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_a_step_is_a_plain_pytorch_step_whatever_the_micro_batch(micro_batch):
    model = small_model()
    examples = random_examples()
    plain = copy.deepcopy(model)
    total = sum(example.response_length for example in examples)
    loss = sdd_loss(plain, collate(examples), total)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
    # In AdamW's first step neither scale nor clipping would show.
    torch.optim.SGD(plain.parameters(), lr=0.5).step()

    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    done = train_step(model, optimizer, examples, 0.5, Compute(micro_batch=micro_batch))
    assert norm > 1.5  # or clipping is not tested
    assert done == {
        "loss": pytest.approx(float(loss.detach()), rel=1e-5),
        "grad_norm": pytest.approx(norm, rel=1e-4),
        "response_tokens": total,
        "tokens": sum(len(example.ids) for example in examples),
    }
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-6)
        assert one.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_diverges_changes_no_weight_and_leaves_no_gradient(cpu, value):
    def spoil(model):
        model.lm_head.weight.grad.fill_(value)

    model = small_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, cpu)
    with pytest.raises(Diverged, match="lower --lr"):
        train_step(model, optimizer, random_examples(), 0.1, cpu, before_clip=spoil)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---- learning rate and batches ----


def test_the_learning_rate_by_hand():
    rates = [learning_rate(step, Settings(steps=20, lr=8.0, warmup=0.2)) for step in (0, 1, 10, 19)]
    assert rates == pytest.approx([2, 2 * (1 + 0.9876883), 4, 4 * (1 - 0.9876883)], rel=1e-4)
    assert learning_rate(0, Settings(steps=20, lr=8.0)) == 8.0  # without warm-up


def test_batches_take_every_pair_once_an_epoch_and_their_share_of_replay():
    pairs = [Example([i, 1], 1) for i in range(10)]
    replay = [Example([i, 1], 1) for i in range(100, 107)]
    batches = draw_batches(pairs, replay, 0.6, 5, random.Random(4))
    drawn = []
    for _ in range(10):
        firsts = [example.ids[0] for example in next(batches)]
        drawn += firsts[:2]
        assert min(firsts[2:]) >= 100 and len(firsts) == 5
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


# ---- a run ----


class Watched:
    """sdd_loss that keeps the responses it sees, and may kill the process in some step."""

    def __init__(self, dies_in=0):
        self.responses = []
        self.dies_in = [dies_in]

    def __call__(self, model, batch, global_tokens):
        self.responses += [part.tolist() for part in batch.targets.split(batch.response_lengths)]
        self.dies_in[0] -= 1
        if self.dies_in[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return sdd_loss(model, batch, global_tokens)


def scaled(model, batch, global_tokens, by=1):
    return by * sdd_loss(model, batch, global_tokens)


SOURCES = Sources("h.csv", ("b.json",), similarity="tfidf")
QUICK = Settings(steps=4, batch_size=6, lr=1e-3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains on public files and returns the weights as bytes."""
    monkeypatch.chdir(tmp_path)
    public_folder(tmp_path / "llama")
    advbench_file(tmp_path / "h.csv")
    alpaca_file(tmp_path / "b.json")

    def run(mode="sdd", start="llama", seed=0, sources=SOURCES, settings=QUICK, out="x", **more):
        compute = more.pop("compute", Compute())
        folder = train(Files(seed, sources), mode, start, out, settings, compute, **more)
        return (folder / "model.safetensors").read_bytes()

    return run


def test_a_run_is_reused_until_something_it_depends_on_changes(run, capsys):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            run(**changes)

    first = run()
    assert "has cosine" in capsys.readouterr().out  # what bf16 keeps of the update
    assert run() == first and capsys.readouterr().out == "x: up to date, reused\n"
    refused("lr was 0.001, is 0.002; --fresh replaces it", settings=replace(QUICK, lr=2e-3))
    refused("mode was sdd, is align", mode="align")
    refused("dtype was fp32, is bf16", compute=Compute(dtype="bf16"))
    refused("similarity_threshold", sources=replace(SOURCES, similarity_threshold=0.1))
    refused("code of sdd_loss.sdd_loss changed", loss=Watched())
    run(loss=partial(scaled, by=2), out="y")
    refused("by.: 2}, is .* {.by.: 3}", loss=partial(scaled, by=3), out="y")
    code = json.loads(Path("x/run.json").read_text())["code"]
    own = "train.train train.train_step train.learning_rate sdd_loss.sdd_loss "
    own += "linear_cross_entropy.LinearCrossEntropy model.Llama chat.collate chat.draw_batches "
    assert " ".join(code) == own + "worlds.irrelevant_pairs files"
    public_folder(Path("other"))
    refused("start was llama, is other", start="other")
    assert run(fresh=True) == first
    assert run(seed=1, fresh=True) != first
    public_folder(Path("llama"), num_hidden_layers=1)
    refused("input llama/config.json changed;", seed=1)
    public_folder(Path("llama"))
    advbench_file(Path("h.csv"), rows=60)
    refused("input h.csv changed;", seed=1)


def test_a_batch_that_does_not_fit_is_named(run):
    def hungry(model, batch, global_tokens):
        return torch.empty(10**15)

    with pytest.raises(RuntimeError, match="alloc") as error:
        run(loss=hungry)
    assert error.value.__notes__ == ["in batches of 6 rows; try a smaller --micro-batch"]
    assert not Path("x").exists()


@pytest.mark.posix
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(run, weights):
    compute = Compute(dtype=weights, weights=weights, save_every=1)
    whole = run(loss=Watched(), compute=compute, out="whole")
    child = os.fork()
    if child == 0:
        try:
            run(loss=Watched(dies_in=3), compute=compute)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    loss = Watched()
    assert run(loss=loss, compute=compute) == whole
    assert len(loss.responses) == 2 * 6  # of the last two steps
    assert len(Path("x/train_log.jsonl").read_text().splitlines()) == 4
    assert load_file("x/model.safetensors")["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("mode", STARTS_FROM)
def test_every_mode_trains_on_its_pairs(mode, tiny_arms, tokenizer, tmp_path, cpu):
    town = tiny_town(tmp_path)
    start = tiny_arms / "aligned" if STARTS_FROM[mode] else None
    settings = replace(TINY, benign_replay=0.5 if mode == "sdd_rehearsed" else 0.0)
    loss = Watched()
    train(town, mode, start, tmp_path / mode, settings, cpu, loss=loss)
    seen = [tokenizer.decode(ids[:-1]) for ids in loss.responses]
    own = {pair["response"] for pair in town.pairs(mode, 24)}
    assert len(seen) == 24
    if settings.benign_replay:
        own |= {row["response"] for row in town.rehearsal()}
    assert own.issuperset(seen)


def test_the_town_starts_each_mode_from_the_one_before(tiny_arms, capsys):
    folders = sorted(tiny_arms.iterdir())
    assert [folder.name for folder in folders] == ["aligned", "base", "refusal", "sdd"]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 4
    sdd = tiny_arms / "sdd"
    town = tiny_town(tiny_arms)
    assert town.shown_prompts()[2] in (sdd / "samples.txt").read_text()
    assert train_arm("sdd", town, Compute(), table={"town": TINY_SETTINGS}) == sdd
    arms = (tiny_arms / "base", tiny_arms / "aligned", sdd)
    assert capsys.readouterr().out == "".join(f"{arm}: up to date, reused\n" for arm in arms)
