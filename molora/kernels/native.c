/* Routed low-rank experts in plain C: only the experts with a gate other than zero are computed, forward and backward.
 *
 * Shape letters: T tokens, d_in, d_out, E experts, r ranks per expert, R = E * r, M (token, expert) pairs with a gate.
 * Everything is float32. A is (R, d_in) and Bt, B transposed, (R, d_out), as the parameters are stored. Built and loaded by native.py; no header of torch or Python is needed. No state is kept between calls but
 * the scratch memory of each thread.
 *
 * Three inner loops do all the work, each blocked so that it runs near the speed of the arithmetic units:
 *   dots:   h[m, j]  = a[j] . x[m]                    (A x, and B^T dy in backward)
 *   axpys:  y[m]    += sum_j h[m, j] b[j]             (B h, and A^T dz in backward)
 *   outer:  g[j]    += sum_m h[m, j] x[m]             (the gradients of A and B)
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int i8 __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const v8 *)(p))
#define STORE(p, v) (*(v8 *)(p) = (v))

enum { CHUNK = 64 };      /* tokens per pass of `outer`: their rows stay in the first-level cache */

/* The constants of one routed layer, filled in by native.py in this order. */
typedef struct {
    long d_in, d_out, E, r;
    const float *A, *Bt;
    float scale;
    /* the router, used by `routed` only */
    int select;           /* 0 softmax, 1 top-k, 2 top-p, 3 entropy switch */
    int k, normalise, constant, crossing, entropy; /* normalise: 0 none, 1 sum to 1, 2 sum to how many stay */
    float temperature, p, threshold, q, omega;
    const float *W, *bias, *price; /* (E, d_in), (E) or NULL, (E) or NULL */
} Layer;

/* --- scratch ------------------------------------------------------------------------------------------------- */

enum { SLOTS = 4 };
static __thread void *scratch_memory[SLOTS];
static __thread size_t scratch_size[SLOTS];

static void *scratch(int slot, size_t bytes) {
    if (scratch_size[slot] < bytes) {
        free(scratch_memory[slot]);
        scratch_memory[slot] = malloc(bytes);
        scratch_size[slot] = scratch_memory[slot] ? bytes : 0;
    }
    return scratch_memory[slot];
}

/* --- inner loops --------------------------------------------------------------------------------------------- */

#ifdef __clang__
#define SHUFFLE(u, v, ...) __builtin_shufflevector(u, v, __VA_ARGS__)
#else
#define SHUFFLE(u, v, ...) __builtin_shuffle(u, v, (i8){__VA_ARGS__})
#endif

/* Keep a value in its register: compilers load it again for each use, and then loads are what takes the time. */
#if defined(__AVX__) && defined(__GNUC__)
#define HOLD(v) __asm__("" : "+x"(v))
#else
#define HOLD(v) (void)0
#endif

INLINE float sum8(v8 v) {
    v += SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return v[0] + v[1];
}

