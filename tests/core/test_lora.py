"""LoRA: no change at the start, only A and B train, and merging changes nothing but rounding.

The update by hand and in bf16 is tried in assignment 4's tests.
"""

import pytest
import torch
import torch.nn.functional as F
from small import small_model

from nanosdd.lora import add_lora, lora_layers, merge_lora

TOKENS = torch.arange(3 * 17).reshape(3, 17) * 29 % 89  # (B,T)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


def loss(model):
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1).float(), TOKENS[:, 1:].flatten())


def adapted(model, seed=5):
    """The model as after training with LoRA: no A or B is zero, and no two are alike."""
    add_lora(model, rank=3, alpha=6, seed=1)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.A.data += 0.1 * torch.randn(layer.A.shape, generator=generator)
        layer.B.data += 0.1 * torch.randn(layer.B.shape, generator=generator)
    return model


def copy_of(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_every_linear_layer_of_the_blocks_is_wrapped_and_nothing_changes_at_the_start():
    model = small_model()
    before = logits(model)
    rng = torch.get_rng_state()
    trainable = add_lora(model, rank=3, alpha=6, seed=1)
    assert torch.equal(logits(model), before) and torch.equal(torch.get_rng_state(), rng)
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in names]
    assert list(lora_layers(model)) == expected
    parts = [f"{name}.{part}" for name in expected for part in "AB"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == parts
    assert [id(p) for p in trainable] == [id(model.get_parameter(name)) for name in parts]
    down = model.model.layers[1].mlp.down_proj
    assert down.A.shape == (3, 80) and down.B.shape == (48, 3)


def test_seeds_draw_other_updates_and_the_same_again():
    drawn = []
    for seed in (1, 1, 2):
        model = small_model()
        add_lora(model, 3, 6, seed)
        drawn.append([layer.A.detach() for layer in lora_layers(model).values()])
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))


@pytest.mark.parametrize("tied", [False, True])
def test_merging_keeps_the_logits_and_gives_the_plain_model_back(tied):
    model = small_model(tie_word_embeddings=tied)
    plain = {name: type(layer) for name, layer in model.named_modules()}
    start = logits(model)
    released = copy_of(model.state_dict())
    for _ in range(2):
        wrapped = logits(adapted(model))
        assert (wrapped - start).abs().max() > 0.1
        prompts = [[5, 9, 2], [7] * 9, [3]]
        answers = model.generate(prompts, 12)  # from the cache
        merge_lora(model)
        torch.testing.assert_close(logits(model), wrapped, atol=1e-5, rtol=0)
        assert model.generate(prompts, 12) == answers
        assert {name: type(layer) for name, layer in model.named_modules()} == plain
        assert all(p.requires_grad for p in model.parameters())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.load_state_dict(released)
        assert torch.equal(logits(model), start)


def test_gradients_are_those_of_the_merged_weights():
    """d loss / dB = scale * dW A^T and d loss / dA = scale * B^T dW, of the whole weight's dW."""
    model = adapted(small_model())
    plain = adapted(small_model())
    merge_lora(plain)
    loss(model).backward()
    loss(plain).backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    for name, layer in lora_layers(model).items():
        dW = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.B.grad, 2 * dW @ layer.A.detach().T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(layer.A.grad, 2 * layer.B.detach().T @ dW, atol=1e-6, rtol=1e-4)
