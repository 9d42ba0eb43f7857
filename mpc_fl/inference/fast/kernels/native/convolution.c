/* Convolutions modulo 2^32: which pixels and panels are computed when, and by which instruction set. */
#include "ring_kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

/* ---- instruction sets, the best first -------------------------------------------------------------------------------- */

#if defined(__x86_64__)

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define PIXELS 12
#include "panel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef PIXELS

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define LANES 8
#define PIXELS 6
#include "panel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef PIXELS

#endif

/* What every processor of this kind has: on 64-bit ARM that is NEON, with 32 registers. */
#define NAME(x) x##_plain
#define TARGET
#define LANES 4
#if defined(__aarch64__)
#define PIXELS 6
#else
#define PIXELS 2
#endif
#include "panel.h"
#undef NAME
#undef TARGET
#undef LANES
#undef PIXELS

typedef struct {
    const char *name;
    panel_kernel kernels[2][2]; /* by whether the layer is depthwise, then by whether earlier sums are taken up */
} instruction_set;

#define KERNELS(set) {{dense_begun_##set, dense_added_##set}, {depthwise_begun_##set, depthwise_added_##set}}

static const instruction_set sets[] = {
#if defined(__x86_64__)
    {"avx512", KERNELS(avx512)},
    {"avx2", KERNELS(avx2)},
#endif
#if defined(__aarch64__)
    {"neon", KERNELS(plain)},
#else
    {"generic", KERNELS(plain)},
#endif
};

#define SETS ((int)(sizeof sets / sizeof *sets))

EXPORTED int ring_kernels_interface(void) { return INTERFACE; }

/* The name of instruction set number `set`, NULL when there are no more; the last one is on every processor. */
EXPORTED const char *ring_kernels_name(int set) { return set >= 0 && set < SETS ? sets[set].name : NULL; }

/* Whether this processor and its operating system have it. */
EXPORTED int ring_kernels_supported(int set) {
#if defined(__x86_64__)
    if (set == 0) return __builtin_cpu_supports("avx512f") != 0;
    if (set == 1) return __builtin_cpu_supports("avx2") != 0;
#endif
    return set == SETS - 1;
}

/* ---- pieces of work ---------------------------------------------------------------------------------------------------- */

#define BLOCK_PIXELS 240  /* result pixels whose inputs stay in the second-level cache */
#define BLOCK_SUMMANDS 320 /* summands whose weights, 64 bytes each, stay in the first-level cache */
#define MANY_PIECES 4      /* for each thread, so that none waits long for the last */

typedef struct {
    const convolution *layer;
    const uint32_t *images, *weights;
    uint32_t *result;
    const instruction_set *set;
    segment *segments;
    int64_t segment_count, summands;   /* of one window */
    int64_t panels, group_panels;      /* of all groups, of one */
    int64_t pixel_blocks, panel_blocks; /* pieces are pixel blocks by panel blocks */
    int64_t next;                      /* the first piece that no thread has taken */
} plan;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The summands of a window in the order of the weights, in segments of at most BLOCK_SUMMANDS. NULL without memory. */
static segment *segments_of(const convolution *layer, int64_t *count) {
    const int64_t width = layer->depthwise ? 1 : layer->channels / layer->groups;
    const int joined = layer->dilation_columns == 1 && layer->groups == 1 && !layer->depthwise;
    const int64_t runs = joined ? 1 : layer->kernel_columns, length = joined ? layer->kernel_columns * width : width;
    const int64_t pieces = (length + BLOCK_SUMMANDS - 1) / BLOCK_SUMMANDS;
    segment *segments = malloc((size_t)(layer->kernel_rows * runs * pieces) * sizeof *segments);
    if (segments == NULL) return NULL;
    *count = 0;
    for (int64_t y = 0; y < layer->kernel_rows; y++)
        for (int64_t x = 0; x < runs; x++) {
            const int64_t place = y * layer->dilation_rows * layer->columns + x * layer->dilation_columns;
            for (int64_t done = 0; done < length; done += BLOCK_SUMMANDS)
                segments[(*count)++] =
                    (segment){place * layer->channels + done, smaller(BLOCK_SUMMANDS, length - done)};
        }
    return segments;
}

