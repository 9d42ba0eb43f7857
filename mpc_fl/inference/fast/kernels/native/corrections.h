/* Corrections of gates, made by the dealer, for one instruction set: included once for each after planes.h and values.h, with
 * NAME, TARGET and WORDS; of one word alone (WORDS = 1) what concerns planes. They are `correction_of` of mpc_fl/inference/fast/preprocessing/gate_correction.py: true values less C's shares. */

#define INLINE TARGET static inline __attribute__((always_inline))

/* The table [v < digit], v = 0 .. 2^size - 2, of WORDS words: exclusive or into `table`. */
INLINE void NAME(correct_table)(const uint64_t *digit, int size, uint64_t *table, int64_t step) {
    NAME(words) entries[63];
    entries[0] = *(const NAME(words) *)digit;
    for (int level = 1; level < size; level++) {
        const int count = (1 << level) - 1;
        const NAME(words) bit = *(const NAME(words) *)(digit + level * MOST_BLOCK);
        for (int i = 0; i < count; i++) entries[count + 1 + i] = entries[i] & bit;
        entries[count] = bit;
        for (int i = 0; i < count; i++) entries[i] |= bit;
    }
    for (int i = 0; i < (1 << size) - 1; i++) *(NAME(words) *)(table + i * step) ^= entries[i];
}

/* The products of threshold `number` that are not made already. */
TARGET static void NAME(correct_products)(const gate *of, const correction_work *work, int64_t word, int number) {
    const int64_t step = of->words, fresh = number * of->products;
    const int64_t *rows = of->mask_rows + number * (2 * of->digits - 1), *next = of->product_rows + fresh;
    const int digits = (int)of->digits, all = 1 << (digits - 1);
    const uint64_t *c = work->c_masks + word, *s = work->s_masks + word;
    NAME(words) products[32];
    products[0] = ~(NAME(words)){0};
    for (int i = 0; i < digits - 1; i++) {
        const int64_t at = rows[digits + i] * step;
        const NAME(words) equal = *(const NAME(words) *)(c + at) ^ *(const NAME(words) *)(s + at);
        for (int subset = 0; subset < 1 << i; subset++) products[(1 << i) + subset] = products[subset] & equal;
    }
    uint64_t *to = work->products + word;
    for (int subset = 3; subset < all; subset++)
        if ((subset & (subset - 1)) != 0) {
            if (*next >= fresh) *(NAME(words) *)(to + *next * step) ^= products[subset];
            next++;
        }
    for (int digit = 0; digit < digits - 1; digit++) {
        const NAME(words) less = *(const NAME(words) *)(c + rows[digit] * step) ^ *(const NAME(words) *)(s + rows[digit] * step);
        for (int subset = 1 << digit; subset < all; subset += 1 << digit) {
            if (*next >= fresh) *(NAME(words) *)(to + *next * step) ^= products[subset] & less;
            next++;
        }
    }
}

/* Tables and products of WORDS words from `word`; `planes` are the bits of r, MOST_BLOCK words from bit to bit. */
TARGET static void NAME(correct_planes)(const gate *of, const correction_work *work, int64_t word, const uint64_t *planes) {
    const int64_t step = of->words;
    uint64_t *table = work->tables + word;
    for (int index = 0; index < of->digits; index++) {
        const int size = (int)of->sizes[index];
        switch (size) {
            case 1: NAME(correct_table)(planes, 1, table, step); break;
            case 2: NAME(correct_table)(planes, 2, table, step); break;
            case 3: NAME(correct_table)(planes, 3, table, step); break;
            case 4: NAME(correct_table)(planes, 4, table, step); break;
            case 5: NAME(correct_table)(planes, 5, table, step); break;
            default: NAME(correct_table)(planes, 6, table, step);
        }
        planes += size * MOST_BLOCK;
        table += ((1 << size) - 1) * step;
    }
    for (int number = 0; number < of->thresholds; number++) NAME(correct_products)(of, work, word, number);
}

#if WORDS > 1

