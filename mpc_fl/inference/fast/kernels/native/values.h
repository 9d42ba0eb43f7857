/* Gates on values, 64 at a time, for one instruction set: included once for each after planes.h, with NAME, TARGET and WORDS.
 * Plain loops: the compiler makes vectors of them. */

#define INLINE TARGET static inline __attribute__((always_inline))

/* The `bits` low bits of 64 values as words, `step` words from bit to bit. */
INLINE void NAME(planes_of)(const uint32_t *values, int bits, uint64_t *planes, int step) {
#if WORDS > 2 && defined(__x86_64__)
    for (int low = 0; low < bits; low += 8) {
        __m256i halves[2];
        for (int h = 0; h < 2; h++) {
            const __m256i *from = (const __m256i *)(values + 32 * h), octet = _mm256_set1_epi32(0xff);
            __m256i part[4];
            for (int i = 0; i < 4; i++)
                part[i] = _mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256(from + i), _mm_cvtsi32_si128(low)), octet);
            const __m256i octets = _mm256_packus_epi16(_mm256_packus_epi32(part[0], part[1]), _mm256_packus_epi32(part[2], part[3]));
            halves[h] = _mm256_permutevar8x32_epi32(octets, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        }
        for (int bit = 7; bit >= 0; bit--) {
            if (low + bit < bits) {
                const uint32_t first = (uint32_t)_mm256_movemask_epi8(halves[0]);
                planes[(low + bit) * step] = first | (uint64_t)(uint32_t)_mm256_movemask_epi8(halves[1]) << 32;
            }
            for (int h = 0; h < 2; h++) halves[h] = _mm256_add_epi8(halves[h], halves[h]);
        }
    }
#else
    for (int bit = 0; bit < bits; bit++) planes[bit * step] = 0;
    for (int low = 0; low < bits; low += 8)
        for (int q = 0; q < 8; q++) {
            uint64_t octets = 0;
            for (int i = 0; i < 8; i++) octets |= (uint64_t)(values[8 * q + i] >> low & 0xff) << (8 * i);
            /* A matrix of 8 x 8 bits is transposed (Warren, Hacker's Delight, section 7-3). */
            uint64_t swapped = (octets ^ (octets >> 7)) & 0x00AA00AA00AA00AAu;
            octets ^= swapped ^ (swapped << 7);
            swapped = (octets ^ (octets >> 14)) & 0x0000CCCC0000CCCCu;
            octets ^= swapped ^ (swapped << 14);
            swapped = (octets ^ (octets >> 28)) & 0x00000000F0F0F0F0u;
            octets ^= swapped ^ (swapped << 28);
            for (int bit = low; bit < bits && bit < low + 8; bit++)
                planes[bit * step] |= (octets >> (8 * (bit - low)) & 0xff) << (8 * q);
        }
#endif
}

/* All ones where a bit of `word` is 0, for 64 values. */
INLINE void NAME(where_zero)(uint64_t word, uint32_t *zero) {
    for (int half = 0; half < 2; half++) {
        const uint32_t bits = (uint32_t)(word >> (32 * half));
        for (int i = 0; i < 32; i++) zero[32 * half + i] = (bits >> i & 1) - 1;
    }
}

/* mine = share + mask (+ 2^(k-1)) modulo 2^k, and the same packed as bit_planes.py does. */
TARGET static void NAME(open_input)(const gate *of, const uint32_t *share, const uint32_t *mask, uint32_t more,
                                    uint32_t *mine, uint8_t *message) {
    const int bits = (int)of->bits, rest = bits % 8;
    const uint32_t ones = (1u << bits) - 1;
    const int64_t plane_bytes = (of->count + 7) / 8;
    uint8_t *third = message + 2 * of->count, *planes = message + bits / 8 * of->count;
    for (int64_t start = 0; start < of->count; start += WORD_BITS) {
        const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
        uint32_t values[WORD_BITS] = {0};
        for (int i = 0; i < count; i++) values[i] = (share[start + i] + mask[start + i] + more) & ones;
        memcpy(mine + start, values, (size_t)count * sizeof *values);
        if (bits >= 16) {
            uint16_t low[WORD_BITS];
            for (int i = 0; i < WORD_BITS; i++) low[i] = (uint16_t)values[i];
            memcpy(message + 2 * start, low, (size_t)count * sizeof *low);
        } else {
            for (int i = 0; i < count; i++) message[start + i] = (uint8_t)values[i];
        }
        if (bits == 24)
            for (int i = 0; i < count; i++) third[start + i] = (uint8_t)(values[i] >> 16);
        if (rest) {
            uint64_t found[8];
            for (int i = 0; i < WORD_BITS; i++) values[i] >>= bits - rest;
            NAME(planes_of)(values, rest, found, 1);
            for (int bit = 0; bit < rest; bit++)
                memcpy(planes + bit * plane_bytes + start / 8, &found[bit], (size_t)(count + 7) / 8);
        }
    }
}

