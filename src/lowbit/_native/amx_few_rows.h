// Products of few rows of bfloat16 with weights that are decoded to it, whose time is that of decoding.
//
// The roles of amx_product.h are exchanged: a tile's rows are channels, so that decoded inputs are used as they lie in the
// weight, and the activations, of which there are few, are transposed. The sums are, too, and are written transposed back.
// Of 16 channels kFewInputs inputs are decoded into the first-level cache and multiplied there; sums stay in their tiles until
// all inputs are added.

constexpr int64_t kMostFewRows = 64;
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileChannels = 16;

// Rows of a tile: 16, or as many as there are where those are fewer, so that they are found in the first-level cache.
LOWBIT_INLINE int64_t rows_of_tile(const AmxJob& job) { return smaller(job.rows, kTileRows); }

LOWBIT_INLINE int64_t bytes_of_step(const AmxJob& job) { return blocks(job.rows, kTileRows) * rows_of_tile(job) * kStep; }

// Steps [first, last) of 32 inputs -> tiles [steps][blocks of rows][16 pairs of inputs][rows of a tile][2].
void transpose_rows(const AmxJob& job, int64_t first, int64_t last) {
    const int64_t pair_bytes = rows_of_tile(job) * 4;
    uint8_t* to = job.tiles + first * bytes_of_step(job);
    for (int64_t step = first; step < last; ++step) {
        const __mmask64 mask = present(step * kStep, job.depth);
        const auto* from = static_cast<const int8_t*>(job.input) + step * kStep;
        for (int64_t row = 0; row < job.rows; row += kTileRows, to += 16 * pair_bytes) {
            alignas(64) int8_t rows[kTileRows * kStep] = {}, turned[kTileRows * kStep];
            for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i) {
                const __m512i inputs = _mm512_maskz_loadu_epi8(mask, from + (row + i) * job.stride);
                _mm512_store_si512(rows + i * kStep, reorder(job.decoder, inputs));
            }
            pack_step(rows, kStep, ~__mmask64{0}, turned);
            const __mmask16 columns = column_mask(rows_of_tile(job));
            for (int64_t pair = 0; pair < 16; ++pair)
                _mm512_mask_storeu_epi32(to + pair * pair_bytes, columns, _mm512_load_si512(turned + pair * kStep));
        }
    }
}

using DecodedChannels = BFloat16[kTileChannels][kFewInputs + kWords];  // not 512 bytes apart: those share few sets

struct FewRowsMemory {
    alignas(64) DecodedChannels decoded;
    alignas(64) float sums[kMostFewRows / kTileRows][kTileRows * kTileChannels];
};

// Inputs of a group of channels.
struct Chunk {
    int64_t group, input;
};

LOWBIT_INLINE Chunk next_chunk(const AmxJob& job, const Chunk& chunk) {
    return chunk.input + kFewInputs < job.depth / 2 ? Chunk{chunk.group, chunk.input + kFewInputs} : Chunk{chunk.group + 1, 0};
}

LOWBIT_INLINE void prefetch_chunk(const AmxJob& job, const Chunk& chunk) {
    const int64_t count = smaller(kFewInputs, job.depth / 2 - chunk.input);
    for (int64_t channel = 0; channel < smaller(kTileChannels, job.columns - chunk.group * kTileChannels); ++channel)
        prefetch_codes(*job.decoder, chunk.group * kTileChannels + channel, chunk.input, count);
}

LOWBIT_INLINE void decode_chunk(const AmxJob& job, const Chunk& chunk, DecodedChannels& decoded) {
    const int64_t channels = smaller(kTileChannels, job.columns - chunk.group * kTileChannels);
    const int64_t count = smaller(kFewInputs, job.depth / 2 - chunk.input);
    job.decoder->decode(job.weight.data, chunk.group * kTileChannels, channels, chunk.input, count, decoded[0], kFewInputs + kWords);
    for (int64_t channel = 0; count % kWords && channel < channels; ++channel)
        for (int64_t rest = count; rest % kWords; ++rest) decoded[channel][rest].bits = 0;
}

