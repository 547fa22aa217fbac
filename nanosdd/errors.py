"""Errors for bad input: a script prints one line and exits with code 2. Any other error is a bug."""

import sys
import traceback


class InputError(ValueError):
    """A file, folder or argument is wrong. The message is one line that names the problem and the fix."""


class Diverged(InputError):
    """The loss or its gradient is no longer finite, or grows."""


class Interrupted(Exception):
    """A command was asked to stop, and has kept its work. The message says how to go on."""


def run_script(main):
    """Call main(); an error of the input or of the machine becomes one line on stderr and exit code 2, an interruption
    one line and exit code 130. With --debug on the command line the traceback is printed too."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # or a redirected log would be empty while work goes on
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        main()
    except Interrupted as error:
        sys.exit(_fail(str(error), 130))
    except KeyboardInterrupt:
        sys.exit(
            _fail("interrupted; finished parts are kept, the same command goes on from them", 130)
        )
    except (InputError, OSError, UnicodeError, RecursionError, OverflowError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        sys.exit(_fail(f"error: {in_words(error)}", 2))


def in_words(error: Exception) -> str:
    """What an error says, in one line that names the file where it is of one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions, and the room on the disk"
    if isinstance(error, (InputError, OSError)):
        return str(error)
    return (
        f"{type(error).__name__}: {error}; an input is not what it should be, --debug shows where"
    )


def _fail(message: str, code: int) -> int:
    print(escaped(" ".join(message.split())), file=sys.stderr)
    return code


def escaped(text: str) -> str:
    """A text in which control characters, which could move the cursor or hide what was printed, are shown as \\x1b."""
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ascii(ch)[1:-1] for ch in text)
