"""Reading published checkpoints: files mapped into memory, naming families as data, every tensor checked."""
