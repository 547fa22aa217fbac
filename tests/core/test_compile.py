"""torch.compile in training and decoding: few graphs whatever the shapes, and the same results.

No C++ compiler is needed: graphs go through AOTAutograd, as with the default backend, and run as
they were traced.
"""

import random

import pytest
import torch
from small_model import small_model
from torch._dynamo.testing import CompileCounterWithBackend

from data.chat import Example
from nanosdd.device import Compute
from nanosdd.optimizer import make_optimizer
from train import train_step

ROWS = [5, 1, 4, 3, 7, 2, 6, 1, 48, 9]  # of each batch: more than a function is compiled for


@pytest.fixture
def counter():
    """Counts the graphs that torch.compile makes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch._dynamo.reset()


def random_rows(rng, rows: int):
    return [rng.choices(range(89), k=rng.randint(3, 60)) for _ in range(rows)]


def trained(compute: Compute, counter):
    """(model, what train_step returns at every step, the number of graphs after every step)."""
    model = small_model(num_hidden_layers=3)
    optimizer = make_optimizer(model, compute)
    rng = random.Random(3)
    steps = []
    graphs = []
    for rows in ROWS:
        batch = [Example(ids, 2) for ids in random_rows(rng, rows)]
        steps.append(train_step(model, optimizer, batch, 1e-3, compute))
        graphs.append(counter.frame_count)
    return model, steps, graphs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_training_is_the_same_training_in_few_graphs(counter, checkpointed):
    """Layers and batches share the graphs before attention and after it."""
    plain, expected, _ = trained(Compute(), counter)
    compute = Compute(compile=True, checkpoint_activations=checkpointed)
    compiled, found, graphs = trained(compute, counter)
    assert 1 <= graphs[-1] == graphs[2] <= 4
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_answers_share_few_graphs_whatever_their_number_and_length(counter):
    """Of the layers, which read the prompts, and of the whole step; one row is a special case."""
    model = small_model()
    prompts = random_rows(random.Random(5), 8)
    parts = [prompts, prompts[:3], prompts[4:5], prompts[1:], prompts[3:4]]
    expected = [model.generate(part, 9) for part in parts]
    make_optimizer(model, Compute(compile=True))
    graphs = []
    for part, answers in zip(parts, expected):
        assert model.generate(part, 9, compiled=True) == answers
        graphs.append(counter.frame_count)
    assert 1 <= graphs[-1] == graphs[2] <= 7
