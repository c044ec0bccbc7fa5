"""Compiles a Python program and answers its grader's questions. A script that runs in the sandbox.

`-I -S -B program_host.py WHAT` with WHAT compile, execute (as `__main__`) or serve; the program is program.py beside
it, messages use descriptor 3. The report on compiling is sent before the program runs; of later messages only values
count, since the program can change everything in this process.
"""

import os
import sys
import traceback
import warnings
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib costs start-up time)
import plain_values as values  # pyright: ignore[reportImplicitRelativeImport]

NAME = "program.py"


def main(what):
    reader, writer = os.fdopen(os.dup(3), "rb"), os.fdopen(3, "wb")
    code = load(writer)
    if code is None or what == "compile":
        return
    if what == "serve":
        serve(code, reader, writer)
        return
    reader.close()
    writer.close()
    exec(code, {"__name__": "__main__", "__builtins__": __builtins__})


def load(channel):
    """Compile the program and report {"compiled", "diagnostics"}. Returns the code, or None."""
    code = None
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), NAME), "rb") as file:  # noqa: PTH100, PTH118, PTH120, PTH123
            source = file.read()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code = compile(source, NAME, "exec", dont_inherit=True)
        diagnostics = [["warning", str(item.message), item.lineno] for item in caught]
    except SyntaxError as error:
        diagnostics = [["error", error.msg, error.lineno]]
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        diagnostics = [["error", str(error) or type(error).__name__, None]]
    values.write(channel, {"compiled": code is not None, "diagnostics": diagnostics})
    return code


def serve(code, channel_in, channel_out):
    """Run the program as the module `program`, then answer questions until the grader closes the channel."""
    objects = []
    namespace = {"__name__": "program", "__builtins__": __builtins__}

    def refer(value):
        objects.append(value)
        return len(objects) - 1

    def answer(question):
        of, does = question["of"], question["do"]
        target: Any = namespace if of is None else objects[of]
        arguments = values.decode(question["arguments"], lambda number: objects[number])
        if does == "run":
            exec(code, namespace)
            names = [name for name in namespace if type(name) is str and not name.startswith("__")]
            return ["list", [["tuple", [name, values.encode(namespace[name], refer)]] for name in names]]
        if does == "call":
            keywords = values.decode(question["keywords"], lambda number: objects[number])
            return values.encode(target(*arguments, **keywords), refer)
        if does == "type":
            return type(target).__name__
        operations = {
            "attribute": getattr,
            "next": next,
            "items": lambda a, most: [item for item, _ in zip(a, range(most), strict=False)],
            "length": len,
            "item": lambda a, b: a[b],
        }
        return values.encode(operations[does](target, *arguments), refer)

    while (question := values.read(channel_in)) is not None:
        try:
            reply = {"value": answer(question)}
        except Exception as error:  # noqa: BLE001 (whatever a program raises is an answer)
            kinds = [kind.__name__ for kind in type(error).__mro__]
            last = traceback.extract_tb(error.__traceback__)[-1:]
            line = next((frame.lineno for frame in last if frame.filename == NAME), None)
            reply = {"raised": kinds, "message": str(error)[:1000], "line": line}
        sys.stdout.flush()
        values.write(channel_out, reply)


if __name__ == "__main__":
    main(sys.argv[1])
