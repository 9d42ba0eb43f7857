/* Result pixels of one panel, for one instruction set: included once for each, with
 *   NAME(x)   the name of a function of this instruction set
 *   TARGET    the attribute by which the compiler may use it
 *   LANES     elements of a vector
 *   PIXELS    pixels that are computed together: PIXELS * VECTORS sums fit the registers, beside what they are made of
 *
 * A tile of up to PIXELS pixels by PANEL outputs stays in registers while products are added up (Goto and van de Geijn,
 * ACM TOMS 2008). Sums of earlier segments are taken up from the result. */

#define VECTORS (PANEL / LANES)

/* Elements lie anywhere: aligned as elements are. */
typedef uint32_t NAME(vector) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE TARGET static inline __attribute__((always_inline))

INLINE void NAME(take_up)(NAME(vector) sums[][VECTORS], const panel_work *work, int64_t first, int count) {
    for (int p = 0; p < count; p++) {
        const uint32_t *from = work->result + (first + p) * work->result_step;
        uint32_t filled[PANEL] = {0};
        if (work->outputs < PANEL) {
            memcpy(filled, from, (size_t)work->outputs * sizeof *from);
            from = filled;
        }
        for (int v = 0; v < VECTORS; v++) sums[p][v] = *(const NAME(vector) *)(from + v * LANES);
    }
}

INLINE void NAME(put_down)(NAME(vector) sums[][VECTORS], const panel_work *work, int64_t first, int count) {
    for (int p = 0; p < count; p++) {
        uint32_t *to = work->result + (first + p) * work->result_step;
        if (work->outputs == PANEL) {
            for (int v = 0; v < VECTORS; v++) *(NAME(vector) *)(to + v * LANES) = sums[p][v];
        } else {
            uint32_t filled[PANEL];
            for (int v = 0; v < VECTORS; v++) *(NAME(vector) *)(filled + v * LANES) = sums[p][v];
            memcpy(to, filled, (size_t)work->outputs * sizeof *to);
        }
    }
}

/* `count` pixels from `first`: `count` is known when this is compiled, so the sums are registers. */
INLINE void NAME(tile)(const panel_work *work, int64_t first, int count, int earlier, int depthwise) {
    NAME(vector) sums[PIXELS][VECTORS];
    if (earlier) {
        NAME(take_up)(sums, work, first, count);
    } else {
        for (int p = 0; p < count; p++)
            for (int v = 0; v < VECTORS; v++) sums[p][v] = (NAME(vector)){0};
    }
    const uint32_t *windows[PIXELS];
    for (int p = 0; p < count; p++) windows[p] = work->windows[first + p];
    const uint32_t *weights = work->weights;
    for (int64_t s = 0; s < work->segment_count; s++) {
        const int64_t end = work->segments[s].offset + work->segments[s].length;
        for (int64_t k = work->segments[s].offset; k < end; k++, weights += PANEL) {
            NAME(vector) factors[VECTORS];
            for (int v = 0; v < VECTORS; v++) factors[v] = *(const NAME(vector) *)(weights + v * LANES);
            for (int p = 0; p < count; p++) {
                for (int v = 0; v < VECTORS; v++) {
                    if (depthwise)
                        sums[p][v] += factors[v] * *(const NAME(vector) *)(windows[p] + k + v * LANES);
                    else
                        sums[p][v] += factors[v] * windows[p][k];
                }
            }
        }
    }
    NAME(put_down)(sums, work, first, count);
}

INLINE void NAME(panel)(const panel_work *work, int earlier, int depthwise) {
    const int64_t tiles = (work->pixels + PIXELS - 1) / PIXELS;
    for (int64_t t = 0; t < tiles; t++) {
        /* Tiles of nearly the same size: one pixel that is left over would cost as much as PIXELS. */
        const int64_t first = work->pixels * t / tiles, count = work->pixels * (t + 1) / tiles - first;
        switch (count) {
#define COUNT(n)                                                 \
    case n:                                                      \
        if (n <= PIXELS) NAME(tile)(work, first, n <= PIXELS ? n : 1, earlier, depthwise); \
        break;
            COUNT(1) COUNT(2) COUNT(3) COUNT(4) COUNT(5) COUNT(6) COUNT(7) COUNT(8) COUNT(9) COUNT(10) COUNT(11) COUNT(12)
#undef COUNT
        }
    }
}

TARGET static void NAME(dense_begun)(const panel_work *work) { NAME(panel)(work, 0, 0); }
TARGET static void NAME(dense_added)(const panel_work *work) { NAME(panel)(work, 1, 0); }
TARGET static void NAME(depthwise_begun)(const panel_work *work) { NAME(panel)(work, 0, 1); }
TARGET static void NAME(depthwise_added)(const panel_work *work) { NAME(panel)(work, 1, 1); }

#undef VECTORS
#undef INLINE
