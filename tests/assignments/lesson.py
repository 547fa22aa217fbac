"""What every assignment's tests use: comparison with a message that teaches.

The tests of an assignment are functions of an implementation, such as check_rope(rope): pytest
calls them with the project's own functions (assignments/adapters.py), the grader with those of a
submission that runs in another process, and test_course.py with the classic mistakes of
wrong_aN.py. Arguments and results are plain data: tensors, numbers, strings, lists and dicts.
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from model import Llama, LlamaConfig


class Lesson(AssertionError):
    """A test failed; the message says what was expected, what came, and the usual cause."""


class Wrong(NamedTuple):
    """A classic mistake."""

    adapter: str  # the function of assignments/adapters.py whose place it takes
    function: Callable
    message: str  # what the test says of it


def mistakes(causes: dict[Callable, dict[str, str]]) -> list[Wrong]:
    """Classic mistakes from {right solution: {its flaw: what the test says of that}}."""
    found = []
    for function, messages in causes.items():
        for flaw, message in messages.items():
            found.append(Wrong(function.__name__, partial(function, flaw=flaw), message))
    return found


class Check(NamedTuple):
    """A test and what it is worth."""

    function: Callable  # of an adapter and a seed
    adapter: str
    points: int
    choice: str = ""  # the choice that it belongs to, where there is one; the best one counts

    @property
    def name(self) -> str:
        return self.function.__name__.removeprefix("check_")

    def run(self, adapters, seed: int = 0):
        """Test the adapters, attributes of an object; an exception says what is wrong."""
        self.function(getattr(adapters, self.adapter), seed=seed)


def full_marks(checks: list[Check]) -> dict[str, int]:
    """{choice: the points that it can earn}; "" is the choice where there is none."""
    marks = {}
    for check in checks:
        marks[check.choice] = marks.get(check.choice, 0) + check.points
    return marks


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


def difference(got, expected, atol: float, at: str = "the result") -> str | None:
    """Where two results differ first, None if they agree: floats within atol, all else exactly."""
    if isinstance(expected, torch.Tensor):
        return tensor_difference(got, expected, atol, at)
    kinds = {type(got), type(expected)}
    if kinds in ({float}, {float, int}):
        both_nan = got != got and expected != expected
        same = both_nan or got == expected or abs(got - expected) <= atol
        return None if same else f"{at} is {short(got)} in the place of {short(expected)}"
    are_dicts = isinstance(expected, dict) and isinstance(got, dict)
    if are_dicts and got.keys() == expected.keys():
        places = list(expected)
    elif kinds <= {list, tuple} and len(got) == len(expected):
        places = range(len(expected))
    else:
        same = type(got) is type(expected) and got == expected
        return None if same else f"{at} is {short(got)} in the place of {short(expected)}"
    for place in places:
        found = difference(got[place], expected[place], atol, f"{at}[{place!r}]")
        if found:
            return found


def tensor_difference(got, expected: torch.Tensor, atol: float, at: str) -> str | None:
    """As `difference`; float dtypes may differ."""
    if not isinstance(got, torch.Tensor):
        return f"{at} is {short(got)}, not a tensor"
    if got.shape != expected.shape:
        return f"{at} has shape {list(got.shape)}, not {list(expected.shape)}"
    if got.dtype != expected.dtype and not (got.is_floating_point() & expected.is_floating_point()):
        return f"{at} is {got.dtype}, not {expected.dtype}"
    one = got.detach().double()
    two = expected.detach().double()
    close = torch.isclose(one, two, rtol=0.0, atol=atol, equal_nan=True)
    if close.all():
        return None
    off = (one - two).abs().nan_to_num(torch.inf).masked_fill(close, 0.0)
    place = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
    return (
        f"{at} is off by up to {float(off.max()):.3g}, at {place}: "
        f"{one[tuple(place)]:.5g} in the place of {two[tuple(place)]:.5g}"
    )


def short(value) -> str:
    """A value in at most 160 characters."""
    text = repr(value)
    if isinstance(value, torch.Tensor):
        text = f"{value.dtype} {list(value.shape)} {value.flatten()[:4].tolist()}..."
    return text if len(text) <= 160 else text[:157] + "..."


def compare(
    function, arguments: tuple, what: str, slow, adapter: str, atol=0.0, view=lambda found: found
):
    """Call function(*arguments) and compare its result with that of the adapter's right solution.

    Where they differ, the classic mistakes of this adapter are tried: if one has the same result,
    the Lesson says so; otherwise it lists them, since one that is made in another way, or beside a
    second one, has another result. what: the expected result, in words. slow: the module wrong_aN,
    which holds both. atol: of floats, as `difference`. view: a function of a result, to what of it
    is compared.
    """
    expected = view(getattr(slow, adapter)(*copy.deepcopy(arguments)))
    try:
        got = view(function(*copy.deepcopy(arguments)))
    except Exception as error:
        error.add_note(f"where this is expected: {what}")
        raise
    found = difference(got, expected, atol)
    if not found:
        return
    messages = []
    for mistake in slow.WRONG:
        if mistake.adapter != adapter:
            continue
        messages.append(mistake.message)
        try:
            other = view(mistake.function(*copy.deepcopy(arguments)))
        except Exception:  # a mistake may not run on every input
            continue
        # A mistake is rounded in its own way: looser than the test, unless it then looks right.
        loose = 30 * atol if difference(other, expected, 30 * atol) else atol
        if difference(other, got, loose) is None:
            fail(what, found, mistake.message)
    known = "\n    - ".join(dict.fromkeys(messages))
    fail(what, found, f"not recognised\n  often        what goes wrong here:\n    - {known}")


def generator(seed: int, salt: str = "") -> torch.Generator:
    """A torch generator that depends on a seed and a name."""
    return torch.Generator().manual_seed(random.Random(f"{salt} {seed}").getrandbits(60))


SMALL = dict(  # a Llama, no two sizes of which are equal
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


def random_llama(seed: int, **changes) -> tuple[dict, dict]:
    """(configuration, weights by name) of a random Llama of the shape SMALL."""
    config = SMALL | changes
    draw = generator(seed, "llama")
    weights = {}
    for name, weight in Llama(LlamaConfig(**config)).state_dict().items():
        noise = torch.randn(weight.shape, generator=draw)
        weights[name] = 1 + 0.3 * noise if weight.dim() == 1 else 0.2 * noise
    return config, weights


def token_ids(seed: int, *shape, below: int = 89) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(below, shape, generator=generator(seed, "tokens"))