/* 64 values of a packed message from value `start` on, zero beyond the last. */
INLINE void NAME(unpacked)(const gate *of, const uint8_t *message, int64_t start, uint32_t *values) {
    const int bits = (int)of->bits, rest = bits % 8;
    const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
    const int64_t plane_bytes = (of->count + 7) / 8;
    const uint8_t *planes = message + bits / 8 * of->count;
    if (bits >= 16) {
        uint16_t low[WORD_BITS] = {0};
        memcpy(low, message + 2 * start, (size_t)count * sizeof *low);
        for (int i = 0; i < WORD_BITS; i++) values[i] = low[i];
    } else {
        uint8_t low[WORD_BITS] = {0};
        memcpy(low, message + start, (size_t)count);
        for (int i = 0; i < WORD_BITS; i++) values[i] = low[i];
    }
    if (bits == 24)
        for (int i = 0; i < count; i++) values[i] |= (uint32_t)message[2 * of->count + start + i] << 16;
    for (int bit = 0; bit < rest; bit++) {
        uint64_t word = 0;
        memcpy(&word, planes + bit * plane_bytes + start / 8, (size_t)(count + 7) / 8);
        const int place = bits - rest + bit;
        for (int half = 0; half < 2; half++) {
            const uint32_t part = (uint32_t)(word >> (32 * half));
            for (int i = 0; i < 32; i++) values[32 * half + i] |= (part >> i & 1) << place;
        }
    }
}

/* opened = mine + theirs modulo 2^k, in place of mine, and its digits looked up. */
TARGET static void NAME(look_up_digits)(const gate *of, const uint8_t *message, uint32_t *opened, const digit_work *work) {
    const int bits = (int)of->bits;
    const uint32_t ones = (1u << bits) - 1;
    uint64_t planes[MOST_THRESHOLDS][MOST_BITS * MOST_BLOCK] = {{0}};
    for (int64_t word = 0; word < of->words; word += MOST_BLOCK) {
        const int64_t block = of->words - word < MOST_BLOCK ? of->words - word : MOST_BLOCK;
        for (int64_t w = 0; w < block; w++) {
            const int64_t start = (word + w) * WORD_BITS;
            const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
            uint32_t values[WORD_BITS];
            NAME(unpacked)(of, message, start, values);
            for (int i = 0; i < count; i++) values[i] = (values[i] + opened[start + i]) & ones;
            for (int i = count; i < WORD_BITS; i++) values[i] = 0;
            memcpy(opened + start, values, (size_t)count * sizeof *values);
            NAME(planes_of)(values, bits, planes[0] + w, MOST_BLOCK);
            if (of->thresholds > 1) {
                uint32_t less[WORD_BITS];
                less_threshold(of, values, count, 1, less);
                NAME(planes_of)(less, bits, planes[1] + w, MOST_BLOCK);
            }
        }
        for (int number = 0; number < of->thresholds; number++) {
            int64_t w = 0;
            for (; w + WORDS <= block; w += WORDS) NAME(digits)(of, work, word + w, planes[number] + w, number);
            for (; w < block; w++) digits_single(of, work, word + w, planes[number] + w, number);
        }
    }
}

INLINE void NAME(borrow_of_threshold)(const gate *of, const borrow_work *work, int number) {
    for (int64_t word = 0; word < of->words; word += MOST_BLOCK) {
        const int64_t block = of->words - word < MOST_BLOCK ? of->words - word : MOST_BLOCK;
        uint64_t top[MOST_BLOCK] = {0};
        for (int64_t w = 0; w < block && of->first; w++) {
            const int64_t start = (word + w) * WORD_BITS;
            const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
            uint32_t values[WORD_BITS] = {0};
            memcpy(values, work->opened + start, (size_t)count * sizeof *values);
            less_threshold(of, values, count, number, values);
            for (int i = 0; i < WORD_BITS; i++) values[i] >>= of->bits - 1;
            NAME(planes_of)(values, 1, top + w, 1);
        }
        int64_t w = 0;
        for (; w + WORDS <= block; w += WORDS) NAME(borrows)(of, work, word + w, top + w, number);
        for (; w < block; w++) borrows_single(of, work, word + w, top + w, number);
    }
}

