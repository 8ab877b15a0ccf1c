"""A server under mixed traffic for long: is every answer the one it gives alone, and does nothing grow?

    .venv/bin/python bench/soak.py --minutes 15                    # the demo model, CPU only
    .venv/bin/python bench/soak.py --minutes 15 --hybrid      # experts on the device that move
    .venv/bin/python bench/soak.py --minutes 2 --model /models/Qwen3-30B-A3B

Requests: greedy ones whose tokens are compared with those of the same request alone, prompts with a common
beginning (the prefix cache), prompts near the context's end, streams that are given up. Meanwhile processes
of the server are stopped and go on, at random. Exit status 1 where an answer differs, a request fails, or
memory, descriptors or threads grow from the first third of the time to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from statistics import mean

from served_model import started

CONTEXT = 1024
PROMPTS, NEW_TOKENS = 24, 24
CLIENTS = 4
TIE = 0.05  # between the best two log-probabilities: either may win on an accelerator
MOST_GROWTH = 1.05, 32 << 20  # of memory: this share and so many bytes more
HYBRID = (
    *("--kt-gpu-experts-ratio", "0.3", "--kt-enable-dynamic-expert-update"),
    *("--kt-expert-update-interval", "1", "--kt-gpu-prefill-token-threshold", "100"),
)


def prompt(number: int, vocabulary: int) -> list[int]:
    """5 to 150 tokens; those of the same rest by 3 begin alike."""
    length = 5 + 6 * number
    common = [3 + (number % 3 * 7919 + place * 31) % (vocabulary - 3) for place in range(length // 2)]
    own = [3 + (number * 104729 + place * 17) % (vocabulary - 3) for place in range(length - len(common))]
    return common + own


class Traffic:
    """Clients of one server, and what they saw."""

    def __init__(self, url: str, vocabulary: int, seed: int) -> None:
        self.url, self.vocabulary, self.seed = url, vocabulary, seed
        self.done = Counter[str]()
        self.failures: list[str] = []
        self.until = 0.0
        self.alone = [self._answer(number) for number in range(PROMPTS)]

    def run(self, seconds: float) -> None:
        """Returns at the end; what went wrong is in `failures`."""
        self.until = time.monotonic() + seconds
        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, number: int) -> None:
        choices = random.Random(self.seed + number)
        kinds = (self._compare, self._compare, self._compare, self._give_up, self._ask_long)
        while time.monotonic() < self.until:
            kind = choices.choice(kinds)
            try:
                kind(choices)
            except (OSError, ValueError, KeyError) as error:
                self.failures.append(f"{kind.__name__}: {error}")
            self.done[kind.__name__.lstrip("_")] += 1

    def _compare(self, choices: random.Random) -> None:
        number = choices.randrange(PROMPTS)
        (right, margins), (tokens, _) = self.alone[number], self._answer(number)
        first = next(
            (i for i, pair in enumerate(zip(right, tokens, strict=True)) if len(set(pair)) > 1), None
        )
        if first is not None and margins[first] < TIE:
            self.done["ties"] += 1
        elif first is not None:
            self.failures.append(f"prompt {number}: token {first} differs, margin {margins[first]:.3f}")

    def _give_up(self, choices: random.Random) -> None:
        body = self._body(prompt(choices.randrange(PROMPTS), self.vocabulary), 500, stream=True)
        with self._post(body) as reply:
            for _ in range(choices.randrange(1, 20)):
                reply.readline()

    def _ask_long(self, choices: random.Random) -> None:
        length = CONTEXT - choices.randrange(8, 40)
        ids = [choices.randrange(3, self.vocabulary) for _ in range(length)]
        with self._post(self._body(ids, 2)) as reply:
            json.load(reply)

    def _answer(self, number: int) -> tuple[list[int], list[float]]:
        body = self._body(
            prompt(number, self.vocabulary), NEW_TOKENS, return_logprob=True, top_logprobs_num=2
        )
        with self._post(body) as reply:
            answer = json.load(reply)
        top = answer["meta_info"]["output_top_logprobs"]
        return answer["output_ids"], [best[0] - second[0] for best, second in top]

    def _body(self, ids: list[int], tokens: int, **more: object) -> dict[str, object]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": sampling, **more}

    def _post(self, body: dict[str, object]):
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=600)


class Watch:
    """Every five seconds: memory, descriptors and threads of a process group. Now and then it stops one."""

    def __init__(self, leader: int, seed: int) -> None:
        self._leader, self._choices = leader, random.Random(seed)
        self.samples: list[tuple[int, int, int]] = []
        self.stops = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(5):
            processes = members(self._leader)
            self.samples.append(usage(processes))
            if self._choices.random() < 0.3:
                self._stop_for_a_moment(self._choices.choice(processes))

    def _stop_for_a_moment(self, process: int) -> None:
        self.stops += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
            time.sleep(self._choices.uniform(0.1, 1.5))
            os.kill(process, signal.SIGCONT)

    def growth(self) -> list[tuple[str, float, float]]:
        """What, in the first third, in the last; the first tenth is warm-up."""
        samples = self.samples[len(self.samples) // 10 :]
        third = max(1, len(samples) // 3)
        parts = zip(zip(*samples[:third], strict=True), zip(*samples[-third:], strict=True), strict=True)
        names = ("memory", "descriptors", "threads")
        return [(name, mean(a), mean(b)) for name, (a, b) in zip(names, parts, strict=True)]


def members(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(entry.name))
    return found


def usage(processes: list[int]) -> tuple[int, int, int]:
    """Proportional memory in bytes, open descriptors, threads, of all together."""
    memory = descriptors = threads = 0
    for process in processes:
        about = Path(f"/proc/{process}")
        with contextlib.suppress(OSError, ValueError):
            lines = (about / "smaps_rollup").read_text().splitlines()
            memory += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            descriptors += len(os.listdir(about / "fd"))
            threads += len(os.listdir(about / "task"))
    return memory, descriptors, threads


def grown(name: str, before: float, after: float) -> bool:
    if name == "memory":
        share, more = MOST_GROWTH
        return after > before * share + more
    return after > before + 8


def main() -> int:
    """Prints a few lines; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; by default the demo model")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--hybrid", action="store_true", help="experts on the device, moved at every step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.model is None:
        from kt_kernel.demo.cache import ensure_demo_checkpoint

        arguments.model = ensure_demo_checkpoint()
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    options = ["--kt-weight-path", str(arguments.model), "--dtype", "float32"]
    options += ["--context-length", str(CONTEXT), *(HYBRID if arguments.hybrid else ())]
    with started(arguments.model, options, {}) as (url, process):
        traffic = Traffic(url, vocabulary, arguments.seed)
        watch = Watch(process.pid, arguments.seed)
        try:
            traffic.run(60 * arguments.minutes)
        finally:
            watch.close()
    print(", ".join(f"{count} {kind}" for kind, count in sorted(traffic.done.items())))
    print(f"{watch.stops} times a process stood still; {len(traffic.failures)} failures")
    print("\n".join(traffic.failures[:20]))
    for name, before, after in watch.growth():
        print(f"{name}: {before:.0f} -> {after:.0f}")
    return 1 if traffic.failures or any(grown(*row) for row in watch.growth()) else 0


if __name__ == "__main__":
    sys.exit(main())
