"""Writes test/golden/data/*.parquet: rows as pyarrow writes them, one file per compression.

    python scripts/golden/parquet.py
"""

from pathlib import Path

import pyarrow
import pyarrow.parquet

OUT = Path(__file__).resolve().parents[2] / "test" / "golden" / "data"

MESSAGES = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é 🙂"}],
    [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x":1}'}}]},
    ],
    [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
]
IDS = [[1, 2, 3], [4], [5, 6]]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    messages = pyarrow.table({"messages": MESSAGES, "id": pyarrow.array([1, 2, 3], pyarrow.int64())})
    pyarrow.parquet.write_table(messages, OUT / "messages.parquet", compression="snappy", row_group_size=2)
    for name, compression in [("zstd", "zstd"), ("gzip", "gzip"), ("plain", "none")]:
        labels = [[-100, *ids[1:]] for ids in IDS]
        table = pyarrow.table({"input_ids": pyarrow.array(IDS, pyarrow.list_(pyarrow.int32())), "labels": labels})
        pyarrow.parquet.write_table(table, OUT / f"{name}.parquet", compression=compression)
    for path in sorted(OUT.glob("*.parquet")):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
