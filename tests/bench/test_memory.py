"""What a step holds in memory: activation checkpointing; the arithmetic of bench/memory.py beside the allocator's."""

import random
from itertools import accumulate

import pytest
import torch
from small import public_folder, small_config, small_model
from torch.profiler import ProfilerActivity, profile

from bench import memory
from data.chat import Example, collate
from model import Llama
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from sdd_loss import sdd_loss
from train import train_step

# ---- activation checkpointing ----


def loss_and_saved_bytes(model, examples) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes of all that is kept for its backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # the tensor too, or another could take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sdd_loss(model, collate(examples), 41)
    return loss, sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("tied", [False, True])
def test_checkpointing_leaves_the_gradient_and_keeps_one_tensor_a_layer(tied):
    model, rng = (
        small_model(num_hidden_layers=5, tie_word_embeddings=tied).train(),
        random.Random(4),
    )
    examples = [
        Example([rng.randrange(89) for _ in range(rng.randint(9, 60))], 3) for _ in range(7)
    ]
    losses, gradients, saved = [], [], []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        loss, nbytes = loss_and_saved_bytes(model, examples)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        saved.append(nbytes)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == losses[1]
    for (name, _), one, two in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.equal(one, two) and one.abs().max() > 0, name
    layer_input = 4 * sum(len(example.ids) for example in examples) * 48  # fp32
    assert saved[0] - saved[1] > 5 * 8 * layer_input
    assert saved[1] < 5 * layer_input + 0.2 * saved[0]


# ---- the arithmetic ----


def measured_peak(config, rows, length, checkpointed, micro_batch) -> tuple[int, int]:
    """Bytes of (weights and optimizer state, the peak of a training step beyond them), as the allocator counts."""
    rng = random.Random(1)
    examples = [
        Example([rng.randrange(config.vocab_size) for _ in range(length)], 1) for _ in range(rows)
    ]
    compute = Compute(
        dtype="bf16", weights="bf16", micro_batch=micro_batch, checkpoint_activations=checkpointed
    )
    model = Llama(config).bfloat16()
    optimizer = make_optimizer(model, compute)
    train_step(model, optimizer, examples, 1e-4, compute)  # makes the optimizer's state
    held = sum(
        t.numel() * t.element_size()
        for p in model.parameters()
        for t in (p, *optimizer.state[p].values())
        if torch.is_tensor(t)
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(model, optimizer, examples, 1e-4, compute)
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return held, max(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )


@pytest.mark.parametrize(
    "changes, rows, length, checkpointed, micro_batch, moment",
    [
        ({}, 2, 20, True, 0, "optimizer"),
        ({}, 16, 99, True, 0, "backward"),
        ({}, 9, 70, False, 0, "loss"),
        ({}, 10, 99, True, 5, "backward"),
        ({}, 9, 70, False, 3, "loss"),
        ({"num_key_value_heads": 2, "tie_word_embeddings": True}, 16, 99, True, 0, "backward"),
        ({"intermediate_size": 80, "num_key_value_heads": 2}, 9, 90, False, 0, "loss"),
        ({"vocab_size": 4000}, 9, 70, True, 0, "loss"),
    ],
)
def test_the_peak_of_a_step_is_that_of_the_arithmetic(
    changes, rows, length, checkpointed, micro_batch, moment
):
    """What is beyond weights and optimizer state within 5%."""
    shape = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
    )
    config = small_config(**shape | changes)
    held, peak = measured_peak(config, rows, length, checkpointed, micro_batch)
    found = memory.step_memory(
        config, micro_batch or rows, length, checkpointed, accumulating=micro_batch > 0
    )
    expected = {name: sum(terms.values()) - held for name, terms in found.items()}
    assert sum(found["loss"][name] for name in ("weights", "low halves", "two moments")) == held
    assert max(expected, key=expected.get) == moment
    assert expected[moment] == pytest.approx(peak, rel=0.05)


def test_seven_billion_fit_with_checkpointing_only(capsys):
    memory.main([])
    printed = capsys.readouterr().out
    assert "weights                12.55" in printed and "peak 65.2 GiB: fits in 74 GiB" in printed
    memory.main(["--keep-activations"])
    assert "does not fit" in capsys.readouterr().out
    memory.main(["--micro-batch", "8"])
    assert "GiB for 8 rows of 512" in capsys.readouterr().out
    with pytest.raises(InputError, match="1 or more"):
        memory.main(["--batch-size", "0"])


def test_the_shape_can_come_from_a_folder(tmp_path, capsys):
    memory.main(
        [
            "--model",
            str(public_folder(tmp_path / "llama")),
            "--batch-size",
            "3",
            "--max-length",
            "20",
        ]
    )
    assert capsys.readouterr().out.startswith("GiB for 3 rows of 20 tokens at once")
