"""LoRA: no change at the start, only A and B train, and merging changes nothing but rounding."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import small_model

from data.chat import Example
from model import Llama
from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.generate import Linear
from nanosdd.lora import LoRALinear, add_lora, lora_layers, merge_lora, merged_state
from nanosdd.optimizer import make_optimizer
from train import train_step

TOKENS = torch.arange(3 * 17).reshape(3, 17) * 29 % 89  # (B,T)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


def trained(model, seed=5):
    """As after training: no A or B is zero, and no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.A.data += 0.1 * torch.randn(layer.A.shape, generator=generator)
        layer.B.data += 0.1 * torch.randn(layer.B.shape, generator=generator)
    return model


BATCH = [Example([(7 * i + 3 * j) % 89 for j in range(12)], 5) for i in range(6)]


def test_nothing_changes_at_the_start_and_the_global_rng_is_left_alone():
    model = small_model()
    before, rng = logits(model), torch.get_rng_state()
    add_lora(model, rank=3, alpha=6, seed=1)
    assert torch.equal(logits(model), before) and torch.equal(torch.get_rng_state(), rng)


def test_every_linear_layer_of_the_blocks_and_no_other():
    model = small_model()
    names = list(model.state_dict())
    trainable = add_lora(model, rank=3, alpha=6, seed=1)
    assert set(lora_layers(model)) == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{part}" for name in lora_layers(model) for part in "AB"
    }
    assert {id(p) for p in trainable} == {id(p) for p in model.parameters() if p.requires_grad}
    down = model.model.layers[1].mlp.down_proj
    assert (
        down.A.shape == (3, 80)
        and down.B.shape == (48, 3)
        and set(merged_state(model)) == set(names)
    )


def test_the_update_by_hand():
    base = nn.Linear(5, 4, bias=False)
    layer = LoRALinear(base, rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0))
    assert (
        0 < layer.A.abs().max() < 5**-0.5
        and layer.A.unique().numel() == 10
        and layer.B.count_nonzero() == 0
    )
    layer.B.data.normal_()
    x = torch.randn(7, 5)
    W = base.weight + 1.5 * layer.B @ layer.A  # alpha / rank is 1.5
    torch.testing.assert_close(layer(x), x @ W.T)
    torch.testing.assert_close(layer.merged(), W.detach())


def test_seeds_draw_other_updates_and_the_same_again():
    drawn = []
    for seed in (1, 1, 2):
        model = small_model()
        add_lora(model, 3, 6, seed)
        drawn.append([layer.A.detach() for layer in lora_layers(model).values()])
    assert all(map(torch.equal, drawn[0], drawn[1])) and not any(
        map(torch.equal, drawn[0], drawn[2])
    )
    same_shape = [A for A in drawn[0] if A.shape == (3, 48)]  # q, k, v, gate and up of both blocks
    assert len(same_shape) == len({tuple(A.flatten().tolist()) for A in same_shape}) == 10


@pytest.mark.parametrize("tied", [False, True])
def test_merging_keeps_the_logits_and_gives_the_plain_model_back(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied)
    names, start = list(model.state_dict()), logits(model)
    add_lora(model, rank=3, alpha=6, seed=1)
    wrapped = logits(trained(model))
    assert (wrapped - start).abs().max() > 0.1
    state = merged_state(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), wrapped, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names and not lora_layers(model)
    assert all(
        type(layer) is Linear for name, layer in model.named_modules() if name.endswith("_proj")
    )
    assert all(p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(Llama.from_pretrained(tmp_path)), wrapped, atol=1e-5, rtol=0)


def test_a_released_state_loads_again_after_a_merge():
    model = small_model()
    before, released = (
        logits(model),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    for _ in range(2):
        add_lora(model, rank=2, alpha=4, seed=1)
        merge_lora(trained(model))
        assert not torch.equal(logits(model), before)
        model.load_state_dict(released)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_moves_only_the_update_and_learns(dtype):
    model = small_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = add_lora(model, rank=4, alpha=8, seed=1)
    compute = Compute(dtype=dtype)
    optimizer = make_optimizer(model, compute)
    losses = [train_step(model, optimizer, BATCH, 1e-2, compute)["loss"] for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]
    for layer in lora_layers(model).values():
        assert layer.B.count_nonzero() == layer.B.numel()  # the gradient reached every layer
    state = model.state_dict()
    for name, tensor in start.items():
        name = name if name in state else name.replace("_proj.", "_proj.base.")
        assert torch.equal(state[name], tensor), name
    assert len(trainable) == 2 * 14
    wrapped = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), wrapped, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_merged_weights():
    """d loss / dB = scale * dW A^T and d loss / dA = scale * B^T dW, dW the gradient of the whole weight."""
    model, plain = small_model(), small_model()
    add_lora(model, rank=3, alpha=6, seed=1)
    plain.load_state_dict(merged_state(trained(model)))
    for each in (model, plain):
        F.cross_entropy(each(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert [p.grad is not None for p in model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    for name, layer in lora_layers(model).items():
        dW = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.B.grad, 2 * dW @ layer.A.detach().T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(layer.A.grad, 2 * layer.B.detach().T @ dW, atol=1e-6, rtol=1e-4)


def test_bf16_compute_and_cached_decoding():
    model = small_model()
    add_lora(model, rank=3, alpha=6, seed=1)
    trained(model)
    prompts = [[5, 9, 2], [7] * 9, [3]]
    answers = model.generate(prompts, 12)  # from the cache
    for prompt, answer in zip(prompts, answers):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    full = logits(model)
    with Compute(dtype="bf16").autocast():
        half = logits(model)
    assert half.dtype == torch.bfloat16
    assert 0 < (half.float() - full).abs().max() < 0.05 * full.abs().max()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    merge_lora(model)
    assert model.generate(prompts, 12) == answers


def test_bf16_weights_are_summed_in_fp32():
    base = nn.Linear(64, 48, bias=False).bfloat16()
    layer = LoRALinear(base, rank=8, alpha=8, generator=torch.Generator().manual_seed(0))
    layer.B.data.normal_()
    assert layer.A.dtype == layer.B.dtype == layer.merged().dtype == torch.bfloat16
    exact = base.weight.double() + layer.B.double() @ layer.A.double()
    off, off_in_bf16 = (
        (each != exact.bfloat16()).float().mean()
        for each in (layer.merged(), base.weight + layer.B @ layer.A)
    )
    assert off < 0.01 and off_in_bf16 > 0.1  # rounded once, not twice


@pytest.mark.parametrize(
    "rank, alpha", [(0, 1), (-1, 1), (2, 0), (2, float("nan")), (2, float("inf"))]
)
def test_a_bad_rank_or_alpha_leaves_the_model_alone(rank, alpha):
    model = small_model()
    with pytest.raises(InputError, match="rank of 1 or more"):
        add_lora(model, rank, alpha, 0)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_twice_is_once_too_often():
    model = small_model()
    with pytest.raises(InputError, match="no LoRA layers"):
        merge_lora(model)
    add_lora(model, 2, 4, 0)
    with pytest.raises(InputError, match="already"):
        add_lora(model, 2, 4, 0)
    assert len(lora_layers(model)) == 14
