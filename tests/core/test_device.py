"""The same numbers on a GPU as on the CPU; without a GPU, the CPU stands in for it, uncompiled."""

import random

import pytest
import torch
from small import public_folder, small_model, tiny_town

from data.chat import Example
from data.chat_model import load_chat, new_chat
from nanosdd.device import DTYPES, Compute, resolve_compute
from nanosdd.errors import InputError
from nanosdd.optimizer import make_optimizer
from train import train_step

PROMPTS = [[4, 9, 1], [70, 3, 3, 8, 15, 2, 60], [5], [33, 2, 81, 7]]


@pytest.fixture
def device():
    """The Compute that the commands choose by themselves: on a GPU bf16 and compiled."""
    return resolve_compute("auto", "auto", None)


def batches():
    rng = random.Random(5)
    drawn = []
    for rows in (6, 1, 4, 7):
        lengths = [rng.randint(3, 40) for _ in range(rows)]
        drawn.append([Example(rng.choices(range(89), k=n), 2) for n in lengths])
    return drawn


def steps(compute: Compute):
    """Losses and gradient norms of four steps, and the change of all weights."""
    model = small_model()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = make_optimizer(model.to(compute.device), compute)
    done = [train_step(model, optimizer, batch, 1e-3, compute) for batch in batches()]
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
    return [step["loss"] for step in done], [step["grad_norm"] for step in done], after - before


def test_logits_in_fp32(device):
    tokens = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    model = small_model()
    with torch.no_grad():
        expected = model(tokens)
        found = model.to(device.device)(tokens.to(device.device)).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_as_the_commands_do_it(device):
    """bf16 has 8 bits: losses agree to a hundredth, and most weights move the same way."""
    losses, norms, change = steps(Compute())
    found_losses, found_norms, found_change = steps(device)
    assert found_losses == pytest.approx(losses, rel=2e-2)
    assert found_norms == pytest.approx(norms, rel=0.1)
    assert torch.cosine_similarity(change, found_change, dim=0) > 0.9


@pytest.mark.slow
def test_split_weights_on_the_device(device):
    compute = Compute(device.device, "bf16", device.compile, weights="bf16")
    model = small_model().to(compute.device, torch.bfloat16)
    optimizer = make_optimizer(model, compute)
    losses = [train_step(model, optimizer, batches()[0], 3e-3, compute)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_answers_on_the_device(device):
    expected = small_model().generate(PROMPTS, 12, {7})
    model = small_model().to(device.device)
    for compiled in {False, device.compile}:
        assert model.generate(PROMPTS, 12, {7}, compiled=compiled) == expected


# ---- a device that computes wrongly ----


class Elsewhere(str):
    """The CPU under a name that does not equal "cpu"."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True


LIES = {  # what a broken kernel does: the layer that it is used in, what comes out
    "a norm of twice the size": ("norm", lambda out: 2 * out),
    "rows that get each other's states": ("layers.1.mlp", lambda out: out.roll(1, 0)),
    "no numbers": ("layers.1.mlp", lambda out: out * float("nan")),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_device_that_computes_rightly_is_used(tmp_path, dtype):
    public_folder(tmp_path)
    chat = load_chat(tmp_path, Compute(Elsewhere("cpu"), dtype, weights=dtype))
    assert chat.model.lm_head.weight.dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_computes_wrongly_is_refused(tmp_path, lie, dtype):
    public_folder(tmp_path)
    name, wrong = LIES[lie]

    def make_it_lie(model):
        layer = model.model.get_submodule(name)
        layer.register_forward_hook(lambda layer, inputs, out: wrong(out))

    load_chat(tmp_path, Compute("cpu", dtype), spread=make_it_lie)  # a CPU is not compared
    with pytest.raises(InputError, match="cpu computes wrongly: log p is .* on the CPU; use --dev"):
        load_chat(tmp_path, Compute(Elsewhere("cpu"), dtype), spread=make_it_lie)


class Doubled(torch.overrides.TorchFunctionMode):
    """A product comes out twice as large."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.nn.functional.linear else out


class Wrong(Compute):
    def autocast(self):
        return Doubled()


def test_a_new_model_is_compared_too(tmp_path):
    town = tiny_town(tmp_path)
    new_chat(town, Compute(Elsewhere("cpu")))
    with pytest.raises(InputError, match="cpu computes wrongly"):
        new_chat(town, Wrong(Elsewhere("cpu")))
