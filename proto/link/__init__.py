"""The link protocol between migrate-src and migrate-dst; nothing here does I/O."""
