"""Our checkpoints <-> the formats of the ecosystem."""
