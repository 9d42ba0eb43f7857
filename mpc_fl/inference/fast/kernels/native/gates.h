/* Comparison gates, as mpc_fl/inference/fast/online/comparison.py specifies them, for compiled_steps.py there, which checks shapes and
 * types beforehand. Values may be secret, numbers and widths are public: no branch and no address depends on a share. */
#ifndef GATES_H
#define GATES_H

#include <stdint.h>

#define MOST_DIGITS 6
#define MOST_THRESHOLDS 2
#define WORD_BITS 64 /* values of one word of a plane */
#define MOST_BLOCK 8 /* words that are computed together at most */
#define MOST_BITS 24

/* A batch of `count` gates, `words` words a plane, of width `bits`, compared in `digits` digits of `sizes` bits, lowest first, at most
 * six each.
 * There are `thresholds`: none for a sign extension, else zero, and perhaps `ceiling`, which has the lowest `common` digits in common with it. For each threshold
 * `mask_rows` are the planes of its 2L - 1 masks and masked bits, `product_rows` those of its `products` products: a second
 * threshold's own lie behind those of the first. */
typedef struct {
    int64_t count, words, bits, digits, first;
    int64_t thresholds, ceiling, common, products;
    int64_t sizes[MOST_DIGITS];
    const int64_t *mask_rows, *product_rows;
} gate;

/* Tables and masks as planes, and where less_j and equal_j go under the masks. */
typedef struct {
    const uint64_t *tables, *masks;
    uint64_t *masked;
    uint64_t first; /* all ones at C */
} digit_work;

/* What step 1 opened; products and masks as planes, what step 2 opened, q; t. The last two have a plane for each threshold. */
typedef struct {
    const uint32_t *opened;
    const uint64_t *products, *masks, *masked, *result_masks;
    uint64_t *result;
    uint64_t first;
} borrow_work;

/* Corrected words of a ReLU, and its result. Without a ceiling `reached` is NULL, in k bits the last three are. */
typedef struct {
    const uint32_t *opened, *input_mask, *w, *wr, *reached;
    const void *kappa, *both, *other; /* uint16_t from 16 bits on, uint32_t below */
    const uint64_t *t;
    uint32_t *result;
} rectifier_work;

/* Corrected words of a sign extension, and its result. */
typedef struct {
    const uint32_t *opened, *input_mask;
    const void *at_zero, *at_one; /* uint16_t from 16 bits on, uint32_t below */
    uint32_t *result;
} extension_work;

/* What both parties drew; C's shares of what is corrected, overwritten by S's. Words that the gate lacks are NULL. */
typedef struct {
    const uint32_t *c_input_mask, *s_input_mask;
    const uint64_t *c_masks, *s_masks, *c_result_masks, *s_result_masks;
    uint64_t *tables, *products;
    uint32_t *w, *wr, *reached;
    void *kappa, *both, *other, *at_zero, *at_one; /* uint16_t from 16 bits on, uint32_t below */
} correction_work;

/* c, or c less the ceiling, modulo 2^k, of the first `count` of 64 values; the others are zero. */
static inline void less_threshold(const gate *of, const uint32_t *values, int count, int number, uint32_t *result) {
    const uint32_t ones = (1u << of->bits) - 1, threshold = number > 0 ? (uint32_t)of->ceiling : 0;
    for (int i = 0; i < WORD_BITS; i++) result[i] = i < count ? (values[i] - threshold) & ones : 0;
}

#endif
