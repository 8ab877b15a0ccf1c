"""Operations of our own on an accelerator's tensors: each is one torch operator with a slow twin in torch."""
