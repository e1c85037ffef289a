"""Hostile input: only typed errors, bounded memory; ``tools/fuzz`` takes a million of each."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuzz import runner

ROOT: Final = Path(__file__).parents[2]
INPUTS: Final = 20_000

ENDINGS: Final = {
    "frames": {"frames: whole", "frames: refused", "frames: cut", "admission: refused"},
    "messages": {"message: read", "message: refused"},
    "session": {
        "session: heard something",
        "session: FrameError",
        "session: MessageError",
        "session: UnexpectedMessageError",
    },
    "codecs": {"codec: decoded", "codec: refused"},
    "stream": {
        "stream: read to its end",
        "stream: refused",
        "stream: refused behind its pages",
    },
    "multifd": {
        "channel: read",
        "channel: cut",
        "channel: refused",
        "several: read to the end",
        "several: refused",
    },
    "return-path": {"return path: read", "return path: refused"},
    "virtio": {
        "device: decoded",
        "device: decoded, rings inconsistent",
        "device: refused",
        "ring: consistent",
        "ring: inconsistent",
        "ring: not judged",
        "tail: decoded",
        "tail: refused",
        "tail: some devices refused",
    },
    "qmp": {"QMP: read", "QMP: refused", "QMP: refused behind the greeting", "HMP: read"},
    "facts": {"facts: compared", "facts: refused"},
}
"""How at least a hundred inputs in ``INPUTS`` end, by target: what is fuzzed is reached."""


def fuzz(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools/fuzz"), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert outcome["good"] == (done.returncode == 0)
    return outcome


@pytest.mark.parametrize("target", sorted(runner.TARGETS))
def test_hostile_input_ends_in_typed_errors_and_bounded_memory(target: str) -> None:
    seed = random.SystemRandom().randrange(2**32)
    outcome = fuzz(target, "--inputs", INPUTS, "--seed", seed)
    assert outcome["failures"] == [], f"seed {seed}"
    assert outcome["growth_bytes"] <= runner.MAX_GROWTH_BYTES, f"seed {seed}"
    assert sum(outcome["counts"].values()) == INPUTS
    often = {what for what, times in outcome["counts"].items() if times >= 100}
    assert often >= ENDINGS[target], f"seed {seed}"


PLANTED: Final = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.fuzz import runner

kept = []

def case(rng):
    mistake = sys.argv[1]
    if mistake == "raises" and rng.random() < 0.5:
        raise KeyError("mistake")
    if mistake == "reserves":
        bytearray(2 * runner.MAX_GROWTH_BYTES)
    if mistake == "keeps":
        kept.append(b"x" * (runner.MAX_GROWTH_BYTES // 10))
    if mistake == "hangs":
        while True:
            pass
    return "good"

runner.TARGETS["planted"] = lambda: case
runner.LIMIT_S = 0.05
outcome = runner.run("planted", 12, 1)
print(outcome.n_failures, int(outcome.good))
print(*(trace.splitlines()[-1] for _, trace in outcome.failures), sep="\\n")
"""


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("raises", "KeyError: 'mistake'"),
        ("reserves", "MemoryError"),
        ("keeps", "MemoryError"),
        ("hangs", "tests.fuzz.runner.TooSlowError: more than 0.05 s of processor time"),
    ],
)
def test_a_planted_mistake_is_found(mistake: str, error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, mistake], capture_output=True, text=True, check=True
    )
    counts, *errors = done.stdout.splitlines()
    n_failures, good = map(int, counts.split())
    assert n_failures >= 1
    assert not good
    assert set(errors) == {error}


def test_without_a_mistake_nothing_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, "none"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]


def test_an_input_is_the_same_by_itself() -> None:
    alone = [fuzz("stream", "--seed", 5, "--only", number)["counts"] for number in range(2)]
    together = fuzz("stream", "--seed", 5, "--inputs", 2)["counts"]
    assert {what: sum(one.get(what, 0) for one in alone) for what in together} == together
