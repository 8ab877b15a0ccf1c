"""Which of a step's cold experts to fetch to the device, so that CPU and bus are done at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def split_misses(
    tokens_of: Mapping[int, int], cpu_seconds_of: Callable[[int], float], fetch_seconds: float, most: int
) -> tuple[int, ...]:
    """The experts to fetch, at most `most`; the CPU computes the others meanwhile.

    `tokens_of`: the tokens of each cold expert. `cpu_seconds_of(tokens)` of one expert; `fetch_seconds` of
    one expert, however many tokens it has. The choice has the least max(CPU's time, bus's time); among such,
    it fetches the fewest.

    Fetching costs the same for all, so for any number of fetches the best choice is the experts that cost
    the CPU most; what is left is to try the numbers.
    """
    costs = {expert: cpu_seconds_of(tokens) for expert, tokens in tokens_of.items() if tokens}
    dearest = sorted(costs, key=lambda expert: (-costs[expert], expert))
    on_cpu = sum(costs.values())
    best, best_seconds = 0, on_cpu
    for fetched, expert in enumerate(dearest[:most], start=1):
        on_cpu -= costs[expert]
        seconds = max(on_cpu, fetched * fetch_seconds)
        if seconds < best_seconds:
            best, best_seconds = fetched, seconds
    return tuple(dearest[:best])
