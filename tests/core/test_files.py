"""Folders that appear whole or not at all."""

from pathlib import Path

import pytest

from attnkit._core.files import new_folder


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "there" / "folder"
    for text in ("first", "second"):
        with new_folder(folder) as temporary:
            (temporary / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_there_may_stay(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text, stays in (("first", False), ("second", True), ("third", False)):
        with new_folder(folder, unless=lambda stays=stays: stays) as temporary:
            (temporary / text).write_text(text)
        assert [path.name for path in folder.iterdir()] == ["third" if text == "third" else "first"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_breaks_off_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()

    def interrupted() -> None:
        with new_folder(folder) as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]
