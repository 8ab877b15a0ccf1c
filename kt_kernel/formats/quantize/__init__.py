"""From bfloat16 to every format, in the layout in which a checkpoint would hold it; plain torch, no files."""
