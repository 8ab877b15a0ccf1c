"""Weight formats in Python: the table of methods, stored matrices, expert images, decoders, quantisers."""
