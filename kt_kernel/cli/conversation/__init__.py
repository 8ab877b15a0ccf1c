"""The parts of `kt chat` (../chat.py).

settings   where to connect, how to sample
messages   the conversation so far: asked, answered, asked again, saved
answer     one answer while it arrives, and its times
screen     how it looks in a terminal and in a file
commands   /help and all others
reading    what the user types, in a terminal and from a pipe
"""
