"""SplitAdamW: a weight in two parts keeps every bit, and its steps are those of fp32 AdamW."""

import copy

import pytest
import torch
from small import small_model

from nanosdd.device import Compute
from nanosdd.errors import InputError
from nanosdd.optimizer import clip_gradient, make_optimizer
from nanosdd.split_adamw import SplitAdamW, gradient_norm, join, round_stochastically, split


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def numbers(patterns) -> torch.Tensor:
    """fp32 numbers from unsigned 32-bit patterns, as a range, list or int64 tensor."""
    return torch.as_tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


# ---- bf16 and 16 more bits ----


def test_split_and_join_on_random_patterns():
    patterns = torch.randint(0, 2**32, (2_000_000,), generator=torch.Generator().manual_seed(0))
    master = numbers(patterns)  # both signs, denormals, infinities and NaN too: bits are bits
    assert torch.equal(bits(join(*split(master))), bits(master))


@pytest.mark.parametrize("sign", [0, 2**31])
def test_split_and_join_on_every_low_half(sign):
    """All 65,536 low halves under high halves that are odd, even, zero, denormal, largest and at powers of two."""
    for high in (
        0x0000,
        0x0001,
        0x007F,
        0x0080,
        0x3CA3,
        0x3CA4,
        0x3F7F,
        0x3F80,
        0x3FFF,
        0x4000,
        0x7F7E,
        0x7F7F,
    ):
        master = numbers(torch.arange(2**16) + (high << 16) + sign)
        weight, low = split(master)
        assert weight.dtype == torch.bfloat16 and low.dtype == torch.int16
        assert torch.equal(bits(join(weight, low)), bits(master)), hex(high)
        tie = torch.arange(2**16) == 2**15
        assert torch.equal(weight[~tie], master.bfloat16()[~tie]), hex(
            high
        )  # the nearest, as PyTorch rounds
        assert (
            weight[tie].view(torch.int16).item() & 0x7FFF == high + 1
        )  # away from zero, whatever is even


def test_split_does_not_turn_the_large_into_nan():
    weight, low = split(numbers([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]))
    assert weight[:4].tolist() == [float("inf"), -float("inf")] * 2 and weight[4].isnan()


def test_rounding_to_even_cannot_be_undone():
    """Why ties do not round to even: two masters would have the same two parts."""
    low_tie, high_tie = numbers([0x3F7F8000, 0x3F808000])
    assert (
        low_tie.bfloat16() == high_tie.bfloat16()
        and bits(low_tie) & 0xFFFF == bits(high_tie) & 0xFFFF
    )
    assert split(low_tie)[0] != split(high_tie)[0]


