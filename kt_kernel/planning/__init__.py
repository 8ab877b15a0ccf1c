"""What a model needs, what this machine has, and what goes where: from a checkpoint to a running server.

`models_dir` is where models are looked for: Hugging Face's cache and the user's folders.
"""
