"""The command `birnn-mnist` trains, evaluates and uses the tutorial's MNIST classifier."""

import signal
import sys


def main() -> int:
    """Runs the command; returns its exit status. SIGTERM acts like Ctrl-C. At the end both are ignored."""
    try:
        from birnn_ext.mnist import cli
    except ModuleNotFoundError as error:
        print(f"birnn-mnist: error: {error}; install birnn_ext[mnist]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return cli.main()
    finally:  # a second signal must not break the interpreter's exit
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
