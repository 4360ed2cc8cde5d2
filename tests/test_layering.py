"""The layers of the library, held by reading import statements (nothing is imported to do so).

patch -> runtime -> adapters, methods -> ops -> backends -> kernels: a layer knows those below it and
none above. Also: what has an op has its tests and benchmarks, under the same file name.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import structure  # noqa: E402

PACKAGE = ROOT / "fastdit"

# A folder, and what no file in it may import.
FORBIDDEN = {
    "fastdit/backends": (
        "fastdit.ops",
        "fastdit.adapters",
        "fastdit.methods",
        "fastdit.runtime",
        "fastdit.patch",
    ),
    "fastdit/ops": (
        "fastdit.adapters",
        "fastdit.methods",
        "fastdit.runtime",
        "fastdit.patch",
    ),
    "fastdit/methods": (
        "fastdit.adapters",
        "fastdit.backends",
        "fastdit.ops",
        "fastdit.runtime",
        "fastdit.patch",
    ),
    "fastdit/adapters": ("fastdit.methods", "fastdit.backends", "fastdit.runtime", "fastdit.patch"),
    "fastdit/runtime": ("fastdit.backends", "fastdit.patch", "fastdit.handle"),
    "fastdit/schedules": (
        "fastdit.adapters",
        "fastdit.methods",
        "fastdit.ops",
        "fastdit.runtime",
        "fastdit.patch",
    ),
    "fastdit/blocks": ("fastdit.adapters", "fastdit.methods", "fastdit.runtime", "fastdit.patch"),
    "fastdit/programs": (
        "fastdit.adapters",
        "fastdit.backends",
        "fastdit.methods",
        "fastdit.runtime",
        "fastdit.patch",
    ),
    "fastdit/tokens": ("fastdit.adapters", "fastdit.backends", "fastdit.runtime", "fastdit.patch"),
    "fastdit/account": ("fastdit.methods", "fastdit.backends", "fastdit.patch", "fastdit.handle"),
    "triton_kernels": ("fastdit",),
}

# These use the library; the library does not use them. Each may import itself and the command line.
TOOLS = ("tiny", "emoji", "search", "train", "evaluate", "cli")
TOOL_FILES = {"__main__"}

# Elsewhere than on GPUs torch's own attention is the kernel.
WITHOUT_CSRC = {"sparse_attention"}

OP_HELPERS = {"__init__", "registry", "checks"}

# What tests may read of others, who have no other name for it.
FOREIGN = {
    "torch": """_C _addmm_activation _cdata _compiled_call_impl _cuda_clearCublasWorkspaces _cuda_endAllocateToPool
        _dynamo _forward_hooks _forward_pre_hooks _get_sdp_priority_order _make_subclass
        _make_wrapper_subclass _mkl_reorder_linear_weight _overloadpacket _parameters _scaled_mm _schema _sleep
        _subclasses _torchdynamo_orig_callable _version""",
    "diffusers": """_attention_backend _callback_tensor_inputs _current_timestep _diffusers_hook _fn_refs
        _guidance_scale _hf_hook _internal_dict _interrupt _keep_in_fp32_modules _prepare_latent_image_ids
        _supports_gradient_checkpointing""",
    "triton": "_LangPatchScope _get_np_dtype _init_args_hst _patch_lang _restore_args_dev",
    "os": "_exit",
}


def imports(path: Path, module_scope: bool = False) -> list[str]:
    """Absolute names of what a file imports; only on loading it where module_scope is set."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in _walk(ast.parse(path.read_text()), module_scope):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found += [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return found


def _walk(node: ast.AST, module_scope: bool):
    for child in ast.iter_child_nodes(node):
        yield child
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not (module_scope and (is_function or _type_checking(child))):
            yield from _walk(child, module_scope)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def reaches(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_layer_imports_none_above_it(folder):
    files = python_files(folder)
    assert files, f"{folder} is empty"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        for package in FORBIDDEN[folder]
        if reaches(name, package)
    ]
    assert not wrong, wrong


def test_the_library_does_not_use_its_tools():
    library = [
        path
        for path in python_files("fastdit")
        if path.relative_to(PACKAGE).parts[0] not in TOOLS
        and not (path.parent == PACKAGE and path.stem in TOOL_FILES)
    ]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in library
        for name in imports(path)
        for tool in TOOLS
        if reaches(name, f"fastdit.{tool}")
    ]
    assert not wrong, wrong


def test_nothing_depends_on_assertions():
    """`python -O` leaves them out."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("fastdit", "triton_kernels")
        for path in python_files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong, wrong


def test_the_tree_is_flat_and_without_circles():
    """Counted by `tools/structure.py`, imports inside functions included."""
    found = structure.measure()
    assert not found.circles, found.circles
    assert len(found.chain) <= 10, " -> ".join(found.chain)
    assert len(found.flat) <= 14, found.flat
    assert found.longest[0] <= 450, found.longest


def test_diffusers_is_not_imported_with_the_library():
    library = [
        path
        for path in python_files("fastdit")
        if path.relative_to(PACKAGE).parts[0]
        not in ("tiny", "emoji", "search", "train", "evaluate")
    ]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name} at module scope"
        for path in library
        for name in imports(path, module_scope=True)
        if reaches(name, "diffusers") or reaches(name, "transformers")
    ]
    assert not wrong, wrong


def test_files_of_an_op_share_its_name():
    ops = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OP_HELPERS
    assert ops
    missing = [
        name
        for op in sorted(ops)
        for name in (f"csrc/{op}.cpp", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py")
        if not (ROOT / name).exists() and not (name.startswith("csrc") and op in WITHOUT_CSRC)
    ]
    assert not missing, missing


def test_tests_read_no_private_names():
    """What a test needs to see of the library is public there. A test's own `self` is its own."""
    foreign = {name for names in FOREIGN.values() for name in names.split()}
    read = {
        name: f"{path.name}:{node.lineno}"
        for path in python_files("tests")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in private_names(node)
    }
    assert not {name: place for name, place in read.items() if name not in foreign}
    assert foreign <= set(read), foreign - set(read)


def private_names(node: ast.AST) -> list[str]:
    """Names with one leading underscore that `x._name`, `setattr(x, "_name", ...)` or an import of a file has."""
    names = []
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "super()"):
        names = [node.attr]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", "setattr")):
        names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
    elif (
        isinstance(node, ast.ImportFrom) and node.module != "fastdit"
    ):  # whose modules `_C` and `_cuda` are
        names = [alias.name for alias in node.names]
    return [name for name in names if str(name).startswith("_") and name[:2] != "__"]


def test_the_core_knows_no_model_and_no_paper():
    """An op is named by its mathematics; papers and families have folders of their own."""
    words = ("ras", "ralu", "ecad", "harmonica", "flux", "pixart")
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("fastdit/ops", "fastdit/backends", "triton_kernels", "csrc")
        for path in sorted((ROOT / folder).rglob("*"))
        for name in words
        if name in path.stem.split("_")
    ]
    assert not wrong, wrong
