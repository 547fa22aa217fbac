"""Scores, the log of a run and sample answers as lines of text."""

from statistics import fmean

from nanosdd.errors import escaped


def text_table(
    title: str, columns: dict, rows: list[tuple[str, dict, str]], notes_title: str = ""
) -> str:
    """A table of scores: percent, two of them as 79/84; nats and cosines with two decimals; blank where missing.

    columns: {title: key, or a pair of keys, of the scores}. rows: (name, scores, what is noted at the right).
    """
    first = max(len(name) for name in [title, *(name for name, _, _ in rows)])
    cells = [
        [
            title_of,
            *(
                "/".join(
                    _number(key, scores[key])
                    for key in ((keys,) if isinstance(keys, str) else keys)
                    if key in scores
                )
                for _, scores, _ in rows
            ),
        ]
        for title_of, keys in columns.items()
    ]
    columns_text = [[f"{text:>{max(map(len, column))}}" for text in column] for column in cells]
    lines = []
    for i, (name, note) in enumerate(
        [(title, notes_title), *((name, note) for name, _, note in rows)]
    ):
        lines.append(
            "  ".join([f"{name:<{first}}", *(column[i] for column in columns_text), note]).rstrip()
        )
    return "\n".join(lines)


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key.endswith(("nll", "logp", "cosine")) else f"{100 * value:.0f}"


def average(cells: list[dict]) -> dict:
    """The mean over cells of every score that is a fraction or a number of nats and that all of them have."""
    return {
        key: fmean(cell[key] for cell in cells)
        for key, value in cells[0].items()
        if isinstance(value, float) and all(key in cell for cell in cells)
    }


def log_text(log: list[dict], steps: int) -> str:
    """The last entry of the log as a line."""
    last, left = (
        log[-1],
        sum(entry["seconds"] for entry in log) / log[-1]["step"] * (steps - log[-1]["step"]),
    )
    rate = last["response_tokens"] / last["seconds"]
    return (
        f"  step {last['step']:>5}/{steps}  loss {last['loss']:.4f}  lr {last['lr']:.1e}  grad norm "
        f"{last['grad_norm']:.2f}  {rate:,.0f} response tokens/s  {left:.0f} s left"
    )


def samples_text(prompts: list[str], before: list | None, after: list) -> str:
    """The prompts with the answers before and after training."""
    old = [one.text for one in before] if before else ["(untrained)"] * len(prompts)
    return "".join(
        f"prompt: {one_line(prompt)}\nbefore: {one_line(was)}\nafter:  {one_line(now.text)}\n\n"
        for prompt, was, now in zip(prompts, old, after)
    )


def answers_text(cells: list[dict], prompts: list[str]) -> str:
    """Each prompt with its answers by the arms of the first seed, before any attack and after mft with the most shots."""
    shots = max(cell["shots"] for cell in cells)
    shown = [
        cell
        for cell in cells
        if cell["seed"] == cells[0]["seed"]
        and cell["chosen"]
        and "answers" in cell
        and cell["attack"] in ("none", "mft")
        and cell["shots"] in (0, shots)
    ]
    lines = []
    for i, prompt in enumerate(prompts if shown else []):
        lines.append(one_line(prompt))
        for cell in shown:
            after = f"after {cell['attack']} {cell['shots']}" if cell["shots"] else ""
            lines.append(f"  {cell['arm']:<12}{after:<14}{one_line(cell['answers'][i])}")
        lines.append("")
    return "\n".join([*lines, ""])


def one_line(text: str) -> str:
    """A text in one line, control characters escaped."""
    return escaped(" ".join(text.split()))


def update_text(moved: float, kept: float, cosine: float) -> str:
    """What checkpoint.kept_update returns for bf16, as a line; a warning where bf16 loses the update."""
    text = (
        f"  the update moved {moved:.1%} of the weights; rounded to bf16, {kept:.1%} of those still differ from "
        f"the start, and what is kept has cosine {cosine:.2f} with the update"
    )
    if cosine < 0.9:
        text += "\n  warning: in bf16 little of this update shows; evaluate with --dtype fp32, or raise --lr"
    return text
