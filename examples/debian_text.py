"""Collects the text of Debian packages of documentation and books, as data to train on.

    python examples/debian_text.py DEBS --out TEXT

DEBS is a folder of `.deb` files, which `apt-get download` puts into the current folder. This script
downloads nothing. docs/proofs.md names the packages and what follows: `goose-jax tokenize` and
`goose-jax train`.

Taken are the files whose names end in `SUFFIXES`, unpacked. Bytes that are not UTF-8 become U+FFFD,
and zeros are left out. So are texts that occur again, and files of less than 1 KiB. About one text
in `HELD_OUT_SHARE` goes to TEXT/held-out, all others go to TEXT/train. Which ones depends only on
their names.
"""

import gzip
import hashlib
import pathlib
import subprocess
import tarfile
from collections.abc import Iterator
from typing import Annotated

import tyro

SUFFIXES = (".txt", ".txt.gz", ".rst", ".rst.gz", ".md", ".md.gz", ".pod", ".dict.dz")
HELD_OUT_SHARE = 200
SMALLEST = 1024


def texts(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields path and contents, in UTF-8, of each text in a Debian package.

    Raises:
      subprocess.CalledProcessError: if `dpkg-deb` cannot read the package.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as files:
            for member in files:
                if member.isfile() and member.name.endswith(SUFFIXES):
                    contents = files.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith((".gz", ".dz")):
                        contents = gzip.decompress(contents)
                    text = contents.decode(errors="replace").replace("\0", "")
                    yield member.name.removeprefix("./"), text.encode()
        process.stdout.read()  # what pads the archive
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def main(debs: Annotated[pathlib.Path, tyro.conf.Positional], out: pathlib.Path) -> None:
    """Writes the texts of all packages in a folder, and prints how much each gives.

    Args:
      debs: folder of `.deb` files.
      out: folder to make, for the folders `train` and `held-out`.
    """
    packages = sorted(debs.glob("*.deb"))
    if not packages:
        raise FileNotFoundError(f"{debs} has no .deb files; `apt-get download` makes them")
    out.mkdir(parents=True)
    seen: set[bytes] = set()
    total = 0
    for package in packages:
        name = package.name.partition("_")[0]
        count = size = 0
        for path, contents in texts(package):
            digest = hashlib.sha256(contents).digest()
            if len(contents) < SMALLEST or digest in seen:
                continue
            seen.add(digest)
            by_name = int.from_bytes(hashlib.sha256(f"{name}/{path}".encode()).digest()[:8])
            part = "held-out" if by_name % HELD_OUT_SHARE == 0 else "train"
            file = out / part / name / path.replace("/", "_")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_name(file.name.removesuffix(".gz").removesuffix(".dz")).write_bytes(contents)
            count, size = count + 1, size + len(contents)
        print(f"{name}: {count} texts, {size / 1e6:.1f} MB")
        total += size
    print(f"all: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main)
