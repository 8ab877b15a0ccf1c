"""Defects of the Python package, but for its integrations."""

from __future__ import annotations

from mutant import Mutant

UPDATE = ("tests/hybrid/test_update.py",)
MISSES = ("tests/hybrid/test_misses.py",)
GROUPS = ("tests/api/test_api_group_size.py",)
FILES = ("tests/api/test_api_hostile_files.py",)
PLAIN_FILES = (*FILES, "-k", "plain_files")
CHECKPOINT = ("tests/api/test_api_checkpoint.py",)
OWN_FILES = ("tests/cli/test_server_files.py",)
KEY = ("tests/cli/test_server_key.py",)
DEFERRAL = ("tests/api/test_api_deferral.py",)
PLACEMENT = ("tests/hybrid/test_placement.py",)
STATISTICS = ("tests/hybrid/test_statistics.py", *UPDATE)

MUTANTS = (
    Mutant("hybrid/update.py", "        copied.wait()\n", "", UPDATE),
    Mutant(
        "hybrid/update.py",
        "        layer.statistics.settle(layer.placement.tables(self._context.device))\n"
        "        layer.placement.switch(new)\n",
        "        layer.placement.switch(new)\n"
        "        layer.statistics.settle(layer.placement.tables(self._context.device))\n",
        UPDATE,
    ),
    Mutant(
        "hybrid/update.py",
        "if state == _RUNNING:\n            return False",
        "if False:\n            pass",
        UPDATE,
    ),
    Mutant("hybrid/update.py", "        self._planned.clear()\n", "", UPDATE),
    Mutant("hybrid/update.py", "elif self._steps >= interval:", "elif self._steps > interval:", UPDATE),
    Mutant("hybrid/misses.py", "if seconds < best_seconds:", "if seconds <= best_seconds:", MISSES),
    Mutant("hybrid/misses.py", "(-costs[expert], expert)", "(-costs[expert], -expert)", MISSES),
    Mutant("hybrid/misses.py", "dearest[:most]", "dearest[: most + 1]", MISSES),
    Mutant("hybrid/misses.py", "max(on_cpu, fetched", "min(on_cpu, fetched", MISSES),
    Mutant("hybrid/statistics.py", "        self._settled.copy_(now)\n", "", STATISTICS),
    Mutant("checkpoint/group_size.py", '("moe_intermediate_size", intermediate)', "", GROUPS),
    Mutant("checkpoint/group_size.py", '("hidden_size", hidden), ', "", GROUPS),
    Mutant("checkpoint/group_size.py", "        if groups > 1:\n", "        if True:\n", GROUPS),
    Mutant("checkpoint/safetensors_file.py", "    _check_disjoint(path, tensors)\n", "", FILES),
    Mutant(
        "checkpoint/safetensors_file.py",
        "following.begin < info.end",
        "following.begin + 1 < info.end",
        FILES,
    ),
    Mutant(
        "checkpoint/safetensors_file.py", "following.begin < info.end", "following.begin <= info.end", FILES
    ),
    Mutant("checkpoint/safetensors_file.py", "        if name in found:\n", "        if False:\n", FILES),
    Mutant("checkpoint/safetensors_file.py", "    if info.end > size:\n", "    if False:\n", CHECKPOINT),
    Mutant("checkpoint/safetensors_file.py", "if data_begin > size:", "if False:", CHECKPOINT),
    Mutant("checkpoint/reader.py", "not os.path.normpath(path).startswith(", "(lambda _: False)(", FILES),
    Mutant("checkpoint/mapped_file.py", "flags | os.O_NONBLOCK", "flags", PLAIN_FILES),
    Mutant("checkpoint/mapped_file.py", "if not stat.S_ISREG(mode):", "if False:", FILES),
    Mutant("checkpoint/mapped_file.py", "watch is not None and watch.cut_off", "False", FILES),
    Mutant("server_files.py", "            _remove(folder)\n", "", OWN_FILES),
    Mutant(
        "server_files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB)\n    except",
        "fcntl.LOCK_SH)\n    except",
        (*OWN_FILES, "-k", "killed_server_leaves"),
    ),
    Mutant("server_files.py", "not _OURS.fullmatch(folder.name) or ", "", OWN_FILES),
    Mutant("server_files.py", " or not _is_private(status)", "", OWN_FILES),
    Mutant("cli/server_key.py", 'KEY: key, KEY_FILE: ""', "KEY: key", KEY),
    Mutant("cli/server_key.py", 'skip = not skip and "=" not in option', "skip = not skip", KEY),
    Mutant(
        "calls/deferral.py",
        "torch.where(skipped[ids.long().clamp(-1, skipped.numel() - 1)], -1, ids)",
        "ids.masked_fill_(skipped[ids.long().clamp(-1, skipped.numel() - 1)], -1)",
        DEFERRAL,
    ),
    Mutant(
        "calls/deferral.py",
        "rank.argsort(dim=1, descending=True",
        "rank.argsort(dim=1, descending=False",
        DEFERRAL,
    ),
    Mutant("calls/deferral.py", "    protected[num_experts] = True\n", "", DEFERRAL),
    Mutant("hybrid/slots.py", "Placement(self.version + 1, ", "Placement(self.version, ", PLACEMENT),
    Mutant("hybrid/slots.py", "if len(set(experts)) != len(experts):", "if False:", PLACEMENT),
    Mutant("hybrid/slots.py", "        if empty < 0:\n", "        if False:\n", PLACEMENT),
)
