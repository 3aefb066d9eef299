// Block-sparse attention on the CPU in float32: one pass over the kept tiles of each query block.
//
// Queries lie in the lanes of the vector registers. With S^T = K Q^T and O^T = V^T P^T both products
// read a key or value token as it lies in memory, one broadcast number at a time, and every step of
// the softmax is the same operation on all lanes: no sums across lanes, no padding of head_dim.
//
// Each (sample, head, part of a query block) is computed by one thread alone, in the order of its
// list, so that the result depends neither on the number of threads nor on their timing.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <vector>

namespace {

// Lanes of a register; registers of accumulators and side by side: what fills the register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kPanel = 4, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kLanes = 8, kPanel = 2, kAccumulators = 12;
#else
constexpr int kLanes = 4, kPanel = 4, kAccumulators = 24;
#endif
// Queries and keys computed at a time: scores, queries and results stay in the nearest cache.
constexpr int kQueries = 64, kKeys = 64;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

struct Problem {
  const float *query, *key, *value;
  const int32_t *counts, *indices;
  const float* bias;                  // of every listed tile, or null
  const int64_t *offsets, *lengths;   // per sample, or null
  const int64_t *starts, *ends;       // the documents' bounds for every query token, or null
  float *out, *lse;
  // Steps between samples, tokens and heads; head_dim is contiguous everywhere.
  int64_t query_step[3], key_step[3], value_step[3];
  // Between samples, heads, query blocks (and slots).
  int64_t count_step[3], index_step[4], bias_step[4];
  int64_t batch, queries, keys, heads, kv_heads, pattern_heads, head_dim, width;
  int64_t block_q, block_k, causal, offset, threads;
  double scale;
};

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Floats all(float x) { return x - Floats{}; }

// 2^x for x <= 0 (0 below 2^-126); the polynomial errs by 2e-8 on [-1/2, 1/2]. NaN stays NaN.
inline Floats exp2(Floats x) {
  const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats inside = x < -126.0f ? all(-126.0f) : x;
  const Floats rounded = inside + shift;
  const Floats f = inside - (rounded - shift);
  Floats p = f * 0.0001534581242594868f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  Ints bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -126.0f ? Floats{} : p * power;
}

// c[r, :] = start + sum_t a[r * row + t * step] * b[t, :], for R rows and V registers of lanes;
// start is `first`, or c[r, :] * factor if there are factors.
template <int R, int V>
inline void product_rows(const float* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                         float* c, int64_t c_step, int depth, const Floats* factor, float first) {
  Floats sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      sum[r][v] = factor ? load(c + r * c_step + v * kLanes) * factor[v] : all(first);
    }
  }
  for (int t = 0; t < depth; t++) {
    Floats right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = load(b + t * b_step + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Floats left = all(a[r * row + t * step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(c + r * c_step + v * kLanes, sum[r][v]);
  }
}

// The same for any number of rows.
template <int V>
void product(const float* a, int64_t row, int64_t step, const float* b, int64_t b_step, float* c,
             int64_t c_step, int rows, int depth, const Floats* factor, float first) {
  constexpr int R = std::min(kAccumulators / V, 12);
  int r = 0;
  for (; r + R <= rows; r += R) {
    product_rows<R, V>(a + r * row, row, step, b, b_step, c + r * c_step, c_step, depth, factor,
                       first);
  }
  for (; r + 4 <= rows; r += 4) {
    product_rows<4, V>(a + r * row, row, step, b, b_step, c + r * c_step, c_step, depth, factor,
                       first);
  }
  for (; r < rows; r++) {
    product_rows<1, V>(a + r * row, row, step, b, b_step, c + r * c_step, c_step, depth, factor,
                       first);
  }
}

// Some queries of one query block, and the running softmax over the tiles seen so far.
struct Rows {
  int64_t lanes, head_dim;
  float *query, *out;                    // (head_dim, lanes), transposed
  float *values, *weights;               // (kKeys, head_dim); (kKeys, lanes)
  float highest[kQueries], sum[kQueries];
  int32_t low[kQueries], high[kQueries];  // the keys that each query may see: low <= m < high
};

// All ones in the lanes whose query sees the key at `place`; `lane` is the first of them.
inline Ints sees(const Rows& x, int64_t lane, int64_t place) {
  Ints low, high;
  std::memcpy(&low, x.low + lane, sizeof low);
  std::memcpy(&high, x.high + lane, sizeof high);
  return (low <= int32_t(place)) & (high > int32_t(place));
}

// Adds weighted values to what `factor` leaves of the results of one register of queries, each to
// the queries that see it alone: 0 * NaN is NaN.
void add_visible(Rows& x, int64_t lane, const float* value, int keys, int64_t first,
                 Floats factor) {
  for (int64_t t = 0; t < x.head_dim; t++) {
    Floats sum = load(x.out + t * x.lanes + lane) * factor;
    for (int m = 0; m < keys; m++) {
      const Floats added = value[m * x.head_dim + t] * load(x.weights + m * kLanes);
      sum += sees(x, lane, first + m) ? added : Floats{};
    }
    store(x.out + t * x.lanes + lane, sum);
  }
}

// Adds keys to V registers of queries from `lane` on. `first` is the place of the first key among
// all; `masked` (V is 1 then) says that not every query sees every key, `finite` that no value is
// NaN or infinite.
template <int V>
void attend_panel(Rows& x, int64_t lane, const float* key, int64_t key_step, const float* value,
                  int keys, int64_t first, float bias, bool masked, bool finite) {
  constexpr int64_t step = V * kLanes;
  product<V>(key, key_step, 1, x.query + lane, x.lanes, x.weights, step, keys, int(x.head_dim),
             nullptr, bias);
  Floats old[V], top[V], sum[V], factor[V];
  for (int v = 0; v < V; v++) top[v] = old[v] = load(x.highest + lane + v * kLanes);
  for (int m = 0; m < keys; m++) {
    for (int v = 0; v < V; v++) {
      Floats s = load(x.weights + m * step + v * kLanes);
      if (masked) {
        s = sees(x, lane + v * kLanes, first + m) ? s : all(-kInfinity);
        store(x.weights + m * step + v * kLanes, s);
      }
      top[v] = s > top[v] ? s : top[v];
    }
  }
  for (int v = 0; v < V; v++) {
    store(x.highest + lane + v * kLanes, top[v]);
    // A row that has seen nothing yet must not become NaN.
    top[v] = top[v] == -kInfinity ? Floats{} : top[v];
    factor[v] = exp2(old[v] - top[v]);
    sum[v] = load(x.sum + lane + v * kLanes) * factor[v];
  }
  for (int m = 0; m < keys; m++) {
    for (int v = 0; v < V; v++) {
      const Floats p = exp2(load(x.weights + m * step + v * kLanes) - top[v]);
      sum[v] += p;
      store(x.weights + m * step + v * kLanes, p);
    }
  }
  for (int v = 0; v < V; v++) store(x.sum + lane + v * kLanes, sum[v]);
  if constexpr (V == 1) {
    if (masked && !finite) return add_visible(x, lane, value, keys, first, factor[0]);
  }
  product<V>(value, 1, x.head_dim, x.weights, step, x.out + lane, x.lanes, int(x.head_dim), keys,
             factor, 0);
}

bool all_finite(const float* x, int64_t count) {
  Floats sum{};
  int64_t i = 0;
  // x - x is 0 for every finite number, NaN for all others.
  for (; i + kLanes <= count; i += kLanes) sum += load(x + i) - load(x + i);
  float rest = 0;
  for (; i < count; i++) rest += x[i] - x[i];
  for (int lane = 0; lane < kLanes; lane++) rest += sum[lane];
  return rest == 0;
}

// Adds the keys [begin, end) to the queries, at most kKeys of them.
void attend_keys(Rows& x, const float* key, int64_t key_step, const float* value,
                 int64_t value_step, int64_t begin, int64_t end, float bias, bool masked) {
  // Side by side the values fit into the nearest cache, however far apart they lie.
  for (int64_t m = begin; m < end; m++) {
    std::memcpy(x.values + (m - begin) * x.head_dim, value + m * value_step, 4 * x.head_dim);
  }
  const bool finite = !masked || all_finite(x.values, (end - begin) * x.head_dim);
  for (int64_t lane = 0; lane < x.lanes;) {
    int64_t from = begin, to = end, vectors = std::min<int64_t>((x.lanes - lane) / kLanes, kPanel);
    if (masked) {
      // One register at a time needs only the keys that one of its queries sees; that spares work
      // on the diagonal, and what nobody reads cannot reach a sum (0 * NaN is NaN).
      vectors = 1;
      int64_t low = end, high = begin;
      for (int64_t n = lane; n < lane + kLanes; n++) {
        if (x.low[n] >= x.high[n]) continue;
        low = std::min<int64_t>(low, x.low[n]);
        high = std::max<int64_t>(high, x.high[n]);
      }
      from = std::max(from, low);
      to = std::min(to, high);
    }
    if (from < to) {
      const float *k = key + from * key_step, *v = x.values + (from - begin) * x.head_dim;
      const int keys = int(to - from);
      switch (vectors) {
        case 1:
          attend_panel<1>(x, lane, k, key_step, v, keys, from, bias, masked, finite);
          break;
        case 2:
          attend_panel<2>(x, lane, k, key_step, v, keys, from, bias, masked, finite);
          break;
        case 3:
          attend_panel<std::min(3, kPanel)>(x, lane, k, key_step, v, keys, from, bias, masked,
                                            finite);
          break;
        default:
          attend_panel<kPanel>(x, lane, k, key_step, v, keys, from, bias, masked, finite);
      }
    }
    lane += vectors * kLanes;
  }
}

// The keys that query n of sample b may see; false if not one. The three rules are intervals.
bool visible(const Problem& p, int64_t b, int64_t n, int32_t& low, int32_t& high) {
  int64_t from = 0, to = p.keys;
  if (p.lengths) to = std::min(to, p.lengths[b]);
  if (p.causal) {
    const int64_t offset = p.offsets ? p.offsets[b] : p.offset;
    to = offset < p.keys - n ? std::min(to, n + offset + 1) : to;
  }
  if (p.starts) {
    from = p.starts[b * p.queries + n];
    to = std::min(to, p.ends[b * p.queries + n]);
  }
  low = int32_t(from);
  high = int32_t(std::max(to, from));
  return from < to;
}

// Queries [begin, end) of one query block; false if the lists are broken.
bool attend_rows(const Problem& p, Rows& x, int64_t b, int64_t h, int64_t i, int64_t begin,
                 int64_t end) {
  const int64_t d = p.head_dim, count = end - begin;
  x.lanes = (count + kLanes - 1) / kLanes * kLanes;
  // Queries are multiplied by this once, so that the softmax is one of powers of two.
  const float scale = float(p.scale * kLog2E);
  const float* query = p.query + b * p.query_step[0] + h * p.query_step[2];
  int64_t lowest = p.keys, highest = 0, shared_low = 0, shared_high = p.keys;
  for (int64_t lane = 0; lane < x.lanes; lane++) {
    x.highest[lane] = -kInfinity;
    x.sum[lane] = 0;
    x.low[lane] = x.high[lane] = 0;
    if (lane >= count) {
      for (int64_t t = 0; t < d; t++) x.query[t * x.lanes + lane] = 0;
      continue;
    }
    const float* row = query + (begin + lane) * p.query_step[1];
    for (int64_t t = 0; t < d; t++) x.query[t * x.lanes + lane] = row[t] * scale;
    if (visible(p, b, begin + lane, x.low[lane], x.high[lane])) {
      lowest = std::min<int64_t>(lowest, x.low[lane]);
      highest = std::max<int64_t>(highest, x.high[lane]);
    }
    shared_low = std::max<int64_t>(shared_low, x.low[lane]);
    shared_high = std::min<int64_t>(shared_high, x.high[lane]);
  }
  std::fill(x.out, x.out + d * x.lanes, 0.0f);

  const int64_t kv_head = h / (p.heads / p.kv_heads), list = h / (p.heads / p.pattern_heads);
  const float* key = p.key + b * p.key_step[0] + kv_head * p.key_step[2];
  const float* value = p.value + b * p.value_step[0] + kv_head * p.value_step[2];
  const int32_t* blocks =
      p.indices + b * p.index_step[0] + list * p.index_step[1] + i * p.index_step[2];
  const int64_t kept = p.counts[b * p.count_step[0] + list * p.count_step[1] + i * p.count_step[2]];
  if (kept < 0 || kept > p.width) return false;
  for (int64_t slot = 0; slot < kept; slot++) {
    const int64_t j = blocks[slot * p.index_step[3]];
    if (j < 0 || j * p.block_k >= p.keys) return false;
    const int64_t first = std::max(j * p.block_k, lowest);
    const int64_t last = std::min({(j + 1) * p.block_k, p.keys, highest});
    const bool masked = shared_low > first || shared_high < last;
    float bias = 0;
    if (p.bias) {
      bias = kLog2E * p.bias[b * p.bias_step[0] + list * p.bias_step[1] + i * p.bias_step[2] +
                             slot * p.bias_step[3]];
      // Nobody reads such a tile.
      if (bias == -kInfinity) continue;
    }
    for (int64_t m = first; m < last; m += kKeys) {
      attend_keys(x, key, p.key_step[1], value, p.value_step[1], m, std::min(m + kKeys, last), bias,
                  masked);
    }
  }

  float* lse = p.lse + (b * p.heads + h) * p.queries + begin;
  float* out = p.out + ((b * p.queries + begin) * p.heads + h) * d;
  for (int64_t lane = 0; lane < count; lane++) {
    const float sum = x.sum[lane];
    // Nothing seen, nothing added up: 0, and -inf.
    const float factor = sum == 0 ? 0 : 1 / sum;
    lse[lane] = sum == 0 ? -kInfinity : (x.highest[lane] + std::log2(sum)) * kLn2;
    // An infinite logit takes all the weight: not inf - inf.
    if (x.highest[lane] == kInfinity) lse[lane] = kInfinity;
    for (int64_t t = 0; t < d; t++) {
      out[lane * p.heads * d + t] = x.out[t * x.lanes + lane] * factor;
    }
  }
  return true;
}

int64_t blocks_of(const Problem& p) { return (p.queries + p.block_q - 1) / p.block_q; }

// Parts of at most kQueries queries in a query block.
int64_t parts_of(const Problem& p) { return (p.block_q + kQueries - 1) / kQueries; }

int64_t tasks_of(const Problem& p) { return p.batch * p.heads * blocks_of(p) * parts_of(p); }

// Takes parts of query blocks until none is left.
void work(const Problem& p, std::atomic<int64_t>& next, std::atomic<int>& status) {
  const int64_t d = p.head_dim;
  void* memory = nullptr;
  const int64_t floats = 2 * d * kQueries + kKeys * d + kKeys * kQueries;
  if (posix_memalign(&memory, 64, floats * sizeof(float))) {
    status = 2;
    return;
  }
  Rows x;
  x.head_dim = d;
  x.query = static_cast<float*>(memory);
  x.out = x.query + d * kQueries;
  x.weights = x.out + d * kQueries;
  x.values = x.weights + kKeys * kQueries;
  const int64_t blocks = blocks_of(p), parts = parts_of(p), total = tasks_of(p);
  for (int64_t task; status == 0 && (task = next++) < total;) {
    const int64_t part = task % parts, i = task / parts % blocks;
    const int64_t h = task / parts / blocks % p.heads, b = task / parts / blocks / p.heads;
    const int64_t begin = i * p.block_q + part * kQueries;
    const int64_t end = std::min({begin + kQueries, (i + 1) * p.block_q, p.queries});
    if (begin < end && !attend_rows(p, x, b, h, i, begin, end)) status = 1;
  }
  std::free(memory);
}

// Runs `work` on several threads at once, this one among them.
template <class Work>
void on_threads(int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  try {
    for (int64_t number = 1; number < threads; number++) others.emplace_back(work);
  } catch (...) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

// 0: done. 1: a list names a block that is not there. 2: out of memory.
extern "C" int block_sparse_forward(const Problem* problem) {
  std::atomic<int64_t> next(0);
  std::atomic<int> status(0);
  on_threads(std::min(problem->threads, tasks_of(*problem)),
             [&] { work(*problem, next, status); });
  return status;
}
