// Products of few rows of bfloat16 with int4 and int8 whose scales are of groups of 64 inputs or a multiple, by AMX.
//
// Activations become integers of 16 bits as in integer_rows.h, with a scale for each unit of 64 or 128 inputs, which belong to
// one group. Their two bytes are rows of their own, multiplied as in amx_int8_few_rows.h. The sums of a unit are exact; while
// those of the next are made they are scaled and added to the totals. No weight is rounded.
#ifndef LOWBIT_NATIVE_KERNELS_AMX_GROUPED_ROWS_H
#define LOWBIT_NATIVE_KERNELS_AMX_GROUPED_ROWS_H

#include "amx_few_rows.h"
#include "weight_codes.h"

LOWBIT_BEGIN(gemm)

template <typename CodeType, typename ScaleType, bool kHasZeros>
struct Grouped {
    using Code = CodeType;
    using Scale = ScaleType;
    using Zero = typename std::conditional<std::is_same<Code, Int4>::value, uint8_t, int16_t>::type;
    static constexpr bool is_packed = std::is_same<Code, Int4>::value, has_zeros = kHasZeros;
    static constexpr int64_t step_bytes = kStep * base::kBits<Code> / 8;  // of a channel's codes
};

// How many rows are multiplied so. Fewer of int4 are by vectors; of more, scaling the sums takes longer than decoding the weight.
struct RowRange {
    int64_t least, most;
};
constexpr RowRange kRowsOfInt4{3, 8}, kRowsOfInt8{1, 16};

constexpr int64_t kBytesOfAUnit = 2;       // of each activation
constexpr float kNibbleScale = 1.0f / 16;  // of int4 as it is multiplied
constexpr int64_t kPairChannels = 2 * kTileChannels;
constexpr int64_t kPhases = 4;  // of a step, see multiply_pair
constexpr int64_t kPhaseChannels = kPairChannels / kPhases;
constexpr int64_t kScaledGroups = 16;  // whose scales are loaded together

// Where the lower bytes of 64 words are. Of int4, two neighbours of which share a byte, even inputs are multiplied first.
template <bool kIsEvenFirst>
struct BytePlaces {
    alignas(64) uint8_t places[kStep];
    constexpr BytePlaces() : places() {
        constexpr int kHalf = kStep / 2;
        for (int i = 0; i < kStep; ++i)
            places[i] = static_cast<uint8_t>(2 * (!kIsEvenFirst ? i : i < kHalf ? 2 * i : 2 * (i - kHalf) + 1));
    }
};
constexpr BytePlaces<false> kPlaces;
constexpr BytePlaces<true> kEvenPlaces;

// 32 activations times a power of two -> integers of 16 bits.
LOWBIT_INLINE __m512i round_words(const BFloat16* x, __mmask32 mask, __m512 factor) {
    const __m512i words = _mm512_maskz_loadu_epi16(mask, x), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), factor));
    const __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), factor));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
}

// Rows [first, last) of x -> two rows each of `codes`, of the upper bytes and of the lower ones, which are signed, too; and the
// scales and sums of their units. Those of a unit that is not finite are NaN and zero.
void round_units(const UnitJob& job, int64_t first, int64_t last) {
    constexpr int kBits = 14, kSmallest = 32;  // of the first bit's exponent; a scale is far from where products vanish
    const __m512i lower_places = _mm512_load_si512(job.is_even_first ? kEvenPlaces.places : kPlaces.places);
    const __m512i upper_places = _mm512_add_epi8(lower_places, _mm512_set1_epi8(1));
    for (int64_t row = first; row < last; ++row) {
        const BFloat16* x = job.x + row * job.stride;
        int8_t *upper = job.codes + row * job.depth, *lower = upper + job.rows * job.depth;
        float *scales = job.scales + row, *sums = job.sums + row;
        for (int64_t input = 0; input < job.depth; input += job.inputs, scales += kMostRows, sums += kMostRows) {
            const int64_t end = smaller(input + job.inputs, job.depth);
            const uint32_t largest = base::largest(x + input, end - input, 0);
            const bool is_finite = largest < 0x7f80u;
            const int found = static_cast<int>((largest + 1) >> 7);  // of 1.99 times a power of two the next: 127.5 is no byte
            const int exponent = found < kSmallest ? kSmallest : found;
            const __m512 factor = _mm512_set1_ps(as_float(static_cast<uint32_t>(254 - exponent + kBits) << 23));
            const float scale = job.scale * as_float(static_cast<uint32_t>(exponent - kBits) << 23);
            scales[0] = is_finite ? 256.0f * scale : std::numeric_limits<float>::quiet_NaN();
            scales[job.rows] = is_finite ? scale : scales[0];
            __m512i upper_sum = _mm512_setzero_si512(), lower_sum = upper_sum;
            for (int64_t i = input; i < end; i += kStep) {
                const __mmask32 mask = is_finite ? ~__mmask32{0} : 0;
                const __m512i a = round_words(x + i, mask, factor), b = round_words(x + i + kStep / 2, mask, factor);
                const __m512i half = _mm512_set1_epi16(128);
                const __m512i high = _mm512_permutex2var_epi8(_mm512_add_epi16(a, half), upper_places, _mm512_add_epi16(b, half));
                const __m512i low = _mm512_permutex2var_epi8(a, lower_places, b);
                _mm512_storeu_si512(upper + i, high);
                _mm512_storeu_si512(lower + i, low);
                upper_sum = _mm512_dpbusd_epi32(upper_sum, _mm512_set1_epi8(1), high);
                lower_sum = _mm512_dpbusd_epi32(lower_sum, _mm512_set1_epi8(1), low);
            }
            if (!job.has_sums) continue;
            sums[0] = static_cast<float>(_mm512_reduce_add_epi32(upper_sum));
            sums[job.rows] = static_cast<float>(_mm512_reduce_add_epi32(lower_sum));
        }
    }
}

