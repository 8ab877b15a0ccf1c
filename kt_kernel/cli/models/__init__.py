"""What `kt model` does.

records   what is known of each model's files: where from, sizes, checksums
known     the models of this machine: the user's list, their folders, Hugging Face's cache
finding   checkpoints and GGUF files below a folder
download  from the Hugging Face hub
verify    complete, readable, and byte for byte what was recorded
remove    what kt downloaded
info      what a model is, from its configuration and headers
listing, downloading, checking, removing: the commands, which print and ask
"""