/* true - share in a word of 16 or 32 bits. */
INLINE void NAME(correct_high)(void *to, int64_t index, uint32_t true_value, int narrow) {
    if (narrow)
        ((uint16_t *)to)[index] = (uint16_t)(true_value - ((uint16_t *)to)[index]);
    else
        ((uint32_t *)to)[index] = true_value - ((uint32_t *)to)[index];
}

/* The words of 64 gates from `start`: r, whether r_C + r_S wraps around, q of each threshold. */
INLINE void NAME(correct_words)(const gate *of, const correction_work *work, int64_t start, const uint32_t *total,
                                const uint64_t *q_words, int narrow) {
    const int bits = (int)of->bits;
    const uint32_t ones = (1u << bits) - 1;
    const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
    uint32_t not_q[WORD_BITS], w_of[WORD_BITS];
    if (work->at_zero != NULL) {
        for (int i = 0; i < count; i++) {
            const uint32_t high = (total[i] & ones) >> (bits - 1), wrap = total[i] >> bits;
            NAME(correct_high)(work->at_zero, start + i, wrap + high, narrow);
            NAME(correct_high)(work->at_one, start + i, wrap, narrow);
        }
        return;
    }
    NAME(where_zero)(q_words[0], not_q);
    if (work->reached == NULL) {
        for (int i = 0; i < count; i++) w_of[i] = (not_q[i] + 1) ^ (total[i] & ones) >> (bits - 1);
    } else {
        uint32_t not_second[WORD_BITS];
        NAME(where_zero)(q_words[1], not_second);
        for (int i = 0; i < count; i++) {
            const uint32_t second = not_second[i] + 1;
            w_of[i] = (not_q[i] + 1) ^ second;
            work->reached[start + i] = (second ^ (total[i] & ones) >> (bits - 1)) - work->reached[start + i];
        }
    }
    for (int i = 0; i < count; i++) {
        const uint32_t r = total[i] & ones, w = w_of[i];
        work->w[start + i] = w - work->w[start + i];
        work->wr[start + i] = r * w - work->wr[start + i];
    }
    if (work->kappa == NULL) return;
    for (int i = 0; i < count; i++) {
        const uint32_t high = (total[i] & ones) >> (bits - 1), w = w_of[i];
        NAME(correct_high)(work->kappa, start + i, total[i] >> bits, narrow);
        NAME(correct_high)(work->both, start + i, w & high, narrow);
        NAME(correct_high)(work->other, start + i, high & (w ^ 1), narrow);
    }
}

TARGET static void NAME(correct)(const gate *of, const correction_work *work) {
    uint64_t planes[MOST_BITS * MOST_BLOCK] = {0};
    for (int64_t word = 0; word < of->words; word += MOST_BLOCK) {
        const int64_t block = of->words - word < MOST_BLOCK ? of->words - word : MOST_BLOCK;
        for (int64_t w = 0; w < block; w++) {
            const int64_t start = (word + w) * WORD_BITS;
            const int count = of->count - start < WORD_BITS ? (int)(of->count - start) : WORD_BITS;
            uint64_t q[MOST_THRESHOLDS] = {0};
            for (int number = 0; number < of->thresholds; number++) {
                const int64_t at = number * of->words + word + w;
                q[number] = work->c_result_masks[at] ^ work->s_result_masks[at];
            }
            uint32_t total[WORD_BITS] = {0};
            for (int i = 0; i < count; i++) total[i] = work->c_input_mask[start + i] + work->s_input_mask[start + i];
            NAME(planes_of)(total, (int)of->bits, planes + w, MOST_BLOCK);
            if (of->bits >= 16)
                NAME(correct_words)(of, work, start, total, q, 1);
            else
                NAME(correct_words)(of, work, start, total, q, 0);
        }
        int64_t w = 0;
        if (of->thresholds == 0) continue;
        for (; w + WORDS <= block; w += WORDS) NAME(correct_planes)(of, work, word + w, planes + w);
        for (; w < block; w++) correct_planes_single(of, work, word + w, planes + w);
    }
}

#endif

#undef INLINE
