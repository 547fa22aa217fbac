"""Errors for bad input: a script prints one line and exits with 2. Any other error is a bug."""

import io
import os
import sys
import traceback


class InputError(ValueError):
    """A file, folder or argument is wrong. The message, one line, names the problem and the fix."""


class Diverged(InputError):
    """The loss or its gradient is no longer finite, or grows."""


class Interrupted(Exception):
    """A command was asked to stop, and has kept its work. The message says how to go on."""


class Stream(io.TextIOWrapper):
    """Standard output or error, which no run ends by: what the encoding lacks is escaped, and
    nothing is written any more once nobody reads (| head -1) or the disk is full.

    On standard output control characters are escaped, whoever wrote the text.
    """

    def write(self, text):
        try:
            super().write(escaped(text) if self is sys.stdout else text)
            self.flush()  # or a log would be empty while work goes on
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def run_script(main):
    """Call main(); an error of the input or the machine is one line on stderr and exit code 2.

    An interruption is one line and exit code 130. --debug on the command line adds tracebacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by 2>&-; the next file that is opened would be in its place
            file = os.devnull if name == "stdout" else os.dup(1)
            setattr(sys, name, open(file, "w", errors="replace"))
        elif hasattr(stream, "buffer"):  # a notebook's has none
            setattr(sys, name, Stream(stream.buffer, stream.encoding, "backslashreplace"))
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
        return
    except (Interrupted, KeyboardInterrupt) as error:
        message = str(error) or "interrupted; the same command goes on from what is finished"
        code = 130
    except (InputError, OSError, UnicodeError, RuntimeError, OverflowError, MemoryError) as error:
        if type(error) is RuntimeError and "alloc" not in str(error):  # out of memory on a CPU
            raise
        message = f"error: {in_words(error)}"
        code = 2
        if debug:
            traceback.print_exc()
    print(escaped(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


def in_words(error: Exception) -> str:
    """What an error says, in one line that names the file where it is of one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, permissions, and room on disk"
    if isinstance(error, (InputError, OSError)):
        return str(error)
    what = "".join(traceback.format_exception_only(error))  # with its notes
    return f"{what}; an input is wrong or too large, --debug shows where"


def escaped(text: str) -> str:
    """A text with control characters, which could hide what was printed, shown as \\x1b."""
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ascii(ch)[1:-1] for ch in text)
