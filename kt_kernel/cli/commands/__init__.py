"""One file per command of `kt`: its name, options, help and examples; what it does is in the modules beside.

Each has `register(app)`, which main.py calls. Nothing but typer is imported at the top of these files, so
that `kt --help` is fast; the work is imported inside the command.
"""
