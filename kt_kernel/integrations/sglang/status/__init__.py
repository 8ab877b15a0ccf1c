"""What a server shows of itself to people and to Prometheus: the page /kt, its figures /kt/status, /metrics.

In the scheduler, which knows everything, and looks only when it is asked:

    tokens      counters of tokens, added to after each batch
    machine     cores, memory and GPUs; the CPU's measured limit
    metrics     the figures as Prometheus metrics
    served      all of these as a part of SGLang's internal state

In the process that talks HTTP:

    reader      asks the scheduler, once a second at most, however many look
    routes      /kt, /kt/status, and a fresh reading for /metrics
    page        page.html: one file that needs no other
"""
