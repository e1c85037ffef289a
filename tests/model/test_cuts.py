"""A migration through both commands whose connections are lost, anywhere and often.

Where others can follow, the guest arrives all the same, as it was; where the loss is silent while
the guest stands still, it may go on at the source. Never do two run, which ``Migration`` checks.
"""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import GuestOn
from migrate.lab.virtual import VirtualParams
from migrate.simulation.profile import Profile
from migrate.transport.memory_link import MemoryLinkParams
from tests.conftest import IN_CI
from tests.model.test_migration import ENGINE, guests, seeds
from tests.model.whole_engine import Blow, Migration, calm, links, parameters

RUNS = 60 if IN_CI else 8

resets = st.lists(
    st.builds(Blow, st.floats(0.0005, 0.04), st.booleans()), min_size=3, max_size=12
)
blows = st.lists(
    st.builds(Blow, st.floats(0.001, 0.1), st.booleans(), st.booleans()), min_size=1, max_size=3
)


@settings(ENGINE, max_examples=RUNS)
@given(profile=guests, link=links, params=parameters, seed=seeds, losses=resets)
def test_a_guest_arrives_however_often_connections_are_reset(
    profile: Profile,
    link: MemoryLinkParams,
    params: VirtualParams,
    seed: int,
    losses: Sequence[Blow],
) -> None:
    migration = Migration(calm(profile), link, params, seed, blows=losses)
    source, destination = migration.run()
    for report in (source, destination):
        assert (report.error, report.guest_on) == (None, GuestOn.DESTINATION)
    assert migration.arrivals == 1
    assert source.integrity.equal
    assert source.integrity == destination.integrity
    assert source.wire_bytes == source.bytes.total()
    assert source.bytes.resent == sum(cut.resent_bytes for cut in source.cuts)


@settings(ENGINE, max_examples=RUNS)
@given(profile=guests, link=links, params=parameters, seed=seeds, losses=blows)
def test_a_guest_is_in_one_place_when_connections_fall_silent(
    profile: Profile,
    link: MemoryLinkParams,
    params: VirtualParams,
    seed: int,
    losses: Sequence[Blow],
) -> None:
    patient = replace(params.timeouts, reconnect_s=60, qemu_s=10)
    migration = Migration(
        calm(profile), link, replace(params, timeouts=patient), seed, blows=losses
    )
    source, _ = migration.run()
    if source.status == "completed":
        assert source.integrity.equal
    else:
        assert source.guest_on in {GuestOn.SOURCE, GuestOn.UNKNOWN}
