"""The image of pages of real files that lab guests read."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from migrate.errors import GuestError
from migrate.lab.file_content import build, pack

PAGE = 4096


def write(path: Path, start: bytes, size: int, fill: int) -> None:
    path.write_bytes(start.ljust(size, bytes([fill])))


def pages_of(image: BytesIO) -> list[bytes]:
    content = image.getvalue()
    return [content[i : i + PAGE] for i in range(0, len(content), PAGE)]


@pytest.fixture
def files(tmp_path: Path) -> str:
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(8):
        write(folder / f"program{i}", b"\x7fELF" + bytes([i]), 5 * PAGE + 100, 1)
        write(folder / f"text{i}", b"text %d" % i, 2 * PAGE + 7, ord("t"))
        write(folder / f"packed{i}", b"\0packed%d" % i, PAGE, 3)
    return str(folder)


def test_kinds_of_files_share_the_image_and_only_whole_pages_are_taken(files: str) -> None:
    image = BytesIO()
    pack(image, 24, (files,))
    pages = pages_of(image)
    assert len(pages) == 24
    last = [page[-1] for page in pages]
    # Files of 5, 2 and 1 pages: the kind that is behind gives the next, so none leads by more.
    assert all(6 <= last.count(fill) <= 10 for fill in (1, ord("t"), 3))


def test_a_small_image_is_the_start_of_a_large_one(files: str) -> None:
    small, large = BytesIO(), BytesIO()
    pack(small, 23, (files,))
    pack(large, 60, (files,))
    assert large.getvalue().startswith(small.getvalue())


def test_where_one_kind_runs_out_the_others_fill_in(files: str) -> None:
    image = BytesIO()
    pack(image, 64, (files,))
    assert len(pages_of(image)) == 64


def test_no_file_comes_twice_and_links_not_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, b"same", 2 * PAGE, 9)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    write(tmp_path / "other", b"other", PAGE, 8)
    image = BytesIO()
    with pytest.raises(GuestError, match="1 of 4 pages of files too few"):
        pack(image, 4, (str(tmp_path),))
    assert len(pages_of(image)) == 3


def test_unreadable_and_short_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "secret", b"secret", PAGE, 1)
    (tmp_path / "secret").chmod(0o600)
    write(tmp_path / "short", b"short", PAGE - 1, 1)
    with pytest.raises(GuestError, match="too few"):
        pack(BytesIO(), 1, (str(tmp_path),))


def test_the_image_is_made_once_and_always_the_same(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(64):
        write(Path(files) / f"more{i}", b"more %d" % i, 8 * PAGE, ord("m"))
    made = []
    for name in ("one", "two"):
        monkeypatch.setenv("PRECOPY_CACHE", str(tmp_path / name))
        made.append(build(2, (files,)))
    assert made[0].xxh3 == made[1].xxh3
    images = [np.fromfile(content.path, np.uint8) for content in made]
    assert np.array_equal(images[0], images[1])
    assert images[0].size == 2 << 20
    before = made[1].path.stat()
    assert build(2, (files,)) == made[1]
    assert made[1].path.stat() == before
    assert sorted(path.name for path in made[1].path.parent.iterdir()) == ["files-2.img"]
