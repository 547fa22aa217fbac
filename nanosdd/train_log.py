"""The log of a training run: what it prints now and then, and when it stops a run that diverges."""

import json
import time
from statistics import fmean

from nanosdd.errors import Diverged


class TrainLog:
    """Ten entries of a run, each the mean of the steps since the one before.

    An entry has step, lr, loss, grad_norm (of its last step), response_tokens, tokens, seconds.
    saved: what `state` returned, of a run that goes on; write: where lines go.
    """

    def __init__(self, steps: int, saved: dict | None = None, write=print):
        saved = saved or {}
        self.entries = saved.get("entries", [])
        self.seen = saved.get("seen", [])  # steps since the last entry
        self.steps = steps
        self.write = write
        self.since = time.perf_counter()

    def add(self, step: int, lr: float, done: dict):
        """Add what train_step returned for a step (counted from 1); Diverged if it gets worse."""
        now = time.perf_counter()
        self.seen.append(done | {"seconds": now - self.since})
        self.since = now
        if step % max(1, self.steps // 10) and step < self.steps:
            return
        entry = {"step": step, "lr": lr, "grad_norm": done["grad_norm"]}
        for name in ("response_tokens", "tokens", "seconds"):
            entry[name] = sum(one[name] for one in self.seen)
        for name in sorted(done.keys() - entry):
            entry[name] = fmean(one[name] for one in self.seen)
        self.entries.append(entry)
        self.seen = []
        rate = entry["response_tokens"] / entry["seconds"]
        self.write(
            f"  step {step:>5}/{self.steps}  loss {entry['loss']:.4f}  lr {lr:.1e}  "
            f"grad norm {entry['grad_norm']:.2f}  {rate:,.0f} response tokens/s"
        )
        self.check()

    def check(self):
        """Diverged where the loss has risen by half a nat, or nothing moves any more."""
        first = self.entries[0]["loss"]
        last = self.entries[-1]
        loss = last["loss"]
        if last["step"] >= 50 and loss > first + 0.5:
            raise Diverged(f"the loss rose from {first:.2f} to {loss:.2f}; lower --lr")
        if last["step"] >= 10 and last["grad_norm"] == 0:
            raise Diverged(f"the gradient is 0 at step {last['step']}; check the data")
        if last["step"] == self.steps and len(self.entries) > 1 and loss > 0.99 * first:
            self.write("  warning: the loss hardly fell; a higher --lr or more --steps change more")

    def state(self) -> dict:
        """What a run that goes on needs."""
        return {"entries": self.entries, "seen": self.seen}

    def text(self) -> str:
        """The entries as JSON Lines."""
        return "".join(json.dumps(entry) + "\n" for entry in self.entries)
