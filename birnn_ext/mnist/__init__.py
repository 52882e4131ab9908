"""The tutorial's MNIST classifier, trained, evaluated and used from the command line: `birnn-mnist`."""

import sys


def main() -> int:
    """Runs the command; returns its exit status."""
    try:
        from birnn_ext.mnist import cli
    except ModuleNotFoundError as error:
        print(f"birnn-mnist: error: {error}; install birnn_ext[mnist]", file=sys.stderr)
        return 2
    return cli.main()
