"""The source texts of a study, and which of their definitions a class or a function reaches.

The study file and the helper modules beside it travel as text. A definition is what a module binds to a name: a class, a
function, a constant, an import. Definitions are compared as syntax trees: comments, layout and docstrings do not count.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import importlib.machinery
import json
import os
import symtable
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from softseg_dist.errors import UserError

PACKAGE = "softseg_dist"
AT_IMPORT = "at import"  # the name for statements that change other modules, such as torch.manual_seed(0)
LONGEST_NAME = 250  # of a module that may be a file
BY_NAME = {"eval", "exec", "globals", "vars"}  # a function that calls one may reach its whole module
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Chain = tuple[str, ...]  # a dotted name: ("lab", "losses", "scale")
Key = tuple[str, str]  # a definition: its file, and its name there


@dataclass(frozen=True)
class Sources:
    """The study file and its helper modules: texts by path relative to the study's folder ("losses.py", "lab/__init__.py").

    `study` names the study file among them; it is "" for a study that was built in Python and not in a file.
    """

    study: str
    texts: Mapping[str, str]

    def __hash__(self) -> int:
        return hash((self.study, *sorted(self.texts.items())))

    @classmethod
    def beside(cls, path: Path, root: Path | None = None) -> Sources:
        """Read the file `path`, and all modules and packages in `root` (its own folder) that it imports, directly or not.

        With a `root` the file is a helper. Raises UserError if a file cannot be read, or a helper has an installed module's name.
        """
        folder = (root or path.parent).resolve()
        name = path.name if root is None else path.resolve().relative_to(folder).as_posix()
        texts: dict[str, str] = {}
        waiting = [name]
        while waiting:
            file = waiting.pop()
            if file not in texts:
                bare = not (folder / file).exists()  # a package whose folder has no __init__.py
                try:
                    texts[file] = "" if bare else (folder / file).read_text(encoding="utf-8-sig")
                except (UnicodeDecodeError, OSError) as error:
                    raise UserError(f"{folder / file}: cannot be read as a Python file: {error}") from None
                waiting += _imported_files(folder, file, texts[file])
        if root is None and (clash := [file for file in texts if file != name and module_name(file) == path.stem]):
            raise UserError(f"{path} and {clash[0]} beside it have one name, and one imports the other; rename one of them")
        return cls(name if root is None else "", texts)

    @property
    def modules(self) -> dict[str, str]:
        """Files by the names of their modules, "lab.losses" -> "lab/losses.py"; that of the study file is its stem."""
        return {Path(file).stem if file == self.study else module_name(file): file for file in self.texts}

    @property
    def digest(self) -> str:
        """The SHA-256 of all texts and their names."""
        return hashlib.sha256(json.dumps([self.study, *sorted(self.texts.items())]).encode()).hexdigest()

    def record_as_run(self) -> None:
        """Add them to what this user has run on this machine; where that cannot be kept, `check_trusted` asks."""
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
            if self.digest not in _digests_run():
                _runs_file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with open(_runs_file(), "a", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(f"{self.digest}\n")

    def check_trusted(self, where: str | Path, doing: str) -> None:
        """Raise UserError if they come from `where` and this user has not run them on this machine: `doing` executes them."""
        if self.texts and self.digest not in _digests_run():
            code = f"{doing} executes its code ({', '.join(self.texts)}), which you have not run on this machine"
            raise UserError(f"{where}: {code}; if you trust its origin, give --trust (in Python: trust=True)")

    def reached(self, module: str, name: str) -> dict[Key, Definition]:
        """The definition `name` of a module, and all that it reaches through the names that it uses; keys are (file, name).

        Statements of any module that change other modules at import, such as torch.manual_seed(0), are always among them.
        """
        modules = self.modules
        waiting = [(other, AT_IMPORT) for other in modules if AT_IMPORT in self._definitions(other).definitions]
        waiting += list(self._resolve(module, (name.partition(".")[0],))) or list(self._resolve_in(module, (), frozenset()))
        found: dict[Key, Definition] = {}
        while waiting:
            module, name = waiting.pop()
            if (modules[module], name) not in found:
                definition = found[modules[module], name] = self._definitions(module).definitions[name]
                for chain in definition.uses:
                    waiting += self._resolve(module, chain)
        return found

    def _definitions(self, module: str) -> _Module:
        file = self.modules[module]
        return _parsed(self.texts[file], file)

    def _resolve_in(self, module: str, chain: Chain, seen: frozenset[tuple[str, Chain]]) -> Iterator[Key]:
        """The definitions that a dotted name refers to in a module; all of them for an empty name."""
        if module not in self.modules or (module, chain) in seen:
            return
        if not chain:
            yield from ((module, name) for name in self._definitions(module).definitions)
        elif f"{module}.{chain[0]}" in self.modules:
            yield from self._resolve_in(f"{module}.{chain[0]}", chain[1:], seen | {(module, chain)})
        else:
            yield from self._resolve(module, chain, seen | {(module, chain)})

    def _resolve(self, module: str, chain: Chain, seen: frozenset[tuple[str, Chain]] = frozenset()) -> Iterator[Key]:
        """The definitions that a dotted name in the text of a module refers to."""
        here, (head, *rest) = self._definitions(module), chain
        if head in here.definitions:
            yield module, head
        for target, name in here.imports.get(head, ()):
            yield from self._resolve_in(target, (*filter(None, [name]), *rest), seen)
        if head not in here.definitions and head not in here.imports:
            if head in BY_NAME:
                yield from self._resolve_in(module, (), seen)
            if not hasattr(builtins, head):
                for star in here.stars:
                    yield from self._resolve_in(star, chain, seen)


def _runs_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "softseg" / "sources_run"


def _digests_run() -> set[str]:
    with suppress(OSError, RuntimeError):
        return set(_runs_file().read_text(encoding="ascii", errors="replace").split())
    return set()


class Definition(NamedTuple):
    """All statements of a module that bind a name or change what it is bound to: their text, made from the syntax tree.

    `line` is that of the first one, `uses` has the dotted names in them.
    """

    line: int
    text: str
    uses: frozenset[Chain]


class _Module(NamedTuple):
    definitions: dict[str, Definition]
    imports: dict[str, list[tuple[str, str]]]  # local name -> (module, name in it; "" for the module itself)
    stars: tuple[str, ...]  # modules of `from ... import *`


def code_changes(old: Sources, new: Sources, module: str, name: str) -> list[str]:
    """One line for each reached definition that differs: file, line in the new file, name, old and new line of code."""
    before, after = old.reached(module, name), new.reached(module, name)
    changed = [key for key in sorted(before.keys() & after.keys()) if before[key].text != after[key].text]
    found = []
    for file, what in changed or sorted(before.keys() ^ after.keys()):
        was, now = before.get((file, what)), after.get((file, what))
        old_lines, new_lines = (definition.text.splitlines() if definition else [] for definition in (was, now))
        steps = difflib.SequenceMatcher(None, old_lines, new_lines, autojunk=False).get_opcodes()
        i, j, k, m = next((ends for kind, *ends in steps if kind != "equal"), (0, 0, 0, 0))
        old_line, new_line = (part[0].strip() if part else "none" for part in (old_lines[i:j], new_lines[k:m]))
        place = f"{file}, line {_line_of(new.texts[file], now, new_line)}" if now else file
        found.append(f"{place}, {what}: {old_line} -> {new_line}")
    return found


def _line_of(text: str, definition: Definition, line: str) -> int:
    """The number, in the text, of a line that was printed from the syntax tree: that of the first statement that prints so."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.lineno >= definition.line and line in ast.unparse(node).splitlines()[:1]:
            return node.lineno
    return definition.line


UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: nested too deeply


def module_name(file: str) -> str:
    """The name under which a helper module is imported.

    >>> module_name("lab/losses.py"), module_name("lab/__init__.py")
    ('lab.losses', 'lab')
    """
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported_files(folder: Path, file: str, text: str) -> Iterator[str]:
    """The files of `folder` that the text of one of them imports, anywhere in it."""
    try:
        tree = ast.parse(text)
    except UNPARSED:
        return  # the import reports it with its line
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{_absolute(node, file)}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                if (found := _file_beside(folder, parts[:count])) is None:
                    break
                other = _installed(folder, parts[0]) if count == 1 else None
                if other is not None and Path(other).resolve() != (folder / found).resolve():
                    both = f"{found} beside the study and an installed module ({other}); rename the file beside the study"
                    raise UserError(f"{folder / file} imports {parts[0]!r}, which is {both}")
                yield found


def _file_beside(folder: Path, parts: list[str]) -> str | None:
    place = "/".join(parts)
    if parts[0] in ("", PACKAGE) or max(map(len, parts)) > LONGEST_NAME:
        return None
    if (folder / place / "__init__.py").is_file():
        return f"{place}/__init__.py"
    if (folder / f"{place}.py").is_file():
        return f"{place}.py"
    bare = (folder / place).is_dir() and (len(parts) > 1 or _installed(folder, parts[0]) is None)
    return f"{place}/__init__.py" if bare else None


