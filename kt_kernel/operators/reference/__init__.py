"""The slow twin of every operator, in plain torch: what the native ones are tested against, and what runs
where there is no native one.

Each module has a table OPERATORS: {"namespace::name": (schema after the name, function)}. Arithmetic is fp32
whatever the tensors' type, rounded once at the end unless SGLang's own torch code rounds in between.
"""
