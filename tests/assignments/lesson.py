"""What every assignment's tests use: comparison with a message that teaches.

The tests of an assignment are functions of an implementation, such as check_rope(rope): pytest calls them with the
project's own functions (assignments/adapters.py), the grader with those of a submission that runs in another process,
and test_course.py with the classic mistakes of wrong_aN.py. Arguments and results are plain data: tensors, numbers,
strings, lists and dicts.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch


class Lesson(AssertionError):
    """A test failed; the message says what was expected, what came, and the usual cause."""


class Wrong(NamedTuple):
    """A classic mistake."""

    adapter: str  # the function of assignments/adapters.py whose place it takes
    function: Callable
    message: str  # what the test says of it


class Check(NamedTuple):
    """A test and what it is worth."""

    function: Callable  # of the named adapters and a seed
    adapters: tuple[str, ...]
    points: int
    choice: str = ""  # where an assignment lets one choose, the choice that it belongs to; the best one counts

    @property
    def name(self) -> str:
        return self.function.__name__.removeprefix("check_")


def full_marks(checks: list[Check]) -> dict[str, int]:
    """{choice: the points that it can earn}; "" stands for an assignment without a choice."""
    return {
        choice: sum(check.points for check in checks if check.choice == choice)
        for choice in dict.fromkeys(check.choice for check in checks)
    }


def fail(expected, got, cause: str):
    """Raise a Lesson; the first line of a cause is its heading."""
    heading = cause.split("\n")[0]
    raise Lesson(
        f"{heading}\n\n  expected     {expected}\n  got          {got}\n  usual cause  {cause}"
    )


def require(condition, expected, got, cause: str):
    """Raise a Lesson unless the condition holds."""
    if not condition:
        fail(expected, got, cause)


def difference(got, expected, atol: float, at: str = "") -> str | None:
    """Where two results differ first, None if they agree: float tensors and numbers within atol, all else exactly."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            return f"{at or 'the result'} is {short(got)}, not a tensor"
        if got.shape != expected.shape:
            return f"{at or 'the result'} has shape {list(got.shape)}, not {list(expected.shape)}"
        if got.dtype != expected.dtype and not (
            got.is_floating_point() and expected.is_floating_point()
        ):
            return f"{at or 'the result'} is {got.dtype}, not {expected.dtype}"
        one, two = got.double(), expected.double()
        off = (one - two).abs().nan_to_num(torch.inf)
        off = off.masked_fill((one == two) | (one.isnan() & two.isnan()), 0.0)
        if off.numel() == 0 or off.max() <= atol:
            return None
        place = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
        return (
            f"{at or 'the result'} is off by up to {float(off.max()):.3g}, at {place}: "
            f"{got[tuple(place)].item():.5g} in the place of {expected[tuple(place)].item():.5g}"
        )
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return f"{at or 'the result'} is {short(got)}, not {len(expected)} entries such as {short(expected)}"
        found = (
            difference(one, two, atol, f"{at}[{i}]")
            for i, (one, two) in enumerate(zip(got, expected))
        )
        return next(filter(None, found), None)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or set(got) != set(expected):
            return f"{at or 'the result'} is {short(got)}, not {short(expected)}"
        found = (difference(got[key], expected[key], atol, f"{at}[{key!r}]") for key in expected)
        return next(filter(None, found), None)
    numbers = all(
        isinstance(one, (int, float)) and not isinstance(one, bool) for one in (got, expected)
    )
    if numbers and isinstance(got + expected, float):
        same = (
            got == expected or abs(got - expected) <= atol or (got != got and expected != expected)
        )  # both NaN
    else:
        same = type(got) is type(expected) and got == expected
    kind = "" if same or type(got) is type(expected) else f", a {type(got).__name__},"
    return (
        None
        if same
        else f"{at or 'the result'} is {short(got)}{kind} in the place of {short(expected)}"
    )


def short(value) -> str:
    """A value in at most 160 characters."""
    if isinstance(value, torch.Tensor):
        text = f"{value.dtype} {list(value.shape)} {value.flatten()[:4].tolist()}..."
    else:
        text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def compare(
    function,
    arguments: tuple,
    expected,
    what: str,
    wrong: list[Wrong],
    adapter: str,
    atol=0.0,
    view=lambda found: found,
):
    """Call function(*arguments) and compare its result with the expected one.

    Where they differ, the classic mistakes of this adapter are tried: if one of them has the same result, the Lesson
    says so; otherwise it lists them, since one that is made in another way, or beside a second one, has another result.
    what: the expected result, in words. atol: of floats, as `difference`. view: a function of a result, to what of it
    is compared.
    """
    try:
        got, expected = view(function(*copy.deepcopy(arguments))), view(expected)
    except Exception as error:
        error.add_note(f"where this is expected: {what}")
        raise
    found = difference(got, expected, atol)
    if not found:
        return
    mistakes = [mistake for mistake in wrong if mistake.adapter == adapter]
    for mistake in mistakes:
        try:
            other = view(mistake.function(*copy.deepcopy(arguments)))
            # Looser than the test, since a mistake is rounded in its own way, but not so loose that it looks right.
            same = (
                difference(other, got, 30 * atol) is None
                and difference(other, expected, 30 * atol) is not None
            )
            same = same or difference(other, got, atol) is None
        except Exception:  # a mistake may not run on every input
            continue
        if same:
            fail(what, found, mistake.message)
    known = "".join(
        f"\n    - {message}" for message in dict.fromkeys(mistake.message for mistake in mistakes)
    )
    fail(what, found, f"not recognised\n  often        what goes wrong here:{known}")


def generator(seed: int, salt: str = "") -> torch.Generator:
    """A torch generator that depends on a seed and a name."""
    return torch.Generator().manual_seed(
        sum(ord(ch) * 31**i for i, ch in enumerate(f"{salt} {seed}")) % 2**62
    )


def random_llama(seed: int, **changes) -> tuple[dict, dict]:
    """(configuration, weights by name) of a small random Llama in which no two sizes are equal."""
    config = dict(
        vocab_size=89,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=0.03,
        rope_theta=500.0,
        max_position_embeddings=70,
    )
    config |= changes
    C, I, V, D = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
    )
    q, kv = D * config["num_attention_heads"], D * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (V, C),
        "model.norm.weight": (C,),
        "lm_head.weight": (V, C),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (C,),
                "post_attention_layernorm": (C,),
                "self_attn.q_proj": (q, C),
                "self_attn.k_proj": (kv, C),
                "self_attn.v_proj": (kv, C),
                "self_attn.o_proj": (C, q),
                "mlp.gate_proj": (I, C),
                "mlp.up_proj": (I, C),
                "mlp.down_proj": (C, I),
            }.items()
        }
    draw = generator(seed, "llama")
    return config, {
        name: 1 + 0.3 * torch.randn(shape, generator=draw)
        if len(shape) == 1
        else 0.2 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


def token_ids(seed: int, *shape, below: int = 89) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(below, shape, generator=generator(seed, "tokens"))