def test_stochastic_rounding_is_unbiased_exact_where_it_can_be_and_seeded():
    fraction = torch.tensor([0.0, 1 / 16, 0.5, 0.9])
    x = ((1 + fraction / 128) * 2.0**-20).repeat(100_000, 1)
    rounded = round_stochastically(x, torch.Generator().manual_seed(3))
    up = (rounded.float() * 2.0**20 - 1) * 128
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert up[:, 0].sum() == 0
    assert torch.allclose(up.mean(0), fraction, atol=5 * 0.5 / 100_000**0.5)
    assert torch.equal(rounded, round_stochastically(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(rounded, round_stochastically(x, torch.Generator().manual_seed(4)))


# ---- against torch.optim.AdamW in fp32 ----


def pair(values: torch.Tensor, **settings):
    """The same bf16 weights twice: (fp32 parameter, torch's AdamW), (bf16 parameter, ours). torch's plain loop, whose
    operations and order ours follows; its fused kernel differs in the last bits."""
    one, two = torch.nn.Parameter(values.bfloat16().float()), torch.nn.Parameter(values.bfloat16())
    return (one, torch.optim.AdamW([one], foreach=False, fused=False, **settings)), (
        two,
        SplitAdamW([two], **settings),
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [5e-7, 5e-5, 1e-2])
def test_the_first_step_is_that_of_fp32_bit_by_bit(lr, weight_decay):
    (one, torch_adamw), (two, ours) = pair(
        torch.randn(31, 17) * 0.02, lr=lr, weight_decay=weight_decay, eps=1e-6
    )
    ours.slice_size = 97
    two.grad = (torch.randn_like(one) * 1e-4).bfloat16()
    one.grad = two.grad.float()
    torch_adamw.step()
    ours.step()
    assert torch.equal(bits(ours.master(two)), bits(one.detach()))
    assert torch.equal(two, split(one.detach())[0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_steps_bit_by_bit_where_bf16_holds_the_moments(weight_decay):
    """With betas of 1/2 and a gradient of +-2**k the moments are (1 - 2**-t) g and g**2: eight bits for eight steps."""
    settings = dict(lr=3e-4, betas=(0.5, 0.5), weight_decay=weight_decay, eps=1e-12)
    (one, torch_adamw), (two, ours) = pair(torch.randn(400), **settings)
    one.grad = 2.0 ** torch.randint(-20, 3, (400,)) * torch.randn(400).sign()
    two.grad = one.grad.bfloat16()
    for _ in range(8):
        torch_adamw.step()
        ours.step()
        assert torch.equal(bits(ours.master(two)), bits(one.detach()))
    assert not torch.equal(ours.master(two), two.float())  # the low half holds something


def updates(lr: float, steps=200, weight_decay=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of `steps` updates of a small network learning noisy data: (torch's in fp32, ours), flat."""
    torch.manual_seed(1)
    teacher = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8))
    student = copy.deepcopy(teacher).bfloat16()
    for p in student.parameters():
        p.data += 0.1 * torch.randn_like(p)
    nets = [copy.deepcopy(student).float(), student]
    begin = [p.detach().float().clone() for p in student.parameters()]
    torch_adamw = torch.optim.AdamW(nets[0].parameters(), lr=lr, weight_decay=weight_decay)
    ours = SplitAdamW(student.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
        y = teacher(x).detach() + 0.1 * torch.randn(
            32, 8, generator=torch.Generator().manual_seed(1000 + step)
        )
        # one fp32 computation for both, on what each sees: the optimizers are compared, not bf16 matrix products
        for net in nets:
            seen = copy.deepcopy(net).float()
            (seen(x) - y).square().mean().backward()
            for p, q in zip(net.parameters(), seen.parameters()):
                p.grad = q.grad.to(p.dtype)
        torch_adamw.step()
        ours.step()
    return (
        torch.cat([(p.detach() - b).flatten() for p, b in zip(nets[0].parameters(), begin)]),
        torch.cat([(ours.master(p) - b).flatten() for p, b in zip(student.parameters(), begin)]),
    )


@pytest.mark.parametrize("lr", [5e-7, 5e-5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_200_steps_make_the_update_of_fp32(lr, weight_decay):
    theirs, ours = updates(lr, weight_decay=weight_decay)
    assert torch.cosine_similarity(theirs, ours, dim=0) > 0.999
    assert 0.99 < ours.norm() / theirs.norm() < 1.01


def test_the_second_moment_decays_as_in_fp32_where_nearest_freezes():
    """1,000 constant gradients, then 2,000 zeros, at beta2 = 0.999: fp32 goes to 0.135 of where it was. 20,000 weights
    in expectation within 0.5%, and one weight within 20% (rms); rounded to nearest nothing moves any more."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    ours = SplitAdamW([p], lr=1e-6)
    exact, nearest = torch.zeros(()), torch.zeros((), dtype=torch.bfloat16)
    for step in range(3000):
        gradient = 1e-3 if step < 1000 else 0.0
        p.grad = torch.full_like(p, gradient)
        ours.step()
        gradient = p.grad[0].float()
        exact = exact * 0.999 + 0.001 * gradient**2
        nearest = (nearest.float() * 0.999 + 0.001 * gradient**2).bfloat16()
        if step == 999:
            peak, frozen = exact.clone(), nearest.clone()
            square = ours.state[p]["exp_avg_sq"].float()
            assert square.mean() == pytest.approx(peak.item(), rel=5e-3)
            assert nearest < 0.5 * peak  # it stops on the way up as well
    square = ours.state[p]["exp_avg_sq"].float()
    assert exact == pytest.approx(0.999**2000 * peak.item(), rel=1e-4)
    assert square.mean() == pytest.approx(exact.item(), rel=5e-3)
    assert (square / exact - 1).square().mean().sqrt() < 0.2
    assert nearest == frozen


def test_the_first_moment_to_nearest_stays_near_fp32_at_beta1_0_9():
    torch.manual_seed(2)
    p = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    ours, exact, signal = SplitAdamW([p], lr=1e-6), torch.zeros(10_000), torch.randn(10_000)
    for step in range(150):
        p.grad = (signal + torch.randn(10_000)).bfloat16() if step < 100 else torch.zeros_like(p)
        ours.step()
        exact = exact.lerp(p.grad.float(), 0.1)
        if step in (99, 149):  # after noise, and after zeros that leave 0.5% of it
            error = ours.state[p]["exp_avg"].float() - exact
            assert error.norm() < 0.02 * exact.norm(), step


# ---- clipping ----


@pytest.mark.parametrize("size", [1e-3, 30.0])  # below and above the limit
def test_clipping_is_that_of_torch(size):
    torch.manual_seed(4)
    values = [torch.randn(7, 30), torch.randn(11)]
    ones, twos = (
        [torch.nn.Parameter(v.to(dtype)) for v in values]
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, two in zip(ones, twos):
        one.data = two.detach().float()
        two.grad = (size * torch.randn_like(one)).bfloat16()
        one.grad = two.grad.float()
    idle = torch.nn.Parameter(
        torch.ones(3, dtype=torch.bfloat16)
    )  # no gradient: no part of the norm, and no step
    kept = [two.grad.clone() for two in twos]
    theirs = torch.nn.utils.clip_grad_norm_(ones, 1.0)
    norm = gradient_norm([*twos, idle], slice_size=50)
    assert norm.dtype == torch.float32 and norm == pytest.approx(theirs.item(), rel=1e-6)
    settings = dict(
        lr=1e-3, betas=(0.0, 0.0), eps=1.0
    )  # with so large an eps the step depends on the gradient's size
    ours = SplitAdamW([*twos, idle], slice_size=50, **settings)
    torch.optim.AdamW(ones, weight_decay=0.0, **settings).step()
    assert clip_gradient(ours, 1.0) == pytest.approx(norm.item())
    ours.step()
    for one, two, grad in zip(ones, twos, kept):
        assert torch.equal(two.grad, grad)  # no gradient was rounded a second time
        assert torch.allclose(ours.master(two), one, rtol=1e-6, atol=1e-9)
    assert (idle == 1).all() and idle not in ours.state
    assert ours.scale == 1.0  # clipping holds for one step


def test_fp32_gradients_are_clipped_in_place():
    p = torch.nn.Parameter(torch.zeros(5))
    p.grad = torch.full((5,), 3.0)
    theirs = torch.optim.AdamW([p])
    assert clip_gradient(theirs, 1.5) == pytest.approx(3 * 5**0.5)
    assert gradient_norm([p]) == pytest.approx(1.5, rel=1e-5)


def test_the_norm_sums_bf16_in_fp32():
    p = torch.nn.Parameter(torch.zeros(5_000_000, dtype=torch.bfloat16))  # more than a slice
    p.grad = torch.full_like(p, 0.01)
    assert gradient_norm([p]) == pytest.approx(p.grad[0].item() * 5_000_000**0.5, rel=1e-6)
    p.grad = None
    assert gradient_norm([p]) == 0


@pytest.mark.parametrize(
    "norm, limit, scale", [(0.0, 1.0, 1.0), (3.0, 1.5, 0.5), (1e-6, 1e-6, 0.5)]
)
def test_the_scale_of_clipping_by_hand(
    norm, limit, scale
):  # torch adds 1e-6 to the norm, which the last one shows
    p = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    p.grad[2] = norm
    ours = SplitAdamW([p], lr=1e-3)
    assert clip_gradient(ours, limit) == pytest.approx(norm, rel=1e-2)
    assert ours.scale == pytest.approx(scale, rel=1e-2)


# ---- an optimizer like any other ----


def bytes_held(p, ours) -> int:
    tensors = [p, *(value for value in ours.state[p].values() if torch.is_tensor(value))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_eight_bytes_a_parameter():
    p = torch.nn.Parameter(torch.randn(64, 33).bfloat16())
    ours = SplitAdamW([p], lr=1e-3)
    p.grad = torch.randn_like(p)
    ours.step()
    assert bytes_held(p, ours) == 8 * p.numel()
    ours.zero_grad()
    assert p.grad is None


def test_a_step_does_not_depend_on_slices():
    values, gradient = torch.randn(40, 25), torch.randn(40, 25).bfloat16()
    masters = []
    for size in (2**22, 300):
        p = torch.nn.Parameter(values.bfloat16())
        ours = SplitAdamW([p], lr=1e-3, slice_size=size)
        p.grad = gradient.clone()
        ours.step()
        masters.append(ours.master(p))
    assert torch.equal(*masters) and masters[0].shape == (40, 25)


def train_steps(parameters, ours, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        ours.step()


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    def fresh(seed=0):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, 5).bfloat16()) for n in (3, 8)]
        return parameters, SplitAdamW(parameters, lr=1e-4, weight_decay=0.1, seed=seed)

    straight, ours = fresh()
    train_steps(straight, ours, range(20))
    first, saved = fresh()
    train_steps(first, saved, range(9))
    torch.save({"weights": first, "optimizer": saved.state_dict()}, tmp_path / "run.pt")
    found = torch.load(tmp_path / "run.pt", weights_only=False)
    second, resumed = fresh()
    for p, q in zip(second, found["weights"]):
        p.data.copy_(q.data)
    resumed.load_state_dict(found["optimizer"])
    train_steps(second, resumed, range(9, 20))
    other, elsewhere = fresh(seed=1)
    train_steps(other, elsewhere, range(20))
    for p, q, r in zip(straight, second, other):
        assert torch.equal(bits(ours.master(p)), bits(resumed.master(q))) and torch.equal(p, q)
        for name in ("low", "exp_avg", "exp_avg_sq"):
            assert torch.equal(
                ours.state[p][name].view(torch.int16), resumed.state[q][name].view(torch.int16)
            ), name
        assert not torch.equal(ours.state[p]["exp_avg_sq"], elsewhere.state[r]["exp_avg_sq"])


def test_each_parameter_is_rounded_by_draws_of_its_own():
    one, two = (torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2))
    ours = SplitAdamW([one, two], lr=1e-3)
    for p in (one, two):
        p.grad = torch.full_like(p, 0.3)
    ours.step()
    assert not torch.equal(ours.state[one]["exp_avg_sq"], ours.state[two]["exp_avg_sq"])


def test_the_rate_is_that_of_the_group_at_each_step():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ours = SplitAdamW([p], lr=1.0)
    p.grad = torch.ones_like(p)
    for group in ours.param_groups:
        group["lr"] = 1e-6
    ours.step()
    assert torch.allclose(ours.master(p), torch.full((4,), 1 - 1e-6), rtol=0, atol=1e-7)
    assert (p == 1).all()  # in bf16 it cannot be seen yet


def test_before_the_first_step_the_master_is_the_parameter():
    p = torch.nn.Parameter(torch.randn(3, 2).bfloat16())
    assert torch.equal(SplitAdamW([p], lr=1.0).master(p), p.float())


@pytest.mark.parametrize(
    "dtype, kind", [(torch.float32, torch.optim.AdamW), (torch.bfloat16, SplitAdamW)]
)
def test_make_optimizer_trains_what_requires_gradients(dtype, kind):
    model = small_model().to(dtype)
    model.lm_head.requires_grad_(False)
    ours = make_optimizer(
        model, Compute(checkpoint_activations=True), betas=(0.8, 0.9), weight_decay=0.3
    )
    assert type(ours) is kind and model.training and model.checkpoint_activations
    (group,) = ours.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.model.parameters()}
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.0, (0.8, 0.9), 0.3)


def test_other_parameters_are_refused():
    for p in (
        torch.ones(2),
        torch.ones(2, dtype=torch.float16),
        torch.ones(3, 2, dtype=torch.bfloat16).T,
    ):
        with pytest.raises(InputError, match="use torch.optim.AdamW for fp32 weights"):
            SplitAdamW([torch.nn.Parameter(p)], lr=1.0)
    with pytest.raises(InputError, match="torch.float32"):
        SplitAdamW([torch.nn.Parameter(torch.ones(2).bfloat16())], lr=1.0).add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))]}
        )
