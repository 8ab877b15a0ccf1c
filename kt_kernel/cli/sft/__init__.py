"""What `kt sft` does.

settings.py   the YAML file of a run
data.py       texts and conversations as tokens with labels
schedule.py   learning rate by step
loop.py       the steps, and what is saved between them
run.py        from a file to an adapter: train_run, export_run
plot.py       the loss as a picture
talk.py       a conversation with the result
"""
