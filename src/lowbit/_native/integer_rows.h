// Up to four rows of activations times weights whose codes are integers of up to 8 bits, by the instruction that multiplies
// bytes: it takes less time than memory takes to give the codes, which decoding them does not.
//
// Activations become integers of 16 bits, with a power of two as scale for each kUnit of them: a bfloat16, which has eight bits,
// is rounded only if it is less than 1/128 of its unit's largest. Their upper and lower bytes are multiplied with the codes
// apart, and the sums of a unit are exact. A unit that holds an infinity or a NaN makes the results of its row NaN.

constexpr int64_t kUnit = 128;
constexpr int64_t kIntegerChannels = 16;  // of a task
constexpr int64_t kBytesAhead = 8192;     // memory is asked for codes so long before they are used
constexpr int64_t kMostGroups = 4096;     // of a channel, whose scales are held

struct alignas(64) Unit {
    int8_t upper[2][64];  // byte b of register r belongs to the code that a weight loads there
    uint8_t lower[2][64];
    float sums[2][16];  // what codes of 1 in each register would give; where lanes of both are added: in both, to the first.
                        // The second is then, of signed codes, what an offset of 128 adds to the product with `upper`
};

struct IntegerJob {
    const void* weight;  // what a weight below is made of
    const void* x;       // [rows, depth], x_stride elements apart
    int64_t rows, x_stride, depth, columns;
    Unit* units;        // [rows, depth / kUnit]
    float* unit_scale;  // likewise; apart, so that units leave more of the first-level cache
    const float* bias;  // [columns], or null
    void* output;       // [rows, columns]
    int element_type;
    LowRank low_rank;  // its hidden [rows, rank] and up are used
};

// The place of the activation of byte b of register r: registers take kRun activations in turn.
template <int kRun>
LOWBIT_INLINE int64_t place_of(int64_t r, int64_t b) {
    return b / kRun * 2 * kRun + r * kRun + b % kRun;
}

// Finds the integers of a unit, in the activations' order. A scale is at least 2**-109, far from where products vanish.
template <typename Input>
LOWBIT_INLINE float round_unit(const Input* x, int16_t* codes) {
    constexpr uint32_t kSmallest = 32, kInfinite = 255;
    float values[kUnit];
    uint32_t largest = kSmallest << 23;
    for (int64_t i = 0; i < kUnit; ++i) {
        values[i] = widen(x[i]);
        const uint32_t magnitude = as_bits(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t exponent = largest >> 23;
    if (exponent == kInfinite) {
        std::memset(codes, 0, kUnit * sizeof *codes);
        return as_float(0x7fc00000u);
    }
    const float inverse = as_float((254 - exponent + 14) << 23);
    for (int64_t i = 0; i < kUnit; ++i) {
        const float code = std::nearbyintf(values[i] * inverse);  // below 2**15, or 2**15 of a float32
        codes[i] = static_cast<int16_t>(code < 32767.0f ? code : 32767.0f);
    }
    return as_float((exponent - 14) << 23);
}

// Units [first, last) of all rows, in the order of registers that take kRun activations in turn.
template <typename Weight, int kRun, typename Input>
void round_activations(const IntegerJob& job, int64_t first, int64_t last) {
    const int64_t units = job.depth / kUnit;
    for (; first < last; ++first) {
        int16_t codes[kUnit];
        Unit& unit = job.units[first];
        job.unit_scale[first] = round_unit(static_cast<const Input*>(job.x) + first / units * job.x_stride + first % units * kUnit, codes);
        int32_t sums[2][16] = {};
        for (int64_t r = 0; r < 2; ++r)
            for (int64_t b = 0; b < 64; ++b) {
                const int16_t code = codes[place_of<kRun>(r, b)];
                unit.upper[r][b] = static_cast<int8_t>(code >> 8);
                unit.lower[r][b] = static_cast<uint8_t>(code & 255);
                sums[Weight::is_joint ? 0 : r][b / 4] += code;
                if (Weight::is_signed) sums[1][b / 4] += (code >> 8) * 32768;
            }
        for (int64_t r = 0; r < 2; ++r)
            for (int64_t lane = 0; lane < 16; ++lane) unit.sums[r][lane] = static_cast<float>(sums[r][lane]);
    }
}

// What a weight loads of a channel for a unit: codes, what each lane's sums are multiplied with, and what is subtracted from a
// code times that.
struct UnitCodes {
    __m512i codes[2];
    __m512 scale[2], minimum[2];
};

// The exact sums of the products of registers kFirst ... kLast.
template <bool kIsSigned, int kFirst, int kLast>
LOWBIT_INLINE __m512 dot(const UnitCodes& weight, const Unit& unit) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int r = kFirst; r <= kLast; ++r) {
        const __m512i codes = kIsSigned ? _mm512_xor_si512(weight.codes[r], _mm512_set1_epi8(-128)) : weight.codes[r];
        sum = _mm512_dpbusd_epi32(sum, codes, _mm512_load_si512(unit.upper[r]));
    }
    sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 2
    for (int r = kFirst; r <= kLast; ++r) sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(unit.lower[r]), weight.codes[r]);
    return _mm512_cvtepi32_ps(sum);
}

