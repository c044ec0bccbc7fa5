"""Evaluates tests in a separate process, where proxies stand for the objects of the program under test.

A script that runs in a second sandbox: descriptor 3 leads to the program, 4 to the host, 5 holds the tests. The
program never sees a test or an expected value, only the calls of its functions; what it returns becomes plain data
before it is compared, and expected values use no name of the program. So it cannot pass without computing the answers.
"""

import ast
import builtins
import ctypes
import importlib
import json
import os
import re
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib costs start-up time)
import plain_values as values  # pyright: ignore[reportImplicitRelativeImport]

PR_SET_DUMPABLE = 4
MOST_ITEMS = 10_000
"""Most items that a test may read from an iterator of the program at once."""
ENDED = "the program ended before its tests"


class Ended(Exception):
    """The program has ended before its tests."""


class Raised(Exception):
    """The program raised an exception that is not built in."""


class NotPlain(BaseException):
    """A test depends on what an object of the program claims. No `except Exception` of a test catches this."""


class Link:
    """The connection to the program: one question, one answer.

    refused: why the current test cannot pass, whatever else it does. allowed: the non-finite numbers that it may get,
    since it names them.
    """

    def __init__(self):
        self.refused, self.allowed = None, ()
        self.reader = os.fdopen(os.dup(3), "rb")
        self.writer = os.fdopen(3, "wb")

    def ask(self, does, of=None, arguments=(), keywords=None):
        question = {
            "do": does,
            "of": of,
            "arguments": values.encode(list(arguments), self.number),
            "keywords": values.encode(keywords or {}, self.number),
        }
        try:
            values.write(self.writer, question)
            reply = values.read(self.reader)
        except OSError:
            reply = None
        if reply is None:
            self.refused = self.refused or ENDED
            raise Ended
        if "value" in reply:
            value = values.decode(reply["value"], lambda number: Remote(self, number))
            for odd in set(not_finite(value)).difference(self.allowed):
                self.refused = self.refused or f"the program returned {odd}, which the test does not name"
            return value
        raise self.exception(reply)

    def refuse(self, reason):
        self.refused = self.refused or reason
        raise NotPlain(reason)

    def exception(self, reply):
        """The program's exception as the first built-in class among its bases."""
        message = str(reply.get("message"))
        for name in reply.get("raised", []):
            kind = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
                try:
                    error = kind(message)
                except TypeError:
                    break
                error.__dict__["line"] = reply.get("line")
                return error
        return Raised(f"{next(iter(reply.get('raised', [])), 'exception')}: {message}")

    @staticmethod
    def number(value):
        if type(value) is Remote:
            return object.__getattribute__(value, "_number")
        raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data can be passed")


def not_finite(value):
    """Names of the non-finite numbers in a plain value."""
    kind = type(value)
    if kind is float or kind is complex:
        text = repr(value)
        yield from (name for name in ("nan", "inf") if name in text)
    elif kind in (list, tuple, set, frozenset, dict):
        for item in value.items() if kind is dict else value:
            yield from not_finite(item)


_OPERATIONS = (
    "eq ne lt le gt ge hash bool contains str repr format abs neg pos invert int float complex index round trunc floor "
    "ceil"
).split() + [
    side + name
    for name in "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
    for side in ("", "r")
]


def _refusal(name):
    def refuse(self, *_):
        object.__getattribute__(self, "_link").refuse(
            f"{name} of an object of the program; only plain values are graded"
        )

    return refuse


class Remote:
    """A proxy for an object of the program: can be called, iterated, and asked for attributes, items and its length.

    Everything that would let the program decide a test (operators, truth, text, its class) is refused.
    """

    __class__ = property(_refusal("class"))  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, link, number):
        self._link, self._number = link, number

    def __call__(self, *arguments, **keywords):
        return self._link.ask("call", self._number, arguments, keywords)

    def __getattr__(self, name):
        if name == "__name__":
            return str(self._link.ask("attribute", self._number, [name]))
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("attribute", self._number, [name])

    def __iter__(self):
        items = self._link.ask("items", self._number, [MOST_ITEMS + 1])
        if len(items) > MOST_ITEMS:
            self._link.refuse(f"an iterator of more than {MOST_ITEMS:,} items; only next() reads from one")
        return iter(items)

    def __next__(self):
        return self._link.ask("next", self._number)

    def __len__(self):
        return self._link.ask("length", self._number)

    def __getitem__(self, key):
        return self._link.ask("item", self._number, [key])


for _name in _OPERATIONS:
    setattr(Remote, f"__{_name}__", _refusal(_name))


class Identities(ast.NodeTransformer):
    """Turns `a is b` into a call of our function, since a proxy is not None whatever it stands for."""

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Is | ast.IsNot):
            return node
        call = ast.Call(ast.Name("__nanochat_same__", ast.Load()), [node.left, node.comparators[0]], [])
        replacement = call if isinstance(node.ops[0], ast.Is) else ast.UnaryOp(ast.Not(), call)
        return ast.copy_location(replacement, node)


