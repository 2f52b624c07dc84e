"""Flags of the commands. These modules import no tensors and no models: `--help` is fast."""
