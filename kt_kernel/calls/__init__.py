"""What one call of a layer needs: the paths of CPU and device tensors, buffers, checks, masks, deferral."""
