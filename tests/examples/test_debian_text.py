"""The text of Debian packages, and the plot of a run, from files that are made here."""

import gzip
import json
import pathlib
import runpy
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LONG = "A goose reads its own state. " * 40


@pytest.fixture(scope="module")
def collect():
    return runpy.run_path(str(ROOT / "examples" / "debian_text.py"))["main"]


def package(folder, name, files):
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n"
    )
    for path, contents in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(contents)
    target = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, target], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, of Debian")
def test_texts_are_unpacked_once_and_divided(collect, tmp_path, capsys):
    numbered = {f"doc/{n}.txt": f"{n}: {LONG}".encode() for n in range(300)}
    package(tmp_path, "many", numbered | {"doc/page.html": LONG.encode()})
    package(
        tmp_path,
        "packed",
        {
            "doc/a.rst.gz": gzip.compress(LONG.encode()),
            "doc/7.txt": numbered["doc/7.txt"],
            "doc/short.txt": b"too short",
            "doc/words.dict.dz": gzip.compress(b"w\xf6rd\0: " + LONG.encode()),
        },
    )
    package(tmp_path, "repeated", {"doc/again.txt": LONG.encode()})
    collect(tmp_path, tmp_path / "text")
    found = sorted((tmp_path / "text").glob("*/*/*"))
    texts = {str(path.relative_to(tmp_path / "text")): path.read_bytes() for path in found}
    many = {name: text for name, text in texts.items() if "/many/" in name}
    assert sorted(many.values()) == sorted(numbered.values())
    held_out = [name for name in many if name.startswith("held-out/")]
    assert 0 < len(held_out) < 10  # 1 in 200
    assert {name.split("/", 1)[1]: text for name, text in texts.items() if name not in many} == {
        "packed/doc_a.rst": LONG.encode(),
        "packed/doc_words.dict": f"w\ufffdrd: {LONG}".encode(),
    }
    assert "packed: 2 texts, 0.0 MB" in capsys.readouterr().out


def test_a_folder_without_packages_is_an_error(collect, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.deb files"):
        collect(tmp_path, tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.slow
def test_the_plot_adds_up_the_time_of_all_parts(tmp_path, capsys):
    lines = [
        {"step": 0, "held_out_bits_per_byte": 8.0},
        {"step": 10, "bits_per_byte": 5.0, "tokens": 1000, "seconds": 30.0},
        {"step": 20, "bits_per_byte": 3.5, "tokens": 2000, "seconds": 60.0},
        {"step": 20, "held_out_bits_per_byte": 3.0},
        {"step": 30, "bits_per_byte": 2.0, "tokens": 1000, "seconds": 20.0},
        {"step": 30, "held_out_bits_per_byte": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = runpy.run_path(str(ROOT / "examples" / "plot_held_out.py"))
    names["main"](tmp_path, tmp_path / "plot.svg")
    assert "2.500 bits per byte on held-out text" in (tmp_path / "plot.svg").read_text()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("step", "minutes", "million_tokens", "held_out_bits_per_byte")
    assert [[row[name] for name in names] for row in rows] == [
        [0, 0, 0, 8],
        [20, 1.5, 0.003, 3],
        [30, pytest.approx(110 / 60), 0.004, 2.5],
    ]
    assert [row.get("training_bits_per_byte") for row in rows] == [None, 4, 2]
    assert [row.get("tokens_per_second") for row in rows] == [None, 33, 50]
