/* Gates on planes, for one instruction set: included once for each, with
 *   NAME(x)   the name of a function of this instruction set
 *   TARGET    the attribute by which the compiler may use it
 *   WORDS     words of planes that are computed together
 *
 * Digits are selected by multiplexers over public bits; shares are never a condition or an index. */

typedef uint64_t NAME(words) __attribute__((vector_size(8 * WORDS), aligned(8), may_alias));

#define INLINE TARGET static inline __attribute__((always_inline))
#define LOAD(from) (*(const NAME(words) *)(from))

/* Entries c and c - 1 of the table of a digit of `size` bits: as `_look_up` of comparison.py. */
INLINE void NAME(look_up)(const uint64_t *table, int64_t step, const uint64_t *digit, int size, uint64_t first,
                          NAME(words) *less, NAME(words) *equal) {
    const int count = 1 << size;
    NAME(words) entries[17], at[8], before[8], bit = LOAD(digit);
    entries[0] = (NAME(words)){0} + first;
    for (int i = 0; i < count - 1; i++) entries[i + 1] = LOAD(table + i * step);
    entries[count] = (NAME(words)){0};
    for (int i = 0; i < count / 2; i++) {
        const NAME(words) even = entries[2 * i], odd = entries[2 * i + 1], next = entries[2 * i + 2];
        before[i] = even ^ ((even ^ odd) & bit);
        at[i] = odd ^ ((odd ^ next) & bit);
    }
    for (int level = 1; level < size; level++) {
        bit = LOAD(digit + level * MOST_BLOCK);
        for (int i = 0; i < count >> (level + 1); i++) {
            before[i] = before[2 * i] ^ ((before[2 * i] ^ before[2 * i + 1]) & bit);
            at[i] = at[2 * i] ^ ((at[2 * i] ^ at[2 * i + 1]) & bit);
        }
    }
    *less = at[0];
    *equal = before[0] ^ at[0];
}

/* Digit number `index` of WORDS words from `word`, under the masks. */
INLINE void NAME(digit)(const gate *of, const digit_work *work, int64_t word, const uint64_t *bits, int index, int size) {
    const int64_t step = of->words;
    NAME(words) less, equal;
    NAME(look_up)(work->tables + 15 * index * step + word, step, bits, size, work->first, &less, &equal);
    const int64_t at = index * step + word, other = (of->digits + index - 1) * step + word;
    *(NAME(words) *)(work->masked + at) = less ^ LOAD(work->masks + at);
    if (index > 0) *(NAME(words) *)(work->masked + other) = equal ^ LOAD(work->masks + other);
}

/* All digits of WORDS words from `word`; `planes` are the bits of the opened values, MOST_BLOCK words from bit to bit. */
TARGET static void NAME(digits)(const gate *of, const digit_work *work, int64_t word, const uint64_t *planes) {
    for (int index = 0; index < of->digits; index++) {
        const uint64_t *bits = planes + DIGIT * index * MOST_BLOCK;
        switch (of->compared - DIGIT * index) {
            case 1: NAME(digit)(of, work, word, bits, index, 1); break;
            case 2: NAME(digit)(of, work, word, bits, index, 2); break;
            case 3: NAME(digit)(of, work, word, bits, index, 3); break;
            default: NAME(digit)(of, work, word, bits, index, 4);
        }
    }
}

/* t for WORDS words from `word`, whose highest opened bits are `top`: as `_masked_borrow` of comparison.py, by Horner's rule; `digits` is known when this is
 * compiled. */
INLINE void NAME(borrow)(const gate *of, const borrow_work *work, int64_t word, const uint64_t *top, int digits) {
    const int64_t step = of->words;
    const uint64_t *masks = work->masks + word, *masked = work->masked + word, *corrected = work->products + word;
    const int all = 1 << (digits - 1);
    NAME(words) products[32], value[32];
    products[0] = (NAME(words)){0} + work->first;
    for (int subset = 1; subset < all; subset++) {
        if ((subset & (subset - 1)) == 0) {
            products[subset] = LOAD(masks + (digits + __builtin_ctz((unsigned)subset)) * step);
        } else {
            products[subset] = LOAD(corrected);
            corrected += step;
        }
    }
    for (int digit = 0; digit < digits; digit++) {
        const NAME(words) less = LOAD(masked + digit * step);
        const NAME(words) equal = digit > 0 ? LOAD(masked + (digits + digit - 1) * step) : (NAME(words)){0};
        for (int i = 0; i < all >> digit; i++) {
            NAME(words) term = products[i << digit] & less;
            if (i == 0) {
                term ^= LOAD(masks + digit * step);
            } else {
                term ^= LOAD(corrected);
                corrected += step;
            }
            if (digit > 0) term ^= (value[2 * i] & equal) ^ value[2 * i + 1];
            value[i] = term;
        }
    }
    *(NAME(words) *)(work->result + word) = value[0] ^ LOAD(work->result_mask + word) ^ LOAD(top);
}

TARGET static void NAME(borrows)(const gate *of, const borrow_work *work, int64_t word, const uint64_t *top) {
    switch (of->digits) {
        case 2: NAME(borrow)(of, work, word, top, 2); break;
        case 3: NAME(borrow)(of, work, word, top, 3); break;
        case 4: NAME(borrow)(of, work, word, top, 4); break;
        case 5: NAME(borrow)(of, work, word, top, 5); break;
        default: NAME(borrow)(of, work, word, top, 6);
    }
}

#undef INLINE
#undef LOAD
