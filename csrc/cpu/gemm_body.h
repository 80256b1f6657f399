// The matrix product of gemm_kernels.h, written once. Each gemm_<isa>.cpp includes this file inside a namespace of its
// own, with LANES floats to a vector, under that instruction set's compiler options. So nothing here may be a function of
// the standard library: the linker would keep one copy of it for all.

#include "vector_body.h"

// What a multiplication is: of floats, unless the including file says otherwise.
#ifndef US3L_MULTIPLY_ADD
#define US3L_MULTIPLY_ADD(sum, left, right) ((sum) + (left) * (right))
#endif

// Registers: kRows[n - 1] rows of n vectors of sums, n vectors of b, one of a; 32 of them with AVX-512, else 16.
constexpr int kMaxPanels = LANES == 16 ? 4 : 2;
constexpr int kMaxRows[] = {LANES == 16 ? 14 : 12, LANES == 16 ? 14 : 6, 9, 6};

// R rows of N panels, the last of which may be a half one: with 8 channels more than a multiple of 16 a whole one would
// waste up to half of the work. Sums start at zero whether or not they are added to c: sums of sums lose less.
//
// What changes from block to block comes in registers: a structure with a field that was just written would be copied only
// after the results before it are in the cache, for such a copy is no load of one store.
template <int R, int N, bool kHalf>
void multiply_block(std::int64_t depth, const float* rows, const Matrix& a, const Panels& b, float* c,
                    std::int64_t c_row, bool add, Ahead::Lines ahead) {
  constexpr int kBases = (R + 2) / 3;  // an address each for three rows: base, + row, + 2 row
  constexpr int kWhole = kHalf ? N - 1 : N, kLast = LANES / 2;
  using Vector = Float<LANES>;
  using Last = Float<kLast>;
  Vector sum[R][N];
  Last last_sum[R];
  US3L_UNROLL
  for (int r = 0; r < R; ++r) {
    US3L_UNROLL
    for (int n = 0; n < kWhole; ++n) sum[r][n] = Vector{};
    if constexpr (kHalf) last_sum[r] = Last{};
  }
  US3L_UNROLL
  for (int r = 0; r < R; ++r) {  // memory gets the results' places ready while the sums are made
    US3L_UNROLL
    for (int n = 0; n < N; ++n) __builtin_prefetch(c + r * c_row + n * LANES, 1);
  }
  const float* base[kBases];
  US3L_UNROLL
  for (int i = 0; i < kBases; ++i) base[i] = rows + 3 * i * a.row;
  const float* panel = b.data;
  const std::int64_t run = a.run > 0 ? a.run : depth, jump = a.next - run * a.column;
  for (std::int64_t runs = depth; runs > 0; runs -= run) {
    for (std::int64_t k = 0; k < run; ++k) {
      Vector right[N];
      Last last_right;
      US3L_UNROLL
      for (int n = 0; n < kWhole; ++n) right[n] = load<LANES>(panel + n * b.panel);
      if constexpr (kHalf) last_right = load<kLast>(panel + kWhole * b.panel);
      panel += b.row;
      __builtin_prefetch(reinterpret_cast<const void*>(ahead.at), 0, 2);
      ahead.at += ahead.step;
      US3L_UNROLL
      for (int r = 0; r < R; ++r) {
        const float left = base[r / 3][r % 3 * a.row];
        US3L_UNROLL
        for (int n = 0; n < kWhole; ++n) sum[r][n] = US3L_MULTIPLY_ADD(sum[r][n], left, right[n]);
        if constexpr (kHalf) last_sum[r] = US3L_MULTIPLY_ADD(last_sum[r], left, last_right);
      }
      US3L_UNROLL
      for (int i = 0; i < kBases; ++i) base[i] += a.column;
    }
    US3L_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] += jump;
  }
  US3L_UNROLL
  for (int r = 0; r < R; ++r) {
    US3L_UNROLL
    for (int n = 0; n < kWhole; ++n) {
      float* const p = c + r * c_row + n * LANES;
      store<LANES>(p, add ? load<LANES>(p) + sum[r][n] : sum[r][n]);
    }
    if constexpr (kHalf) {
      float* const p = c + r * c_row + kWhole * LANES;
      store<kLast>(p, add ? load<kLast>(p) + last_sum[r] : last_sum[r]);
    }
  }
}

using MultiplyBlock = void (*)(std::int64_t, const float*, const Matrix&, const Panels&, float*, std::int64_t, bool,
                               Ahead::Lines);

template <int N, bool kHalf>
MultiplyBlock block_of(std::int64_t rows) {
  switch (rows) {
#define US3L_ROWS(r) \
  case r:            \
    if constexpr (r <= kMaxRows[N - 1]) return multiply_block<r, N, kHalf>;
    US3L_ROWS(1) US3L_ROWS(2) US3L_ROWS(3) US3L_ROWS(4) US3L_ROWS(5) US3L_ROWS(6) US3L_ROWS(7)
    US3L_ROWS(8) US3L_ROWS(9) US3L_ROWS(10) US3L_ROWS(11) US3L_ROWS(12) US3L_ROWS(13) US3L_ROWS(14)
#undef US3L_ROWS
  }
  return nullptr;
}

