"""A cost model of one reinforcement-learning step: what it needs in memory and time, and what limits it.

    rlhf plan run.toml --gpu h100 --count 8 --model llama-8b

`architecture` says what a model's token costs, `machine` what a device can do, `job` what a run file asks for,
`memory` where the bytes go, `step` what each operation takes, `kernels` the least work of the project's own operations,
`check` how far all this is from what was measured. The formulas stand at the top of each of these files.
"""

from rlhf_engine.plan.architecture import Architecture, find_architecture
from rlhf_engine.plan.job import Job, job_of, model_of, not_counted
from rlhf_engine.plan.machine import Machine, find_machine, measure_cpu
from rlhf_engine.plan.memory import Part, Setup, memory_parts, peak
from rlhf_engine.plan.step import Operation, bottleneck, operations, seconds
from rlhf_engine.plan.tables import check_tables, plan_tables, sweep_table

__all__ = [
    "Architecture",
    "Job",
    "Machine",
    "Operation",
    "Part",
    "Setup",
    "bottleneck",
    "check_tables",
    "find_architecture",
    "find_machine",
    "job_of",
    "measure_cpu",
    "memory_parts",
    "model_of",
    "not_counted",
    "operations",
    "peak",
    "plan_tables",
    "seconds",
    "sweep_table",
]