// 64 inputs of int4 -> int8, the even ones first, less 8 and divided by kNibbleScale.
LOWBIT_INLINE __m512i unpack_nibbles(const void* codes) {
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_setzero_si256(), 1);
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0)), eight = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(codes)));
    return _mm512_ternarylogic_epi64(eight, _mm512_sllv_epi16(bytes, shifts), upper, kXorAnd);
}

LOWBIT_INLINE __m512 load_scales(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
LOWBIT_INLINE __m512 load_scales(__mmask16 mask, const BFloat16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// Of codes as they are multiplied.
LOWBIT_INLINE __m512 load_zeros(__mmask16 mask, const int16_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, from)));
}
LOWBIT_INLINE __m512 load_zeros(__mmask16 mask, const uint8_t* from) {
    const __m512i zeros = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from)), _mm512_set1_epi32(8));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(zeros), _mm512_set1_ps(1 / kNibbleScale));
}

struct PairScales {  // of some groups of two tiles of channels
    alignas(64) float scales[kPairChannels][kScaledGroups], zeros[kPairChannels][kScaledGroups];
};

struct GroupedMemory {
    alignas(64) int8_t unpacked[2][2 * kTileBytes];
    alignas(64) int32_t sums[4][kTileRows * kTileChannels];
    alignas(64) float totals[4][kTileRows * kTileChannels];
    PairScales scales[2];
};

// Groups from `group` on of up to 32 channels.
template <typename Kind>
LOWBIT_INLINE void load_groups(const GemmArgs& job, int64_t channel, int64_t group, PairScales& to) {
    const GroupScales& groups = *job.groups;
    const __mmask16 mask = column_mask(groups.per_channel - group);
    const int64_t channels = smaller(kPairChannels, job.columns - channel), at = channel * groups.per_channel + group;
    const auto* scales = static_cast<const typename Kind::Scale*>(groups.scales) + at;
    const auto* zeros = static_cast<const typename Kind::Zero*>(groups.zero_points) + at;
    for (int64_t i = 0; i < channels; ++i) {
        _mm512_store_ps(to.scales[i], load_scales(mask, scales + i * groups.per_channel));
        if (Kind::has_zeros) _mm512_store_ps(to.zeros[i], load_zeros(mask, zeros + i * groups.per_channel));
    }
}

// 64 inputs of 32 channels times x, in phases between which other things are done: instructions that load tiles hold up what
// follows at once. Tiles 0 and 1 hold the sums of the first 16 channels, 2 and 3 those of the others; of up to 16 rows the even
// ones alone.
template <bool kIsWide>
LOWBIT_INLINE void multiply_pair(int64_t phase, const int8_t* first, const int8_t* second, int64_t stride, const uint8_t* x,
                                 int64_t rows) {
    if (phase == 0) {
        _tile_loadd(6, x, 4 * rows);
        _tile_loadd(4, first, stride);
    } else if (phase == 1) {
        _tile_dpbssd(0, 4, 6);
        if (kIsWide) _tile_loadd(7, x + kTileBytes, kStep);
        else _tile_loadd(5, second, stride);
    } else if (phase == 2) {
        if (!kIsWide) return;
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, second, stride);
    } else {
        _tile_dpbssd(2, 5, 6);
        if (kIsWide) _tile_dpbssd(3, 5, 7);
    }
}

