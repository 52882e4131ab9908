"""Makes birnn_ext/mnist/sample.xz from the full MNIST in a folder of torchvision's layout, and prints its MD5."""

from __future__ import annotations

import argparse
import hashlib
import lzma
from pathlib import Path

from birnn_ext.mnist import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder that contains MNIST/raw")
    parser.add_argument("--out", type=Path, default=Path(data.__file__).with_name(data.SAMPLE_FILE))
    args = parser.parse_args()
    content = b""
    parts = data.read_files(args.directory)
    for digits, step in zip(parts, (data.SAMPLE_TRAIN_STEP, data.SAMPLE_TEST_STEP), strict=True):
        content += digits.images[::step].numpy().tobytes() + bytes(digits.labels[::step].tolist())
    # lc, lp, pb: neighbouring pixels predict a pixel, while its position within a word does not
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    packed = lzma.compress(content, filters=filters)
    args.out.write_bytes(packed)
    print(f"{args.out}: {len(packed)} bytes; MD5 of the content {hashlib.md5(content).hexdigest()}")


if __name__ == "__main__":
    main()
