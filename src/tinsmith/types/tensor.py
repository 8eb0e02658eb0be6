"""`TensorData`: a small typed array on its way over the wire. Backed by numpy, never by pydantic."""

# R rows, C columns of a sparse matrix, Z stored values

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]
_NUMPY_DTYPE: dict[str, Any] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}


class TensorData:
    """A dense array, or a sparse matrix in CSR form, of `float32` or `int64`.

    `data` holds the values flat, in C order; `shape` their shape (`None` means one-dimensional). With
    `sparse_crow_indices` (R+1) and `sparse_col_indices` (Z), `data` holds the Z stored values and cells that are not
    stored are 0.

    Raises `ValueError` if the dtype is not one of the two, or if the values do not fill the shape.
    """

    __slots__ = ("_col_indices", "_crow_indices", "_dtype", "_flat", "_shape")

    def __init__(
        self,
        data: Sequence[int] | Sequence[float] | np.ndarray | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | np.ndarray | None = None,
        sparse_col_indices: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if data is None:
            raise ValueError("TensorData needs data")
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise ValueError("TensorData: sparse_crow_indices and sparse_col_indices go together")
        array = np.asarray(data)
        self._dtype: TensorDtype = dtype if dtype is not None else wire_dtype(array)
        if self._dtype not in _NUMPY_DTYPE:
            raise ValueError(f"TensorData dtype must be 'int64' or 'float32', not {dtype!r}")
        if shape is None and array.ndim != 1:
            shape = array.shape
        self._flat = np.ascontiguousarray(array, dtype=_NUMPY_DTYPE[self._dtype]).reshape(-1)
        self._shape = None if shape is None else [int(n) for n in shape]
        self._crow_indices = None if sparse_crow_indices is None else np.asarray(sparse_crow_indices, dtype=np.int64)
        self._col_indices = None if sparse_col_indices is None else np.asarray(sparse_col_indices, dtype=np.int64)
        self._check()

    def _check(self) -> None:
        if self._crow_indices is not None and self._col_indices is not None:
            if self._shape is None or len(self._shape) != 2:
                raise ValueError(f"a sparse TensorData needs a two-dimensional shape, not {self._shape!r}")
            check_csr(self._shape, self._crow_indices, self._col_indices, len(self._flat))
        elif self._shape is not None and math.prod(self._shape) != len(self._flat):
            raise ValueError(f"TensorData: {len(self._flat)} values do not fill shape {self._shape!r}")

    @property
    def data(self) -> list[Any]:
        """The values as a flat list (the stored values, if sparse)."""
        values: list[Any] = self._flat.tolist()
        return values

    @property
    def dtype(self) -> TensorDtype:
        return self._dtype

    @property
    def shape(self) -> list[int] | None:
        return None if self._shape is None else list(self._shape)

    @property
    def sparse_crow_indices(self) -> list[int] | None:
        return None if self._crow_indices is None else self._crow_indices.tolist()

    @property
    def sparse_col_indices(self) -> list[int] | None:
        return None if self._col_indices is None else self._col_indices.tolist()

    @property
    def is_sparse(self) -> bool:
        return self._crow_indices is not None

    @property
    def flat(self) -> np.ndarray:
        """The stored values, one-dimensional; not a copy."""
        return self._flat

    @property
    def csr_indices(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`(crow, col)` as int64 arrays if sparse; not copies."""
        if self._crow_indices is None or self._col_indices is None:
            return None
        return self._crow_indices, self._col_indices

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: the values, and 8 for each CSR index."""
        indices = self.csr_indices
        return self._flat.nbytes + (0 if indices is None else 8 * (len(indices[0]) + len(indices[1])))

    @classmethod
    def of_flat(cls, flat: np.ndarray, dtype: TensorDtype, shape: list[int]) -> TensorData:
        """Dense values that are known to be one-dimensional, of `dtype`, and to fill `shape`: nothing is checked."""
        tensor = object.__new__(cls)
        tensor._flat, tensor._dtype, tensor._shape = flat, dtype, shape
        tensor._crow_indices = tensor._col_indices = None
        return tensor

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array, wire_dtype(array), array.shape)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Any floating tensor becomes float32, any signed integer tensor int64."""
        dense = tensor.detach().cpu()
        return cls.from_numpy((dense.float() if dense.is_floating_point() else dense).numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: float = 0) -> TensorData:
        """CSR form of a two-dimensional tensor; cells equal to `pad_value` are not stored."""
        if tensor.ndim != 2:
            raise ValueError(f"from_torch_sparse needs a two-dimensional tensor, not shape {tuple(tensor.shape)!r}")
        dense = cls.from_torch(tensor).to_numpy()
        row_Z, col_Z = np.nonzero(dense != pad_value)
        crow = np.concatenate([[0], np.cumsum(np.bincount(row_Z, minlength=dense.shape[0]))])
        return cls(dense[row_Z, col_Z], wire_dtype(dense), dense.shape, crow, col_Z)

    def to_numpy(self, pad_value: float = 0) -> np.ndarray:
        """The dense array in its shape; cells that a sparse one does not store get `pad_value`."""
        indices = self.csr_indices
        if indices is None or self._shape is None:
            return self._flat if self._shape is None else self._flat.reshape(self._shape)
        crow, col = indices
        dense = np.full(self._shape, pad_value, dtype=self._flat.dtype)
        dense[np.repeat(np.arange(self._shape[0]), np.diff(crow)), col] = self._flat
        return dense

    def to_torch(self, pad_value: float = 0) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(self.to_numpy(pad_value)))

    def tolist(self, pad_value: float = 0) -> list[Any]:
        values: list[Any] = self.to_numpy(pad_value).tolist()
        return values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        mine, theirs = self.to_numpy(), other.to_numpy()
        return self.dtype == other.dtype and mine.shape == theirs.shape and np.array_equal(mine, theirs, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sparse = f", {len(self._flat)} stored" if self.is_sparse else ""
        shape = self._shape if self._shape is not None else [len(self._flat)]
        return f"TensorData({self._dtype}, shape={shape}{sparse})"

    def model_dump(self) -> dict[str, Any]:
        """JSON form of the Tinker wire; absent fields are null there."""
        dump = {"data": self.data, "dtype": self._dtype, "shape": self.shape}
        if self.is_sparse:
            dump |= {"sparse_crow_indices": self.sparse_crow_indices, "sparse_col_indices": self.sparse_col_indices}
        return {key: value for key, value in dump.items() if value is not None}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._coerce, serialization=core_schema.plain_serializer_function_ser_schema(cls.model_dump)
        )

    @classmethod
    def _coerce(cls, value: Any) -> TensorData:
        if isinstance(value, TensorData):
            return value
        if isinstance(value, dict):
            return cls(**value)
        raise ValueError(f"not a TensorData: {type(value).__name__}")


def wire_dtype(array: np.ndarray) -> TensorDtype:
    """The wire dtype for a numpy array. Raises `ValueError` for unsigned, boolean and other kinds."""
    if array.dtype.kind == "f":
        return "float32"
    if array.dtype.kind == "i":
        return "int64"
    if array.size == 0:
        return "float32"
    raise ValueError(f"cannot send an array of dtype {array.dtype}; use a float or a signed integer dtype")


def check_csr(shape: Sequence[int], crow: np.ndarray, col: np.ndarray, num_values: int) -> None:
    """Raise `ValueError` unless the indices describe a matrix of `shape` with `num_values` stored cells."""
    rows, columns = int(shape[0]), int(shape[1])
    if len(crow) != rows + 1 or len(col) != num_values:
        raise ValueError(
            f"sparse TensorData of shape {list(shape)!r} with {num_values} values needs {rows + 1} row offsets and "
            f"{num_values} column indices, not {len(crow)} and {len(col)}"
        )
    if crow[0] != 0 or crow[-1] != num_values or (np.diff(crow) < 0).any():
        raise ValueError(f"sparse TensorData: row offsets must rise from 0 to {num_values}")
    if num_values and (col.min() < 0 or col.max() >= columns):
        raise ValueError(f"sparse TensorData: a column index lies outside 0..{columns - 1}")
    row = np.repeat(np.arange(rows), np.diff(crow))
    order = np.lexsort((col, row))
    if ((np.diff(row[order]) == 0) & (np.diff(col[order]) == 0)).any():
        raise ValueError("sparse TensorData: a row names one column twice")