// The sums begin anew.
template <bool kIsWide>
LOWBIT_INLINE void take_sums(int32_t (*sums)[kTileRows * kTileChannels]) {
    if (kIsWide) {
        store_sums(sums);
        zero_sums();
    } else {
        _tile_stored(0, sums[0], kStep);
        _tile_stored(2, sums[2], kStep);
        __asm__ volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(2);
    }
}

struct Unit {
    int64_t number, group;
};

// Adds a unit's sums, scaled, to the totals of the channels of a phase, or to zero.
template <typename Kind, bool kIsWide>
LOWBIT_INLINE void add_unit(const GemmArgs& job, const Unit& unit, int64_t phase, GroupedMemory& memory) {
    const PairScales& pair = memory.scales[unit.group / kScaledGroups % 2];
    const float* scales = pair.scales[phase * kPhaseChannels] + unit.group % kScaledGroups;
    const float* zeros = pair.zeros[phase * kPhaseChannels] + unit.group % kScaledGroups;
    const int64_t first = phase * kPhaseChannels % kTileChannels * kTileRows;
    for (int64_t block = 0; block < (kIsWide ? 2 : 1); ++block) {
        const int64_t row = unit.number * kMostRows + block * kTileRows,
                      tile = phase * kPhaseChannels / kTileChannels * 2 + block;
        const __m512 row_scales = _mm512_loadu_ps(job.groups->row_scales + row),
                     row_sums = _mm512_loadu_ps(job.groups->row_sums + row);
        const int32_t* sums = memory.sums[tile] + first;
        float* totals = memory.totals[tile] + first;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPhaseChannels; ++i) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * kTileRows));
            if (Kind::has_zeros) sum = _mm512_fnmadd_ps(_mm512_set1_ps(zeros[i * kScaledGroups]), row_sums, sum);
            const __m512 before = unit.number ? _mm512_load_ps(totals + i * kTileRows) : _mm512_setzero_ps();
            const __m512 scale = _mm512_mul_ps(row_scales, _mm512_set1_ps(scales[i * kScaledGroups]));
            _mm512_store_ps(totals + i * kTileRows, _mm512_fmadd_ps(sum, scale, before));
        }
    }
}

// Totals [16 channels][16 rows] of each block of rows -> output [rows][channels].
LOWBIT_INLINE void write_totals(const GemmArgs& job, const float (*totals)[kTileRows * kTileChannels], int64_t channel) {
    alignas(64) float turned[kBytesOfAUnit * kRowsOfInt8.most * kTileChannels];
    for (int64_t block = 0; block * kTileRows < job.rows; ++block)
        pack_step(reinterpret_cast<const int8_t*>(totals[block]), kStep, ~__mmask64{0},
                  reinterpret_cast<int8_t*>(turned + block * kTileRows * kTileChannels));
    const int64_t rows = job.rows / kBytesOfAUnit;
    const __m512 bias = job.weight.bias ? _mm512_loadu_ps(job.weight.bias + channel) : _mm512_setzero_ps();
    auto* to = static_cast<BFloat16*>(job.output) + channel;
    for (int64_t row = 0; row < rows; ++row, to += job.columns) {
        const __m512 upper = _mm512_load_ps(turned + row * kTileChannels),
                     lower = _mm512_load_ps(turned + (rows + row) * kTileChannels);
        const __m512 value = _mm512_add_ps(upper, lower);
        store_narrow(to, 0xffff, job.weight.bias ? _mm512_add_ps(value, bias) : value);
    }
}

// Two tiles of channels; where there is no second, the first again.
struct Pair {
    const int8_t* codes[2];
    int64_t row_bytes, channel;

    Pair(const GemmArgs& job, int64_t number, int64_t bytes) : row_bytes(bytes), channel(number * kPairChannels) {
        const auto* weight = static_cast<const int8_t*>(job.weight.data);
        for (int64_t i = 0; i < 2; ++i)
            codes[i] = weight + smaller(channel + i * kTileChannels, job.columns - kTileChannels) * row_bytes;
    }
};

// Ask memory for 256 bytes of some channels, which come four or eight steps later; at the end of a channel for what lies behind.
template <typename Kind>
LOWBIT_INLINE void ask_for(const Pair& pair, const Pair& next, int64_t step) {
    constexpr int64_t kLines = 4, kBytes = 64 * kLines, kSteps = kBytes / Kind::step_bytes, kChannels = kTileChannels / kSteps;
    const int64_t later = (step / kSteps + 1) * kBytes;
    const bool is_next = later >= pair.row_bytes;
    const int64_t at = step % kSteps * kChannels * pair.row_bytes + (is_next ? 0 : later);
    for (int64_t tile = 0; tile < 2; ++tile) {
        const int8_t* codes = (is_next ? next : pair).codes[tile] + at;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kChannels; ++i, codes += pair.row_bytes)
            for (int64_t line = 0; line < kLines; ++line) __asm__ volatile("prefetcht0 %0" : : "m"(codes[64 * line]));
    }
}

