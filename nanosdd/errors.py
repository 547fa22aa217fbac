"""The error for bad input: a script prints its message, one line, and exits with code 2. Any other error is a bug."""

import sys


class InputError(ValueError):
    """A file, folder or argument is wrong. The message is one line that names the problem and the fix."""


def run_script(main):
    """Call main(); an InputError becomes one line on stderr and exit code 2, Ctrl-C one line and exit code 130."""
    try:
        main()
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; unfinished work is not kept", 130))


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
