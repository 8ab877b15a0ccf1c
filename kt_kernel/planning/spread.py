"""How a model is spread over hosts and processes, by the options of the server (doc/scale.md)."""

from __future__ import annotations

from dataclasses import dataclass

from kt_kernel.planning.user_options import UserOptions


@dataclass(frozen=True)
class Spread:
    """`hosts` in all; the layers are in `stages`; each is shared by `ranks`, on one host or several."""

    hosts: int = 1
    stages: int = 1
    ranks: int = 1

    @classmethod
    def of(cls, options: UserOptions) -> Spread:
        return cls(
            hosts=max(1, options.integer("--nnodes") or 1),
            stages=max(1, options.integer("--pp-size") or 1),
            ranks=max(1, options.integer("--tp-size") or 1),
        )

    @property
    def processes(self) -> int:
        """Of one host."""
        return max(1, self.ranks * self.stages // self.hosts)

    @property
    def hosts_of_a_layer(self) -> int:
        """So many read a layer at the same time; stages take their turns."""
        return max(1, self.hosts // self.stages)