// A lane's codes of both registers have one scale.
template <bool kIsSigned, bool kIsScaled, bool kHasMinimum>
LOWBIT_INLINE __m512 joint_product(const UnitCodes& weight, const Unit& unit) {
    __m512 value = dot<kIsSigned, 0, 1>(weight, unit);
    if (kIsSigned) value = _mm512_sub_ps(value, _mm512_load_ps(unit.sums[1]));
    if (kIsScaled) value = _mm512_mul_ps(value, weight.scale[0]);
    return kHasMinimum ? _mm512_fnmadd_ps(weight.minimum[0], _mm512_load_ps(unit.sums[0]), value) : value;
}

// Each register has its own.
LOWBIT_INLINE __m512 apart_product(const UnitCodes& weight, const Unit& unit) {
    __m512 value = _mm512_mul_ps(dot<false, 0, 0>(weight, unit), weight.scale[0]);
    value = _mm512_fmadd_ps(dot<false, 1, 1>(weight, unit), weight.scale[1], value);
    value = _mm512_fnmadd_ps(_mm512_load_ps(unit.sums[0]), weight.minimum[0], value);
    return _mm512_fnmadd_ps(_mm512_load_ps(unit.sums[1]), weight.minimum[1], value);
}

LOWBIT_INLINE __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

LOWBIT_INLINE __m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }

LOWBIT_INLINE void load_codes(Int8, const uint8_t* from, UnitCodes& unit) {
    unit.codes[0] = _mm512_loadu_si512(from);
    unit.codes[1] = _mm512_loadu_si512(from + 64);
}

// Two codes in a byte.
LOWBIT_INLINE void split_nibbles(__m512i bytes, UnitCodes& unit) {
    unit.codes[0] = low_nibbles(bytes);
    unit.codes[1] = low_nibbles(_mm512_srli_epi16(bytes, 4));
}

LOWBIT_INLINE void load_codes(Int4, const uint8_t* from, UnitCodes& unit) { split_nibbles(_mm512_loadu_si512(from), unit); }

// Twice the values, plus 12.
LOWBIT_INLINE void load_codes(E2M1, const uint8_t* from, UnitCodes& unit) {
    const __m512i values = _mm512_set4_epi32(0x00040608, 0x090a0b0c, 0x18141210, 0x0f0e0d0c);
    split_nibbles(_mm512_loadu_si512(from), unit);
    for (__m512i& codes : unit.codes) codes = _mm512_shuffle_epi8(values, codes);
}

// A WeightJob whose depth is a multiple of kUnit, and so many groups of equal size in a unit, or one of all of a channel.
template <typename Code, bool kIsWhole, bool kHasZero>
struct GroupedWeight {
    static constexpr bool is_signed = std::is_same<Code, Int8>::value, is_joint = true, has_minimum = kHasZero || !is_signed;
    using Zero = typename std::conditional<is_signed, int16_t, uint8_t>::type;
    static constexpr int run = is_signed ? 64 : 1, unit_bytes = kUnit * avx512::kBits<Code> / 8;
    static constexpr float offset = std::is_same<Code, E2M1>::value ? 12.0f : 8.0f;