// Adds decoded times x to tiles 0 ... 3. With one or two blocks of rows every other step has sums of its own: an instruction
// would wait for the one before that adds to the same.
template <int RowBlocks>
LOWBIT_NOINLINE void multiply_chunk(const DecodedChannels& decoded, const uint8_t* x, int64_t steps, int64_t rows) {
    const BFloat16* channels = decoded[0];
    const int64_t pair_bytes = RowBlocks == 1 ? 4 * rows : kStep;
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
    for (int64_t step = 0; step < steps; ++step, channels += kWords, x += RowBlocks * 16 * pair_bytes) {
        _tile_loadd(4, channels, sizeof decoded[0]);
        _tile_loadd(5, x, pair_bytes);
        if (RowBlocks <= 2 && step % 2) {
            _tile_dpbf16ps(2, 4, 5);
            if (RowBlocks == 2) {
                _tile_loadd(6, x + kTileBytes, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
            continue;
        }
        _tile_dpbf16ps(0, 4, 5);
        if (RowBlocks >= 2) {
            _tile_loadd(6, x + kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (RowBlocks >= 3) {
            _tile_loadd(7, x + 2 * kTileBytes, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (RowBlocks >= 4) {
            _tile_loadd(5, x + 3 * kTileBytes, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
}

LOWBIT_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

LOWBIT_INLINE void store_sums(float (*sums)[kTileRows * kTileChannels], int64_t row_blocks) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    __asm__ volatile("" ::: "memory");
    if (row_blocks > 2) return;
    for (int64_t i = 0; i < row_blocks * kTileRows * kTileChannels; i += 16)
        _mm512_store_ps(sums[0] + i, _mm512_add_ps(_mm512_load_ps(sums[0] + i), _mm512_load_ps(sums[2] + i)));
}

// Sums [16 channels][16 rows] -> output [rows][channels].
LOWBIT_INLINE void write_transposed(const AmxJob& job, const float* sums, int64_t row, int64_t column) {
    alignas(64) float turned[kTileRows * kTileChannels];
    pack_step(reinterpret_cast<const int8_t*>(sums), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(turned));
    const __mmask16 mask = column_mask(job.columns - column);
    const __m512 bias = job.weight.bias ? _mm512_maskz_loadu_ps(mask, job.weight.bias + column) : _mm512_setzero_ps();
    auto* to = static_cast<BFloat16*>(job.output) + row * job.columns + column;
    for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i, to += job.columns) {
        const __m512 value = _mm512_load_ps(turned + i * kTileChannels);
        store_narrow(to, mask, job.weight.bias ? _mm512_add_ps(value, bias) : value);
    }
}

using MultiplyChunk = void (*)(const DecodedChannels&, const uint8_t*, int64_t, int64_t);
constexpr MultiplyChunk kMultiplyChunk[kMostFewRows / kTileRows] = {multiply_chunk<1>, multiply_chunk<2>, multiply_chunk<3>,
                                                                    multiply_chunk<4>};

// Not inlined: compilers look up the thread's own again for each use.
LOWBIT_NOINLINE FewRowsMemory& few_rows_memory() {
    static thread_local FewRowsMemory memory;
    return memory;
}

// Sums and activations have a column for each row.
LOWBIT_INLINE void configure_tiles(int64_t rows) {
    TileShape shape;
    for (int tile : {0, 1, 2, 3, 5, 6, 7}) shape.row_bytes[tile] = static_cast<uint16_t>(4 * rows);
    __asm__ volatile("" : : "r"(&shape) : "memory");  // the intrinsic does not say how much of it is read
    _tile_loadconfig(&shape);
}

// Groups [first, last) of 16 channels, with all rows.
void multiply_few_rows(const AmxJob& job, int64_t first, int64_t last) {
    FewRowsMemory& memory = few_rows_memory();
    const int64_t inputs = job.depth / 2, row_blocks = blocks(job.rows, kTileRows);
    const MultiplyChunk multiply = kMultiplyChunk[row_blocks - 1];
    configure_tiles(rows_of_tile(job));
    prefetch_chunk(job, {first, 0});
    for (int64_t group = first; group < last; ++group) {
        zero_sums();
        for (int64_t input = 0; input < inputs; input += kFewInputs) {
            const Chunk chunk{group, input}, next = next_chunk(job, chunk);
            if (next.group < last) prefetch_chunk(job, next);
            decode_chunk(job, chunk, memory.decoded);
            const int64_t steps = blocks(smaller(kFewInputs, inputs - input), kWords);
            multiply(memory.decoded, job.tiles + input / kWords * bytes_of_step(job), steps, job.rows);
        }
        store_sums(memory.sums, row_blocks);
        for (int64_t block = 0; block < row_blocks; ++block)
            write_transposed(job, memory.sums[block], block * kTileRows, group * kTileChannels);
    }
    _tile_release();
}
