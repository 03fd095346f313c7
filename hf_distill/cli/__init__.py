"""The command `hf-distill`."""