/* One panel for some pixels, by blocks of summands. */
static void compute_panel(const plan *of, panel_work work) {
    const segment *segments = work.segments;
    const int64_t count = work.segment_count;
    for (int64_t start = 0, end; start < count; start = end) {
        int64_t summands = segments[start].length;
        for (end = start + 1; end < count && summands + segments[end].length <= BLOCK_SUMMANDS; end++)
            summands += segments[end].length;
        work.segments = segments + start;
        work.segment_count = end - start;
        of->set->kernels[of->layer->depthwise != 0][start > 0](&work);
        work.weights += summands * PANEL;
    }
}

static void compute_piece(const plan *of, int64_t piece) {
    const convolution *layer = of->layer;
    const int64_t pixels = layer->images * layer->result_rows * layer->result_columns;
    const int64_t block = piece / of->panel_blocks, part = piece % of->panel_blocks;
    const int64_t first = pixels * block / of->pixel_blocks, last = pixels * (block + 1) / of->pixel_blocks;
    const int64_t group_outputs = layer->depthwise ? layer->outputs : layer->outputs / layer->groups;
    const int64_t group_channels = layer->channels / layer->groups;
    const uint32_t *windows[BLOCK_PIXELS], *channels[BLOCK_PIXELS];
    for (int64_t p = first; p < last; p++) {
        const int64_t x = p % layer->result_columns, row = p / layer->result_columns;
        const int64_t y = row % layer->result_rows, image = row / layer->result_rows;
        const int64_t place =
            (image * layer->rows + y * layer->stride_rows) * layer->columns + x * layer->stride_columns;
        windows[p - first] = of->images + place * layer->channels;
    }
    const int64_t end = of->panels * (part + 1) / of->panel_blocks;
    for (int64_t panel = of->panels * part / of->panel_blocks; panel < end; panel++) {
        const int64_t group = panel / of->group_panels, inside = panel % of->group_panels * PANEL;
        const int64_t channel = layer->depthwise ? inside : group * group_channels;
        for (int64_t p = 0; p < last - first; p++) channels[p] = windows[p] + channel;
        compute_panel(of, (panel_work){
                              .windows = channels,
                              .pixels = last - first,
                              .weights = of->weights + panel * of->summands * PANEL,
                              .segments = of->segments,
                              .segment_count = of->segment_count,
                              .result = of->result + first * layer->outputs + group * group_outputs + inside,
                              .result_step = layer->outputs,
                              .outputs = smaller(PANEL, group_outputs - inside),
                          });
    }
}

static void *compute_pieces(void *argument) {
    plan *of = argument;
    const int64_t pieces = of->pixel_blocks * of->panel_blocks;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return NULL;
        compute_piece(of, piece);
    }
}

#define MOST_THREADS 256

/* result = images * weights modulo 2^32, by up to `threads` threads. Threads live as long as the call, so a process may fork
 * between calls; where one cannot be started, the others do its work. 0, or 1 when memory is short. */
EXPORTED int ring_kernels_convolve(int set, const convolution *layer, const uint32_t *images, const uint32_t *weights,
                                   uint32_t *result, int threads) {
    plan of = {.layer = layer, .images = images, .weights = weights, .result = result, .set = &sets[set]};
    const int64_t pixels = layer->images * layer->result_rows * layer->result_columns;
    const int64_t group_outputs = layer->depthwise ? layer->outputs : layer->outputs / layer->groups;
    if (pixels == 0 || layer->outputs == 0) return 0;
    of.segments = segments_of(layer, &of.segment_count);
    if (of.segments == NULL) return 1;
    for (int64_t s = 0; s < of.segment_count; s++) of.summands += of.segments[s].length;
    of.group_panels = (group_outputs + PANEL - 1) / PANEL;
    of.panels = of.group_panels * (layer->depthwise ? 1 : layer->groups);
    of.pixel_blocks = (pixels + BLOCK_PIXELS - 1) / BLOCK_PIXELS;
    const int64_t missing = (int64_t)threads * MANY_PIECES / of.pixel_blocks;
    of.panel_blocks = threads == 1 || missing < 2 ? 1 : smaller(missing, of.panels);
    pthread_t helpers[MOST_THREADS];
    int started = 0;
    const int64_t useful = smaller(smaller(threads, MOST_THREADS), of.pixel_blocks * of.panel_blocks);
    while (started < useful - 1 && pthread_create(&helpers[started], NULL, compute_pieces, &of) == 0) started++;
    compute_pieces(&of);
    for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
    free(of.segments);
    return 0;
}
