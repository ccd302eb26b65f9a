"""A whole GRPO and PPO step of a randomly initialised 0.5B model (24 layers, V = 151,936, bfloat16): ours, a plain
PyTorch loop and TRL's GRPOTrainer where it is installed, each in a process of its own.

    python -m bench.gpu_step FILE.json [--dry]

Exit status 77, and the reason, where what it needs (transformers, and for ours the engine's requirements) is missing.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

STEPS = 3
SECONDS = 40  # of one contestant: set-up, a warm-up step and the timed ones
CONTESTANTS = [("grpo", "ours"), ("grpo", "plain PyTorch loop"), ("grpo", "TRL 1.16 GRPOTrainer"), ("ppo", "ours")]
NEEDED = {
    "ours": ("transformers", "tokenizers", "pluggy", "pydantic", "safetensors", "rlhf_plugins"),
    "plain PyTorch loop": ("transformers", "tokenizers"),
    "TRL 1.16 GRPOTrainer": ("transformers", "tokenizers", "trl", "datasets"),
}


def missing(name: str) -> list[str]:
    if name == "ours":
        find_plugins()
    return [module for module in NEEDED[name] if not importlib.util.find_spec(module)]


def find_plugins() -> None:
    """In a checkout that is not installed the plugins' folder stands under another name than they are imported by."""
    if importlib.util.find_spec("rlhf_plugins") or not (Path("plugins") / "__init__.py").is_file():
        return
    spec = importlib.util.spec_from_file_location(
        "rlhf_plugins", Path("plugins") / "__init__.py", submodule_search_locations=["plugins"]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rlhf_plugins"] = module
    spec.loader.exec_module(module)


def setting_of(dry: bool) -> Any:
    from .subject import Setting

    if dry:
        return Setting(vocabulary=64, hidden=16, intermediate=24, layers=2, heads=2, prompts=2, group=2,
                       prompt_length=4, response_length=6)  # fmt: skip
    return Setting(vocabulary=151_936, hidden=896, intermediate=4864, layers=24, heads=14, prompts=8, group=4,
                   prompt_length=64, response_length=128)  # fmt: skip


def policy_of(setting: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The shape of Qwen2-0.5B, weights drawn at random."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**_shape(setting, setting.vocabulary))
    with torch.device(device):
        model: torch.nn.Module = Qwen2ForCausalLM(config)
    return model.to(dtype)


def scorer_of(setting: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(seed)
    config = Qwen2Config(**_shape(setting, setting.vocabulary + 1))
    config.num_labels = 1
    with torch.device(device):
        model: torch.nn.Module = Qwen2ForSequenceClassification(config)
    return model.to(dtype)


def _shape(setting: Any, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": setting.hidden,
        "intermediate_size": setting.intermediate,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def one(which: str, name: str, dry: bool) -> dict[str, Any]:
    """Milliseconds of each timed step and the most memory, of one contestant in this process."""
    if name == "ours":
        find_plugins()
    from . import peers
    from .subject import make_prompts, make_tokenizer

    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    setting = setting_of(dry)
    tokenizer, prompts = make_tokenizer(setting), make_prompts(setting, 64 * setting.batch)
    policy = policy_of(setting, device, dtype)
    with torch.device(device) if name == "plain PyTorch loop" else nullcontext():  # it names no device itself
        if name == "ours":
            from . import ours

            if which == "grpo":
                step = ours.grpo(policy, tokenizer, prompts, setting)
            else:
                critic, judge = (scorer_of(setting, device, dtype, seed) for seed in (1, 2))
                step = ours.ppo(policy, critic, judge, tokenizer, prompts, setting)
        elif name == "plain PyTorch loop":
            step = peers.minimal_grpo(policy, tokenizer, prompts, setting)
        else:
            step = peers.trl_grpo(policy, tokenizer, prompts, setting)
        milliseconds = []
        for turn in range(STEPS + 1):
            start = time.perf_counter()
            step()
            if not dry:
                torch.cuda.synchronize()
            if turn:
                milliseconds.append(1e3 * (time.perf_counter() - start))
    return {"milliseconds": milliseconds, "peak_bytes": None if dry else torch.cuda.max_memory_allocated()}


def measure(file: Path, dry: bool) -> dict[str, dict[str, Any]]:
    """One after the other; what is there is written at once, in case the rest is cut off."""
    found: dict[str, dict[str, Any]] = {}
    for which, name in CONTESTANTS:
        if absent := missing(name):
            result: dict[str, Any] = {"why": f"{', '.join(absent)} not installed"}
        else:
            command = [sys.executable, "-m", f"{__package__}.gpu_step", "--one", which, name]
            try:
                done = subprocess.run(
                    [*command, *(["--dry"] if dry else [])], capture_output=True, text=True, timeout=SECONDS
                )
                last = (done.stdout.strip().splitlines() or [""])[-1]
                fault = (done.stderr.strip().splitlines() or ["no message"])[-1]
                result = json.loads(last) if not done.returncode else {"why": fault[:200]}
            except subprocess.TimeoutExpired:
                result = {"why": f"not done after {SECONDS} s"}
        found[f"{which}: {name}"] = result
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        times = result.get("milliseconds")
        print(f"{which}: {name}: {statistics.median(times):.0f} ms" if times else f"{which}: {name}: {result['why']}")
    return found


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "--dry"]
    dry = "--dry" in sys.argv
    if arguments[0] == "--one":
        print(json.dumps(one(arguments[1], arguments[2], dry)), flush=True)
        sys.exit(0)
    found = measure(Path(arguments[0]), dry)
    if not any("milliseconds" in result for result in found.values()):
        print("; ".join(f"{name}: {result['why']}" for name, result in found.items()))
        sys.exit(77)


if __name__ == "__main__":
    main()
