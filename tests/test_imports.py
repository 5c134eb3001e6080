"""Who may import whom, and which file alone may use what: the arrows of the design."""

import ast
import dataclasses
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dynamics", "experiments", "runner", "configs", "paper_figures")

# A module imports modules of higher lines and of its own package; not its neighbours on a line.
LAYERS = """
types calls counts
tree
config hosts
losses mesh record statistics
data models task optim subspace
step ghost
observers
population
curvature kernel representation scores stability
landscape
probes revise observers
checkpoint
chunk watch identity stopping artefact
book pace plan
fit
training testing
"""
LEVEL = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}

ONLY = {  # third-party package -> where it may be imported
    "grain": {"dynamics/data/stream.py"},
    "matplotlib": {"paper_figures/"},
    "orbax": {"dynamics/checkpoint/"},
    "polars": {"dynamics/record/", "dynamics/training.py", "experiments/", "paper_figures/"},
    "rich": {"runner/"},
    "sklearn": {"dynamics/data/", "dynamics/scores/noise.py"},
    "submitit": {"runner/"},
    "tueplots": {"paper_figures/"},
    "tyro": {"runner/command.py"},
}
JIT = {  # the drivers: everything else composes
    "dynamics/chunk.py",
    "dynamics/watch.py",
    "dynamics/fit.py",
    "dynamics/plan.py",
    "dynamics/scores/examples.py",
    "dynamics/data/stream.py",
    "dynamics/curvature/drive.py",
}