def _installed(folder: Path, name: str) -> str | None:
    """Where a module comes from that is found elsewhere than in `folder`; None if there is none."""
    if name in sys.stdlib_module_names:
        return "Python's own"
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != folder]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    return None if spec is None or spec.loader is None or not spec.has_location else spec.origin


def _absolute(node: ast.ImportFrom, file: str) -> str:
    """The module that `from ... import` names, in a file of that path."""
    if not node.level:
        return node.module or ""
    return ".".join([*file.split("/")[: -node.level], *filter(None, [node.module])])


@lru_cache(maxsize=256)
def _parsed(text: str, file: str) -> _Module:
    try:
        tree = ast.parse(text)
    except UNPARSED:  # in a helper whose import may fail
        return _Module({}, {}, ())
    statements = defaultdict[str, list[ast.stmt]](list)
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    for statement in kept:
        for name, part in _bound(statement):
            statements[name].append(part)
    own = {name for name, parts in statements.items() if not isinstance(parts[0], ast.Import | ast.ImportFrom)}
    for statement in kept:  # one that changes a definition belongs to it; one that changes another module counts for all
        if (touched := _touched(statement)) is not None:
            for name in touched & own or {AT_IMPORT}:
                statements[name].append(statement)
    imports = defaultdict[str, list[tuple[str, str]]](list)
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(node, ast.ImportFrom):
                target = _absolute(node, file), alias.name
            else:
                target = alias.name if alias.asname else _local_name(alias), ""
            imports[_local_name(alias)].append(target)
    stars = tuple(module for module, _ in imports.pop("*", []))
    return _Module({name: _definition(parts) for name, parts in statements.items()}, imports, stars)


def _definition(parts: list[ast.stmt]) -> Definition:
    uses = frozenset(chain for part in parts for chain in _uses(part))
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, _NAMED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return Definition(parts[0].lineno, "\n".join(map(ast.unparse, parts)), uses)


def _bound(statement: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a statement binds, each with the statement that counts for it; public names of this package never differ."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            bound = alias if alias.asname else ast.alias(_local_name(alias))
            yield _local_name(alias), ast.copy_location(ast.Import([bound]), statement)
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            if statement.module != "__future__" and (statement.module != PACKAGE or alias.asname):
                one = ast.ImportFrom(statement.module, [alias], statement.level)
                yield AT_IMPORT if alias.name == "*" else _local_name(alias), ast.copy_location(one, statement)
    else:
        for symbol, scope in _symbols(statement):
            if (symbol.is_assigned() or symbol.is_imported()) and (scope == "module" or symbol.is_declared_global()):
                yield symbol.get_name(), statement


def _local_name(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _touched(statement: ast.stmt) -> set[str] | None:
    """The names whose objects a statement may change, as `TABLE.append(1)` does; None if it changes no object."""
    if isinstance(statement, _NAMED):
        return None
    found: list[ast.AST] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            found.append(node)
        elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.append(ast.Expr(node.value))
    return {chain[0] for node in found for chain in _uses(node)} if found else None


def _uses(statement: ast.AST) -> set[Chain]:
    """The dotted names in a statement whose first part is not local to a function in it."""
    shared = {
        symbol.get_name()
        for symbol, scope in _symbols(statement)
        if scope == "module" or symbol.is_global() or (scope == "class" and symbol.is_referenced())
    }
    inner = {id(node.value) for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
    chains = {_chain(node) for node in ast.walk(statement) if id(node) not in inner}
    return {chain for chain in chains if chain and chain[0] in shared}


def _chain(node: ast.AST) -> Chain:
    """`lab.losses.scale` as its parts; () for what is no dotted name."""
    if isinstance(node, ast.Attribute):
        return (*before, node.attr) if (before := _chain(node.value)) else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def _symbols(statement: ast.AST) -> Iterator[tuple[symtable.Symbol, str]]:
    """The names in a statement of a module and in all scopes inside it, with the kind of the scope."""
    waiting = [symtable.symtable(ast.unparse(statement), "", "exec")]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        yield from ((symbol, str(table.get_type())) for symbol in table.get_symbols())
