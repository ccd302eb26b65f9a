"""The walls of the house: who may import whom, and which files come in pairs.

Every rule is a function that takes the root of a tree and returns the faults it finds, as sentences.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMPORT_NAMES = {"rlhf_kernels": "rlhf_kernels", "rlhf_engine": "rlhf_engine", "plugins": "rlhf_plugins"}
ALL_FOLDERS = (*IMPORT_NAMES, "tests", "bench", "examples")

# The only places in the packages that may know these libraries.
WRAPPED_BY = {
    "triton": ("rlhf_kernels/_triton/",),
    "transformers": ("plugins/hf/", "rlhf_engine/embed/trainer.py"),
    "tokenizers": ("plugins/hf/",),
    "tensorboard": ("plugins/tensorboard/",),
    "torch.utils.tensorboard": ("plugins/tensorboard/",),
    "trackio": ("plugins/trackio/",),
    "trl": ("rlhf_engine/embed/trl.py",),
    "accelerate": (),  # a loop with accelerate calls the engine, see examples/accelerate_loop.py
    "peft": ("plugins/hf/",),
}

# Top to bottom: a module imports only from its own row or from rows after it.
ROWS = {
    "rlhf_engine": (
        *("__main__", "cli", "templates", "__init__"),
        *("embed", "plan", "new", "doctor", "stages", "engine", "run", "worker", "manager", "defaults", "rewards"),
        *("heads", "hookspecs", "checkpoint", "state", "config", "models", "split"),
        "batch",
    ),
    "rlhf_kernels": (
        *("__main__", "selftest", "__init__", "ops", "_triton"),
        *("_autograd", "_vocabulary_parallel", "backend"),
    ),
}

PICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
TORCH_PICKLERS = ("torch.load", "torch.save")


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands and its full dotted path."""

    path: str
    line: int
    name: str
    type_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def inside(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text("utf-8"), str(path))


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """The dotted names that a statement or call imports; `package` is where its relative names start."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*start, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def imports(root: Path, *folders: str) -> Iterator[Import]:
    """Every import in these folders, also inside functions, conditions and `import_module("...")`."""
    for path, tree in sources(root, *folders):
        folder, *rest = path.removesuffix(".py").split("/")
        package = [IMPORT_NAMES.get(folder, folder), *rest[:-1]]
        type_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for name in imported_names(node, package):
                yield Import(path, getattr(node, "lineno", 0), name, id(node) in type_only)


# ------------------------------------------------------------------------------------------ rules on imports


def libraries_outside_their_wrapper(root: Path) -> list[str]:
    return [
        f"{found}: {library} only in {', '.join(wrappers) or 'none of these folders'}"
        for found in imports(root, *IMPORT_NAMES)
        for library, wrappers in WRAPPED_BY.items()
        if inside(found.name, library) and not found.path.startswith(wrappers)
    ]


def imports_from_a_higher_floor(root: Path) -> list[str]:
    """Kernels know no engine, the engine knows no plugin, and no plugin knows another."""
    faults = []
    for found in imports(root, *IMPORT_NAMES):
        folder, inner = found.path.split("/")[:2]
        own = f"rlhf_plugins.{inner.removesuffix('.py')}"
        forbidden = {
            "rlhf_kernels": inside(found.name, "rlhf_engine", "rlhf_plugins"),
            "rlhf_engine": inside(found.name, "rlhf_plugins"),
            "plugins": inside(found.name, "rlhf_plugins") and not inside(found.name, own),
        }
        if forbidden[folder]:
            faults.append(f"{found}: a file imports only from a lower row, and a plugin never another plugin")
    return faults


def imports_against_the_rows(root: Path) -> list[str]:
    """Inside a package: only downwards. Names used in annotations alone may point up."""
    faults = []
    for package, rows in ROWS.items():
        modules = {path.split("/")[1].removesuffix(".py") for path, _ in sources(root, package)}
        faults += [
            f"{package}/{name} stands in no row: give it one in ROWS and in the README"
            for name in sorted(modules - set(rows))
        ]
        for found in imports(root, package):
            if found.type_only or not inside(found.name, package):
                continue
            source = found.path.split("/")[1].removesuffix(".py")
            target = [*found.name.split("."), "__init__"][1]
            target = target if target in modules else "__init__"
            if source in rows and target in rows and rows.index(target) < rows.index(source):
                faults.append(f"{found}: {source} stands below {target}")
    return faults


def imports_of_the_benchmarks(root: Path) -> list[str]:
    """Only the command line knows them, and only when asked: they import the packages, not the other way round."""
    faults = []
    for path, tree in sources(root, *IMPORT_NAMES):
        at_start_up = {id(node) for statement in tree.body for node in _outside_functions(statement)}
        faults += [
            f"{path}:{getattr(node, 'lineno', 0)} imports {name}: only rlhf_engine/cli.py, inside its command"
            for node in ast.walk(tree)
            for name in imported_names(node, package=[])
            if inside(name, "rlhf_bench", "bench") and (path != "rlhf_engine/cli.py" or id(node) in at_start_up)
        ]
    return faults


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what runs with it when the module is imported."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    yield node
    for inner in ast.iter_child_nodes(node):
        yield from _outside_functions(inner)


def benchmarks_that_name_themselves(root: Path) -> list[str]:
    """In a checkout their folder is `bench`, installed it is `rlhf_bench`: only relative imports work in both."""
    return [
        f"{path}:{getattr(node, 'lineno', 0)} imports {name}: write it relative, `from .module import ...`"
        for path, tree in sources(root, "bench")
        for node in ast.walk(tree)
        for name in imported_names(node, package=[])
        if inside(name, "rlhf_bench") or (inside(name, "bench") and not getattr(node, "level", 0))
    ]


def imports_of_the_folder_name(root: Path) -> list[str]:
    return [
        f"{found}: the import name is rlhf_plugins"
        for found in imports(root, *ALL_FOLDERS)
        if inside(found.name, "plugins")
    ]


def plugins_that_name_themselves(root: Path) -> list[str]:
    """A plugin's own modules come by relative imports: the type checker knows the folder, not the import name."""
    return [
        f"{path}:{node.lineno} imports {name}: write it relative, `from .module import ...`"
        for path, tree in sources(root, "plugins")
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node, package=[])
        if inside(name, "rlhf_plugins")
    ]


