"""Where the memory of one device goes.

With P parameters, n devices, w bytes a number (2 in 16 bits, 4 in float32), and everything sharded evenly over the
devices as in ZeRO-3 / FSDP (Rajbhandari et al. 2020, arXiv:1910.02054):

    parameters                w P / n             policy; reference and reward model, which are frozen; critic
    gradients                 w P / n             of what is trained, while it learns
    optimizer                 12 P / n            Adam in 16 bits: a float32 copy and two moments; 8 P / n in float32
    gathered layer            2 w U               n > 1: weights and gradient of the largest unit U, layer or embedding
    activations               m L l k             m responses of L tokens at once; k bytes a token and layer
      recomputed              m L (l h w + k)     one input a layer, and one layer whole
    logits, by the kernels    2 min(4 N V, 256 MiB), and in 16 bits 4 V h for the float32 gradient of the head
    generator's weights       w P / t             n > 1: a copy, split over t devices
    keys and values           R L kv / t          R responses of each of n // t generators, all at once

t, the tensor parallelism of the generator, is the smallest power of two whose share of the weights is at most a quarter
of a device's memory, and no more than n or a node. Generating and learning take turns, so that the most is what always
stands there, and the larger of the two. Not counted: the allocator's waste, buffers of communication, the CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlhf_engine.plan.architecture import Architecture
from rlhf_engine.plan.job import Job
from rlhf_engine.plan.machine import WIDTH, Machine

__all__ = ["ALWAYS", "GENERATING", "LEARNING", "Part", "Setup", "memory_parts", "peak"]

ALWAYS, GENERATING, LEARNING = "always", "generating", "learning"
KEPT_LOGITS = 256 * 2**20  # as `linear_logprobs` keeps at most


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a plan depends on."""

    job: Job
    model: Architecture
    machine: Machine
    count: int = 1
    dtype: str = "bfloat16"
    recompute: bool = False
    """activations are computed again in the backward pass, layer by layer"""

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def minibatch(self) -> int:
        """Responses of an optimizer step on one device."""
        return ceil(self.job.minibatch / self.count)

    @property
    def piece(self) -> int:
        """Responses that go through a model at once on one device."""
        return min(self.job.piece, self.minibatch)

    @property
    def responses(self) -> int:
        """Of a step, on one device."""
        return ceil(self.job.responses / self.count)

    @property
    def trained(self) -> int:
        """Parameters with a gradient, of all devices together."""
        return self.model.parameters + self.critic + (self.model.hidden if self.shared_values else 0)

    @property
    def critic(self) -> int:
        return self.model.scalar_parameters if self.job.own_critic else 0

    @property
    def shared_values(self) -> bool:
        return self.job.values and not self.job.own_critic

    @property
    def tensor_parallel(self) -> int:
        most = min(self.count, self.machine.node)
        t = 1
        while 2 * t <= most and self.width * self.model.parameters / t > self.machine.memory / 4:
            t *= 2
        return t

    @property
    def generators(self) -> int:
        return self.count // self.tensor_parallel

    @property
    def generated(self) -> int:
        """Responses of one generator, all at once."""
        return ceil(self.job.responses / self.generators)


@dataclass(frozen=True)
class Part:
    """Bytes of one device, and when they stand there."""

    name: str
    bytes: float
    when: str


def activations(setup: Setup, recompute: bool) -> float:
    """Bytes kept for the backward pass of one piece; policy and critic stand there together."""
    model = setup.model
    tokens = setup.piece * setup.job.tokens
    layers, kept = model.layers, model.kept_bytes(setup.width)
    each = layers * model.hidden * setup.width + kept if recompute else layers * kept
    return float(tokens * each * (2 if setup.job.own_critic else 1))


def held_logits(setup: Setup) -> float:
    """Bytes of the logits of one piece and of their gradient in float32, if nobody takes them tile by tile."""
    return 8.0 * setup.piece * setup.job.response_tokens * setup.model.vocabulary


def kernel_logits(setup: Setup) -> float:
    """What `linear_logprobs` holds of them instead."""
    head = 4.0 * setup.model.head if setup.width < 4 else 0.0
    return min(held_logits(setup), 2 * KEPT_LOGITS) + head


def memory_parts(setup: Setup) -> list[Part]:
    """Every part that this setup has."""
    model, job, n, w = setup.model, setup.job, setup.count, setup.width
    optimizer = 12 if w < 4 else 8
    kv = setup.generated * job.tokens * model.kv_bytes(w) / setup.tensor_parallel
    parts = [
        Part("policy", w * (setup.trained - setup.critic) / n, ALWAYS),
        Part("critic", w * setup.critic / n, ALWAYS),
        Part("optimizer states", optimizer * setup.trained / n, ALWAYS),
        Part("reference", w * model.parameters / n * job.reference, ALWAYS),
        Part("reward model", w * model.scalar_parameters / n * job.reward_model, ALWAYS),
        Part("generator's weights", w * model.parameters / setup.tensor_parallel * (n > 1), GENERATING),
        Part("keys and values", kv, GENERATING),
        Part("gradients", w * setup.trained / n, LEARNING),
        Part("gathered layer", 2 * w * model.largest_unit * (n > 1), LEARNING),
        Part("activations", activations(setup, setup.recompute), LEARNING),
        Part("logits, by the kernels", kernel_logits(setup), LEARNING),
    ]
    return [part for part in parts if part.bytes]


def peak(parts: list[Part]) -> float:
    """The most that stands there at a time."""
    of = {when: sum(part.bytes for part in parts if part.when == when) for when in (ALWAYS, GENERATING, LEARNING)}
    return of[ALWAYS] + max(of[GENERATING], of[LEARNING])
