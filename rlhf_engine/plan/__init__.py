"""A cost model of one reinforcement-learning step: what it needs in memory and time, and what limits it.

    rlhf plan run.toml --gpu h100 --count 8 --model llama-8b

`architecture` says what a model's token costs, `machine` what a device can do, `job` what a run file asks for,
`memory` where the bytes go, `step` what each operation takes, `kernels` the least work of the project's own operations,
`check` how far all this is from what was measured. The formulas stand at the top of each of these files.
"""

from rlhf_engine.plan.architecture import Architecture, architecture
from rlhf_engine.plan.job import Job, job_of, model_of
from rlhf_engine.plan.machine import Machine, machine, measure_cpu
from rlhf_engine.plan.memory import Part, Setup, memory, peak
from rlhf_engine.plan.step import Operation, bottleneck, seconds, step
from rlhf_engine.plan.tables import check_tables, plan_tables, sweep_table

__all__ = [
    "Architecture",
    "Job",
    "Machine",
    "Operation",
    "Part",
    "Setup",
    "architecture",
    "bottleneck",
    "check_tables",
    "job_of",
    "machine",
    "measure_cpu",
    "memory",
    "model_of",
    "peak",
    "plan_tables",
    "seconds",
    "step",
    "sweep_table",
]
