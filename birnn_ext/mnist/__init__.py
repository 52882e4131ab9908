"""The tutorial's MNIST classifier, trained, evaluated and used from the command line: `birnn-mnist`."""

import signal
import sys


def main() -> int:
    """Runs the command; returns its exit status. SIGTERM is as good as Ctrl-C; both are ignored from the end on."""
    try:
        from birnn_ext.mnist import cli
    except ModuleNotFoundError as error:
        print(f"birnn-mnist: error: {error}; install birnn_ext[mnist]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return cli.main()
    finally:  # an impatient user's second one must not break the interpreter's exit
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
