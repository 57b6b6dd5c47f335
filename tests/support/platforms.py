"""Where the tests ran: the scripts that run them record it in tests/platforms.json, and README has it as a table.

python tests/support/platforms.py record SCRIPT [emulated]     # SCRIPT has passed, with this Python and torch
python tests/support/platforms.py record-cpp SCRIPT PLATFORM   # SCRIPT has passed, without Python
python tests/support/platforms.py table                        # README's table
"""

import datetime
import json
import platform
import re
import sys
import sysconfig
from pathlib import Path

RECORDS = Path(__file__).parents[1] / "platforms.json"

Record = dict[str, str]

KERNELS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2", "neon": "NEON"}


def read() -> list[Record]:
    records: list[Record] = json.loads(RECORDS.read_text())
    return records


def this_platform() -> str:
    from onepass import _core

    kernels = [KERNELS[name] for name, supported in _core.isas().items() if supported and name in KERNELS]
    return f"{platform.system()}, {platform.machine().replace('_', '-')}, with {', '.join(kernels)}"


def of_this_python(script: str, *more: str) -> Record:
    import torch

    free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return {
        "platform": ", ".join([this_platform(), *more]),
        "script": script,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}{free_threaded}",
        "torch": torch.__version__.partition("+")[0],
    }


def record(new: Record) -> None:
    """Adds a record, in place of that of the same script, platform and Python (and torch, for tests/versions)."""
    same = ("script", "platform", "python", *(("torch",) if new["script"] == "tests/versions" else ()))
    others = [old for old in read() if any(old[key] != new[key] for key in same)]
    write([*others, {**new, "date": datetime.date.today().isoformat()}])
    print(f"README has this table:\n{table(read())}")


def write(records: list[Record]) -> None:
    lines = ",\n".join(f"  {json.dumps(each)}" for each in sorted(records, key=_order))
    RECORDS.write_text(f"[\n{lines}\n]\n")


def _order(each: Record) -> tuple[object, ...]:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    where, python = each["platform"], each["python"]
    by_kind = where.startswith("CUDA"), "emulated" in where
    return *by_kind, where, each["script"], numbers(python), numbers(each["torch"]), python


def table(records: list[Record]) -> str:
    """A row for each platform, with the scripts, and the versions of Python and torch that each ran with."""
    rows: dict[str, dict[str, list[str]]] = {}
    for each in records:
        versions = rows.setdefault(each["platform"], {}).setdefault(each["script"], [])
        if each["python"]:
            versions.append(f"torch {each['torch']} on Python {each['python']}")
    lines = ["| platform | tested by |", "| --- | --- |"]
    for where, scripts in rows.items():
        cells = [f"`{script}`" + (f" ({', '.join(found)})" if found else "") for script, found in scripts.items()]
        lines.append(f"| {where} | {'; '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", script, *more]:
            record(of_this_python(script, *more))
        case ["record-cpp", script, where]:
            record({"platform": where, "script": script, "python": "", "torch": ""})
        case ["table"]:
            print(table(read()))
        case _:
            sys.exit(__doc__)
