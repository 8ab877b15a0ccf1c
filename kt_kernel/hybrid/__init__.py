"""Which expert lives where, and moving them. Works on tensors and masks; knows no serving program."""
