"""torch.compile in training and decoding: few graphs whatever the shapes, and the same results as without it.

No C++ compiler is needed: graphs go through AOTAutograd, as with the default backend, and run as they were traced.
"""

import random

import pytest
import torch
from small import small_model
from torch._dynamo.testing import CompileCounterWithBackend

from data.chat import Example
from nanosdd.chat_model import Chat, answer
from nanosdd.device import Compute
from nanosdd.optimizer import make_optimizer
from train import train_step

# (rows, longest row) of each batch: one row is a special case to torch.compile, as is a size that another one has, here
# 5 rows as many as the pairs of a head
SHAPES = [
    (5, 31),
    (1, 17),
    (4, 20),
    (3, 12),
    (7, 44),
    (2, 9),
    (6, 60),
    (8, 33),
    (1, 48),
    (48, 10),
    (9, 21),
]


@pytest.fixture
def counter():
    """Counts the graphs that torch.compile makes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch._dynamo.reset()


def batches():
    rng = random.Random(3)
    for rows, longest in SHAPES:
        yield [
            Example([rng.randrange(89) for _ in range(rng.randint(3, longest))], 2)
            for _ in range(rows)
        ]


def trained(compute: Compute, counter):
    """(model, what train_step returns of every step, the number of graphs after every step)."""
    model = small_model(num_hidden_layers=3)
    optimizer, steps, graphs = make_optimizer(model, compute), [], []
    for batch in batches():
        steps.append(train_step(model, optimizer, batch, 1e-3, compute))
        graphs.append(counter.frame_count)
    return model, steps, graphs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed, micro_batch", [(False, 0), (True, 0), (True, 4)])
def test_compiled_training_is_the_same_training_in_two_graphs(counter, checkpointed, micro_batch):
    """One graph for several rows and one for one row, which the three layers and eleven shapes share."""
    plain, expected, graphs = trained(Compute(micro_batch=micro_batch), counter)
    assert graphs[-1] == 0
    compiled, found, graphs = trained(
        Compute(micro_batch=micro_batch, compile=True, checkpoint_activations=checkpointed), counter
    )
    assert 1 <= graphs[0] <= graphs[2] <= 2 and graphs[2:] == graphs[2:3] * (len(SHAPES) - 2)
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-5, name


@pytest.mark.slow
def test_answers_share_few_graphs_whatever_their_number_and_length(counter, tokenizer):
    """The layers alone, when the prompts are read, and the whole step; a batch of one row is again a special case."""
    model = small_model(vocab_size=tokenizer.n_vocab)
    prompts = [
        f"{word} {'is it so? ' * (i % 4)}"
        for i, word in enumerate("Who what when where why how whose".split())
    ]
    parts = [
        prompts,
        prompts[:3],
        prompts[2:6],
        prompts[4:5],
        prompts[1:],
        prompts[3:4],
        prompts[::2],
    ]
    plain = Chat(model, tokenizer, "llama3", Compute())
    expected = [answer(plain, part, 9) for part in parts]
    compiled, counts = Chat(model, tokenizer, "llama3", Compute(compile=True)), []
    optimizer = make_optimizer(model, compiled.compute)
    train_step(model, optimizer, next(batches()), 0.0, compiled.compute)
    for part, answers in zip(parts, expected):
        assert answer(compiled, part, 9) == answers
        counts.append(counter.frame_count)
    assert counts[3:] == [counts[3]] * 4 and counts[3] <= 6  # training is one or two of them
