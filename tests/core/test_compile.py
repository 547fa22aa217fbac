"""torch.compile in the training loop: few graphs whatever the shapes, and what is computed without it. No C++ compiler
is needed: the graphs are run as they were traced."""

import functools
import random

import pytest
import torch
from small import small_model
from torch._dynamo.testing import CompileCounterWithBackend

from nanosdd import loop
from data.chat import Example
from eval import greedy

# (rows, longest row) of each batch: one row is a special case to torch.compile, as is a size that another one has, here
# 5 rows as many as the pairs of a head
SHAPES = [(5, 31), (1, 17), (4, 20), (3, 12), (7, 44), (2, 9), (6, 60), (8, 33), (1, 48), (48, 10), (9, 21)]


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs, all of which go through AOTAutograd, as with the default backend."""
    torch._dynamo.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


def batches(vocab=89):
    rng = random.Random(3)
    for rows, longest in SHAPES:
        yield [Example([rng.randrange(vocab) for _ in range(rng.randint(3, longest))], 2) for _ in range(rows)]


def train(args, after_step=None, micro_batch=0, **flags):
    model = small_model(num_hidden_layers=3)
    for name, value in flags.items():
        setattr(model, name, value)
    lines = []
    loop.fit(model, batches(), steps=len(SHAPES), lr=1e-3, args=args, log=lines.append, after_step=after_step,
             micro_batch=micro_batch)
    return model, lines


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_and_shapes_share_two_graphs(cpu, counter, checkpointed):
    """One for several rows and one for one row; that of three layers and eleven shapes none needs a third."""
    cpu.compile, counts = True, []
    train(cpu, lambda step: counts.append(counter.frame_count), checkpoint_activations=checkpointed)
    assert len(counts) == len(SHAPES) and 1 <= counts[0] <= counts[2] <= 2
    assert counts[2:] == counts[2:3] * (len(SHAPES) - 2)


@pytest.mark.parametrize("checkpointed, micro_batch", [(False, 0), (True, 4)])
def test_compiled_training_is_the_same_training(cpu, counter, checkpointed, micro_batch):
    plain, expected = train(cpu, micro_batch=micro_batch)
    assert counter.frame_count == 0
    cpu.compile = True
    compiled, found = train(cpu, micro_batch=micro_batch, checkpoint_activations=checkpointed)
    assert counter.frame_count > 0
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-5, name


def test_answers_share_few_graphs_whatever_their_number_and_length(cpu, counter, tokenizer, monkeypatch):
    """The layers alone, when the prompts are read, and the whole step; a batch of one row is again a special case."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = small_model(vocab_size=tokenizer.n_vocab)
    prompts = [f"{word} {'is it so? ' * (i % 4)}" for i, word in enumerate("Who what when where why how whose".split())]

    def answers(rows):
        return greedy(model, tokenizer, "llama3", rows, cpu, max_new_tokens=9)

    parts = [prompts, prompts[:3], prompts[2:6], prompts[4:5], prompts[1:], prompts[3:4], prompts[::2]]
    expected, cpu.compile = [answers(part) for part in parts], True
    loop.fit(model, batches(), steps=1, lr=0.0, args=cpu)
    counts = []
    for part, answer in zip(parts, expected):
        assert answers(part) == answer
        counts.append(counter.frame_count)
    assert counts[3:] == [counts[3]] * 4 and counts[3] <= 6  # training is one or two of them