// Pairs [first, last) of tiles of channels, with all rows.
template <typename Kind, bool kIsWide>
void multiply_pairs_of_tiles(const GemmArgs& job, int64_t first, int64_t last) {
    auto& memory = scratch_object<GroupedMemory>(Slot::kGrouped);
    const GroupScales& groups = *job.groups;
    const int64_t steps = job.depth / kStep, group_steps = groups.inputs / kStep, rows = rows_of_tile(job);
    const auto unpack = [&memory](const Pair& pair, int64_t step, int64_t turn, int64_t phase) LOWBIT_INLINE_LAMBDA {
        const int8_t* from =
            pair.codes[phase * kPhaseChannels / kTileChannels] + phase * kPhaseChannels % kTileChannels * pair.row_bytes;
        int8_t* to = memory.unpacked[turn] + phase * kPhaseChannels * kStep;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPhaseChannels; ++i)
            _mm512_store_si512(to + i * kStep, unpack_nibbles(from + i * pair.row_bytes + step * Kind::step_bytes));
    };
    configure_tiles(rows);
    zero_sums();
    Pair pair(job, first, steps * Kind::step_bytes);
    int64_t turn = 0;
    for (int64_t phase = 0; Kind::is_packed && phase < kPhases; ++phase) unpack(pair, 0, turn, phase);
    for (int64_t number = first; number < last; ++number) {
        const Pair next(job, smaller(number + 1, last - 1), pair.row_bytes);
        const uint8_t* x = job.tiles;
        Unit unit{-1, 0};  // whose sums are waiting
        int64_t loaded = 0, left = groups.unit_steps;
        for (int64_t step = 0; step < steps; ++step, x += bytes_of_step(job)) {
            if (step == loaded * group_steps) {
                load_groups<Kind>(job, pair.channel, loaded, memory.scales[loaded / kScaledGroups % 2]);
                loaded += kScaledGroups;
            }
            ask_for<Kind>(pair, next, step);
            const int8_t* codes[2] = {pair.codes[0] + step * Kind::step_bytes, pair.codes[1] + step * Kind::step_bytes};
            if (Kind::is_packed) codes[0] = memory.unpacked[turn], codes[1] = codes[0] + kTileBytes;
            const int64_t stride = Kind::is_packed ? kStep : pair.row_bytes;
            const bool is_added = left == groups.unit_steps && unit.number >= 0, is_last = step + 1 == steps;
            turn ^= 1;
            __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read it
#pragma GCC unroll 4
            for (int64_t phase = 0; phase < kPhases; ++phase) {
                multiply_pair<kIsWide>(phase, codes[0], codes[1], stride, x, rows);
                if (is_added) add_unit<Kind, kIsWide>(job, unit, phase, memory);
                if (Kind::is_packed) unpack(is_last ? next : pair, is_last ? 0 : step + 1, turn, phase);
            }
            if (--left && !is_last) continue;
            left = groups.unit_steps;
            unit = {unit.number + 1, step / group_steps};
            take_sums<kIsWide>(memory.sums);
        }
        for (int64_t phase = 0; phase < kPhases; ++phase) add_unit<Kind, kIsWide>(job, unit, phase, memory);
        write_totals(job, memory.totals, pair.channel);
        if (pair.channel + kTileChannels < job.columns) write_totals(job, memory.totals + 2, pair.channel + kTileChannels);
        pair = next;
    }
    _tile_release();
}

template <typename Kind>
void multiply_grouped(const GemmArgs& job, int64_t first, int64_t last) {
    constexpr bool kMayBeWide = kBytesOfAUnit * (Kind::is_packed ? kRowsOfInt4 : kRowsOfInt8).most > kTileRows;
    if (kMayBeWide && job.rows > kTileRows) multiply_pairs_of_tiles<Kind, kMayBeWide>(job, first, last);
    else multiply_pairs_of_tiles<Kind, false>(job, first, last);
}

template <typename Code>
constexpr TileKernel grouped_products[2][2] = {
    // by the type of the scales, and whether there are zero points
    {multiply_grouped<Grouped<Code, float, false>>, multiply_grouped<Grouped<Code, float, true>>},
    {multiply_grouped<Grouped<Code, BFloat16, false>>, multiply_grouped<Grouped<Code, BFloat16, true>>}};

LOWBIT_END
#endif  // LOWBIT_NATIVE_KERNELS_AMX_GROUPED_ROWS_H
