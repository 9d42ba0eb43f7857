/* Comparison gates, as mpc_fl/inference/fast/online/comparison.py specifies them, for compiled_steps.py there, which checks shapes and
 * types beforehand. Values may be secret, numbers and widths are public: no branch and no address depends on a share. */
#ifndef GATES_H
#define GATES_H

#include <stdint.h>

#define DIGIT 4      /* bits of a digit, except perhaps the last one */
#define WORD_BITS 64 /* values of one word of a plane */
#define MOST_BLOCK 8 /* words that are computed together at most */
#define MOST_BITS 24

/* A batch of `count` gates, `words` words a plane, of width `bits`; `compared` bits are compared in `digits` digits. `top` is
 * whether the highest bit of the opened value belongs to t here (ReLU, at C). */
typedef struct {
    int64_t count, words, bits, compared, digits, first, top;
} gate;

/* Tables and masks as planes, and where less_j and equal_j go under the masks: (2L - 1, words). */
typedef struct {
    const uint64_t *tables, *masks;
    uint64_t *masked;
    uint64_t first; /* all ones at C */
} digit_work;

/* What step 1 opened; products and masks as planes, what step 2 opened, q; t. */
typedef struct {
    const uint32_t *opened;
    const uint64_t *products, *masks, *masked, *result_mask;
    uint64_t *result;
    uint64_t first;
} borrow_work;

/* Corrected words of a ReLU, and its result. In k bits: the last three are NULL. */
typedef struct {
    const uint32_t *opened, *input_mask, *w, *wr;
    const void *kappa, *both, *other; /* uint16_t from 16 bits on, uint32_t below */
    const uint64_t *t;
    uint32_t *result;
} rectifier_work;

/* Corrected words of a sign extension, and its result. */
typedef struct {
    const uint32_t *opened, *input_mask;
    const void *at_zero, *at_one; /* uint16_t from 16 bits on, uint32_t below */
    const uint64_t *t;
    uint32_t *result;
} extension_work;

/* What both parties drew; C's shares of what is corrected, overwritten by S's. Words that the gate lacks are NULL. */
typedef struct {
    const uint32_t *c_input_mask, *s_input_mask;
    const uint64_t *c_masks, *s_masks, *c_result_mask, *s_result_mask;
    uint64_t *tables, *products;
    uint32_t *w, *wr;
    void *kappa, *both, *other, *at_zero, *at_one; /* uint16_t from 16 bits on, uint32_t below */
} correction_work;

#endif
