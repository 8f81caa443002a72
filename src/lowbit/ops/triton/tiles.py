"""How matrix products of one-byte operands are cut up, per chip: the table, and the reasons for its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowbit.ops.triton.launch import Target


@dataclass(frozen=True)
class Tile:
    """How a matrix product is cut up.

    Attributes:
        block_m, block_n: rows and columns of the result that a program computes at a time.
        block_k: depth of one step.
        num_warps, num_stages: Triton's launch options.
        group_m: row tiles that share their column tiles in the L2 cache before the next columns are begun.
        persistent: one program per processor takes tile after tile and loads operands through tensor descriptors.
        promoted: FP8 only: sums leave the tensor core's accumulator, which on Hopper keeps about 14 bits, for float32
            registers after every step.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    persistent: bool = False
    promoted: bool = True

    def programs(self, m: int, n: int) -> int:
        """Return how many tiles cover an [m, n] result."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    def constants(self) -> dict[str, int]:
        """Return the kernels' compile-time arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }

    def options(self) -> dict[str, int]:
        """Return Triton's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# What is multiplied: int8; e4m3 with scales that hold for all of k; e4m3 with a scale per block.
INT8, FP8, FP8_BLOCKS = "int8", "fp8", "fp8 blocks"

# From the widest tile to the narrowest. None of this is measured: `python -m benchmarks.gpu --only tune` measures it.
#
# Ampere, Ada, consumer Blackwell: mma.sync accumulates in registers, at most 64 a thread in a 128x128 tile of 8 warps,
# and 99 KiB of shared memory (SM 8.9) hold four stages of 64 columns.
SMALL_TILES = (
    Tile(128, 128, 64, num_warps=8, num_stages=4),
    Tile(64, 64, 128, num_warps=4, num_stages=4),
    Tile(16, 64, 128, num_warps=4, num_stages=5),
)
# wgmma and tcgen05, 227 KiB of shared memory. 16-row tiles are for a product that reads weights and little else: narrow
# ones give more programs, more stages keep more loads in flight.
NARROW_WIDE_TILES = (
    Tile(64, 128, 128, num_warps=4, num_stages=4),
    Tile(16, 64, 128, num_warps=4, num_stages=5),
)
# A step of a 128x128 tile reads 32 KiB for 2 M multiplications, of a 128x256 tile 48 KiB for 4 M: at the full rate of
# an H100 64 and 48 bytes a clock of each processor, where its L2 cache gives about 39 (see benchmarks/gpu_model.py). So
# the widest tile that fits the registers wins: integers accumulate in place, 128 registers a thread.
HOPPER_INT8_TILES = (
    Tile(128, 256, 128, num_warps=8, num_stages=3, persistent=True),
    Tile(128, 128, 128, num_warps=8, num_stages=4, persistent=True),
    *NARROW_WIDE_TILES,
)
# Promoted sums and scaled blocks take a second accumulator: 128x256 would spill.
HOPPER_FP8_TILES = (Tile(128, 128, 128, num_warps=8, num_stages=4, persistent=True), *NARROW_WIDE_TILES)
# The accumulator is in tensor memory and does not need promoting.
BLACKWELL_TILES = (Tile(128, 128, 128, num_warps=8, num_stages=4), *NARROW_WIDE_TILES)
# ROCm prefetches into registers: two stages take one buffer of LDS, of which there are 64 KiB.
HIP_TILES = (
    Tile(128, 128, 64, num_warps=4, num_stages=2),
    Tile(64, 64, 128, num_warps=4, num_stages=2),
    Tile(16, 64, 128, num_warps=4, num_stages=2),
)
# The interpreter pays by the operation, not by the element.
INTERPRETER_TILES = (Tile(32, 32, 64, num_warps=1, num_stages=1, group_m=2),)

TileTable = tuple[Tile, ...]
HOPPER_TABLES: Mapping[str, TileTable] = {
    INT8: HOPPER_INT8_TILES,
    FP8: HOPPER_FP8_TILES,
    FP8_BLOCKS: HOPPER_FP8_TILES,
}


def tiles_for(kind: str, target: Target) -> TileTable:
    """Return the tiles for a product of ``kind`` on ``target``, the widest first."""
    if target.backend == "interpreter":
        return INTERPRETER_TILES
    if target.backend == "hip":
        return HIP_TILES
    if target.backend == "cuda" and int(target.arch) // 10 == 9:
        return HOPPER_TABLES[kind]
    return BLACKWELL_TILES if target.has_wide_tiles else SMALL_TILES


def choose_tile(kind: str, target: Target, m: int, n: int) -> Tile:
    """Return the tile for an [m, n] product of ``kind`` on ``target``.

    Up to 16 rows the narrowest; else the widest that is not mostly beyond the last row and gives every processor a
    tile; if none does, the narrowest of more than 16 rows.
    """
    tiles = tiles_for(kind, target)
    if m <= 16:
        return tiles[-1]
    tall = [tile for tile in tiles if tile.block_m > 16]
    fitting = [tile for tile in tall if tile.block_m < 2 * m] or tall[-1:]
    return next((tile for tile in fitting if tile.programs(m, n) >= target.processors), fitting[-1])


def pointer_tile(tile: Tile) -> Tile:
    """Return the tile for operands that no descriptor can describe in place of a persistent one.

    A persistent tile of 256 columns fits: its stages are what fills the shared memory.
    """
    return replace(tile, persistent=False)


def with_depth(tile: Tile, block_k: int) -> Tile:
    """Return ``tile`` with steps of ``block_k`` columns."""
    return replace(tile, block_k=block_k)
