"""How metrics of several requests become one, and how datums are spread over requests."""

from __future__ import annotations

import numpy as np
import pytest

from tinsmith.types import Datum, ImageChunk, ModelInput
from tinsmith.wire.chunking import chunk_datums, estimated_bytes
from tinsmith.wire.compression import compress, decompress
from tinsmith.wire.metrics import merge_metrics
from tinsmith.wire.tinker_proto import WireError


@pytest.mark.parametrize(
    ("key", "values", "weights", "expected"),
    [
        ("loss:sum", [1.0, 2.5], [1, 3], 3.5),
        ("x:min", [1.0, -2.5], [1, 3], -2.5),
        ("x:max", [1.0, 2.5], [1, 3], 2.5),
        ("x:mean", [1.0, 2.0], [1, 3], 1.75),
        ("x:mean", [1.0, 2.0], [0, 0], 1.5),
        ("x:slack", [1.0, 2.0], [1, 3], 0.25),
        ("x:hash2", [2.0**63, 2.0**63 + 4096], [1, 1], 4096.0),
    ],
)
def test_each_reduction(key: str, values: list[float], weights: list[int], expected: float) -> None:
    assert merge_metrics([{key: value} for value in values], weights) == {key: pytest.approx(expected)}


def test_distinct_values_of_unique_and_unknown_reductions_are_all_kept() -> None:
    for key in ("clock:unique", "odd", "a:b:c", "x:median"):
        assert merge_metrics([{key: 1.0}, {key: 2.0}, {key: 1.0}], [1, 1, 1]) == {key: 1.0, f"{key}_1": 2.0}


def test_a_key_missing_in_some_chunks_is_not_lost() -> None:
    assert merge_metrics([{"a:sum": 1.0}, {"a:sum": 2.0, "b:mean": 4.0}], [1, 1]) == {"a:sum": 3.0, "b:mean": 4.0}


def datum(num_tokens: int, num_weights: int = 0) -> Datum:
    return Datum(ModelInput.from_ints(range(num_tokens)), {"weights": np.zeros(num_weights, np.float32)})


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (1024, [1024]), (1025, [1024, 1])])
def test_at_most_1024_datums_travel_together(count: int, sizes: list[int]) -> None:
    data = [datum(1) for _ in range(count)]
    chunks = list(chunk_datums(data))
    assert [len(c) for c in chunks] == sizes
    assert [d for c in chunks for d in c] == data


def test_a_datum_beyond_the_byte_limit_travels_alone_and_no_chunk_is_empty() -> None:
    big = Datum(ModelInput(chunks=[ImageChunk(data=b"x" * 6_000_000, format="png")]), {})
    assert [len(c) for c in chunk_datums([big])] == [1]
    assert [len(c) for c in chunk_datums([datum(1), big, datum(1), datum(1)])] == [1, 1, 2]


def test_bytes_are_estimated_as_on_the_wire() -> None:
    assert estimated_bytes(datum(10, 5)) == 10 * 4 + 5 * 4
    assert [len(c) for c in chunk_datums([datum(100)] * 10, max_bytes=1000)] == [2] * 5


def test_zstd_bodies_come_back_and_bombs_do_not() -> None:
    body = b"abc" * 1000
    assert decompress(compress(body), max_bytes=len(body)) == body
    with pytest.raises(WireError, match="beyond the limit of 2999"):
        decompress(compress(body), max_bytes=2999)
    with pytest.raises(WireError, match="not valid zstd"):
        decompress(b"plain", max_bytes=100)
