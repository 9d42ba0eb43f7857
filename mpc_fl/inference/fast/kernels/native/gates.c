/* Comparison gates and their corrections by the instruction sets of ring_kernels_name, in the same order. */
#include "gates.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORTED __attribute__((visibility("default")))

/* Words that are left over, one at a time. */
#define NAME(x) x##_single
#define TARGET
#define WORDS 1
#include "planes.h"
#include "corrections.h"
#undef NAME
#undef TARGET
#undef WORDS

#if defined(__x86_64__)

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2")))
#define WORDS 8
#include "planes.h"
#include "values.h"
#include "corrections.h"
#undef NAME
#undef TARGET
#undef WORDS

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define WORDS 4
#include "planes.h"
#include "values.h"
#include "corrections.h"
#undef NAME
#undef TARGET
#undef WORDS

#endif

#define NAME(x) x##_plain
#define TARGET
#define WORDS 2
#include "planes.h"
#include "values.h"
#include "corrections.h"
#undef NAME
#undef TARGET
#undef WORDS

#if defined(__x86_64__)
#define BY_SET(function) {function##_avx512, function##_avx2, function##_plain}
#else
#define BY_SET(function) {function##_plain}
#endif

EXPORTED void ring_kernels_open_input(int set, const gate *of, const uint32_t *share, const uint32_t *mask, uint32_t more,
                                      uint32_t *mine, uint8_t *message) {
    static void (*const by[])(const gate *, const uint32_t *, const uint32_t *, uint32_t, uint32_t *, uint8_t *) =
        BY_SET(open_input);
    by[set](of, share, mask, more, mine, message);
}

EXPORTED void ring_kernels_look_up(int set, const gate *of, const uint8_t *message, uint32_t *opened,
                                   const uint64_t *tables, const uint64_t *masks, uint64_t *masked) {
    static void (*const by[])(const gate *, const uint8_t *, uint32_t *, const digit_work *) = BY_SET(look_up_digits);
    by[set](of, message, opened, &(digit_work){tables, masks, masked, of->first ? UINT64_MAX : 0});
}

EXPORTED void ring_kernels_borrow(int set, const gate *of, const uint32_t *opened, const uint64_t *products,
                                  const uint64_t *masks, const uint64_t *masked, const uint64_t *result_masks,
                                  uint64_t *result) {
    static void (*const by[])(const gate *, const borrow_work *) = BY_SET(borrow_of);
    const uint64_t first = of->first ? UINT64_MAX : 0;
    by[set](of, &(borrow_work){opened, products, masks, masked, result_masks, result, first});
}

EXPORTED void ring_kernels_rectify(int set, const gate *of, const rectifier_work *work) {
    static void (*const by[])(const gate *, const rectifier_work *) = BY_SET(rectified);
    by[set](of, work);
}

EXPORTED void ring_kernels_extend(int set, const gate *of, const extension_work *work) {
    static void (*const by[])(const gate *, const extension_work *) = BY_SET(extended);
    by[set](of, work);
}

EXPORTED void ring_kernels_correct(int set, const gate *of, const correction_work *work) {
    static void (*const by[])(const gate *, const correction_work *) = BY_SET(correct);
    by[set](of, work);
}