    const WeightJob& job;
    const int64_t groups, in_unit;
    const __m512i group_of_lane;
    __m512 zero;
    const uint8_t* codes;
    alignas(64) float scales[kIsWhole ? 16 : kMostGroups + 16], zeros[kIsWhole || !kHasZero ? 16 : kMostGroups + 16];

    explicit GroupedWeight(const void* weight)
        : job(*static_cast<const WeightJob*>(weight)), groups(kIsWhole ? 1 : job.depth / job.block_columns),
          in_unit(kIsWhole ? 0 : kUnit / job.block_columns),
          group_of_lane(_mm512_srli_epi32(_mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(in_unit))), 4)),
          zero(_mm512_set1_ps(offset)) {}

    // Returns what all sums of a channel are to be multiplied with.
    LOWBIT_INLINE_LAMBDA inline float begin(int64_t channel) {
        const int64_t index = avx512::quotient(channel, job.block_rows) * groups;
        codes = static_cast<const uint8_t*>(job.weight) + channel * (job.depth * avx512::kBits<Code> / 8);
        float factor = std::is_same<Code, E2M1>::value ? 0.5f : 1.0f;
        if (job.outer_scale && !job.outer_columns) factor *= job.outer_scale[0];
        const auto* points = static_cast<const Zero*>(job.zero_point) + index;
        if (kHasZero && kIsWhole) zero = _mm512_set1_ps(points[0]);
        if (kIsWhole) return factor * avx512::scale_at(job, index, channel, 0);
        avx512::load_scales(job, index, groups, scales);
        if (job.outer_columns) multiply_outer_scales(channel);
        for (int64_t i = 0; kHasZero && i < groups; ++i) zeros[i] = points[i];
        return factor;
    }

    // Of 512 inputs, or a multiple, each; they are whole registers of scales, as kernels_for sees to.
    LOWBIT_INLINE_LAMBDA inline void multiply_outer_scales(int64_t channel) {
        const float* outer = job.outer_scale + channel * avx512::quotient_up(job.depth, job.outer_columns);
        const int64_t count = job.outer_columns / job.block_columns;
        for (int64_t i = 0; i < groups; i += count, ++outer)
            for (int64_t j = i; j < smaller(i + count, groups); j += 16)
                _mm512_storeu_ps(scales + j, _mm512_mul_ps(_mm512_loadu_ps(scales + j), _mm512_set1_ps(*outer)));
    }

    LOWBIT_INLINE_LAMBDA inline const uint8_t* at(int64_t i) const { return codes + i * unit_bytes; }

    LOWBIT_INLINE_LAMBDA inline __m512 of_lanes(const float* of_groups) const {
        return _mm512_permutexvar_ps(group_of_lane, _mm512_castps256_ps512(_mm256_loadu_ps(of_groups)));
    }

    LOWBIT_INLINE_LAMBDA inline UnitCodes load(int64_t i) {
        UnitCodes unit;
        load_codes(Code{}, at(i), unit);
        unit.minimum[0] = zero;
        if (kIsWhole) return unit;
        unit.scale[0] = of_lanes(scales + i * in_unit);
        if (has_minimum) unit.minimum[0] = _mm512_mul_ps(kHasZero ? of_lanes(zeros + i * in_unit) : zero, unit.scale[0]);
        return unit;
    }

    LOWBIT_INLINE_LAMBDA static inline __m512 product(const UnitCodes& weight, const Unit& unit) {
        return joint_product<is_signed, !kIsWhole, has_minimum>(weight, unit);
    }
};

LOWBIT_INLINE float low_rank_product(const LowRank& low_rank, int64_t row, int64_t channel) {
    __m512 sum = _mm512_setzero_ps();
    const BFloat16 *hidden = low_rank.hidden + row * low_rank.rank, *up = low_rank.up + channel * low_rank.rank;
    for (int64_t i = 0; i < low_rank.rank; i += 16) {
        const __mmask16 mask = static_cast<__mmask16>(low_rank.rank - i >= 16 ? 0xffff : (1u << (low_rank.rank - i)) - 1);
        const __m512i x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, hidden + i)), 16);
        const __m512i y = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, up + i)), 16);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

