"""Modules of a package merged into the text of one that needs no other, their code and comments as they stand.

Imports between the modules go, imports from elsewhere are gathered at the top. Where two modules bind one name the last
keeps it, and in the earlier ones it is renamed after its module: `coefficients` of `ops.few` becomes
`few_coefficients`. A module that is used as an object (`from . import few`) becomes a namespace of its functions.

What cannot be merged without a guess raises `CannotMerge`: a module that is not in the list, a local variable that
hides a name which is to be renamed, one name for two things.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_WIDTH = 120
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, *_COMPREHENSIONS)


class CannotMerge(ValueError):
    """The modules hold something that merging has no rule for."""


@dataclass
class _Module:
    """One module: where its statements stand, what it binds, and what it takes from elsewhere."""

    name: str  # relative to the package: "ops.few"
    source: str
    cuts: list[ast.stmt] = field(default_factory=list)
    # local name -> (module, name there), or (module, None) for a module itself
    taken: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)
        self.lines = self.source.splitlines()

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def bound(self) -> dict[str, ast.stmt]:
        """Top-level names and the statements that bind them."""
        return {name: node for node in self.tree.body for name in _names_bound_by(node)}

    def locate(self, node: ast.Import | ast.ImportFrom) -> str | None:
        """What `node` imports from, relative to the package; None if it is outside of it."""
        if isinstance(node, ast.Import) or not node.level:
            return None
        package = self.name.split(".")[: -node.level]
        return ".".join([*package, *(node.module.split(".") if node.module else [])])


class _Edit(NamedTuple):
    """Bytes of a line that become others. Rows count from 1, columns from 0, as in a tree."""

    row: int
    start: int
    stop: int
    new: str

    @classmethod
    def at(cls, node: ast.expr, new: str) -> _Edit:
        return cls(node.lineno, node.col_offset, node.end_col_offset or 0, new)


def merge(
    sources: Mapping[str, str],
    packages: Mapping[str, str],
    *,
    substitutes: Mapping[str, str],
    only: Mapping[str, tuple[str, ...]],
    without: tuple[str, ...],
) -> str:
    """The modules as one, in the order given, which must be that of their imports.

    Args:
        sources: text by name, relative to the package ("ops.few").
        packages: text of `__init__` by name ("ops"), through which modules import from others.
        substitutes: modules that are imported and do not come along, and those in `sources` that take their place.
        only: top-level names that are wanted of a module; of the others all are.
        without: values of names, such as "triton": a statement `if name == value` is left out, with what it imports.
    Raises:
        CannotMerge: there is no rule for something; the message says what, and where.
    """
    modules = {name: _Module(name, text) for name, text in sources.items()}
    for module in modules.values():
        _find_cuts(module, without)
        _find_imports(module, modules, packages, substitutes)
        if module.name in only:
            wanted = only[module.name]
            module.cuts += [node for name, node in module.bound.items() if name not in wanted]
    final = _final_names(modules)
    objects = {name for module in modules.values() for name in _used_as_objects(module)}
    doubled = sorted({modules[name].stem for name in objects} & set(final.values()))
    if doubled:
        raise CannotMerge(f"names of modules that are used as objects, and of something else: {', '.join(doubled)}")
    head = f"from __future__ import annotations\n\n{_external_imports(modules, bool(objects))}\n\n"
    sections = []
    for module in modules.values():
        sections.append(f"{_banner(module)}\n\n\n{_rewrite(module, modules, final)}")
        if module.name in objects:
            sections.append(_namespace(module, final))
    return head + "\n\n\n".join(sections) + "\n"


def _find_cuts(module: _Module, without: tuple[str, ...]) -> None:
    first = module.tree.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        module.cuts.append(first)  # the docstring goes into the banner
    for node in ast.walk(module.tree):
        match node:
            case ast.If(test=ast.Compare(ops=[ast.Eq()], comparators=[ast.Constant(value=value)]), orelse=rest):
                if value in without:
                    if rest:
                        raise CannotMerge(f"{module.name}, line {node.lineno}: an `if` on {value!r} has an `else`")
                    module.cuts.append(node)


def _find_imports(
    module: _Module, modules: Mapping[str, _Module], packages: Mapping[str, str], substitutes: Mapping[str, str]
) -> None:
    left_out = {id(node) for cut in module.cuts for node in ast.walk(cut)}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) in left_out:
            continue
        target = module.locate(node)
        top_level = node in module.tree.body
        if target is None:
            if top_level:
                module.cuts.append(node)
                module.imports.append(node)
            continue
        if not top_level:
            raise CannotMerge(f"{module.name}, line {node.lineno}: an import of {target} that is not at the top")
        module.cuts.append(node)
        for alias in node.names:
            found = _follow(target, alias.name, modules, packages, substitutes)
            if found is None:
                raise CannotMerge(
                    f"{module.name}, line {node.lineno}: `{alias.name}` of {target} is in none of the listed modules"
                )
            module.taken[alias.asname or alias.name] = found


def _follow(
    target: str,
    name: str,
    modules: Mapping[str, _Module],
    packages: Mapping[str, str],
    substitutes: Mapping[str, str],
) -> tuple[str, str | None] | None:
    """Where `from target import name` leads to among the modules."""
    whole = f"{target}.{name}".lstrip(".")
    whole = substitutes.get(whole, whole)
    if whole in modules:
        return whole, None
    target = substitutes.get(target, target)
    if target in modules:
        return (target, name) if name in _kept(modules[target]) else None
    if target in packages:
        package = _Module(f"{target}.__init__", packages[target])
        for node in package.tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _follow(package.locate(node) or "", alias.name, modules, packages, substitutes)
    return None


def _final_names(modules: Mapping[str, _Module]) -> dict[tuple[str, str], str]:
    last = {name: module.name for module in modules.values() for name in _kept(module)}
    final = {}
    for module in modules.values():
        for name in _kept(module):
            private = "_" if name.startswith("_") else ""
            renamed = f"{private}{module.stem}_{name.strip('_')}"
            final[module.name, name] = name if last[name] == module.name else renamed
    doubled = sorted({name for name in final.values() if list(final.values()).count(name) > 1})
    if doubled:
        raise CannotMerge(f"renamed names collide: {', '.join(doubled)}")
    return final


def _kept(module: _Module) -> list[str]:
    return [name for name, node in module.bound.items() if node not in module.cuts]


def _rewrite(module: _Module, modules: Mapping[str, _Module], final: Mapping[tuple[str, str], str]) -> str:
    """The text of a module without its cuts, every name that is another in the merged text replaced."""
    new_names = {name: final[module.name, name] for name in _kept(module)}
    objects = {name: target for name, (target, part) in module.taken.items() if part is None}
    for name, (target, part) in module.taken.items():
        new_names[name] = modules[target].stem if part is None else final[target, part]
    changed = {name: new for name, new in new_names.items() if new != name}
    left_out = {id(node) for cut in module.cuts for node in ast.walk(cut)}
    edits: list[_Edit] = []
    for node in ast.walk(module.tree):
        if id(node) in left_out:
            continue
        match node:
            case ast.JoinedStr():
                # Python 3.11 does not say where the names in such a string stand
                _refuse(module, node, {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {*changed, *objects})
            case _ if isinstance(node, _SCOPES):
                _refuse(module, node, _hidden_by(node) & {*changed, *changed.values(), *objects})
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in objects:
                edits.append(_Edit.at(node, final[objects[name], attribute]))
            case ast.Name(id=name) if name in changed:
                edits.append(_Edit.at(node, changed[name]))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if node in module.tree.body and name in changed:
                start = node.col_offset + len("def " if isinstance(node, ast.FunctionDef) else "class ")
                edits.append(_Edit(node.lineno, start, start + len(name.encode()), changed[name]))
    return _apply(module, edits)


def _used_as_objects(module: _Module) -> set[str]:
    """Modules that `module` does more with than to name something of theirs."""
    named = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    taken = {name: target for name, (target, part) in module.taken.items() if part is None}
    names = [node for node in ast.walk(module.tree) if isinstance(node, ast.Name) and id(node) not in named]
    return {taken[node.id] for node in names if node.id in taken}


def _apply(module: _Module, edits: list[_Edit]) -> str:
    lines = [line.encode() for line in module.lines]
    for edit in sorted(edits, reverse=True):
        line = lines[edit.row - 1]
        lines[edit.row - 1] = line[: edit.start] + edit.new.encode() + line[edit.stop :]
    kept: list[str | None] = [line.decode() for line in lines]
    for cut in module.cuts:
        first = min([cut.lineno, *(d.lineno for d in getattr(cut, "decorator_list", []))])
        kept[first - 1 : cut.end_lineno] = [None] * ((cut.end_lineno or first) - first + 1)
    text = "\n".join(line for line in kept if line is not None).strip("\n")
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text


def _hidden_by(scope: ast.AST) -> set[str]:
    """Names that a function, a class or a comprehension binds in a scope of its own, nested ones included."""
    found = set()
    for node in ast.walk(scope):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if node is not scope:
                found.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)) | ast.alias(name=name, asname=None):
                found.add(name)
    return found


def _refuse(module: _Module, node: ast.AST, names: set[str]) -> None:
    if names:
        where = f"{module.name}, line {node.lineno}"  # type: ignore[attr-defined]
        raise CannotMerge(f"{where}: {', '.join(sorted(names))} cannot be renamed there; name the variable otherwise")


def _names_bound_by(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def _namespace(module: _Module, final: Mapping[tuple[str, str], str]) -> str:
    entries = [
        f"    {name}={final[module.name, name]},\n"
        for name in _kept(module)
        if not name.startswith("_") and name.islower()
    ]
    return f"{module.stem} = SimpleNamespace(\n{''.join(entries)})"


def _banner(module: _Module) -> str:
    title = f"# ---- {module.name.replace('.', '/')}.py "
    words = (ast.get_docstring(module.tree) or "").splitlines()
    return "\n".join([title + "-" * (_WIDTH - len(title) - 1), *(f"# {line}".rstrip() for line in words)])


def _external_imports(modules: Mapping[str, _Module], with_namespaces: bool) -> str:
    """All imports from outside the package: the standard library's, then others', each as ruff would sort them."""
    plain: set[str] = set()
    members: dict[str, set[str]] = {"types": {"SimpleNamespace"}} if with_namespaces else {}
    meaning: dict[str, str] = {}
    for module in modules.values():
        for node in module.imports:
            where = "" if isinstance(node, ast.Import) else str(node.module)
            if where == "__future__":
                continue
            for alias in node.names:
                text = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                local = alias.asname or alias.name
                if meaning.setdefault(local, f"{where}:{text}") != f"{where}:{text}" or local in module.bound:
                    raise CannotMerge(f"{module.name}, line {node.lineno}: `{local}` is something else elsewhere")
                (members.setdefault(where, set()) if where else plain).add(text)
    taken = {name for module in modules.values() for name in _kept(module)} & meaning.keys()
    if taken:
        raise CannotMerge(f"imported under a name that a module binds: {', '.join(sorted(taken))}")
    sections = []
    for standard in (True, False):
        lines = [f"import {name}" for name in sorted(plain) if _is_standard(name) == standard]
        lines += [_from(where, members[where]) for where in sorted(members) if _is_standard(where) == standard]
        sections.append("\n".join(lines))
    return "\n\n".join(section for section in sections if section)


def _from(where: str, names: set[str]) -> str:
    ordered = sorted(names, key=lambda name: (0 if name.isupper() else 1 if name.lstrip("_")[0].isupper() else 2, name))
    renamed = [f"from {where} import {name}" for name in ordered if " as " in name]
    ordered = [name for name in ordered if " as " not in name]
    line = f"from {where} import {', '.join(ordered)}"
    if len(line) > _WIDTH:
        line = f"from {where} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"
    return "\n".join([line] * bool(ordered) + renamed)


def _is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names
