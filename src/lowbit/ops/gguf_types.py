"""The tensor types of GGUF files that lowbit reads: their numbers in a file and the sizes of their blocks.

A row of a quantized tensor is a sequence of blocks, each with its own scales; rows are whole numbers of blocks. Names,
numbers and sizes are those of ggml (``ggml.h``, ``ggml-common.h``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.errors import UnsupportedError, expected_one_of


@dataclass(frozen=True)
class BlockType:
    """A tensor type.

    Attributes:
        name: as ggml writes it.
        number: in a file, ``ggml_type``.
        elements: of a block.
        bytes: of a block.
    """

    name: str
    number: int
    elements: int
    bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether its elements are ordinary floating-point numbers."""
        return self.elements == 1

    @property
    def bits(self) -> float:
        """Bits per element, scales included."""
        return 8 * self.bytes / self.elements

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` elements.

        Raises:
            UnsupportedError: rows of that length are not whole blocks.
        """
        if columns % self.elements:
            raise UnsupportedError(f"{self.name} stores rows in blocks of {self.elements}; {columns} is no multiple")
        return columns // self.elements * self.bytes

    def columns(self, row_bytes: int) -> int:
        """Return the elements of a row of ``row_bytes`` bytes.

        Raises:
            UnsupportedError: these are not whole blocks.
        """
        if row_bytes % self.bytes:
            raise UnsupportedError(f"{self.name} stores blocks of {self.bytes} bytes; {row_bytes} is no multiple")
        return row_bytes // self.bytes * self.elements


_ALL = (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("BF16", 30, 1, 2),
    BlockType("Q8_0", 8, 32, 34),
    BlockType("Q4_0", 2, 32, 18),
    BlockType("Q4_1", 3, 32, 20),
    BlockType("Q5_0", 6, 32, 22),
    BlockType("Q5_1", 7, 32, 24),
    BlockType("Q2_K", 10, 256, 84),
    BlockType("Q3_K", 11, 256, 110),
    BlockType("Q4_K", 12, 256, 144),
    BlockType("Q5_K", 13, 256, 176),
    BlockType("Q6_K", 14, 256, 210),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("MXFP4", 39, 32, 17),
    BlockType("NVFP4", 40, 64, 36),
    BlockType("IQ3_S", 21, 256, 110),
    BlockType("IQ3_XXS", 18, 256, 98),
    BlockType("IQ2_S", 22, 256, 82),
    BlockType("IQ2_XS", 17, 256, 74),
    BlockType("IQ2_XXS", 16, 256, 66),
    BlockType("IQ1_M", 29, 256, 56),
    BlockType("IQ1_S", 19, 256, 50),
    BlockType("TQ2_0", 35, 256, 66),
    BlockType("TQ1_0", 34, 256, 54),
    BlockType("Q1_0", 41, 128, 18),
)

BLOCK_TYPES: Mapping[str, BlockType] = {kind.name: kind for kind in _ALL}
BY_NUMBER: Mapping[int, BlockType] = {kind.number: kind for kind in _ALL}

# Types that exist and that lowbit does not read, to name them in messages.
OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
}


def block_type(name: str) -> BlockType:
    """Return the type called ``name``; case does not matter.

    Raises:
        UnsupportedError: lowbit does not read it; lists those it does.
    """
    found = BLOCK_TYPES.get(name.upper())
    if found is None:
        raise UnsupportedError(f"Unknown GGUF type {name!r}. {expected_one_of(BLOCK_TYPES)}")
    return found
