"""Runs a notebook as Jupyter does: cell by cell, in one namespace, where an event loop already runs.

`python -m tests.notebook FILE` prints as JSON what each cell of code says and gives; with `--write` it is put
into the file.
"""

import argparse
import ast
import asyncio
import inspect
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def code_cells(path: Path) -> list[Cell]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


async def run(cells: list[Cell]) -> list[list[Cell]]:
    """The outputs of each cell, as a notebook has them."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [await _outputs(cell, number, namespace) for number, cell in enumerate(cells, 1)]


async def _outputs(cell: Cell, number: int, namespace: dict[str, Any]) -> list[Cell]:
    body = ast.parse("".join(cell["source"])).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    said = io.StringIO()
    with redirect_stdout(said):
        await _evaluated(ast.Module(body, []), "exec", namespace)
        value = await _evaluated(ast.Expression(last.value), "eval", namespace) if last is not None else None
    outputs: list[Cell] = []
    if said.getvalue():
        text = said.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        outputs.append(
            {
                "data": {"text/plain": repr(value).splitlines(keepends=True)},
                "execution_count": number,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


async def _evaluated(tree: Any, mode: str, namespace: dict[str, Any]) -> Any:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    result = eval(compile(tree, "a cell", mode, flags=flags), namespace)
    return await result if inspect.isawaitable(result) else result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    outputs = asyncio.run(run(code_cells(args.file)))
    if not args.write:
        print(json.dumps(outputs))
        return
    notebook = json.loads(args.file.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, said) in enumerate(zip(cells, outputs, strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, said
    args.file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
