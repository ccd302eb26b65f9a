"""The command line: `rlhf run FILE`, `rlhf plugins [doctor] [FILE]`, `rlhf new KIND NAME`, `rlhf bench | plan`."""

from __future__ import annotations

import logging
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from rlhf_engine.checkpoint import CheckpointNotSaved, DamagedCheckpoint
from rlhf_engine.config import ConfigError, RunFile, read_run_file
from rlhf_engine.doctor import examine, installed_table
from rlhf_engine.manager import winners
from rlhf_engine.new import Kind, new_package
from rlhf_engine.plan import (
    Setup,
    check_tables,
    find_architecture,
    find_machine,
    job_of,
    model_of,
    not_counted,
    plan_tables,
    sweep_table,
)
from rlhf_engine.plan.machine import WIDTH
from rlhf_engine.run import Run

__all__ = ["main"]


class ShowByDefault(TyperGroup):
    """`rlhf plugins [FILE]` is `rlhf plugins show [FILE]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["show", *args])


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=escape(__doc__))
plugins = typer.Typer(
    cls=ShowByDefault, help=escape("What is installed, and what a run makes of it. `rlhf plugins [FILE]` shows it.")
)
app.add_typer(plugins, name="plugins")


class BenchMissing(Exception):
    """What `rlhf bench` was asked for is not there; the message says what to do."""


# People can mend these from what they say; any other error may be a fault of a plugin's code, or of ours.
EXPLAINED = (ConfigError, DamagedCheckpoint, CheckpointNotSaved, BenchMissing)

Set = Annotated[list[str], typer.Option("--set", help="override a key: table.key=value, such as ppo.clip=0.3")]


@app.command()
def run(file: Path, set: Set = []) -> None:  # noqa: B006 (typer reads the option's name and default here)
    """Do what a run file says. The same command again goes on where a stopped run was."""
    parsed = _read(file, set)
    folder = Path(parsed.options.folder)
    try:
        Run(parsed).execute()
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped. The same command goes on from the last checkpoint in {folder}")
        raise typer.Exit(130) from None
    except Exception as error:
        if folder.is_dir() or not isinstance(error, EXPLAINED):
            _keep_traceback(error, folder)
        raise
    (folder / "error.txt").unlink(missing_ok=True)


def _read(file: Path, overrides: list[str]) -> RunFile:
    """The run file. Modules that it names by path are looked for beside it first, then in the current folder."""
    sys.path.insert(0, str(file.resolve().parent))
    return read_run_file(file, overrides)


def _keep_traceback(error: Exception, folder: Path) -> None:
    """Write the full traceback to `error.txt` in the run's folder, and say so in a note."""
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(text, "utf-8")
    except OSError as fault:
        if not isinstance(error, EXPLAINED):
            error.add_note(f"{text}This could not be written to {folder / 'error.txt'}: {fault}")
    else:
        goes_on = "" if isinstance(error, EXPLAINED) else " Once that is mended, the same command goes on where it was."
        error.add_note(f"The full traceback is in {folder / 'error.txt'}.{goes_on}")


@plugins.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="a run file: show who answers each hook in it")] = None,
    set: Set = [],  # noqa: B006
) -> None:
    """What is installed and what each plugin answers; with a run file, who won each hook in it."""
    console = get_console()
    if file is None:
        table = installed_table()
    else:
        loaded = Run(_read(file, set))
        table = Table("hook", "answered by (in this order)", title=escape(str(file)))
        for hook, names in winners(loaded.manager).items():
            table.add_row(hook, escape(", ".join(names)) or "-")
    console.print(table)


@plugins.command()
def doctor(
    file: Annotated[Path, typer.Argument(help="a run file; nothing in it is run")],
    set: Set = [],  # noqa: B006
) -> None:
    """All that is wrong with a run file's plugins, in one go, and what to do; exit status 1 if anything is."""
    sys.path.insert(0, str(file.resolve().parent))
    report = examine(file, set)
    get_console().print(*report.tables(), sep="\n")
    raise typer.Exit(1 if report.faults else 0)


