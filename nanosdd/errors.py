"""One kind of error for bad input: scripts print its one line and exit with code 2; anything else is a bug."""

import sys


class InputError(ValueError):
    """A file, folder or argument is wrong. The message is one line that names the problem and the fix."""


def run_script(main):
    """Call main() as a script: an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; what was half done is not kept", 130))


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
