"""``inspect``'s output for programs: one JSON document; units stand in the names.

``devices`` has the shape of the migration report's list of that name (``migrate.report.report``).
"""

from typing import Any, Final

from migrate.lab.inspect_model import Section, Survey
from migrate.lab.inspect_rings import Rings
from migrate.report.report import to_json_value
from proto.ring_check import QueueCheck
from proto.virtqueue import VirtioDeviceState

SCHEMA: Final = 1


def survey_document(
    survey: Survey, rings: Rings, *, name: str, kind: str, is_packed: bool
) -> dict[str, Any]:
    """Return the document.

    Args:
        survey: What the stream holds.
        rings: Its virtqueues.
        name: The input as the user named it.
        kind: ``file``, ``pipe`` or ``socket``.
        is_packed: Whether the input was unpacked; offsets are those of the unpacked stream.
    """
    damage = survey.damage
    document = {
        "schema": SCHEMA,
        "input": {"name": name, "kind": kind, "zstd": is_packed},
        "complete": survey.complete,
        "error": None,
        "stream_bytes": survey.stream_bytes,
        "trailing_bytes": survey.trailing_bytes,
        "configuration": survey.configuration,
        "run_state": survey.run_state,
        "ram_bytes": survey.ram_bytes,
        "blocks": survey.blocks,
        "pages": survey.pages(),
        "rounds": [_round(survey, i) for i in range(len(survey.rounds))],
        "commands": survey.commands,
        "sections": [_section(section, rings) for section in survey.sections],
        "device_state_offset_bytes": survey.device_state_offset_bytes,
        "description_bytes": survey.description_bytes,
        "devices": [_device(device, rings) for device in rings.devices],
        "rings_not_checked": rings.not_checked or None,
        "not_shown": survey.not_shown,
        "problems": rings.problems,
    }
    if damage is not None:
        document["error"] = {**to_json_value(damage), "message": damage.text()}
    found: dict[str, Any] = to_json_value(document)
    return found


def _round(survey: Survey, number: int) -> dict[str, Any]:
    this_round = survey.rounds[number]
    value: dict[str, Any] = to_json_value(this_round)
    other = this_round.stream_bytes - this_round.page_bytes.total()
    value["page_bytes"]["other"] = other
    value["stream_bytes"] = this_round.stream_bytes
    return value


def _section(section: Section, rings: Rings) -> dict[str, Any]:
    value: dict[str, Any] = to_json_value(section)
    value["virtio"] = None
    for device in rings.devices:
        if (device.name, device.instance) == (section.name, section.instance):
            value["virtio"] = {
                "kind": device.kind,
                "status": device.status,
                "features": device.features,
                "started": device.started,
                "broken": device.broken,
                "disabled": device.disabled,
                "kept_requests": [
                    {"queue": queue, "requests": count} for queue, count in device.in_flight
                ],
                "queues": [_ring(check) for check in rings.checks_of(device)],
            }
    return value


def _ring(check: QueueCheck) -> dict[str, Any]:
    """What is known of a queue beyond the report's shape."""
    queue = check.state
    return {
        "index": queue.index,
        "avail_idx": check.avail_idx,
        "packed": queue.packed,
        "last_avail_wrap": queue.last_avail_wrap if queue.packed else None,
        "used_wrap": queue.used_wrap if queue.packed else None,
        "problem": check.problem or None,
        "problem_page": check.page,
    }


def _device(device: VirtioDeviceState, rings: Rings) -> dict[str, Any]:
    return {
        "name": device.name,
        "instance": device.instance,
        "virtqueues": [queue_value(check) for check in rings.checks_of(device)],
    }


def queue_value(check: QueueCheck) -> dict[str, Any]:
    """Return a queue as the migration report has it."""
    queue = check.state
    return {
        "index": queue.index,
        "num": queue.num,
        "desc": queue.desc,
        "avail": queue.avail,
        "used": queue.used,
        "last_avail_idx": queue.last_avail_idx,
        "used_idx": queue.used_idx,
        "in_flight": queue.in_flight,
        "consistent": check.consistent,
    }
