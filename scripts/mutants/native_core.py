"""Defects of the layer, the threads and the queue (csrc/moe, csrc/core)."""

from __future__ import annotations

from mutant import Mutant

PASS = ("moe/forward_pass.cc",)
ROUTING = ("moe/routing.cc",)
GEMM = ("moe/grouped_gemm.cc",)
LAYER = ("moe/layer.cc",)
WEIGHTS = ("moe/weights.cc",)
POOL = ("core/thread_pool.cc",)
TASKS = ("core/task_queue.cc",)
ARENA = ("core/arena.cc",)

EXACT = "tests/kernels/test_exact_on_integers.py"
FEW_SHAPES = (EXACT, "-k", "every_token_count and BF16 and (33x70 or 129x127)")
ADDED = (EXACT, "-k", "accumulat")
SKEWED = (EXACT, "-k", "(skewed or top_k or experts_per_token) and (BF16 or RAWINT4)")
ONE_TOKEN = "tests/kernels/test_result_depends_on_the_token_alone.py"
NOTHING_LEFT = (ONE_TOKEN, "-k", "leaves_nothing_behind")
BIASES = ("tests/kernels/test_biases.py",)
ARGUMENTS = ("tests/kernels/test_bad_arguments.py",)
STRAY = ("tests/kernels/test_stray_reads_and_writes.py", "-k", "nothing_beside")
STATISTICS = ("tests/kernels/test_engine_stats.py",)
SCENES = ("tests/kernels/test_thread_pools.py", "-k", "piece or exceptions")
QUEUE = ("tests/kernels/test_queue.py",)
SLEEPING = ("tests/kernels/test_idle_threads.py", "-k", "sleep_in_the_end")
LEFT_TASKS = ("tests/kernels/test_mailbox.py", "-k", "unseen or left_a_task")
WRITE_BACK = ("tests/kernels/test_write_expert.py",)
TYPES = ("tests/kernels/test_gguf_panels.py", "-k", "own_type")
SHARED_MEMORY = ("tests/operators/test_linear.py", "-k", "share_memory")
POOLS = (ONE_TOKEN, "-k", "threads_and_pools and BF16")