def pickles(root: Path) -> list[str]:
    faults = [
        f"{found}: only safetensors and JSON on disk"
        for found in imports(root, *IMPORT_NAMES)
        if inside(found.name, *PICKLERS, *TORCH_PICKLERS)
    ]
    for path, tree in sources(root, *IMPORT_NAMES):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and dotted(node) in TORCH_PICKLERS:
                faults.append(f"{path}:{node.lineno} uses {dotted(node)}: only safetensors and JSON on disk")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                faults.append(f"{path}:{node.value.lineno} uses allow_pickle: only safetensors and JSON on disk")
    return faults


# -------------------------------------------------------------------------------------------- rules on twins


def names(root: Path, folder: str, prefix: str = "") -> list[str]:
    """The public modules `folder/<prefix><name>.py`, without the prefix."""
    stems = sorted(path.stem for path in (root / folder).glob(f"{prefix}*.py"))
    return [stem.removeprefix(prefix) for stem in stems if not stem.startswith("_")]


def operations_without_twins(root: Path) -> list[str]:
    operations = names(root, "rlhf_kernels/ops")
    tests = names(root, "tests/kernels", "test_")
    return [
        *(f"ops/{name}.py has no tests/kernels/test_{name}.py" for name in operations if name not in tests),
        *(
            f"_triton/{name}.py: rlhf_kernels/ops has no operation of that name"
            for name in names(root, "rlhf_kernels/_triton")
            if name not in operations
        ),
        *(
            f"bench_{name}.py: neither an operation nor `step`"
            for name in names(root, "bench", "bench_")
            if name not in (*operations, "step")
        ),
    ]


def entry_points(root: Path) -> dict[str, str]:
    """The table `PLUGINS` of setup.py."""
    for statement in ast.parse((root / "setup.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and dotted(statement.targets[0]) == "PLUGINS":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py has no table PLUGINS")


def plugins_without_twins(root: Path) -> list[str]:
    folders = {path.parent.name for path in (root / "plugins").glob("*/__init__.py")}
    registered = entry_points(root)
    built_in = {name: target for name, target in registered.items() if inside(target, "rlhf_plugins")}
    tests = names(root, "tests/plugins", "test_")
    return [
        *(f"plugins/{name}.py: a plugin is a folder" for name in names(root, "plugins")),
        *(f"plugins/{name} has no entry point in setup.py" for name in sorted(folders - set(registered))),
        *(f"plugins/{name} has no tests/plugins/test_{name}.py" for name in sorted(folders - set(tests))),
        *(f"setup.py: {name} has no folder plugins/{name}" for name in sorted(set(built_in) - folders)),
        *(
            f"setup.py: {name} = {target}, which is not rlhf_plugins.{name}:<class>"
            for name, target in built_in.items()
            if not target.startswith(f"rlhf_plugins.{name}:")
        ),
    ]


RULES: list[Callable[[Path], list[str]]] = [
    libraries_outside_their_wrapper,
    imports_from_a_higher_floor,
    imports_against_the_rows,
    imports_of_the_benchmarks,
    benchmarks_that_name_themselves,
    imports_of_the_folder_name,
    plugins_that_name_themselves,
    pickles,
    operations_without_twins,
    plugins_without_twins,
]