@app.command()
def bench(
    ops: Annotated[str, typer.Option(help="operations, with commas: token_logprobs,gae; all if not given")] = "",
    shapes: Annotated[str, typer.Option(help="time these shapes instead, such as 8x128x4096,4x64x1000")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="a few shapes, a few rounds")] = False,
    json: Annotated[Path | None, typer.Option(help="write the records into this file")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="an older file of --json: print what got slower; exit status 1 if anything did")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="a folder for report.html, its pictures and results.json")] = None,
    minutes: Annotated[float | None, typer.Option(help="what is not measured by then is left out, and says so")] = None,
    compile: Annotated[
        bool | None, typer.Option(help="time torch.compile of the definitions too (default: unless --quick)")
    ] = None,
) -> None:
    """Time the operations and training steps here, beside other trainers' and this machine's limits."""
    try:
        command = import_module("rlhf_bench.command")
    except ModuleNotFoundError as error:
        raise BenchMissing(
            f"rlhf bench needs {error.name}, which is not installed: pip install 'rlhf-engine[bench]'"
        ) from error
    try:
        asked = command.Request(
            ops=command.names(ops), shapes=command.shapes(shapes), quick=quick, json=json,
            compare=compare, output=output, minutes=minutes, compile=compile,
        )  # fmt: skip
        status = command.bench(asked)
    except (command.BenchError, ValueError, OSError) as error:
        raise BenchMissing(str(error)) from error
    raise typer.Exit(status)


@app.command()
def plan(
    file: Annotated[Path | None, typer.Argument(help="a run file; its rl table says what a step is")] = None,
    set: Set = [],  # noqa: B006
    model: Annotated[str, typer.Option(help="llama-8b and the like, or a config.json; else the run file's own")] = "",
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200; cpu: this machine, measured now")] = "h100",
    count: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
    tokens: Annotated[int, typer.Option(min=0, help="of a response; else the run file's")] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="of a prompt; else as many, at most 512")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="responses in a step; else the run file's")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32; else bfloat16, and float32 on a CPU")] = "",
    recompute: Annotated[bool, typer.Option("--recompute", help="activations again in the backward pass")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="also 8B and 70B, 8k and 128k tokens, 1, 8 and 64")] = False,
    check: Annotated[Path | None, typer.Option(help="compare the model with a file of rlhf bench --json")] = None,
) -> None:
    """What a step of a run needs on some GPUs: memory by part, time by operation, and the bottleneck."""
    if file is None and check is None:
        raise ConfigError("rlhf plan needs a run file, such as examples/movies.toml, or --check with a file of results")
    if dtype and dtype not in WIDTH:
        raise ConfigError(f"--dtype {dtype}: unknown. Known: {', '.join(WIDTH)}")
    if gpu == "cpu" and (count > 1 or sweep):
        raise ConfigError("--gpu cpu: there is one such machine here, so neither --count nor --sweep goes with it")
    console = get_console()
    if file is not None:
        parsed = _read(file, set)
        setup = Setup(
            job=job_of(parsed).resized(batch=batch, tokens=tokens, prompt_tokens=prompt_tokens),
            model=find_architecture(model) if model else model_of(parsed), machine=find_machine(gpu), count=count,
            dtype=dtype or ("float32" if gpu == "cpu" else "bfloat16"), recompute=recompute,
        )  # fmt: skip
        if left_out := not_counted(parsed):
            console.print(
                escape(f"NOT counted in this plan: {', '.join(left_out)}. Say --dtype or --recompute for those")
            )
        console.print(*plan_tables(setup), sep="\n")
        if sweep:
            console.print(sweep_table(setup))
    if check is not None:
        console.print(*check_tables(check), sep="\n")


@app.command()
def new(
    kind: Annotated[Kind, typer.Argument(help="what the plugin is")],
    name: Annotated[str, typer.Argument(help="the name that run files will use, such as my_reward")],
    folder: Annotated[Path, typer.Option(help="where the package's folder is put")] = Path("."),
) -> None:
    """Write a plugin in a package of its own: a class, its test and a README, ready to install."""
    package = new_package(kind, name, folder)
    get_console().print(
        f"{package}: {', '.join(sorted(file.name for file in package.iterdir()))}\n"
        f"Now: pip install --editable {package} && python -m pytest {package}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def main() -> None:
    """The entry point of the `rlhf` command. Every error is told in one message, and ends with exit status 2."""
    handler = RichHandler(console=get_console(), show_path=False, show_level=False, rich_tracebacks=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("rlhf_engine")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    sys.path.insert(0, "")  # plugins named by path, as "my_module:Class", may stand in the current folder
    try:
        app()
    except Exception as error:
        kind = "" if isinstance(error, EXPLAINED) else f"{type(error).__name__}: "
        console = Console(stderr=True)
        console.print(f"[bold red]error:[/] {escape(f'{kind}{error}')}", soft_wrap=True)
        for note in getattr(error, "__notes__", ()):
            console.print(escape(note), soft_wrap=True)
        raise SystemExit(2) from None
