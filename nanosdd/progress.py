"""Progress of anything that takes longer than a few seconds."""

import io
import sys

from tqdm import tqdm


class Progress(tqdm):
    """A tqdm bar in a terminal; elsewhere, such as in a log file, a line every so many seconds."""

    def __init__(self, iterable=None, *, desc: str, total=None, disable=False, seconds=30):
        self.in_terminal = sys.stderr.isatty()
        super().__init__(
            iterable,
            desc=desc,
            total=total,
            leave=False,
            disable=disable,
            mininterval=0.1 if self.in_terminal else seconds,
            miniters=1,
            file=None if self.in_terminal else io.StringIO(),
        )

    def display(self, msg=None, pos=None):
        if self.in_terminal:
            super().display(msg, pos)
        elif self.n and msg is None:  # "" clears the bar at the end
            print(f"  {self.desc}: {self.n} of {self.total}", file=sys.stderr, flush=True)
