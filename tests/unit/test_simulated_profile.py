"""Profiles: the shipped ones, what can be written in one, and how a mistake is told."""

from pathlib import Path

import pytest

from migrate.errors import ParamsError
from migrate.simulation.profile import Profile, load_profile, read_profile, shipped_names

SMALL = {"name": "small", "ram": "16MiB"}
WRITER = {"rate": 100, "working_set": "1MiB"}


def test_the_documented_profiles_are_shipped() -> None:
    documented = {"idle", "web", "database", "compile", "thrash", "cache"}
    assert documented <= set(shipped_names())


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_profile_says_what_it_is_and_travels_unchanged(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert profile.vcpus
    assert read_profile(profile.to_map()) == profile


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('ram = "2MiB"\n[[vcpus]]\nrate = 5\nworking_set = "4KiB"\n')
    profile = load_profile(str(path))
    assert (profile.name, profile.ram_bytes) == ("mine", 2 << 20)
    assert profile.vcpus[0][0].rate == 5


def test_a_phase_inherits_from_its_vcpu() -> None:
    phases = [{"duration": "1s"}, {"duration": "2s", "rate": 7, "locality": "zipf"}]
    profile = read_profile({**SMALL, "vcpus": [{**WRITER, "phases": phases}]})
    first, second = profile.vcpus[0]
    assert (first.rate, first.locality, first.duration_ns) == (100, "uniform", 10**9)
    assert (second.rate, second.locality, second.working_set_bytes) == (7, "zipf", 1 << 20)


def test_areas_lie_one_after_the_other_and_working_sets_behind_them() -> None:
    devices = [{"kind": "a", "area": "64KiB"}, {"kind": "a", "area": "1MiB", "speed": 3}]
    profile = read_profile({**SMALL, "vcpus": [WRITER], "devices": devices})
    assert profile.areas() == [(1 << 20, 65536), ((1 << 20) + 65536, 1 << 20)]
    assert [device.name for device in profile.devices] == ["a.0", "a.1"]
    assert profile.devices[1].options == {"speed": 3}
    assert profile.offset_of(profile.vcpus[0][0]) == 3 << 20


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ram": "3KiB"}, "ram: expected pages of 4KiB, 1MiB to 1TiB"),
        ({"ram": "1000001"}, "ram: expected pages"),
        ({"ram": 16}, "expected a text with a unit"),
        ({"ram": "many"}, "not a size"),
        ({"speed": 1}, "no such key: 'speed'"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"name": "a\nb"}, "expected a line"),
        ({"warm_up": "2h"}, "warm_up: expected 0ns to 1min"),
        ({"content": {"random": 1.1}}, "content.random: expected 0.0 to 1.0"),
        ({"content": {"random": float("nan")}}, "content.random"),
        ({"content": {"random": 0.6, "text": 0.6}}, "up to 1 in all"),
        ({"content": []}, "expected a table"),
        ({"vcpus": [{}]}, "expected a value for 'rate'"),
        ({"vcpus": [{**WRITER, "locality": "far"}]}, "uniform or zipf or sequential"),
        ({"vcpus": [{**WRITER, "offset": "15.5MiB"}]}, "ends outside of RAM"),
        ({"vcpus": [{**WRITER, "rate": 9_000_000}] * 2}, "at most 10000000 page writes"),
        ({"vcpus": [WRITER] * 65}, "at most 64 tables"),
        ({"vcpus": [{**WRITER, "phases": [{}]}]}, "expected a value for 'duration'"),
        ({"devices": [{"kind": "a", "name": "x"}] * 2}, "different names"),
        ({"devices": [{"kind": "a"}] * 4}, "do not fit 16MiB"),
        (
            {"devices": [{"kind": "a"}], "vcpus": [{**WRITER, "offset": "1MiB"}]},
            "in the devices' areas",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, object], text: str) -> None:
    with pytest.raises(ParamsError) as caught:
        read_profile({**SMALL, **change})
    assert text in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ParamsError, match=r"no profile 'nothing': .*cache.*thrash"):
        load_profile("nothing")


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"ram = ", "no TOML"), (b"\xff", "no TOML"), (b"#" * 70_000, "larger than 64KiB")],
)
def test_a_file_that_is_no_profile_is_refused(
    tmp_path: Path, content: bytes, text: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=text):
        load_profile(str(path))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="cannot read profile"):
        load_profile(str(tmp_path / "none.toml"))


def test_the_default_profile_has_nothing_in_it() -> None:
    profile = read_profile(SMALL)
    assert profile == Profile("small", "", 16 << 20)