TARGET static void NAME(borrow_of)(const gate *of, const borrow_work *work) {
    for (int number = 0; number < of->thresholds; number++) NAME(borrow_of_threshold)(of, work, number);
}

/* A word of 16 or 32 bits. */
INLINE uint32_t NAME(high)(const void *from, int64_t index, int narrow) {
    return narrow ? ((const uint16_t *)from)[index] : ((const uint32_t *)from)[index];
}

/* As `_rectified` of comparison.py. */
INLINE void NAME(rectify)(const gate *of, const rectifier_work *work, int wide, int narrow, int capped) {
    const int bits = (int)of->bits;
    const uint32_t ones = wide ? UINT32_MAX : (1u << bits) - 1, c_too = of->first ? UINT32_MAX : 0;
    for (int64_t start = 0; start < of->count; start += WORD_BITS) {
        const int64_t end = of->count - start < WORD_BITS ? of->count : start + WORD_BITS;
        uint32_t zeros[WORD_BITS], below[WORD_BITS];
        const int64_t word = start / WORD_BITS;
        NAME(where_zero)(capped ? ~(work->t[word] ^ work->t[of->words + word]) : work->t[word], zeros);
        if (capped) NAME(where_zero)(work->t[of->words + word], below);
        for (int64_t i = start; i < end; i++) {
            const uint32_t c = work->opened[i], zero = zeros[i - start];
            uint32_t y = ((work->w[i] * c - work->wr[i]) ^ zero) - zero;
            y += ((c & c_too) - work->input_mask[i]) & zero;
            if (capped) {
                const uint32_t at_zero = below[i - start];
                y += (((work->reached[i] ^ at_zero) - at_zero) + (at_zero & c_too & 1)) * (uint32_t)of->ceiling;
            }
            if (wide) {
                const uint32_t both = NAME(high)(work->both, i, narrow), other = NAME(high)(work->other, i, narrow);
                const uint32_t wraps = (((both ^ other) & zero) ^ both) & ((c >> (bits - 1)) - 1);
                y += ((NAME(high)(work->kappa, i, narrow) & zero) + wraps) << bits;
            }
            work->result[i] = y & ones;
        }
    }
}

INLINE void NAME(rectify_wide_or_not)(const gate *of, const rectifier_work *work, int capped) {
    if (work->kappa == NULL)
        NAME(rectify)(of, work, 0, 0, capped);
    else if (of->bits >= 16)
        NAME(rectify)(of, work, 1, 1, capped);
    else
        NAME(rectify)(of, work, 1, 0, capped);
}

TARGET static void NAME(rectified)(const gate *of, const rectifier_work *work) {
    if (of->thresholds > 1)
        NAME(rectify_wide_or_not)(of, work, 1);
    else
        NAME(rectify_wide_or_not)(of, work, 0);
}

/* As `_extended` of comparison.py. */
INLINE void NAME(extend)(const gate *of, const extension_work *work, int narrow) {
    const int bits = (int)of->bits;
    const uint32_t c_too = of->first ? UINT32_MAX : 0, less = of->first ? 1u << (bits - 2) : 0;
    for (int64_t i = 0; i < of->count; i++) {
        const uint32_t c = work->opened[i], zero = (c >> (bits - 1)) - 1;
        const uint32_t at_zero = NAME(high)(work->at_zero, i, narrow), at_one = NAME(high)(work->at_one, i, narrow);
        const uint32_t wraps = ((at_zero ^ at_one) & zero) ^ at_one;
        work->result[i] = (c & c_too) - work->input_mask[i] - less + (wraps << bits);
    }
}

TARGET static void NAME(extended)(const gate *of, const extension_work *work) {
    if (of->bits >= 16)
        NAME(extend)(of, work, 1);
    else
        NAME(extend)(of, work, 0);
}

#undef INLINE
