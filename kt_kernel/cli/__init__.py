"""The `kt` command.

main       the table of commands
commands/  one file per command: options, help, examples; what a command does is in the module of its name
           here, imported only when it runs
"""
