"""What a model needs, what this machine has, and what goes where: from a checkpoint to a running server.

`plan.make_plan(facts, machine, options)` is a pure function; everything around it gathers its arguments:

    model_facts     what a plan must know of a model: sizes, bytes of experts and of the rest
    config_facts    the sizes, from config.json
    checkpoint_facts  the bytes and the method, from the headers of the files; kept in the user's cache
    registry        the same of published models by name (models.yaml), with parsers and flags
    models_dir      where models are looked for
    machine_facts   what a plan must know of a machine; limits of known GPUs
    this_machine    the present one: cores allowed, control groups, nodes, nvidia-smi
    kt_kernel.machine_limits  how fast it reads and multiplies, measured by the first runs
    user_options    what the command line already decides

    gpu_plan        what the GPUs hold
    requests        what requests keep on one rank: KV cache, states
    memory          which bytes lie where; the refusal of what main memory cannot hold
    dense_storage   bytes of the weights outside the experts once loaded
    attention_backend  which code SGLang takes
    estimate, measured_shares   expected tokens/s
    render          text and JSON
"""
