"""Progress of anything that takes longer than a few seconds, and of a loss."""

import sys
import time

from tqdm import tqdm

from nanosdd.errors import Diverged


class Progress(tqdm):
    """A tqdm bar in a terminal; elsewhere, such as in a log file, a line every so many seconds."""

    def __init__(
        self, iterable=None, *, desc: str, total=None, leave=False, disable=False, seconds=30
    ):
        self.in_terminal, self.told, self.seconds = sys.stderr.isatty(), time.monotonic(), seconds
        super().__init__(
            iterable,
            desc=desc,
            total=total,
            leave=leave,
            disable=disable,
            mininterval=0.1,
            file=None if self.in_terminal else _Nowhere(),
        )

    def update(self, n=1):
        super().update(n)
        self._tell()

    def __iter__(self):
        for done, thing in enumerate(super().__iter__(), 1):
            yield thing
            self._tell(done)

    def _tell(self, done=None):
        quiet = self.in_terminal or self.disable or self.total == 1
        if not quiet and time.monotonic() - self.told >= self.seconds:
            self.told = time.monotonic()
            of = f" of {self.total}" if self.total else ""
            print(
                f"  {self.desc}: {self.n if done is None else done}{of}",
                file=sys.stderr,
                flush=True,
            )


class _Nowhere:
    """A file that forgets."""

    def write(self, text):
        pass

    def flush(self):
        pass


def check_progress(log: list[dict], steps: int):
    """Look at the log of a run of so many steps after each of its entries; a warning is printed after the last one.

    Diverged where the loss has risen by half a nat since the first entry of the log, or nothing moves any more."""
    first, last = log[0], log[-1]
    if last["step"] >= 50 and last["loss"] > first["loss"] + 0.5:
        raise Diverged(f"the loss rose from {first['loss']:.2f} to {last['loss']:.2f}; lower --lr")
    if last["grad_norm"] == 0 and last["step"] >= 10:
        raise Diverged(
            f"the gradient is 0 at step {last['step']}: nothing is learned; check the data, lower --lr"
        )
    if last["step"] == steps > first["step"] and last["loss"] > 0.99 * first["loss"]:
        print("  warning: the loss hardly fell; a higher --lr or more --steps would change more")
