"""Write `src/tinsmith/wire/tinker_pb2.py(i)` from `tinker.proto`. With `--check`, only say whether they are current."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

WIRE = Path(__file__).resolve().parent.parent / "src" / "tinsmith" / "wire"
GENERATED = ("tinker_pb2.py", "tinker_pb2.pyi")


def main(argv: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"-I{WIRE}", f"--python_out={folder}", f"--pyi_out={folder}", str(WIRE / "tinker.proto")]
        if protoc.main(["protoc", *arguments]) != 0:
            return 1
        fresh = {name: (Path(folder) / name).read_text() for name in GENERATED}
    if "--check" in argv:
        stale = [name for name, text in fresh.items() if _body((WIRE / name).read_text()) != _body(text)]
        print(f"stale: {', '.join(stale)}; run scripts/build_proto.py" if stale else "tinker_pb2 is current")
        return 1 if stale else 0
    for name, text in fresh.items():
        (WIRE / name).write_text(text)
    return 0


def _body(text: str) -> list[str]:
    """Lines that depend on the schema; the generator's version appears in the others."""
    return [
        line for line in text.splitlines() if "_descriptor_pool.Default().AddSerializedFile" in line or ": " in line
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
