"""The `kt` command.

main     the typer application; each command imports its module only when it runs
run      `kt run`: model + machine -> one SGLang server command, which replaces this process
model    what a model name or directory turns out to be
machine  cores, NUMA nodes and accelerators, as far as `kt run` must know them
chat     `kt chat`: a conversation with a running server
doctor   `kt doctor`: a table of checks; checks.py and forward_check.py do the looking
version  `kt version`
"""