template <bool kHalf>
MultiplyBlock block_of(std::int64_t rows, std::int64_t panels) {
  switch (panels) {
    case 1:
      return block_of<1, kHalf>(rows);
    case 2:
      return block_of<2, kHalf>(rows);
    case 3:
      if constexpr (kMaxPanels >= 3) return block_of<3, kHalf>(rows);
    case 4:
      if constexpr (kMaxPanels >= 4) return block_of<4, kHalf>(rows);
  }
  return nullptr;
}

// Longer sums are cut, and the parts added up: that is more accurate, and a part of b stays in the L1 cache.
constexpr std::int64_t kMaxDepth = 128;

void multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix a, Panels b, float* c,
              std::int64_t c_row, bool add, Ahead& ahead) {
  // Equal blocks: a last one that is small would not hide the latency of its sums.
  constexpr std::int64_t kHalfPanel = LANES / 2;
  const std::int64_t halves = (columns + kHalfPanel - 1) / kHalfPanel, panels = (halves + 1) / 2;
  const std::int64_t bands = (panels + kMaxPanels - 1) / kMaxPanels, cuts = (depth + kMaxDepth - 1) / kMaxDepth;
  const std::int64_t run = a.run > 0 ? a.run : 1, next = a.run > 0 ? a.next : a.column;
  for (std::int64_t cut = 0; cut < cuts; ++cut) {
    const std::int64_t first = depth / run * cut / cuts, last = depth / run * (cut + 1) / cuts;
    const std::int64_t k = first * run, length = last * run - k;
    for (std::int64_t i = 0; i < bands; ++i) {
      const std::int64_t p = panels * i / bands, width = panels * (i + 1) / bands - p;
      const Panels right{b.data + p * b.panel + k * b.row, b.panel, b.row};
      // `taller` blocks of one row more than the others.
      const std::int64_t blocks = (rows + kMaxRows[width - 1] - 1) / kMaxRows[width - 1], height = rows / blocks;
      const std::int64_t taller = rows - height * blocks;
      const auto of = i + 1 == bands && halves % 2 == 1 ? block_of<true> : block_of<false>;
      const MultiplyBlock block = of(height, width), taller_block = of(height + 1, width);
      const float* from = a.data + first * next;
      float* to = c + p * LANES;
      for (std::int64_t j = 0; j < blocks; ++j) {
        const std::int64_t r = height + (j < taller);
        (j < taller ? taller_block : block)(length, from, a, right, to, c_row, add || cut > 0, ahead.next(length, to));
        from += r * a.row;
        to += r * c_row;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- packing

void pack_panel(std::int64_t depth, Matrix from, float* to) {
  std::int64_t k = 0;
  if (from.column == 1) {
    for (; k < depth; ++k) store<LANES>(to + k * LANES, load<LANES>(from.data + k * from.row));
  } else if (from.row == 1) {
    for (; k + LANES <= depth; k += LANES) {
      Float<LANES> v[LANES];
      US3L_UNROLL
      for (int l = 0; l < LANES; ++l) v[l] = load<LANES>(from.data + k + l * from.column);
      transpose(v);
      US3L_UNROLL
      for (int l = 0; l < LANES; ++l) store<LANES>(to + (k + l) * LANES, v[l]);
    }
  }
  for (; k < depth; ++k)
    for (int l = 0; l < LANES; ++l) to[k * LANES + l] = from.data[k * from.row + l * from.column];
}

void pack(std::int64_t depth, std::int64_t columns, Matrix from, float* b, std::int64_t panel) {
  for (; columns >= LANES; columns -= LANES, b += panel, from.data += LANES * from.column)
    pack_panel(depth, from, b);
  if (columns == 0) return;
  for (std::int64_t k = 0; k < depth; ++k)
    for (int l = 0; l < LANES; ++l)
      b[k * LANES + l] = l < columns ? from.data[k * from.row + l * from.column] : 0;
}

// ---------------------------------------------------------------------------------------------- rows

// Columns that do not fill a vector are copied by one that overlaps the last.
template <int W>
void copy_rows(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, float* to,
               std::int64_t to_row) {
  if constexpr (W > 1) {
    if (columns < W) return copy_rows<W / 2>(rows, columns, from, from_row, to, to_row);
  }
  for (; rows > 0; --rows, from += from_row, to += to_row) {
    for (std::int64_t j = 0; j + W <= columns; j += W) store<W>(to + j, load<W>(from + j));
    store<W>(to + columns - W, load<W>(from + columns - W));
  }
}

constexpr std::int64_t kMaxRowsInFloat = 16;  // then on to float64

template <int W>
void add_rows(std::int64_t rows, std::int64_t columns, const float* a, std::int64_t row, double* sums) {
  std::int64_t j = 0;
  for (; j + W <= columns; j += W) {
    for (std::int64_t i = 0; i < rows;) {
      Float<W> sum{};
      const std::int64_t end = i + kMaxRowsInFloat < rows ? i + kMaxRowsInFloat : rows;
      for (; i < end; ++i) sum += load<W>(a + i * row + j);
      for (int l = 0; l < W; ++l) sums[j + l] += sum[l];
    }
  }
  if constexpr (W > 1) {
    if (j < columns) add_rows<W / 2>(rows, columns - j, a + j, row, sums + j);
  }
}

GemmKernels gemm_kernels() { return {LANES, multiply, pack, copy_rows<LANES>, add_rows<LANES>}; }
