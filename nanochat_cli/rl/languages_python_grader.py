"""Evaluates tests in a process of its own, and calls the program under test as if it were here.

A script that runs in a second sandbox: descriptor 3 leads to the program, 4 to the host, 5 holds the tests. The
program never sees a test or an expected value, only the calls of its functions; what it returns becomes plain data
before it is compared. So it cannot pass without computing the answers.
"""

import ast
import builtins
import ctypes
import json
import os
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib costs start-up time)
import languages_python_values as values  # pyright: ignore[reportImplicitRelativeImport]

PR_SET_DUMPABLE = 4


class Ended(Exception):
    """The program has ended before its tests."""


class Raised(Exception):
    """The program raised something that is no built-in exception."""


class Link:
    """The way to the program: one question, one answer."""

    def __init__(self):
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
            raise Ended
        if "value" in reply:
            return values.decode(reply["value"], lambda number: Remote(self, number))
        raise self.exception(reply)

    def exception(self, reply):
        """The first built-in class that the program's exception has."""
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
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_number")
        raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data can be passed")


class Remote:
    """An object of the program. Equal to itself only."""

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
        iterator = self._link.ask("iterate", self._number)
        while True:
            try:
                yield self._link.ask("next", iterator._number)
            except StopIteration:
                return

    def __next__(self):
        return self._link.ask("next", self._number)

    def __len__(self):
        return self._link.ask("length", self._number)

    def __getitem__(self, key):
        return self._link.ask("item", self._number, [key])

    def __repr__(self):
        return f"an object of type {self._link.ask('type', self._number)}"


def main():
    ctypes.CDLL(None).prctl(
        PR_SET_DUMPABLE, 0, 0, 0, 0
    )  # where both share a process space: no debugger, no /proc/PID/fd
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
    for case in tests["cases"]:
        passed, message = judge(case, tests["support"], names)
        values.write(report, {"passed": passed, "message": message})


def judge(case, support, names):
    """Whether a test passes, and what to say when it does not."""
    try:
        namespace = {name: value for name, value in names.items() if not hidden(name, case["call"])}
        exec(support, namespace)
        expected = eval(case["expected"], namespace)
        found = eval(case["call"], namespace)
        if type(found) is Remote:
            return False, f"{case['call']} is {found!r}, expected {expected!r}"
        passed = bool(found == expected)
        return passed, "" if passed else f"{case['call']} is {found!r}, not {expected!r}"[:1000]
    except Exception as error:  # noqa: BLE001 (a test that fails in any way has failed)
        return False, f"{case['call']}: {describe(error)}"


def hidden(name, call):
    """A program's name hides a built-in one only where the test is a call of just that, and no yes-or-no question."""
    if not hasattr(builtins, name):
        return False
    tree = ast.parse(call.strip(), mode="eval").body
    called = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else None
    return name != called or name in ("isinstance", "issubclass", "callable", "hasattr", "bool", "all", "any", "type")


def describe(error):
    if isinstance(error, Ended):
        return "the program ended before its tests"
    return f"{type(error).__name__}: {error}"[:500] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
