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
    NAME(words) entries[65], at[32], before[32], bit = LOAD(digit);
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

/* One digit of WORDS words, under the masks: less_j in plane `at` and equal_j, which the lowest digit has no use for, in `other`. */
INLINE void NAME(digit)(const digit_work *work, const uint64_t *table, int64_t step, const uint64_t *bits, int size,
                        int64_t at, int64_t other) {
    NAME(words) less, equal;
    NAME(look_up)(table, step, bits, size, work->first, &less, &equal);
    *(NAME(words) *)(work->masked + at) = less ^ LOAD(work->masks + at);
    if (other >= 0) *(NAME(words) *)(work->masked + other) = equal ^ LOAD(work->masks + other);
}

/* The digits of threshold `number` of WORDS words from `word`; `planes` are the bits of the opened values less the threshold,
 * MOST_BLOCK words from bit to bit. */
TARGET static void NAME(digits)(const gate *of, const digit_work *work, int64_t word, const uint64_t *planes, int number) {
    const int64_t step = of->words, *rows = of->mask_rows + number * (2 * of->digits - 1);
    const uint64_t *table = work->tables + word;
    for (int index = 0; index < of->digits; index++) {
        const int size = (int)of->sizes[index];
        if (number == 0 || index >= of->common) {
            const int64_t at = rows[index] * step + word;
            const int64_t other = index > 0 ? rows[of->digits + index - 1] * step + word : -1;
            switch (size) {
                case 1: NAME(digit)(work, table, step, planes, 1, at, other); break;
                case 2: NAME(digit)(work, table, step, planes, 2, at, other); break;
                case 3: NAME(digit)(work, table, step, planes, 3, at, other); break;
                case 4: NAME(digit)(work, table, step, planes, 4, at, other); break;
                case 5: NAME(digit)(work, table, step, planes, 5, at, other); break;
                default: NAME(digit)(work, table, step, planes, 6, at, other);
            }
        }
        table += ((1 << size) - 1) * step;
        planes += size * MOST_BLOCK;
    }
}

/* t of threshold `number` for WORDS words from `word`, whose highest opened bits are `top`: as `_masked_borrow` of comparison.py, by
 * Horner's rule; `digits` is known when this is compiled. */
INLINE void NAME(borrow)(const gate *of, const borrow_work *work, int64_t word, const uint64_t *top, int number,
                         int digits) {
    const int64_t step = of->words;
    const int64_t *rows = of->mask_rows + number * (2 * digits - 1), *next = of->product_rows + number * of->products;
    const uint64_t *masks = work->masks + word, *masked = work->masked + word, *corrected = work->products + word;
    const int all = 1 << (digits - 1);
    NAME(words) products[32], value[32];
    products[0] = (NAME(words)){0} + work->first;
    for (int subset = 1; subset < all; subset++) {
        if ((subset & (subset - 1)) == 0) {
            products[subset] = LOAD(masks + rows[digits + __builtin_ctz((unsigned)subset)] * step);
        } else {
            products[subset] = LOAD(corrected + *next++ * step);
        }
    }
    for (int digit = 0; digit < digits; digit++) {
        const NAME(words) less = LOAD(masked + rows[digit] * step);
        const NAME(words) equal = digit > 0 ? LOAD(masked + rows[digits + digit - 1] * step) : (NAME(words)){0};
        for (int i = 0; i < all >> digit; i++) {
            NAME(words) term = products[i << digit] & less;
            if (i == 0) {
                term ^= LOAD(masks + rows[digit] * step);
            } else {
                term ^= LOAD(corrected + *next++ * step);
            }
            if (digit > 0) term ^= (value[2 * i] & equal) ^ value[2 * i + 1];
            value[i] = term;
        }
    }
    const int64_t at = number * step + word;
    *(NAME(words) *)(work->result + at) = value[0] ^ LOAD(work->result_masks + at) ^ LOAD(top);
}

TARGET static void NAME(borrows)(const gate *of, const borrow_work *work, int64_t word, const uint64_t *top, int number) {
    switch (of->digits) {
        case 2: NAME(borrow)(of, work, word, top, number, 2); break;
        case 3: NAME(borrow)(of, work, word, top, number, 3); break;
        case 4: NAME(borrow)(of, work, word, top, number, 4); break;
        case 5: NAME(borrow)(of, work, word, top, number, 5); break;
        default: NAME(borrow)(of, work, word, top, number, 6);
    }
}

#undef INLINE
#undef LOAD
