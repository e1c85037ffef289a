"""Virtio devices of the simulated guest: real rings in guest RAM, driver and device halves."""
