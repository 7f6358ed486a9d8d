"""The rules of the house as functions from source text to complaints; see tests/test_house_rules.py."""

import ast
import re
import sys
from collections.abc import Iterator

# A folder may import those before it. LOWEST knows none of the folders; any other module beside them (the
# command line) may know all.
ORDER = ("core", "model", "generate", "train", "evaluate", "deploy")
LOWEST = {"errors", "files", "_version"}
PACKAGE = "shadowpeft"
# Triton is torch's own compiler. jaxtyping is read by one file, which does without it.
CORE_MAY_IMPORT = {"torch", "triton"}
SHAPES_FILE, SHAPES_MAY_IMPORT = "core/shapes.py", {"jaxtyping"}
PLACES = re.compile(r"""(?:^|[\s"'`(=:])/(?:home|root|work|Users|tmp|mnt|data|opt)/\w""")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("." * node.level) + (node.module or "")
            if module == PACKAGE:  # `from shadowpeft import files` names a module
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def level(module: str) -> int:
    """Height of a module (path below the package, parts joined by dots) in the order."""
    top = module.split(".")[0]
    if top in ORDER:
        return ORDER.index(top)
    return -1 if top in LOWEST else len(ORDER)


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports against the order of the folders, relative ones, and in core/ anything but torch.

    ``path`` is relative to the package, such as ``core/step.py``.
    """
    own = level(path.removesuffix(".py").replace("/", "."))
    allowed = SHAPES_MAY_IMPORT if path == SHAPES_FILE else set()
    complaints = []
    for line, module in imported(ast.parse(source)):
        top, _, rest = module.partition(".")
        if module.startswith("."):
            complaints.append(f"{path}:{line}: relative import {module}")
        elif top == PACKAGE:
            if level(rest or "__init__") > own:
                complaints.append(f"{path}:{line}: {module} is above {path}")
        elif path.startswith("core/") and top not in sys.stdlib_module_names | CORE_MAY_IMPORT | allowed:
            complaints.append(f"{path}:{line}: core imports torch alone, not {module}")
    return complaints


def root_of(node: ast.expr) -> tuple[str, str]:
    """("self", "x") for ``self.x``, ``self.x[0]`` and ``self.x.y``; empty strings for anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.value.id, node.attr
        node = node.value
    return "", ""


def changed_on_self(path: str, source: str) -> list[tuple[str, str, str]]:
    """(path, ``Class.method``, attribute) wherever a method other than ``__init__`` assigns to its object."""
    found = []
    for owner in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        methods = [node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
        found += [(path, f"{owner.name}.{m.name}", name) for m in methods for name in _assigned(m)]
    return found


def _assigned(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr"}:
            yield from [ast.unparse(node.args[1])] if ast.unparse(node.args[0]) == "self" else []
        flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        yield from (name for owner, name in map(root_of, flat) if owner == "self")


def broad_excepts(path: str, source: str) -> list[str]:
    """Handlers that catch everything and keep it."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
            continue  # tidies up and lets it go on
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(kind).split(".")[-1] if kind else "everything" for kind in caught}
        if names & {"everything", "Exception", "BaseException"}:
            complaints.append(f"{path}:{node.lineno}: catches {', '.join(sorted(names))}")
    return complaints


def pickling(path: str, source: str) -> list[str]:
    """Imports of pickle and its like, and torch's own readers and writers, which use it."""
    tree = ast.parse(source)
    modules = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    complaints = [f"{path}:{line}: {name}" for line, name in imported(tree) if name.split(".")[0] in modules]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in {"load", "save"}]
    return complaints + [f"{path}:{node.lineno}: {ast.unparse(node)}" for node in calls if root_of(node)[0] == "torch"]


def missing_all(path: str, source: str) -> list[str]:
    """Whether a package's ``__init__`` lacks ``__all__``, or imports a name that is not in it."""
    tree = ast.parse(source)
    lists = [
        node.value
        for node in tree.body
        if ast.unparse(node).startswith("__all__") and isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    if not lists:
        return [f"{path}: no __all__"]
    listed = set(ast.literal_eval(lists[0]))
    names = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    return [f"{path}: {name} is imported but not in __all__" for name in sorted(names - listed)]


def places(path: str, text: str) -> list[str]:
    """Absolute paths of somebody's machine."""
    return [f"{path}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if PLACES.search(line)]
