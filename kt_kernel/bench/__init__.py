"""Speed of one MoE layer as a share of the machine's limits: behind `kt bench` and the programs in bench/."""