MUTANTS = (
    # ---- a call ----
    Mutant("moe/forward_pass.cc", "std::min(columns, hidden - first_column)", "columns", STRAY, PASS),
    Mutant("moe/forward_pass.cc", "row[i] += from[i];", "row[i] = from[i];", ADDED, PASS),
    Mutant(
        "moe/forward_pass.cc",
        "  std::memset(converted + hidden * operand.element(), 0, padding * operand.element());\n",
        "",
        NOTHING_LEFT,
        PASS,
    ),
    Mutant("moe/forward_pass.cc", "sums[i] += bias[p * kPanelRows + i]", "sums[i] += bias[i]", BIASES, PASS),
    Mutant(
        "moe/forward_pass.cc",
        "return weights_.bias(which, piece.expert->expert, begin + piece.first_pair);",
        "return weights_.bias(which, piece.expert->expert, begin);",
        BIASES,
        PASS,
    ),
    Mutant("moe/forward_pass.cc", "  std::memset(sum, 0, sum_bytes);\n", "", FEW_SHAPES, PASS),
    Mutant(
        "moe/forward_pass.cc",
        "(weights_.panels(Projection::kGate, piece.subpool).begin + piece.first_pair)",
        "piece.first_pair",
        POOLS,
        PASS,
    ),
    Mutant(
        "moe/routing.cc",
        "ids[i] < -1 || ids[i] >= num_experts",
        "ids[i] < -1 || ids[i] > num_experts",
        ARGUMENTS,
        ROUTING,
    ),
    Mutant(
        "moe/routing.cc",
        "weight_of_pair_[pair] = input.weights[i];",
        "weight_of_pair_[pair] = input.weights[i / input.top_k * input.top_k];",
        SKEWED,
        ROUTING,
    ),
    Mutant(
        "moe/routing.cc",
        "device_mask[id] != 0",
        "device_mask[id] > 1",
        (EXACT, "-k", "mask_is_read_live and BF16"),
        ROUTING,
    ),
    Mutant(
        "moe/grouped_gemm.cc",
        "block.a.groups + first * block.a.stride",
        "block.a.groups",
        (ONE_TOKEN, "-k", "crowded and by-int8"),
        GEMM,
    ),
    Mutant(
        "moe/grouped_gemm.cc",
        "table.groups_at + format_.groups(first_k)",
        "table.groups_at",
        (EXACT, "-k", "left_over and by-int8"),
        GEMM,
    ),
    Mutant(
        "moe/grouped_gemm.cc",
        "row + elements_at, elements);",
        "row, elements);",
        (EXACT, "-k", "left_over and BF16"),
        GEMM,
    ),
    Mutant(
        "moe/grouped_gemm.cc",
        "call.c = block.c + first * block.c_stride;",
        "call.c = block.c;",
        (EXACT, "-k", "every_token_count and RAWINT4 and 160x128"),
        GEMM,
    ),
    # ---- a layer ----
    Mutant("moe/layer.cc", "args.routing.tokens > config_.max_tokens", "false", ARGUMENTS, LAYER),
    Mutant("moe/layer.cc", "    fill_with_nothing(args, config_.shape.hidden);\n", "", SKEWED, LAYER),
    Mutant("moe/layer.cc", "fetch_add(active.pairs, ", "fetch_add(1, ", STATISTICS, LAYER),
    Mutant("moe/layer.cc", "args.routing.top_k > config_.shape.num_experts", "false", ARGUMENTS, LAYER),
    Mutant(
        "moe/weights.cc",
        "std::copy_n(sources[p][e].bias, matrix(p).rows, &biases_[p][e * rows]);",
        "std::copy_n(sources[p][0].bias, matrix(p).rows, &biases_[p][e * rows]);",
        BIASES,
        WEIGHTS,
    ),
    Mutant(
        "moe/weights.cc",
        "paired_ = &format(Projection::kGate) == &format(Projection::kUp);",
        "paired_ = true;",
        TYPES,
        WEIGHTS,
    ),
    Mutant(
        "moe/weights.cc",
        "size_t{4} * rows : written_code_bytes",
        "size_t{2} * rows : written_code_bytes",
        WRITE_BACK,
        WEIGHTS,
    ),
    Mutant(
        "moe/weights.cc",
        "matrix(Projection::kDown), 1, ranks);",
        "matrix(Projection::kDown), 1, 1);",
        WRITE_BACK,
        WEIGHTS,
    ),
    Mutant(
        "moe/weights.cc",
        "int64_t{before + pools.threads_in(index)} / total)",
        "int64_t{before + pools.threads_in(index)} / (total + 1))",
        POOLS,
        WEIGHTS,
    ),
    # ---- memory ----
    Mutant(
        "core/arena.cc",
        "filling.used + bytes_ > buffer_->size()",
        "filling.used > buffer_->size()",
        SHARED_MEMORY,
        ARENA,
    ),
    Mutant(
        "core/arena.cc",
        "filling.used += bytes_;",
        "filling.used += bytes_ - kAlignment;",
        SHARED_MEMORY,
        ARENA,
    ),
    # ---- threads ----
    Mutant("core/thread_pool.cc", "  failed_.store(false, std::memory_order_relaxed);\n", "", SCENES, POOL),
    Mutant(
        "core/thread_pool.cc", "worker.index == 0 || belongs(stage + 1)", "belongs(stage + 1)", SCENES, POOL
    ),
    Mutant(
        "core/thread_pool.cc",
        "phase.count_ * (before + threads_in(subpool)) / threads()",
        "phase.count_ * before / threads() + phase.count_ / threads()",
        POOLS,
        POOL,
    ),
    Mutant(
        "core/thread_pool.cc",
        "config.subpools < 1 || config.subpools > config.threads",
        "config.subpools < 1",
        ARGUMENTS,
        POOL,
    ),
    Mutant(
        "core/thread_pool.cc",
        "p < config.threads % config.subpools ? 1 : 0",
        "p <= config.threads % config.subpools ? 1 : 0",
        POOLS,
        POOL,
    ),
    Mutant(
        "core/thread_pool.cc",
        "running_.exchange(true, std::memory_order_acquire)",
        "running_.load()",
        SCENES,
        POOL,
    ),
    # ---- the queue ----
    Mutant(
        "core/task_queue.cc",
        "state_->submitted - allowed_pending",
        "state_->submitted - 2 * allowed_pending",
        QUEUE,
        TASKS,
    ),
    Mutant(
        "core/task_queue.cc",
        "error = std::exchange(state_->error, nullptr);",
        "error = state_->error;",
        QUEUE,
        TASKS,
    ),
    Mutant(
        "core/task_queue.cc",
        "if (thrown && !error) error = thrown;",
        "if (thrown) error = thrown;",
        QUEUE,
        TASKS,
    ),
    Mutant(
        "core/task_queue.cc",
        "  task_finished.wait(lock, [&] { return mailbox.finished == mailbox.taken; });\n",
        "",
        LEFT_TASKS,
        TASKS,
    ),
    Mutant(
        "core/task_queue.cc",
        "    mailbox->replaying = mailbox->taken < mailbox->tasks.size();\n",
        "",
        SLEEPING,
        TASKS,
    ),
    Mutant(
        "core/task_queue.cc",
        "    take_requests();\n    tasks_of_it.swap(mailbox->tasks);\n",
        "    tasks_of_it.swap(mailbox->tasks);\n",
        LEFT_TASKS,
        TASKS,
    ),
    Mutant("core/task_queue.cc", "if (allowed_pending < 0)", "if (false)", ARGUMENTS, TASKS),
)
