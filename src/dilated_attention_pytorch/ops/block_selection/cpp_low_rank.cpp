// Low-rank tile mass on the CPU in float32, without the square of the tokens.
//
// Compiled behind cpp_forward.cpp, whose vectors and products it takes: queries lie in the lanes.
// Per query and key block the largest logit and the sum of exponentials are kept; what all blocks of
// a row have in common divides them at the end.

namespace {

struct Masses {
  const float *query, *key;  // (batch, heads, rows, depth) and (batch, heads, keys, depth)
  const int32_t* spans;      // per sample, or for all: first keys of the rows, then their ends
  float *mass, *peaks;       // (batch, heads, blocks of rows, blocks of keys), zero; peaks or null
  int64_t span_step;         // between samples
  int64_t batch, rows, keys, heads, depth, per_block, block_size, threads;
};

int64_t divided(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Some rows of one block: transposed queries, spans, and what each key block has given so far.
struct Sampled {
  int64_t lanes;
  float *query, *weights, *top, *sum;  // (depth, lanes), (kKeys, lanes), (key blocks, lanes) twice
  int32_t low[kQueries], high[kQueries];
};

// Adds keys [begin, end) of a block, at most kKeys, to V registers of rows from `lane` on.
template <int V>
void add_keys(Sampled& x, int64_t lane, const float* key, int64_t begin, int64_t end, int depth,
              bool masked, float* top, float* sum) {
  constexpr int64_t step = V * kLanes;
  const int keys = int(end - begin);
  product<V>(key + begin * depth, depth, 1, x.query + lane, x.lanes, x.weights, step, keys, depth,
             nullptr, 0);
  Floats old[V], most[V], total[V];
  for (int v = 0; v < V; v++) most[v] = old[v] = load(top + lane + v * kLanes);
  for (int m = 0; m < keys; m++) {
    for (int v = 0; v < V; v++) {
      Floats s = load(x.weights + m * step + v * kLanes);
      if (masked) {
        Ints low, high;
        std::memcpy(&low, x.low + lane + v * kLanes, sizeof low);
        std::memcpy(&high, x.high + lane + v * kLanes, sizeof high);
        const int32_t place = int32_t(begin + m);
        s = ((low <= place) & (high > place)) ? s : all(-kInfinity);
        store(x.weights + m * step + v * kLanes, s);
      }
      most[v] = s > most[v] ? s : most[v];
    }
  }
  for (int v = 0; v < V; v++) {
    store(top + lane + v * kLanes, most[v]);
    // What has seen nothing yet must not become NaN.
    most[v] = most[v] == -kInfinity ? Floats{} : most[v];
    total[v] = load(sum + lane + v * kLanes) * exp2(old[v] - most[v]);
  }
  for (int m = 0; m < keys; m++) {
    for (int v = 0; v < V; v++) total[v] += exp2(load(x.weights + m * step + v * kLanes) - most[v]);
  }
  for (int v = 0; v < V; v++) store(sum + lane + v * kLanes, total[v]);
}

// Rows [begin, end) of a block, at most kQueries; `share` of them all is the weight of one.
void add_rows(const Masses& p, Sampled& x, int64_t b, int64_t h, int64_t begin, int64_t end,
              float share, float* mass, float* peaks) {
  const int64_t count = end - begin, depth = p.depth;
  x.lanes = divided(count, kLanes) * kLanes;
  const float* query = p.query + ((b * p.heads + h) * p.rows + begin) * depth;
  const int32_t* spans = p.spans + b * p.span_step + begin;
  int64_t lowest = p.keys, highest = 0, shared_low = 0, shared_high = p.keys;
  for (int64_t lane = 0; lane < x.lanes; lane++) {
    x.low[lane] = x.high[lane] = 0;
    const bool there = lane < count && spans[p.rows + lane] > spans[lane];
    for (int64_t t = 0; t < depth; t++) {
      x.query[t * x.lanes + lane] = there ? query[lane * depth + t] : 0;
    }
    if (!there) continue;
    x.low[lane] = spans[lane];
    x.high[lane] = spans[p.rows + lane];
    lowest = std::min<int64_t>(lowest, x.low[lane]);
    highest = std::max<int64_t>(highest, x.high[lane]);
    shared_low = std::max<int64_t>(shared_low, x.low[lane]);
    shared_high = std::min<int64_t>(shared_high, x.high[lane]);
  }
  if (lowest >= highest) return;
  const int64_t first = lowest / p.block_size, last = divided(highest, p.block_size);
  std::fill(x.top, x.top + (last - first) * x.lanes, -kInfinity);
  std::fill(x.sum, x.sum + (last - first) * x.lanes, 0.0f);
  const float* key = p.key + (b * p.heads + h) * p.keys * depth;
  for (int64_t j = first; j < last; j++) {
    const int64_t from = std::max(j * p.block_size, lowest);
    const int64_t to = std::min((j + 1) * p.block_size, highest);
    const bool masked = shared_low > from || shared_high < to;
    float *top = x.top + (j - first) * x.lanes, *sum = x.sum + (j - first) * x.lanes;
    for (int64_t m = from; m < to; m += kKeys) {
      const int64_t stop = std::min(m + kKeys, to);
      for (int64_t lane = 0; lane < x.lanes;) {
        const int64_t vectors = std::min<int64_t>((x.lanes - lane) / kLanes, kPanel);
        if (vectors == kPanel) {
          add_keys<kPanel>(x, lane, key, m, stop, int(depth), masked, top, sum);
        } else if (vectors == 2) {
          add_keys<2>(x, lane, key, m, stop, int(depth), masked, top, sum);
        } else {
          add_keys<1>(x, lane, key, m, stop, int(depth), masked, top, sum);
        }
        lane += (vectors == kPanel ? kPanel : vectors == 2 ? 2 : 1) * kLanes;
      }
    }
  }
  for (int64_t lane = 0; lane < x.lanes; lane += kLanes) {
    Floats most = all(-kInfinity), total{};
    for (int64_t j = 0; j < last - first; j++) {
      const Floats top = load(x.top + j * x.lanes + lane);
      most = top > most ? top : most;
    }
    most = most == -kInfinity ? Floats{} : most;
    for (int64_t j = 0; j < last - first; j++) {
      const int64_t place = j * x.lanes + lane;
      const Floats part = load(x.sum + place) * exp2(load(x.top + place) - most);
      store(x.sum + place, part);
      total += part;
    }
    Ints low, high;
    std::memcpy(&low, x.low + lane, sizeof low);
    std::memcpy(&high, x.high + lane, sizeof high);
    for (int64_t j = 0; j < last - first; j++) {
      // Nothing of rows that see nothing.
      const Floats part = low < high ? load(x.sum + j * x.lanes + lane) / total : Floats{};
      float sum = 0, peak = 0;
      for (int row = 0; row < kLanes; row++) {
        sum += part[row];
        // NaN stays.
        peak = part[row] > peak || part[row] != part[row] ? part[row] : peak;
      }
      mass[first + j] += sum * share;
      if (peaks && (peak > peaks[first + j] || peak != peak)) peaks[first + j] = peak;
    }
  }
}

// Takes blocks of rows until none is left.
void rate(const Masses& p, std::atomic<int64_t>& next, std::atomic<int>& status) {
  const int64_t blocks = divided(p.rows, p.per_block), columns = divided(p.keys, p.block_size);
  const int64_t total = p.batch * p.heads * blocks;
  void* memory = nullptr;
  const int64_t floats = kQueries * (p.depth + kKeys + 2 * columns);
  if (posix_memalign(&memory, 64, floats * sizeof(float))) {
    status = 2;
    return;
  }
  Sampled x;
  x.query = static_cast<float*>(memory);
  x.weights = x.query + kQueries * p.depth;
  x.top = x.weights + kQueries * kKeys;
  x.sum = x.top + kQueries * columns;
  for (int64_t task; (task = next++) < total;) {
    const int64_t i = task % blocks, h = task / blocks % p.heads, b = task / blocks / p.heads;
    const int64_t begin = i * p.per_block, end = std::min(begin + p.per_block, p.rows);
    const int32_t* spans = p.spans + b * p.span_step;
    int64_t counted = 0;
    for (int64_t row = begin; row < end; row++) counted += spans[p.rows + row] > spans[row];
    const float share = 1.0f / float(std::max<int64_t>(counted, 1));
    float* peaks = p.peaks ? p.peaks + task * columns : nullptr;
    for (int64_t row = begin; row < end; row += kQueries) {
      add_rows(p, x, b, h, row, std::min(row + kQueries, end), share, p.mass + task * columns,
               peaks);
    }
  }
  std::free(memory);
}

}  // namespace

// 0: done. 2: out of memory.
extern "C" int low_rank_masses(const Masses* problem) {
  std::atomic<int64_t> next(0);
  std::atomic<int> status(0);
  const int64_t blocks = divided(problem->rows, problem->per_block);
  on_threads(std::min(problem->threads, problem->batch * problem->heads * blocks),
             [&] { rate(*problem, next, status); });
  return status;
}
