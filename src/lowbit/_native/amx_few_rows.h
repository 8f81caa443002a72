// Products of few rows of bfloat16 with weights that are decoded to it, whose time is that of decoding.
//
// The roles of amx_product.h are exchanged: a tile's rows are channels, so that decoded inputs are used as they lie in the
// weight, and the activations, of which there are few, are transposed. The sums are, too, and are written transposed back.

constexpr int64_t kMostFewRows = 64;
constexpr int64_t kTileRows = 16;
constexpr int64_t kChannelsTogether = 32;
// Inputs decoded at once are kFewInputs, so that they are still in the first-level cache; or, where the sums do not stay in
// tiles, many, so that sums are seldom moved.
constexpr int64_t kManyInputs = 2048;

// Blocks [first, last) of 16 rows -> tiles [steps][16 pairs of inputs][16 rows][2].
void transpose_rows(const AmxJob& job, int64_t first, int64_t last) {
    const int64_t steps = blocks(job.depth, kStep);
    for (int64_t block = first; block < last; ++block) {
        const auto* from = static_cast<const int8_t*>(job.input) + block * kTileRows * job.stride;
        pack_panel(from, job.stride, smaller(kTileRows, job.rows - block * kTileRows), job.depth, job.tiles + block * steps * kTileBytes);
    }
}

using DecodedChannels = BFloat16[kChannelsTogether][kManyInputs + kWords];  // not 4096 bytes apart: those share a set

struct FewRowsMemory {
    alignas(64) DecodedChannels decoded[2];  // what is multiplied, and what comes next
    alignas(64) float sums[kMostFewRows / kTileRows][2][kTileRows * kTileRows];  // [blocks of rows][halves of the channels]
};

// Decodes inputs of channels, in pieces that fit between products.
struct Decoding {
    const AmxJob& job;
    DecodedChannels* to;
    int64_t column, channels, first, count, piece;

    // Channels from `column` on, inputs [first, first + count); zeros up to a whole step.
    void begin(DecodedChannels& decoded, int64_t from_column, int64_t from_input, int64_t inputs) {
        to = &decoded, column = from_column, first = from_input, count = inputs, piece = 0;
        channels = smaller(kChannelsTogether, job.columns - column);
    }

    LOWBIT_NOINLINE void advance() {
        const int64_t channel = piece % kChannelsTogether, done = piece / kChannelsTogether * kFewInputs;
        ++piece;
        if (channel >= channels || done >= count) return;
        BFloat16* values = (*to)[channel] + done;
        const int64_t part = smaller(kFewInputs, count - done);
        job.decode(job.weight.data, column + channel, first + done, part, values);
        for (int64_t rest = part; rest % kWords; ++rest) values[rest].bits = 0;
    }

    void finish() {
        while (piece < blocks(count, kFewInputs) * kChannelsTogether) advance();
    }
};

// Tiles 0 and 1, of two halves of the channels, and with a second block of rows 2 and 3: += decoded times x. Between the
// steps `pieces` of what comes next are decoded.
template <bool HasSecond>
LOWBIT_NOINLINE void multiply_steps(const DecodedChannels& decoded, const uint8_t* x, const uint8_t* second, int64_t steps,
                                    Decoding& next, int64_t pieces) {
    constexpr int64_t kStride = sizeof decoded[0];
    const BFloat16 *low = decoded[0], *high = decoded[kTileRows];
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
    for (int64_t step = 0; step < steps; ++step, low += kWords, high += kWords, x += kTileBytes, second += kTileBytes) {
        _tile_loadd(4, low, kStride);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, high, kStride);
        _tile_dpbf16ps(1, 5, 6);
        if (HasSecond) {
            _tile_loadd(7, second, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < pieces; ++i) next.advance();
    }
}

LOWBIT_INLINE void load_sums(float (*sums)[2][kTileRows * kTileRows], bool is_first) {
    __asm__ volatile("" ::: "memory");
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0][0], 64);
        _tile_loadd(1, sums[0][1], 64);
        _tile_loadd(2, sums[1][0], 64);
        _tile_loadd(3, sums[1][1], 64);
    }
}

LOWBIT_INLINE void store_sums(float (*sums)[2][kTileRows * kTileRows]) {
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
    __asm__ volatile("" ::: "memory");
}

// Sums [16 channels][16 rows] -> output [rows][channels].
LOWBIT_INLINE void write_transposed(const AmxJob& job, const float* sums, int64_t row, int64_t column) {
    alignas(64) float turned[kTileRows * kTileRows];
    pack_step(reinterpret_cast<const int8_t*>(sums), kStep, ~__mmask64{0}, reinterpret_cast<int8_t*>(turned));
    const __mmask16 mask = column_mask(job.columns - column);
    const __m512 bias = job.weight.bias ? _mm512_maskz_loadu_ps(mask, job.weight.bias + column) : _mm512_setzero_ps();
    auto* to = static_cast<BFloat16*>(job.output) + row * job.columns + column;
    for (int64_t i = 0; i < smaller(kTileRows, job.rows - row); ++i, to += job.columns) {
        const __m512 value = _mm512_load_ps(turned + i * kTileRows);
        store_narrow(to, mask, job.weight.bias ? _mm512_add_ps(value, bias) : value);
    }
}

// Groups [first, last) of 32 channels, with all rows.
void multiply_few_rows(const AmxJob& job, int64_t first, int64_t last) {
    static thread_local FewRowsMemory memory;
    const int64_t all_steps = blocks(job.depth, kStep), inputs = job.depth / 2, row_blocks = blocks(job.rows, kTileRows);
    const bool stay = row_blocks <= 2;  // the sums, in their tiles
    const int64_t at_once = stay ? kFewInputs : kManyInputs;
    const int64_t pieces = blocks(kChannelsTogether * kWords, blocks(row_blocks, 2) * kFewInputs);
    Decoding next{job, nullptr, 0, 0, 0, 0, 0};
    next.begin(memory.decoded[0], first * kChannelsTogether, 0, smaller(at_once, inputs));
    next.finish();
    int turn = 0;
    configure_tiles();
    for (int64_t group = first; group < last; ++group) {
        const int64_t column = group * kChannelsTogether;
        if (stay) load_sums(memory.sums, true);
        for (int64_t input = 0; input < inputs; input += at_once, turn ^= 1) {
            const int64_t steps = blocks(smaller(at_once, inputs - input), kWords), after = input + at_once;
            const bool is_last = group + 1 == last && after >= inputs;
            if (after < inputs) next.begin(memory.decoded[turn ^ 1], column, after, smaller(at_once, inputs - after));
            else next.begin(memory.decoded[turn ^ 1], column + kChannelsTogether, 0, is_last ? 0 : smaller(at_once, inputs));
            for (int64_t block = 0; block < row_blocks; block += 2) {
                const uint8_t* x = job.tiles + (block * all_steps + input / kWords) * kTileBytes;
                if (!stay) load_sums(memory.sums + block, input == 0);
                if (block + 1 < row_blocks)
                    multiply_steps<true>(memory.decoded[turn], x, x + all_steps * kTileBytes, steps, next, pieces);
                else multiply_steps<false>(memory.decoded[turn], x, x, steps, next, pieces);
                if (!stay) store_sums(memory.sums + block);
            }
            next.finish();
        }
        if (stay) store_sums(memory.sums);
        for (int64_t block = 0; block < row_blocks; ++block)
            for (int64_t half = 0; half < 2; ++half)
                write_transposed(job, memory.sums[block][half], block * kTileRows, column + half * kTileRows);
    }
    _tile_release();
}
