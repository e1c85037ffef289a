"""A guest goes to another host and comes back, by the command."""

import json
from pathlib import Path

import pytest

from migrate.cli import lab

pytestmark = pytest.mark.qemu


@pytest.mark.timeout(120)
def test_a_guest_goes_there_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    with pytest.raises(SystemExit) as exit_info:
        lab.main(
            [
                *("round-trip", "--stay", "0s", "--link", "1gbit", "--qemu", "10.0"),
                *("--ram", "128MiB", "--content", "16MiB", "--json", str(raw)),
            ]
        )
    told = capsys.readouterr()
    assert exit_info.value.code == 0, told.err
    ((there, back),) = json.loads(raw.read_text())["trips"]
    for leg in (there, back):
        assert leg["report"]["status"] == "completed"
        assert leg["report"]["integrity"]["equal"] is True
    assert there["sent_bytes"] > 4 << 20
    assert back["report"]["old_copy"]["referenced_pages"] > 4096
    names = [line.split("  ")[0] for line in told.out.splitlines()]
    assert names == ["leg", "A to B", "B to A", "B to A / A to B"]
