"""The project's own rules: import layers, file sizes, imports without torch, the shipped prompts, the README's file map."""

import ast
import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "forerun"
# A file imports only from names before its own; ARCHITECTURE.md prints the same list.
LAYERS = [
    "types", "config", "text", "workload", "tree", "sampling", "accept", "packed", "attention", "graph", "cache", "model",
    "scoring", "heads", "draft", "compress", "engine", "plugin", "backends", "build", "train", "evaluate", "bench", "audit",
    "server", "verbs", "cli",
]  # fmt: skip
VERBS = ["generate", "bench", "eval", "compress", "report", "train", "audit"]
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})  # the package's own file stands above all layers


def layer(path: Path) -> str:
    """The first part of a file's name below the package: draft/model.py belongs to `draft`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Layers that a file imports, at whatever depth of the file, those for type checking too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            names |= {f"forerun.{alias.name}" for alias in node.names} if node.module == "forerun" else {str(node.module)}
    return {name.split(".")[1] for name in names if name.startswith("forerun.")}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running some code."""
    ending = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_layers(path: Path) -> None:
    own = layer(path)
    assert own in LAYERS, f"{own} has no place in the order of layers"
    lower = set(LAYERS[: LAYERS.index(own) + 1])
    names = {name for name in imported(path) if not name.startswith("__")}
    assert names <= lower, f"{path.name} is below {sorted(names - lower)} and must not import them"


def test_the_order_is_the_documented_one() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert f"`{', '.join(LAYERS)}`" in text


@pytest.mark.parametrize("folder", ["src", "tests", "recipes", "benchmarks"])
def test_files_stay_readable(folder: str) -> None:
    long = {
        str(path): count for path in (ROOT / folder).rglob("*.py") if (count := len(path.read_text("utf-8").splitlines())) > 400
    }
    assert not long


HELP = """
import sys
from forerun.cli import main
sys.argv = ["forerun", "--help"]
try:
    main()
except SystemExit:
    pass
"""


def test_help_names_the_verbs_without_torch() -> None:
    modules = loaded_by(HELP)
    assert "forerun" in modules
    assert not modules & {"torch", "transformers"}
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert [verb for verb in VERBS if verb not in re.findall(r"\w+", shown)] == []


def test_the_package_imports_without_torch() -> None:
    modules = loaded_by("import forerun\nassert forerun.__version__\nassert forerun.Request")
    assert "forerun" in modules
    assert not modules & {"torch", "transformers"}


def test_every_public_name_exists() -> None:
    import forerun

    assert [name for name in forerun.__all__ if not hasattr(forerun, name)] == []


def prompts() -> list[dict[str, object]]:
    text = resources.files("forerun").joinpath("assets/prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_have_the_form_of_spec_bench() -> None:
    for prompt in prompts():
        assert set(prompt) == {"question_id", "category", "turns"}
        turns = prompt["turns"]
        assert isinstance(turns, list)
        assert len(turns) == 1
        assert 15 <= len(turns[0].split()) <= 150
    assert [prompt["question_id"] for prompt in prompts()] == list(range(1, len(prompts()) + 1))


def test_prompts_cover_the_categories_evenly() -> None:
    counts: dict[object, int] = {}
    for prompt in prompts():
        counts[prompt["category"]] = counts.get(prompt["category"], 0) + 1
    assert set(counts) == {"continuation", "story", "list", "code", "qa", "repetition"}
    assert len(set(counts.values())) == 1
    assert len({str(prompt["turns"]) for prompt in prompts()}) == len(prompts())


def test_repetition_prompts_end_inside_a_copy() -> None:
    for prompt in prompts():
        if prompt["category"] == "repetition":
            turns = prompt["turns"]
            assert isinstance(turns, list)
            passage, start = turns[0].split("The same passage again:")
            assert passage.startswith(start.strip())
            assert len(start.strip()) < len(passage) / 3, "most of the copy is left to write"


def test_the_file_map_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w./-]+/[\w./-]*)` \|", text, re.MULTILINE)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "recipes/embedded/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_constraints_pin_what_the_project_depends_on() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tested = [requirement for name in ("dev", "data", "eval", "bnb") for requirement in extras[name]]
    wanted = project["dependencies"] + [one for one in tested if not one.startswith("forerun[")]
    pinned = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    names = {re.split(r"[<>=!~ \[]", requirement)[0].lower() for requirement in wanted}
    assert names <= {name.lower().replace("_", "-") for name in pinned}
