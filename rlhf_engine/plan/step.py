"""What one step of reinforcement learning does, operation by operation, and how long each takes at least.

An operation's time is the largest of its arithmetic over the matrix peak, its bytes over the memory's bandwidth, its
transfers over the links, and its launches from Python; each ceiling times the share of it that is counted on. On a CPU
the launches are added, since the same cores do the work. Operations follow one another; inside one, all overlaps.

    generate: prompts      each distinct prompt once
    generate: tokens       T times: all weights; keys and values of what stands before; the sampler's passes over the
                           logits (32 bytes a logit); over t devices, two all-reduces a layer
    forward                2 flops a weight and token, and attention; weights, and what a layer makes of a token,
                           written and read; with n devices the weights are gathered, w P (n - 1) / n
    learning               three times a forward; with recomputation four; transfers three times (ZeRO, section 7.2)
    optimizer              28 bytes a parameter for Adam, 3 w to clip the gradients
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlhf_engine.plan.kernels import KERNELS, kernel_work
from rlhf_engine.plan.machine import Machine
from rlhf_engine.plan.memory import KEPT_LOGITS, Setup

__all__ = ["Operation", "bottleneck", "operations", "seconds"]

# Operations that a layer of transformers 5.23's Llama launches, counted with TorchDispatchMode, views left out.
FORWARD_LAUNCHES, BACKWARD_LAUNCHES, TOKEN_LAUNCHES, SAMPLER_LAUNCHES = 34, 67, 40, 30


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Work of one device in one step."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    transfers: float = 0.0
    """bytes that come in over the links"""
    within_node: bool = False
    """the transfers stay in a node however many devices there are"""
    launches: float = 0.0

    def limits(self, machine: Machine, dtype: str, count: int) -> dict[str, float]:
        """Seconds that each limit asks for."""
        share = machine.efficiency
        link = machine.link if self.within_node or count <= machine.node else machine.network
        return {
            "arithmetic": self.flops / (machine.peak(dtype) * share.matmul),
            "memory": self.bytes / (machine.bandwidth * share.memory),
            "links": self.transfers / (link * share.link) if self.transfers else 0.0,
            "launches": self.launches * machine.launch,
        }


def seconds(operation: Operation, setup: Setup) -> tuple[float, str]:
    """How long an operation takes, and what limits it."""
    limits = operation.limits(setup.machine, setup.dtype, setup.count)
    which = max(limits, key=lambda name: limits[name])
    if not setup.machine.is_cpu:
        return limits[which], which
    return limits.pop("launches") + max(limits.values()), which


def operations(setup: Setup) -> list[Operation]:
    """All operations of one step, in order."""
    job = setup.job
    found = [*_generate(setup)]
    if job.old_logp or (job.values and not job.own_critic):
        found += [_pass(setup, "policy: forward"), *([_head(setup, "policy: log-probs")] if job.old_logp else [])]
    if job.reference:
        found += [_pass(setup, "reference: forward"), _head(setup, "reference: log-probs")]
    found += [_pass(setup, "critic: forward")] if job.own_critic else []
    found += [_pass(setup, "reward model: forward")] if job.reward_model else []
    found += [_per_token(setup, "advantages", "shaped_gae", backward=False)]
    found += [_pass(setup, "policy: learn", learns=True), _head(setup, "policy: log-probs, learn", learns=True)]
    found += [_pass(setup, "critic: learn", learns=True)] if job.own_critic else []
    found += [_per_token(setup, "policy loss", "policy_loss", backward=True)]
    found += [_per_token(setup, "value loss", "value_loss", backward=True)] if job.values else []
    return [*found, _optimizer(setup)]


def _generate(setup: Setup) -> list[Operation]:
    model, job, w, t, n = setup.model, setup.job, setup.width, setup.tensor_parallel, setup.count
    rows = setup.generated
    prompts = ceil(rows / job.samples)
    start, stop = job.prompt_tokens, job.tokens
    weights = model.layers * model.layer_parameters * w
    seen = rows * (stop**2 - start**2) / 2  # of all tokens that are sampled, the ones before each, together

    def reduced(tokens: float) -> float:
        return 4 * model.layers * tokens * model.hidden * w * (t - 1) / t

    copied = Operation(name="generate: new weights", transfers=w * model.parameters / t * (n - 1) / n)
    read = Operation(
        name="generate: prompts",
        flops=(model.body_flops(prompts * start) + prompts * model.attention_flops(0, start)) / t,
        bytes=(weights + _traffic(setup, prompts * start)) / t,
        transfers=reduced(prompts * start),
        within_node=True,
        launches=model.layers * FORWARD_LAUNCHES,
    )
    tokens = rows * job.response_tokens
    write = Operation(
        name="generate: tokens",
        flops=(model.body_flops(tokens) + model.head_flops(tokens) + rows * model.attention_flops(start, stop)) / t,
        bytes=(job.response_tokens * (weights + model.head * w) + seen * model.kv_bytes(w)) / t
        + 32 * tokens * model.vocabulary / t,
        transfers=reduced(tokens),
        within_node=True,
        launches=job.response_tokens * (model.layers * TOKEN_LAUNCHES + SAMPLER_LAUNCHES),
    )
    return [copied, read, write] if n > 1 else [read, write]


def _traffic(setup: Setup, tokens: float) -> float:
    """Bytes that the layers write and read of so many tokens, forward."""
    return 2.0 * tokens * setup.model.layers * setup.model.kept_bytes(setup.width)


def _rows(setup: Setup, learns: bool) -> tuple[int, int]:
    """Responses of one device that go through in a step, and in how many pieces."""
    if not learns:
        return setup.responses, ceil(setup.responses / setup.piece)
    return setup.minibatch * setup.job.updates, ceil(setup.minibatch / setup.piece) * setup.job.updates


def _pass(setup: Setup, name: str, *, learns: bool = False) -> Operation:
    model, job, n, w = setup.model, setup.job, setup.count, setup.width
    rows, pieces = _rows(setup, learns)
    tokens = rows * job.tokens
    times = 3 if learns else 1
    again = 1 if learns and setup.recompute else 0
    weights = model.layers * model.layer_parameters * w
    return Operation(
        name=name,
        flops=(times + again) * (model.body_flops(tokens) + rows * model.attention_flops(0, job.tokens)),
        bytes=times * pieces * weights + (times + again) * _traffic(setup, tokens),
        transfers=times * pieces * w * model.parameters * (n - 1) / n,
        launches=pieces * model.layers * (FORWARD_LAUNCHES * (1 + again) + (BACKWARD_LAUNCHES if learns else 0)),
    )


def _head(setup: Setup, name: str, *, learns: bool = False) -> Operation:
    """`linear_logprobs` of the responses. Where it does not keep the logits it computes them again to learn."""
    model = setup.model
    rows, pieces = _rows(setup, learns)
    tokens = rows * setup.job.response_tokens
    work = kernel_work("linear_logprobs", (tokens, model.hidden, model.vocabulary), setup.width, backward=learns)
    assert work is not None
    kept = setup.machine.is_cpu and 4 * tokens / pieces * model.vocabulary <= KEPT_LOGITS
    again = model.head_flops(tokens) if learns and not kept else 0.0
    weights_again = (pieces - 1) * model.head * setup.width * (3 if learns else 1)
    return Operation(name=name, flops=work.flops + again, bytes=work.bytes + weights_again)


def _per_token(setup: Setup, name: str, kernel: str, *, backward: bool) -> Operation:
    rows, _ = _rows(setup, backward)
    return Operation(name=name, bytes=KERNELS[kernel]((rows, setup.job.response_tokens), 4, backward).bytes)


def _optimizer(setup: Setup) -> Operation:
    each = 28 + 3 * setup.width
    return Operation(name="optimizer", bytes=setup.job.updates * each * setup.trained / setup.count)


def bottleneck(setup: Setup) -> str:
    """One sentence: what takes longest, and what would if that took half as long."""
    times = {operation.name: seconds(operation, setup) for operation in operations(setup)}
    total = sum(time for time, _ in times.values())
    first, second = sorted(times, key=lambda name: times[name][0], reverse=True)[:2]
    (time, why), (other, other_why) = times[first], times[second]
    halved = total - time / 2
    after = f"{second} ({other_why}, {other / halved:.0%}) would be next"
    if other < time / 2:
        after = f"it would still come first, then {second} ({other_why}, {other / halved:.0%})"
    return (
        f"Bottleneck: {first}, {time / total:.0%} of the step, limited by {why}. At half that time the step would take "
        f"{halved / total:.0%} as long, and {after}."
    )