LOWBIT_INLINE void write_result(const IntegerJob& job, int64_t row, int64_t channel, float value) {
    const int64_t at = row * job.columns + channel;
    if (job.low_rank.rank) value += low_rank_product(job.low_rank, row, channel);
    if (job.bias) value += job.bias[channel];
    if (job.element_type == 1) narrow(value, static_cast<BFloat16*>(job.output)[at]);
    else narrow(value, static_cast<Half*>(job.output)[at]);
}

// `kChannels` channels at a time, so that activations are loaded once for them: those of four rows do not fit all first-level
// caches.
template <int kRows, int kChannels, typename Weight>
LOWBIT_INLINE void multiply_channels(const IntegerJob& job, int64_t channel, Weight* weights) {
    const int64_t units = job.depth / kUnit;
    __m512 sums[kChannels][kRows];
    float factors[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
        factors[c] = weights[c].begin(channel + c);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sums[c][row] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < units; ++i) {
        UnitCodes codes[kChannels];
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) {
            for (int byte = 0; byte < Weight::unit_bytes; byte += 64)
                _mm_prefetch(reinterpret_cast<const char*>(weights[c].at(i)) + kBytesAhead + byte, _MM_HINT_T1);
            codes[c] = weights[c].load(i);
        }
#pragma GCC unroll 4
        for (int64_t row = 0, at = i; row < kRows; ++row, at += units) {
            const __m512 scale = _mm512_set1_ps(job.unit_scale[at]);
#pragma GCC unroll 4
            for (int c = 0; c < kChannels; ++c)
                sums[c][row] = _mm512_fmadd_ps(Weight::product(codes[c], job.units[at]), scale, sums[c][row]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) write_result(job, row, channel + c, _mm512_reduce_add_ps(sums[c][row]) * factors[c]);
}

// Groups [first, last) of kIntegerChannels.
template <typename Weight, int kRows>
void multiply_integers(const IntegerJob& job, int64_t first, int64_t last) {
    constexpr int kTogether = 2;
    Weight weights[kTogether] = {Weight(job.weight), Weight(job.weight)};
    const int64_t end = smaller(last * kIntegerChannels, job.columns);
    int64_t channel = first * kIntegerChannels;
    for (; channel + kTogether <= end; channel += kTogether) multiply_channels<kRows, kTogether>(job, channel, weights);
    for (; channel < end; ++channel) multiply_channels<kRows, 1>(job, channel, weights);
}

struct IntegerKernels {
    // Of a float32 in the order of split activations, and as they are: float32, bfloat16.
    void (*round[3])(const IntegerJob&, int64_t, int64_t);
    void (*multiply[kFewRows])(const IntegerJob&, int64_t, int64_t);
};

template <typename Weight>
constexpr IntegerKernels kIntegerKernels{
    {round_activations<Weight, 16, float>, round_activations<Weight, Weight::run, float>, round_activations<Weight, Weight::run, BFloat16>},
    {multiply_integers<Weight, 1>, multiply_integers<Weight, 2>, multiply_integers<Weight, 3>, multiply_integers<Weight, 4>}};

template <typename Code, bool kHasZero>
const IntegerKernels* grouped_kernels(bool is_whole) {
    return is_whole ? &kIntegerKernels<GroupedWeight<Code, true, kHasZero>> : &kIntegerKernels<GroupedWeight<Code, false, kHasZero>>;
}

template <typename Code>
const IntegerKernels* grouped_kernels(const WeightJob& job, bool is_whole) {
    return job.zero_point ? grouped_kernels<Code, true>(is_whole) : grouped_kernels<Code, false>(is_whole);
}

// The kernels for a weight, or null where there are none.
const IntegerKernels* kernels_for(const WeightJob& job, int code_type) {
    const bool is_whole = job.block_columns >= job.depth;
    const bool is_even = kUnit % job.block_columns == 0 && job.block_columns >= 16 && job.depth / job.block_columns <= kMostGroups;
    if (job.depth % kUnit || !(is_whole || is_even) || (job.outer_columns && job.block_columns > 32)) return nullptr;
    switch (code_type) {
        case 0: return is_whole || job.block_columns == kUnit ? grouped_kernels<Int8>(job, is_whole) : nullptr;
        case 2: return grouped_kernels<Int4>(job, is_whole);
        case 3: return grouped_kernels<E2M1, false>(is_whole);
        default: return nullptr;
    }
}
