"""Reading GGUF: headers checked whole, metadata decoded when asked for, tensors as views of the file."""