def main():
    # Where both share a process namespace, the program must not debug us or read /proc/PID/fd.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with os.fdopen(5, "rb") as file:
        tests = json.load(file)
    link = Link()
    report = os.fdopen(4, "wb")
    compiled = values.read(link.reader) or {}
    values.write(report, compiled)
    if not compiled.get("compiled"):
        return
    try:
        names = dict(link.ask("run"))
    except Exception as error:  # noqa: BLE001 (whatever a program raises is an outcome)
        values.write(report, {"run": False, "message": describe(error), "line": getattr(error, "line", None)})
        return
    values.write(report, {"run": True})
    try:
        graded = Tests(tests, names, link)
    except SyntaxError as error:  # in the support
        for case in tests["cases"]:
            values.write(report, {"passed": False, "message": f"{case['call']}: {describe(error)}"})
        return
    for case in tests["cases"]:
        passed, message = graded.judge(case)
        values.write(report, {"passed": passed, "message": message})


class Tests:
    """The tests of a program, and the names that they may use.

    given: the beginning of the program, which the model did not write. Its functions, constants and imports are
    evaluated here and not taken from the program, unless it defines classes, whose objects only the program knows.
    """

    def __init__(self, tests, names, link):
        self.link, self.names = link, names
        self.support_text, self.support = tests["support"], self._compiled(tests["support"], "exec")
        self.given = self._given(tests["given"])
        classes = any(isinstance(value, type) for value in self.given.values())
        self.trusted = {name: value for name, value in self.given.items() if not classes or not callable(value)}

    @staticmethod
    def _given(text):
        """The names that the source defines, except for the unfinished definition at its end."""
        try:
            tree = ast.parse(text)
            last = getattr(tree.body.pop(), "name", None) if tree.body else None
            names = {}
            exec(compile(tree, "given", "exec"), names)
        except Exception:  # noqa: BLE001 (the beginning of a program need not run by itself)
            return {}
        return {name: value for name, value in names.items() if name not in ("__builtins__", last)}

    def _compiled(self, text, mode):
        tree = Identities().visit(ast.parse(text.strip() if mode == "eval" else text, mode=mode))
        return compile(ast.fix_missing_locations(tree), "test", mode)

    def _same(self, one, other):
        if Remote in (type(one), type(other)) or one is Remote or other is Remote:
            self.link.refuse("identity of an object of the program; only plain values are graded")
        return one is other

    def _modules(self, call):
        """Standard-library modules whose attributes a test uses, whatever the program means by their names."""
        nodes = [*ast.walk(ast.parse(call.strip())), *ast.walk(ast.parse(self.support_text))]
        bases = {
            node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        return {name: importlib.import_module(name) for name in bases & sys.stdlib_module_names}

    def expected(self, text):
        """The value of an expression that cannot see the program."""
        namespace = {**self._modules(text), **self.given, "__nanochat_same__": self._same}
        try:
            exec(self.support, namespace)
        except Exception:  # noqa: BLE001 (a support that cannot do without the program defines nothing here)
            namespace = {**self._modules(text), **self.given}
        return eval(text.strip(), namespace)

    def actual(self, call):
        """The value of an expression that can use the names of the program."""
        namespace = {name: value for name, value in self.names.items() if not hidden(name, call)}
        namespace |= {**self._modules(call), **self.trusted, "__nanochat_same__": self._same}
        exec(self.support, namespace)
        return eval(self._compiled(call, "eval"), namespace)

    def judge(self, case):
        """Whether a test passes, and a message if it fails."""
        link, call = self.link, case["call"]
        text = f"{call} {case['expected']} {self.support_text}".lower()
        nan, infinite = re.search(r"\b(is)?nan\b", text), re.search(r"\b(is)?inf(inity|inite)?\b|\bisfinite\b", text)
        link.refused, link.allowed = None, ("nan", "inf") if nan else ("inf",) if infinite else ()
        try:
            expected = self.expected(case["expected"])
            actual = self.actual(call)
            if type(actual) is Remote:
                kind = link.ask("type", link.number(actual))
                return False, f"{call} is an object of type {kind}, expected {expected!r}"[:1000]
            passed = bool(actual == expected)
            if link.refused is None:
                return passed, "" if passed else f"{call} is {actual!r}, not {expected!r}"[:1000]
        except NotPlain:
            pass
        except Exception as error:  # noqa: BLE001 (a test that fails in any way has failed)
            return False, f"{call}: {describe(error)}"
        return False, f"{call}: {link.refused}"[:1000]


def hidden(name, call):
    """Whether a built-in hides the program's name: unless the test is one call of it, and always for a predicate."""
    if not hasattr(builtins, name):
        return False
    tree = ast.parse(call.strip(), mode="eval").body
    called = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else None
    return name != called or name in ("isinstance", "issubclass", "callable", "hasattr", "bool", "all", "any", "type")


def describe(error):
    if isinstance(error, Ended):
        return ENDED
    return f"{type(error).__name__}: {error}"[:500] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