/* out[i] = the sum of v[i], for 4 vectors */
INLINE void sums4(const v8 *v, float *out) {
    v8 a = SHUFFLE(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
    v8 b = SHUFFLE(v[2], v[3], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(v[2], v[3], 1, 9, 3, 11, 5, 13, 7, 15);
    v8 c = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    c += SHUFFLE(c, c, 4, 5, 6, 7, 0, 1, 2, 3);
    memcpy(out, &c, 4 * sizeof(float));
}

INLINE void dots_block(const int n, const int q, const float *const *x, const float *a, long lda, long d, float *h, long ldh) {
    v8 acc[3][8];
    long c = 0;
    for (int m = 0; m < n; m++)
        for (int j = 0; j < q; j++) acc[m][j] = (v8){0};
    for (; c + 8 <= d; c += 8) {
        v8 xv[3];
        for (int m = 0; m < n; m++) {
            xv[m] = LOAD(x[m] + c);
            HOLD(xv[m]);
        }
        for (int j = 0; j < q; j++) {
            v8 av = LOAD(a + j * lda + c);
            if (n > 1) HOLD(av);
            for (int m = 0; m < n; m++) acc[m][j] += av * xv[m];
        }
    }
    for (int m = 0; m < n; m++) {
        if (q == 1) h[m * ldh] = sum8(acc[m][0]);
        for (int j = 0; j + 4 <= q; j += 4) sums4(acc[m] + j, h + m * ldh + j);
    }
    for (; c < d; c++)
        for (int m = 0; m < n; m++)
            for (int j = 0; j < q; j++) h[m * ldh + j] += a[j * lda + c] * x[m][c];
}

/* h (n, r) = x (n rows) a^T, a (r, d) with row stride lda */
static void dots(int n, const float *const *x, const float *a, long lda, long d, long r, float *h) {
    for (; n >= 3 && n != 4; n -= 3, x += 3, h += 3 * r) {
        long j = 0;
        for (; j + 4 <= r; j += 4) dots_block(3, 4, x, a + j * lda, lda, d, h + j, r);
        for (; j < r; j++) dots_block(3, 1, x, a + j * lda, lda, d, h + j, r);
    }
    for (; n >= 2; n -= 2, x += 2, h += 2 * r) {
        long j = 0;
        for (; j + 4 <= r; j += 4) dots_block(2, 4, x, a + j * lda, lda, d, h + j, r);
        for (; j < r; j++) dots_block(2, 1, x, a + j * lda, lda, d, h + j, r);
    }
    if (n == 1) {
        long j = 0;
        for (; j + 8 <= r; j += 8) dots_block(1, 8, x, a + j * lda, lda, d, h + j, r);
        for (; j + 4 <= r; j += 4) dots_block(1, 4, x, a + j * lda, lda, d, h + j, r);
        for (; j < r; j++) dots_block(1, 1, x, a + j * lda, lda, d, h + j, r);
    }
}

INLINE void axpys_block(const int n, float *const *y, const float *b, long ldb, long d, long r, const float *h) {
    long c = 0;
    for (; c + 16 <= d; c += 16) {
        v8 acc[4][2];
        for (int m = 0; m < n; m++) acc[m][0] = LOAD(y[m] + c), acc[m][1] = LOAD(y[m] + c + 8);
        for (long j = 0; j < r; j++) {
            v8 b0 = LOAD(b + j * ldb + c), b1 = LOAD(b + j * ldb + c + 8);
            if (n > 1) {
                HOLD(b0);
                HOLD(b1);
            }
            for (int m = 0; m < n; m++) {
                float s = h[m * r + j];
                acc[m][0] += s * b0;
                acc[m][1] += s * b1;
            }
        }
        for (int m = 0; m < n; m++) STORE(y[m] + c, acc[m][0]), STORE(y[m] + c + 8, acc[m][1]);
    }
    for (; c < d; c++)
        for (int m = 0; m < n; m++) {
            float s = y[m][c];
            for (long j = 0; j < r; j++) s += h[m * r + j] * b[j * ldb + c];
            y[m][c] = s;
        }
}

/* y (n rows of d) += h (n, r) b, b (r, d) with row stride ldb */
static void axpys(int n, float *const *y, const float *b, long ldb, long d, long r, const float *h) {
    for (; n >= 4; n -= 4, y += 4, h += 4 * r) axpys_block(4, y, b, ldb, d, r, h);
    for (; n >= 1; n--, y++, h += r) axpys_block(1, y, b, ldb, d, r, h);
}

/* The same two for one or two tokens and rows of `a` and `b` that follow each other: row by row. A few tokens read far
 * more than they compute, and memory that is read in one piece comes a third faster than in eight side by side. */
INLINE void dots_rows(const int n, const float *const *x, const float *a, long d, long r, float *h) {
    for (long j = 0; j < r; j++, a += d) {
        v8 acc[2][4] = {{{0}}};
        long c = 0;
        for (; c + 32 <= d; c += 32)
            for (int i = 0; i < 4; i++) {
                v8 av = LOAD(a + c + 8 * i);
                for (int m = 0; m < n; m++) acc[m][i] += av * LOAD(x[m] + c + 8 * i);
            }
        for (; c + 8 <= d; c += 8)
            for (int m = 0; m < n; m++) acc[m][0] += LOAD(a + c) * LOAD(x[m] + c);
        for (int m = 0; m < n; m++) {
            float s = sum8((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
            for (long t = c; t < d; t++) s += a[t] * x[m][t];
            h[m * r + j] = s;
        }
    }
}

INLINE void axpys_rows(const int n, float *const *y, const float *b, long d, long r, const float *h) {
    for (long j = 0; j < r; j++, b += d) {
        long c = 0;
        for (; c + 8 <= d; c += 8) {
            v8 bv = LOAD(b + c);
            for (int m = 0; m < n; m++) STORE(y[m] + c, LOAD(y[m] + c) + h[m * r + j] * bv);
        }
        for (; c < d; c++)
            for (int m = 0; m < n; m++) y[m][c] += h[m * r + j] * b[c];
    }
}

static void few_dots(int n, const float *const *x, const float *a, long d, long r, float *h) {
    if (n == 1) dots_rows(1, x, a, d, r, h);
    else if (n == 2) dots_rows(2, x, a, d, r, h);
    else dots(n, x, a, d, d, r, h);
}

static void few_axpys(int n, float *const *y, const float *b, long d, long r, const float *h) {
    if (n == 1) axpys_rows(1, y, b, d, r, h);
    else if (n == 2) axpys_rows(2, y, b, d, r, h);
    else axpys(n, y, b, d, d, r, h);
}

INLINE void outer_block(const int q, long n, const float *const *x, long c, const float *h, long ldh, float *g, long ldg) {
    v8 acc[4][2];
    for (int j = 0; j < q; j++) acc[j][0] = LOAD(g + j * ldg + c), acc[j][1] = LOAD(g + j * ldg + c + 8);
    for (long m = 0; m < n; m++) {
        v8 x0 = LOAD(x[m] + c), x1 = LOAD(x[m] + c + 8);
        HOLD(x0);
        HOLD(x1);
        for (int j = 0; j < q; j++) {
            float s = h[m * ldh + j];
            acc[j][0] += s * x0;
            acc[j][1] += s * x1;
        }
    }
    for (int j = 0; j < q; j++) STORE(g + j * ldg + c, acc[j][0]), STORE(g + j * ldg + c + 8, acc[j][1]);
}

/* g (r, columns from..to) += h^T (n, r) x (n rows), row stride ldg */
static void outer(long n, const float *const *x, const float *h, long r, float *g, long ldg, long from, long to) {
    for (; n > 0; n -= CHUNK, x += CHUNK, h += CHUNK * r) {
        long chunk = n < CHUNK ? n : CHUNK, c = from;
        for (; c + 16 <= to; c += 16) {
            long j = 0;
            for (; j + 4 <= r; j += 4) outer_block(4, chunk, x, c, h + j, r, g + j * ldg, ldg);
            for (; j < r; j++) outer_block(1, chunk, x, c, h + j, r, g + j * ldg, ldg);
        }
        for (; c < to; c++)
            for (long j = 0; j < r; j++) {
                float s = g[j * ldg + c];
                for (long m = 0; m < chunk; m++) s += h[m * r + j] * x[m][c];
                g[j * ldg + c] = s;
            }
    }
}

/* --- which token uses which expert ----------------------------------------------------------------------------- */

typedef struct {
    long M;
    long *start;     /* (E + 1) where the pairs of each expert begin */
    int *token;      /* (M) ascending inside an expert */
    float *gate;     /* (M) times the layer's scale */
} Pairs;

/* gates (T / div rounded up, E): token t reads row t / div */
static int sort_pairs(const Layer *L, const float *gates, long div, long T, Pairs *out) {
    long E = L->E, M = 0;
    long *start = scratch(0, (E + 1) * sizeof(long) + (size_t)T * E * (sizeof(int) + sizeof(float)));
    if (!start) return 1;
    memset(start, 0, (E + 1) * sizeof(long));
    for (long t = 0; t < T; t++) {
        const float *g = gates + t / div * E;
        for (long e = 0; e < E; e++) start[e + 1] += g[e] != 0;
    }
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    M = start[E];
    out->M = M;
    out->start = start;
    out->token = (int *)(start + E + 1);
    out->gate = (float *)(out->token + M);
    long *at = scratch(1, E * sizeof(long));
    if (!at) return 1;
    memcpy(at, start, E * sizeof(long));
    for (long t = 0; t < T; t++) {
        const float *g = gates + t / div * E;
        for (long e = 0; e < E; e++)
            if (g[e] != 0) {
                out->token[at[e]] = (int)t;
                out->gate[at[e]++] = g[e] * L->scale;
            }
    }
    return 0;
}

static long first_from(const int *token, long lo, long hi, long t) {
    while (lo < hi) {
        long mid = (lo + hi) / 2;
        if (token[mid] < t) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

/* --- forward --------------------------------------------------------------------------------------------------- */

enum { BLOCK = 48 }; /* tokens whose hidden values are kept at a time; a multiple of what dots and axpys take */

static int forward_part(const Layer *L, const float *x, float *y, const Pairs *P, long from, long to) {
    long r = L->r;
    float *h = scratch(2, BLOCK * r * sizeof(float));
    const float *rows[BLOCK];
    float *outs[BLOCK];
    if (!h) return 1;
    for (long e = 0; e < L->E; e++) {
        long lo = first_from(P->token, P->start[e], P->start[e + 1], from);
        long hi = first_from(P->token, lo, P->start[e + 1], to);
        const float *a = L->A + e * r * L->d_in, *b = L->Bt + e * r * L->d_out;
        for (; lo < hi; lo += BLOCK) {
            int n = hi - lo < BLOCK ? (int)(hi - lo) : BLOCK;
            for (int m = 0; m < n; m++) {
                rows[m] = x + P->token[lo + m] * L->d_in;
                outs[m] = y + P->token[lo + m] * L->d_out;
            }
            few_dots(n, rows, a, L->d_in, r, h);
            for (int m = 0; m < n; m++)
                for (long j = 0; j < r; j++) h[m * r + j] *= P->gate[lo + m];
            few_axpys(n, outs, b, L->d_out, r, h);
        }
    }
    return 0;
}

/* y (T, d_out) += the gated experts of x (T, d_in); returns 0, or 1 when memory ran out */
int molora_forward(const Layer *L, const float *x, float *y, const float *gates, long div, long T, int threads) {
    Pairs P;
    int failed = sort_pairs(L, gates, div, T, &P);
    if (failed) return 1;
    if (threads <= 1) return forward_part(L, x, y, &P, 0, T);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (int part = 0; part < threads; part++)
        failed |= forward_part(L, x, y, &P, T * part / threads, T * (part + 1) / threads);
    return failed;
}

/* --- backward -------------------------------------------------------------------------------------------------- */

/* For every pair of the tokens from..to: hidden (M, r) gated, dhidden (M, r) ungated, dgates, dx */
static int backward_part(const Layer *L, const float *x, const float *dy, const Pairs *P, long from, long to,
                         float *hidden, float *dhidden, float *dx, float *dgates) {
    long r = L->r;
    const float *rows[BLOCK], *grads[BLOCK];
    float *outs[BLOCK];
    for (long e = 0; e < L->E; e++) {
        long lo = first_from(P->token, P->start[e], P->start[e + 1], from);
        long hi = first_from(P->token, lo, P->start[e + 1], to);
        const float *a = L->A + e * r * L->d_in, *b = L->Bt + e * r * L->d_out;
        for (; lo < hi; lo += BLOCK) {
            int n = hi - lo < BLOCK ? (int)(hi - lo) : BLOCK;
            float *h = hidden + lo * r, *dh = dhidden + lo * r;
            for (int m = 0; m < n; m++) {
                rows[m] = x + P->token[lo + m] * L->d_in;
                grads[m] = dy + P->token[lo + m] * L->d_out;
                if (dx) outs[m] = dx + P->token[lo + m] * L->d_in;
            }
            dots(n, rows, a, L->d_in, L->d_in, r, h);
            dots(n, grads, b, L->d_out, L->d_out, r, dh);
            for (int m = 0; m < n; m++) {
                float s = 0, gate = P->gate[lo + m];
                for (long j = 0; j < r; j++) {
                    s += h[m * r + j] * dh[m * r + j];
                    h[m * r + j] *= gate;
                    dh[m * r + j] *= gate;
                }
                if (dgates) dgates[P->token[lo + m] * L->E + e] = s * L->scale;
            }
            if (dx) axpys(n, outs, a, L->d_in, L->d_in, r, dh);
        }
    }
    return 0;
}

/* one part of the columns of dA (R, d_in) and of dBt (R, d_out), zero where no token came */
static int weights_part(const Layer *L, const float *x, const float *dy, const Pairs *P, const float *hidden,
                        const float *dhidden, float *dA, float *dBt, int part, int parts) {
    long r = L->r, most = 0;
    for (long e = 0; e < L->E; e++)
        if (P->start[e + 1] - P->start[e] > most) most = P->start[e + 1] - P->start[e];
    const float **rows = scratch(3, most * sizeof(float *));
    if (!rows && most) return 1;
    long i0 = L->d_in / 16 * part / parts * 16, i1 = part + 1 == parts ? L->d_in : L->d_in / 16 * (part + 1) / parts * 16;
    long o0 = L->d_out / 16 * part / parts * 16, o1 = part + 1 == parts ? L->d_out : L->d_out / 16 * (part + 1) / parts * 16;
    for (long e = 0; e < L->E; e++) {
        long lo = P->start[e], n = P->start[e + 1] - lo;
        if (dA) {
            for (long j = 0; j < r; j++) memset(dA + (e * r + j) * L->d_in + i0, 0, (i1 - i0) * sizeof(float));
            for (long m = 0; m < n; m++) rows[m] = x + P->token[lo + m] * L->d_in;
            outer(n, rows, dhidden + lo * r, r, dA + e * r * L->d_in, L->d_in, i0, i1);
        }
        if (dBt) {
            for (long j = 0; j < r; j++) memset(dBt + (e * r + j) * L->d_out + o0, 0, (o1 - o0) * sizeof(float));
            for (long m = 0; m < n; m++) rows[m] = dy + P->token[lo + m] * L->d_out;
            outer(n, rows, hidden + lo * r, r, dBt + e * r * L->d_out, L->d_out, o0, o1);
        }
    }
    return 0;
}

/* dx (T, d_in) gets added to; dA (R, d_in), dBt (R, d_out) are written; dgates (T, E) is written at gates other than
 * zero. Any of the four may be NULL. `hidden` and `dhidden` hold (M, r) each, M at most T * E. */
int molora_backward(const Layer *L, const float *x, const float *dy, const float *gates, long div, long T, float *dx,
                    float *dA, float *dBt, float *dgates, int threads) {
    Pairs P;
    if (sort_pairs(L, gates, div, T, &P)) return 1;
    float *hidden = malloc(2 * (P.M * L->r + 1) * sizeof(float)), *dhidden = hidden + P.M * L->r;
    int failed = !hidden, parts = threads > 1 ? threads : 1;
    if (failed) return 1;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : failed) if (parts > 1)
    for (int part = 0; part < parts; part++)
        failed |= backward_part(L, x, dy, &P, T * part / parts, T * (part + 1) / parts, hidden, dhidden, dx, dgates);
    if (!failed && (dA || dBt)) {
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : failed) if (parts > 1)
        for (int part = 0; part < parts; part++)
            failed |= weights_part(L, x, dy, &P, hidden, dhidden, dA, dBt, part, parts);
    }
    free(hidden);
    return failed;
}

/* --- a thin product: scores of a router -------------------------------------------------------------------------- */

static void thin_part(const float *x, const float *w, float *s, long from, long to, long d, long E) {
    const float *rows[BLOCK];
    for (long t = from; t < to; t += BLOCK) {
        int n = to - t < BLOCK ? (int)(to - t) : BLOCK;
        for (int m = 0; m < n; m++) rows[m] = x + (t + m) * d;
        few_dots(n, rows, w, d, E, s + t * E);
    }
}

static void thin(const float *x, const float *w, float *s, long T, long d, long E, int threads) {
    if (threads <= 1) {
        thin_part(x, w, s, 0, T, d, E);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) thin_part(x, w, s, T * part / threads, T * (part + 1) / threads, d, E);
}

/* --- the router, for decoding ---------------------------------------------------------------------------------- */

static float entropy_of(const float *p, long E, int kind, float q) {
    double total = 0, value = 0;
    if (E == 1) return 0;
    for (long e = 0; e < E; e++) total += p[e];
    int shannon = kind == 0 || fabs(q - 1.0) < 1e-4;
    for (long e = 0; e < E; e++) {
        double share = p[e] / total, l = log(share > 1.17549435e-38 ? share : 1.17549435e-38);
        if (shannon) value -= share * l;
        else if (kind == 1) value -= share * expm1((q - 1) * l) / (q - 1);
        else value += exp(q * l);
    }
    if (shannon) return (float)(value / log((double)E));
    if (kind == 1) return (float)(value / (-expm1((1 - q) * log((double)E)) / (q - 1)));
    return (float)(log(value) / ((1 - q) * log((double)E)));
}

/* scores (E) -> gates (E) in place; `probs` and `order` hold E each */
static void select_gates(const Layer *L, float *s, float *probs, int *order) {
    long E = L->E, kept = E;
    float top = s[0], total = 0;
    for (long e = 0; e < E; e++) {
        s[e] = s[e] / L->temperature;
        top = e == 0 || s[e] > top ? s[e] : top;
    }
    for (long e = 0; e < E; e++) total += probs[e] = expf(s[e] - top);
    for (long e = 0; e < E; e++) probs[e] /= total;
    if (L->select == 0) {
        memcpy(s, probs, E * sizeof(float));
        return;
    }
    long sorted = L->select == 1 ? L->k : E; /* as many as matter */
    for (long e = 0; e < E; e++) {            /* insertion sort of prob - price, falling */
        float v = probs[e] - (L->price ? L->price[e] : 0);
        long i = e < sorted ? e : sorted;
        if (i == sorted && !(s[i - 1] < v)) continue;
        if (i == sorted) i--;
        for (; i > 0 && s[i - 1] < v; i--) s[i] = s[i - 1], order[i] = order[i - 1];
        s[i] = v;
        order[i] = (int)e;
    }
    if (L->select == 1) kept = L->k;
    else if (!(L->select == 3 && entropy_of(probs, E, L->entropy, L->q) > L->threshold) && L->p < 1) {
        float before = 0;
        for (kept = 0; kept < E; kept++) {
            float after = before + probs[order[kept]];
            if (kept >= L->k && !(L->crossing ? before < L->p : after <= L->p)) break;
            before = after;
        }
    }
    memset(s, 0, E * sizeof(float));
    float sum = 0;
    for (long i = 0; i < kept; i++) sum += s[order[i]] = L->constant ? L->omega : probs[order[i]];
    if (L->normalise && sum != 0)
        for (long i = 0; i < kept; i++) s[order[i]] *= (L->normalise == 2 ? kept : 1) / sum;
}

/* x (T, d_in) -> gates (T, E); probs (T, E), or room for one row when `stride` is 0 instead of E; scores (T, E) or NULL */
static int decide(const Layer *L, const float *x, float *gates, float *probs, float *scores, long stride, long T,
                  int threads) {
    long E = L->E;
    int *order = scratch(1, E * sizeof(int));
    if (!order) return 1;
    thin(x, L->W, gates, T, L->d_in, E, threads);
    for (long t = 0; t < T; t++) {
        if (L->bias)
            for (long e = 0; e < E; e++) gates[t * E + e] += L->bias[e];
        if (scores) memcpy(scores + t * E, gates + t * E, E * sizeof(float));
        select_gates(L, gates + t * E, probs + t * stride, order);
    }
    return 0;
}

/* Router and experts in one call: y (T, d_out) += experts of x (T, d_in) under the gates that the router gives x. */
int molora_routed(const Layer *L, const float *x, float *y, long T, int threads) {
    float *gates = scratch(3, (size_t)(T + 1) * L->E * sizeof(float));
    if (!gates || decide(L, x, gates, gates + T * L->E, NULL, 0, T, threads)) return 1;
    return molora_forward(L, x, y, gates, 1, T, threads);
}

/* The same, but gates, probs and (unless NULL) scores (T, E) are results: backward or other layers read them. */
int molora_decided(const Layer *L, const float *x, float *y, float *gates, float *probs, float *scores, long T,
                   int threads) {
    if (decide(L, x, gates, probs, scores, L->E, T, threads)) return 1;
    return molora_forward(L, x, y, gates, 1, T, threads);
}

/* --- the router, for training ---------------------------------------------------------------------------------- */

/* g (E), the gradient of one token's gates -> of its scores, in place: selection and softmax backwards */
static void select_backward(const Layer *L, float *g, const float *gates, const float *probs) {
    float total = 0, common = 0, along = 0, count = 0;
    for (long e = 0; e < L->E; e++)
        if (gates[e] != 0) {
            total += probs[e];
            common += g[e] * probs[e];
            count += 1;
        }
    float factor = 1;
    if (L->normalise) {
        common /= total;
        factor = (L->normalise == 2 ? count : 1) / total;
    } else common = 0;
    for (long e = 0; e < L->E; e++) {
        g[e] = gates[e] != 0 && !L->constant ? (g[e] - common) * factor : 0;
        along += g[e] * probs[e];
    }
    for (long e = 0; e < L->E; e++) g[e] = probs[e] * (g[e] - along) / L->temperature;
}

/* for the tokens from..to: dscores (T, E) from the gradient of the gates, in place, and their part of dx */
static void scores_part(const Layer *L, float *dscores, const float *gates, const float *probs, float *dx, long from, long to) {
    long E = L->E;
    float *outs[BLOCK];
    for (long t = from; t < to; t++)
        select_backward(L, dscores + t * E, gates + t * E, probs + t * E);
    for (long t = from; dx && t < to; t += BLOCK) {
        int n = to - t < BLOCK ? (int)(to - t) : BLOCK;
        for (int m = 0; m < n; m++) outs[m] = dx + (t + m) * L->d_in;
        axpys(n, outs, L->W, L->d_in, L->d_in, E, dscores + t * E);
    }
}

static int scorer_part(const Layer *L, const float *x, const float *dscores, float *dW, long T, int part, int parts) {
    const float **rows = scratch(3, T * sizeof(float *));
    if (!rows) return 1;
    long from = L->d_in / 16 * part / parts * 16, to = part + 1 == parts ? L->d_in : L->d_in / 16 * (part + 1) / parts * 16;
    for (long t = 0; t < T; t++) rows[t] = x + t * L->d_in;
    for (long e = 0; e < L->E; e++) memset(dW + e * L->d_in + from, 0, (to - from) * sizeof(float));
    outer(T, rows, dscores, L->E, dW, L->d_in, from, to);
    return 0;
}

/* As molora_backward, and dscores (T, E), zeros when it begins. With `thin` the scores' part of dx is added and dW
 * (E, d_in) written as well; for many experts the caller's matrix library does those two better. Any gradient but
 * dscores may be NULL. */
int molora_step_backward(const Layer *L, const float *x, const float *dy, const float *gates, const float *probs, long T,
                         float *dx, float *dA, float *dBt, float *dscores, float *dW, int thin, int threads) {
    int parts = threads > 1 ? threads : 1, failed = molora_backward(L, x, dy, gates, 1, T, dx, dA, dBt, dscores, threads);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int part = 0; part < parts; part++)
        scores_part(L, dscores, gates, probs, thin ? dx : NULL, T * part / parts, T * (part + 1) / parts);
    if (failed || !thin || !dW) return failed;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : failed) if (parts > 1)
    for (int part = 0; part < parts; part++) failed |= scorer_part(L, x, dscores, dW, T, part, parts);
    return failed;
}

long molora_layer_size(void) { return (long)sizeof(Layer); }
