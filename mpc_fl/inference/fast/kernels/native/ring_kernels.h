/* Exact arithmetic modulo 2^32 for mpc_fl/inference/fast/kernels/compiled.py, which checks shapes and types beforehand.
 *
 * Elements are uint32_t, which wraps: modulo 2^32. Values may be secret, shapes are public: no branch and no address
 * depends on a value, and 32-bit products take the same time for all factors on the processors meant here. */
#ifndef RING_KERNELS_H
#define RING_KERNELS_H

#include <stdint.h>

#define INTERFACE 2 /* compiled.py asks for the same number: a library of another source is not used */
#define PANEL 16    /* output channels that are computed together; weights are packed by panels */

/* A convolution. Images are padded, (images, rows, columns, channels), channels last; the result is (images, result_rows,
 * result_columns, outputs). Weights are (groups, panels of a group, kernel_rows, kernel_columns, channels of a group,
 * PANEL), the last panel filled up with zeros. Depthwise: every output reads the input channel of its number; channels are
 * a multiple of PANEL, outputs may be fewer, and weights are (panels, kernel_rows, kernel_columns, PANEL). */
typedef struct {
    int64_t images, rows, columns, channels;
    int64_t outputs, groups, depthwise;
    int64_t kernel_rows, kernel_columns;
    int64_t stride_rows, stride_columns;
    int64_t dilation_rows, dilation_columns;
    int64_t result_rows, result_columns;
} convolution;

/* Summands that lie side by side: `length` elements from `offset`, counted from the first element of a window. */
typedef struct {
    int64_t offset, length;
} segment;

/* What one thread computes at a time: result pixels of one panel. */
typedef struct {
    const uint32_t *const *windows; /* `pixels` addresses of windows, of the panel's input channels */
    int64_t pixels;
    const uint32_t *weights; /* the panel's */
    const segment *segments;
    int64_t segment_count;
    uint32_t *result; /* the panel's first output of the first pixel */
    int64_t result_step, outputs; /* from pixel to pixel; outputs of this panel, at most PANEL */
} panel_work;

typedef void (*panel_kernel)(const panel_work *work);

#endif