def files(*packages: str) -> list[Path]:
    return [p for package in packages for p in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_module(name: str) -> bool:
    at = ROOT.joinpath(*name.split("."))
    return at.with_suffix(".py").is_file() or (at / "__init__.py").is_file()


@functools.cache
def imports(path: Path) -> tuple[tuple[int, str, str], ...]:
    """(line, module, name imported from it or ''), everywhere in the file, functions included."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                module, name = (inner, "") if is_module(inner) else (str(node.module), alias.name)
                found.append((node.lineno, module, name))
    return tuple(found)


def of_us(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, module, name) of the imports of our own packages."""
    for line, module, name in imports(path):
        if module.split(".")[0] in (*PACKAGES, "benchmarks", "tests"):
            yield f"{name_of(path)}:{line}", module, name


def test_there_are_files_to_check() -> None:
    assert all(files(package) for package in PACKAGES)
    assert len(list(of_us(ROOT / "dynamics/fit.py"))) > 5


# ---- our packages -------------------------------------------------------------------------------


def test_inside_dynamics_imports_point_one_way() -> None:
    wrong = []
    for path in files("dynamics"):
        mine = path.relative_to(ROOT / "dynamics").with_suffix("").parts[0]
        for place, module, _ in of_us(path):
            package, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if mine == "__init__" or package != "dynamics" or not other:
                wrong.append(f"{place}: {module}")
            elif other != mine and LEVEL[other] >= LEVEL[mine]:
                wrong.append(f"{place}: {mine} imports {other}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_every_module_of_dynamics_has_its_place() -> None:
    names = {p.relative_to(ROOT / "dynamics").with_suffix("").parts[0] for p in files("dynamics")}
    assert names - {"__init__"} <= LEVEL.keys(), "give it a line in LAYERS, and in the design"


def test_experiments_import_the_library() -> None:
    """The command line alone knows what imports the command line: ``python -m experiments``."""
    entry = ROOT / "experiments" / "__main__.py"
    for path in files("experiments"):
        allowed = ("runner",) if path == entry else ("dynamics", "experiments")
        for place, module, _ in of_us(path):
            assert module.split(".")[0] in allowed, f"{place}: {module}"


def test_the_runner_imports_experiments_and_the_library() -> None:
    for path in files("runner"):
        for place, module, _ in of_us(path):
            assert module.split(".")[0] in ("dynamics", "experiments", "runner"), place


def test_presets_import_values_only() -> None:
    """One experiment, the config tools, and config classes; nothing that computes."""
    wrong = []
    for path in files("configs"):
        study = path.relative_to(ROOT / "configs").parts[0]
        for place, module, name in of_us(path):
            if module == "dynamics.config":
                continue
            parts = module.split(".")
            home = module == f"experiments.{study}" or (
                len(parts) == 2
                and parts[0] == "dynamics"
                and parts[1] in ("data", "models", "optim", "training")
            )
            found = getattr(importlib.import_module(module), name) if home and name else None
            if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
                wrong.append(f"{place}: {module} {name}")
        for line, module, _ in imports(path):
            if module.split(".")[0] not in (*PACKAGES, "math"):
                wrong.append(f"{name_of(path)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)


def test_figures_read_records_only() -> None:
    for path in files("paper_figures"):
        for line, module, _ in imports(path):
            place = f"{name_of(path)}:{line}: {module}"
            package = module.split(".")[0]
            assert package not in ("jax", "jaxlib", "flax", "optax", "orbax"), place
            if package in (*PACKAGES, "benchmarks"):
                allowed = module in ("dynamics.record", "dynamics.statistics")
                allowed |= (name_of(path), module) == ("paper_figures/__main__.py", "runner.errors")
                assert allowed or package == "paper_figures", place


@pytest.mark.parametrize(
    "module",
    [
        "dynamics",
        "dynamics.config",
        "dynamics.record",
        "dynamics.statistics",
        *(f"paper_figures.{path.stem}" for path in files("paper_figures")),
    ],
)
def test_no_jax(module: str) -> None:
    module = module.removesuffix(".__init__")
    if module.startswith("paper_figures"):
        pytest.importorskip("matplotlib")
    code = f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] == 'jax'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout[:300] + done.stderr


# ---- what belongs to one file -------------------------------------------------------------------


@pytest.mark.parametrize("package", ONLY)
def test_third_party_packages_stay_in_their_place(package: str) -> None:
    for path in files(*PACKAGES):
        for line, module, _ in imports(path):
            if module.split(".")[0] == package:
                inside = any(name_of(path).startswith(place) for place in ONLY[package])
                assert inside, f"{name_of(path)}:{line} imports {module}"


def mentions(path: Path, module: str, name: str) -> list[str]:
    """Where ``module.name`` is used or imported, whatever it is called there."""
    plain = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import)]
    aliases = [alias for node in plain for alias in node.names if alias.name == module]
    bound = {alias.asname or alias.name for alias in aliases}
    found = [line for line, source, what in imports(path) if (source, what) == (module, name)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr == name:
            if isinstance(node.value, ast.Name) and node.value.id in bound:
                found.append(node.lineno)
    return [f"{name_of(path)}:{line}" for line in found]


def test_only_the_drivers_compile() -> None:
    for path in files("dynamics"):
        places = mentions(path, "jax", "jit") + mentions(path, "jax", "pmap")
        assert not places or name_of(path) in JIT, places


def test_nothing_in_the_library_prints() -> None:
    for path in files("dynamics"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Name) and node.id in ("print", "breakpoint"):
                raise AssertionError(f"{name_of(path)}:{node.lineno}: {node.id}")
        assert not mentions(path, "jax", "debug"), "jax.debug prints"


def test_only_mesh_names_the_axes() -> None:
    wrong = []
    for path in files(*PACKAGES):
        if name_of(path) == "dynamics/mesh.py":
            continue
        for node in ast.walk(tree(path)):
            inside: list[ast.AST] = []
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                if called in ("PartitionSpec", "P", "NamedSharding", "Mesh", "make_mesh"):
                    inside = [*node.args, *node.keywords]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".shape"):
                inside = [node.slice]
            strings = [
                part.value
                for each in inside
                for part in ast.walk(each)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            if strings:
                wrong.append(f"{name_of(path)}:{node.lineno}: {strings}")
    assert not wrong, "\n".join(wrong)


def test_only_mesh_makes_meshes() -> None:
    """Auto axis types are chosen in one place."""
    for path in files(*PACKAGES):
        if name_of(path) != "dynamics/mesh.py":
            assert not mentions(path, "jax", "make_mesh"), name_of(path)
            calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
            assert not [c for c in calls if ast.unparse(c.func).split(".")[-1] == "Mesh"]


def test_random_numbers_come_from_a_key_or_a_seed() -> None:
    """No global state, nothing seeded by the clock."""
    legal = ("Generator", "PCG64", "SeedSequence", "BitGenerator", "default_rng")
    for path in files(*PACKAGES):
        assert "random" not in [module for _, module, _ in imports(path)], name_of(path)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute):
                used = ast.unparse(node.value) in ("np.random", "numpy.random")
                assert not used or node.attr in legal, f"{name_of(path)}:{node.lineno}: {node.attr}"
            elif isinstance(node, ast.Call):
                made = ast.unparse(node.func).split(".")[-1] in legal
                assert not made or node.args, f"{name_of(path)}:{node.lineno}: no seed"
