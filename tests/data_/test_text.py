# SPDX-License-Identifier: Apache-2.0
import pytest

from hmf.data import text
from hmf.errors import HmfError


def test_the_library_is_split_once_and_for_all():
    train = {document.path for document in text.stdlib_documents("train")}
    heldout = {document.path for document in text.stdlib_documents("heldout")}
    assert train and heldout and not train & heldout
    # Fixed by the paths alone, so it holds on every machine and Python version.
    assert text.split_of("argparse.py") == "train"
    assert text.split_of("pprint.py") == "heldout"
    assert {"argparse.py", "textwrap.py"} <= train
    assert {"pprint.py", "json/encoder.py"} <= heldout


def test_a_module_that_becomes_a_package_keeps_its_part():
    for name in ("zipfile", "pprint", "json", "pathlib"):
        assert text.split_of(f"{name}.py") == text.split_of(f"{name}/__init__.py")


def test_no_tests_no_tables_no_other_packages():
    for split in ("train", "heldout"):
        for document in text.stdlib_documents(split):
            assert not {"site-packages", "test", "tests", "encodings"} & set(document.path.split("/"))


def test_a_limit_is_kept_and_is_a_prefix():
    whole = text.stdlib_documents("heldout")
    some = text.stdlib_documents("heldout", max_bytes=30_000)
    assert 29_996 <= sum(len(document.text.encode()) for document in some) <= 30_000
    assert [document.path for document in some] == [document.path for document in whole[: len(some)]]
    assert all(a.text == b.text for a, b in zip(some[:-1], whole, strict=False))


def test_folders_and_files(tmp_path, capsys):
    for index in range(60):
        (tmp_path / f"{index}.md").write_text(f"text {index}")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    every = text.documents(tmp_path)
    assert len(every) == 60
    assert ": not read: image.png" in capsys.readouterr().err
    parts = [text.documents(tmp_path, "train"), text.documents(tmp_path, "heldout")]
    assert all(parts) and len(parts[0]) + len(parts[1]) == 60
    assert [document.text for document in text.documents(tmp_path / "7.md", "train")] == ["text 7"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(HmfError, match=r"latin.txt: not UTF-8 \(unexpected end of data at byte 4\)"):
        text.documents(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(HmfError, match=r"rows.jsonl: holds jsonl files; prepare them with `hmf data prepare`"):
        text.documents(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("make", ["missing", "empty", "one file for two parts"])
def test_nothing_to_read_names_the_place(tmp_path, make):
    folder = tmp_path / "corpus"
    if make != "missing":
        folder.mkdir()
    if make == "one file for two parts":
        (folder / "a.txt").write_text("text")
    other = "heldout" if text.split_of("a.txt") == "train" else "train"
    with pytest.raises(HmfError, match="corpus"):
        text.documents(folder, other)
