"""`python ledger_writer.py FILE COUNT`: writes entries one after another and says which are on disk; 3 if the disk
failed for good, 4 if the last entries were refused."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tinsmith.control import ledger as module
from tinsmith.control.ledger import Entry, Ledger, put
from tinsmith.types.errors import StorageError

module._PREALLOCATED_BYTES = 4096
module._TIDY_BYTES = 200_000  # so that the log is moved into the database a few times


async def main(path: Path, count: int) -> int:
    ledger = Ledger(path)
    ledger.open()
    ledger.start(asyncio.get_running_loop())
    print("open", flush=True)
    is_refused = False
    for number in range(count):
        try:
            await ledger.write([put(Entry(kind="k", name=str(number), value=b"x" * 5_000))])
        except StorageError as error:
            is_refused = True
            print(f"refused {number}: {error}", flush=True)
            if ledger.fatal is not None:
                return 3
        else:
            is_refused = False
            print(f"told {number}", flush=True)
    ledger.close()
    return 4 if is_refused else 0


try:
    sys.exit(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]))))
except StorageError as failure:
    sys.exit(f"cannot begin: {failure}")
