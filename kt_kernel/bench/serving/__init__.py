"""`kt bench serve`: latency and throughput of a running OpenAI-compatible server.

prompts   texts of so many tokens, each different from its first word on
requests  one streamed completion and its times
load      so many users who each ask again when they have their answer
figures   medians, percentiles and rates of a level of load
report    a table, JSON lines, a chart
"""
