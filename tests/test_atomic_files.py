"""Files and folders that are whole or not there."""

import pytest

from jsae_lightning.atomic_files import atomic_file, atomic_folder


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "before").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "old") as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["before"]
    with atomic_folder(tmp_path / "old") as temporary:
        (temporary / "after").touch()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["after"]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("exists", [True, False])
def test_of_a_link_the_folder_is_replaced(tmp_path, exists):
    """And the link stays one, with nothing left beside it."""
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "real").mkdir()
        (tmp_path / "disk" / "real" / "before").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "after").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["after"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["after", "disk", "link", "real"]


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "before"
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("after")
    assert (tmp_path / "file").read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
