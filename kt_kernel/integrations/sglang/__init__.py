"""The plug-in for stock SGLang 0.5.23: its routed experts run in our CPU kernels.

SGLang finds it through the entry-point group `sglang.srt.plugins`; nothing in SGLang is edited. One server
passes through these files in this order:

    plugin.py            register(): SGLang calls it in every process it starts
    hooks.py             what is hooked into SGLang and why
    hooking.py           checks that every hook took effect
    flags.py             the --kt-* flags: one table; what they mean is in kt_kernel/integrations/options.py
    cli.py               the flags on SGLang's command line; errors found before anything is started
    engine_arguments.py  the same flags as arguments of `sglang.Engine`
    startup.py           our step in SGLang's configuration: from flags and model to settings
    settings.py          KTSettings: the options with every default filled in, and the model
    cpu_defaults.py      defaults for machines without a GPU
    recurrent_states.py  the same for models whose layers keep states (Qwen3-Next, Qwen3.5)
    layer_hooks.py       where SGLang's MoE layer asks for its settings and its method
    moe_method.py        one MoE layer: SGLang's own method, and kt_kernel/hybrid around it
    device_backends.py   which of SGLang's GPU code computes some of the experts, and what is refused
    device_experts.py    SGLang's expert weights as slots that the hybrid engine can fill
    served_model.py      what the layers share: the hybrid model, and what becomes of its failures
    prompt_rows.py       which rows of a batch belong to prompts that meet whole layers on the device
    batch_failures.py    an exception ends the requests of its batch
    serving_hooks.py     between the scheduler's steps: experts move, failed requests end, figures are told
    dense_weights.py     quantised checkpoints without a GPU: dense layers are decoded while they are loaded
    startup_failure.py   one sentence instead of a stack trace when a layer cannot be loaded
    interrupt.py         Ctrl-C without stack traces
    one_host.py          the processes of a server on one host listen on its loopback interface
    temporary_files.py   a server's files have its name; a child that dies ends it at once
    deaths.py            what the end of a process means
    access.py            the key of the server; which web pages may ask it
    cpu_fixes.py         repairs of SGLang's CPU path, hooked only on machines without a GPU
    cpu_speculation.py   the same for speculative decoding
    cpu_idle.py          an idle server on a CPU leaves the CPU alone

Without --kt-weight-path the plug-in changes nothing but what cpu_fixes.py and cpu_idle.py say.
"""
