"""Which known chat template writes what a given one writes: data/chat.py runs this as a process.

A chat template is a program in Jinja, written by anybody. Jinja's sandbox keeps it from files and
modules, this process from taking all memory, and data/chat.py ends the process after a while.

stdin: JSON, [the template, {"bos_token": str, "eos_token": str, ...}]. chat_templates.json has
conversations, and what apply_chat_template (transformers) makes of each by the known templates.
"""

import json
import re
import sys
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment  # comes with torch

MOST_BYTES = 2**29
# transformers' own tag, which marks a response
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")


def recognise(jinja: str, tokens: dict) -> str | None:
    """Return the name of the known template that writes what this one does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {
        "add_generation_prompt": True,
        "tools": None,
        # Llama 3.2 asks for the day; ours is the default of 3.1, on every day.
        "strftime_now": lambda form: "26 Jul 2024",
    }
    jinja = GENERATION.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true"), jinja)
    template = environment.from_string(jinja)
    known = json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))
    for name, form in known["templates"].items():
        named = form["tokens"] | tokens
        texts = [template.render(named, messages=turns) for turns in known["conversations"]]
        if texts == form["texts"]:
            return name
    return None


if __name__ == "__main__":
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    print(recognise(*json.load(sys.stdin)))
