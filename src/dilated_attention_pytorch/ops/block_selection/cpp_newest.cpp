// The blocks that a new token reads, by low-rank mass, on the CPU in float32: see newest.py.
//
// Compiled behind cpp_decode.cpp, whose products it takes: one query asks, so numbers of a head lie
// in the lanes.

namespace {

struct Newest {
  const float *queries, *key;          // (batch, ring, heads, head_dim); a cache with any steps
  const float *query_map, *key_map;    // (heads, head_dim, rank)
  const int64_t *lengths, *known, *starts;  // per sample; starts or null
  const float* threshold;
  const int32_t *least, *quota;        // of rows and heads, or null
  float *masses, *peaks;               // (batch, lists, room); peaks or null
  int64_t* sampled;                    // (batch, lists)
  int32_t *counts, *indices;           // (batch, lists); (batch, lists, width)
  int64_t key_step[3];                 // between samples, tokens and heads
  int64_t least_step[2], quota_step[2];  // between samples and lists
  int64_t threshold_step;              // between samples
  int64_t batch, ring, heads, kv_heads, lists, head_dim, rank, capacity, blocks, room, width;
  int64_t block_size, stride, sinks, near, threads;
  double scale;
};

constexpr float kTiny = std::numeric_limits<float>::min();

// Where the newest row of a sample is, and the query that it is rated by.
struct Place {
  int64_t row, count, newest;
  bool sees;
};

Place place_of(const Newest& p, int64_t b) {
  const int64_t length = p.lengths[b];
  Place x;
  x.row = std::max<int64_t>(length - 1, 0) / p.block_size;
  const int64_t start = std::max(x.row * p.block_size, p.known[b]);
  x.count = std::max<int64_t>(length - 1 - start, 0) / p.stride + 1;
  x.newest = start + (x.count - 1) * p.stride;
  x.sees = x.newest < length;
  return x;
}

struct Room {
  float *folded, *shorter, *logits;  // (heads of a key head, head_dim), (rank), (those heads, keys)
  float *mass, *peak;                // of the lists of a task, (lists, blocks)
  int64_t* order;
  unsigned char* kept;
};

// Heads that share keys or a list: one task.
int64_t together(const Newest& p) { return p.heads / std::min(p.lists, p.kv_heads); }

// A head's query through both maps: what its keys need no map for.
void fold(const Newest& p, const Place& at, int64_t b, int64_t h, float* shorter, float* folded) {
  const int64_t d = p.head_dim, r = p.rank;
  const float* query = p.queries + ((b * p.ring + at.newest % p.ring) * p.heads + h) * d;
  const float *left = p.query_map + h * d * r, *right = p.key_map + h * d * r;
  std::fill(shorter, shorter + r, 0.0f);
  for (int64_t t = 0; t < d; t++) {
    for (int64_t s = 0; s < r; s++) shorter[s] += query[t] * left[t * r + s];
  }
  const float factor = float(p.scale * kLog2E);
  for (int64_t t = 0; t < d; t++) folded[t] = dot(shorter, right + t * r, r) * factor;
}

// Adds the shares of one head's softmax to those of its list, divided by `share` heads.
void add_shares(const Newest& p, int64_t tokens, int64_t share, float* logits, float* mass,
                float* peak) {
  const int64_t size = p.block_size, blocks = divided(tokens, size);
  float top = -kInfinity, total = 0;
  for (int64_t m = 0; m < tokens; m++) top = logits[m] > top ? logits[m] : top;
  for (int64_t j = 0; j < blocks; j++) {
    float sum = 0;
    const int64_t end = std::min((j + 1) * size, tokens);
    for (int64_t m = j * size; m < end; m += kLanes) {
      // There is room for whole registers behind the last.
      const Floats part = exp2(load(logits + m) - top);
      for (int lane = 0; lane < kLanes && m + lane < end; lane++) sum += part[lane];
    }
    // What was read already makes room.
    logits[j] = sum;
    total += sum;
  }
  for (int64_t j = 0; j < blocks; j++) {
    const float part = logits[j] / total;
    mass[j] += part / float(share);
    peak[j] = part > peak[j] || part != part ? part : peak[j];
  }
}

// What the newest queries of one key head's heads give every block.
void rate_heads(const Newest& p, const Place& at, int64_t b, int64_t kv_head, int64_t first_list,
                Room& x) {
  const int64_t d = p.head_dim, group = p.heads / p.kv_heads, share = p.heads / p.lists;
  const int64_t room = p.capacity + kLanes, start = p.starts ? p.starts[b] : 0;
  const int64_t most = std::min(p.capacity - start, p.blocks * p.block_size);
  const int64_t tokens = std::max<int64_t>(std::min(at.newest + 1, most), 0);
  const float* key =
      p.key + b * p.key_step[0] + start * p.key_step[1] + kv_head * p.key_step[2];
  for (int64_t n = 0; n < group; n++) {
    fold(p, at, b, kv_head * group + n, x.shorter, x.folded + n * d);
  }
  // Keys are read from memory once for all of them.
  for (int64_t from = 0; from < tokens; from += kKeys) {
    const int64_t to = std::min(from + kKeys, tokens);
    for (int64_t n = 0; n < group; n++) {
      float* logits = x.logits + n * room;
      for (int64_t m = from; m < to; m++) {
        logits[m] = dot(x.folded + n * d, key + m * p.key_step[1], d);
      }
    }
  }
  for (int64_t n = 0; n < group; n++) {
    const int64_t list = (kv_head * group + n) / share - first_list;
    add_shares(p, tokens, share, x.logits + n * room, x.mass + list * p.blocks,
               x.peak + list * p.blocks);
  }
}

// Puts the best `count` of the first `all` entries of the order in front: ties to the lower block.
template <typename Rank>
void best_first(int64_t* order, int64_t all, int64_t count, const Rank& rank) {
  if (count <= 0 || count >= all) return;
  std::nth_element(order, order + count, order + all, [&](int64_t i, int64_t j) {
    return rank(i) != rank(j) ? rank(i) > rank(j) : i < j;
  });
}

// Adds the shares to what the row's queries before have given, and lists its blocks.
void list_blocks(const Newest& p, const Place& at, int64_t b, int64_t list, float* new_mass,
                 const float* new_peak, Room x) {
  const int64_t task = b * p.lists + list;
  const bool begins = at.count == 1, more = at.newest > p.sampled[task];
  p.sampled[task] = at.newest;
  float *mass = p.masses + task * p.room + 1, *peak = nullptr;
  if (p.peaks) peak = p.peaks + task * p.room + 1;
  const int64_t visible = std::min(at.row + 1, p.blocks);
  float total = 0;
  for (int64_t j = 0; j < p.blocks; j++) {
    mass[j] = begins ? new_mass[j] : more ? mass[j] + new_mass[j] : mass[j];
    if (peak) peak[j] = begins || new_peak[j] > peak[j] ? new_peak[j] : peak[j];
    new_mass[j] = std::max(mass[j] / float(at.count), kTiny);
    if (j < visible) total += new_mass[j];
  }
  // NaN ranks below everything.
  const auto by_peak = [&](int64_t j) { return peak[j] == peak[j] ? peak[j] : -kInfinity; };
  const auto by_mass = [&](int64_t j) {
    return new_mass[j] == new_mass[j] ? new_mass[j] : -kInfinity;
  };
  int64_t free = 0, kept = 0;
  for (int64_t j = 0; j < visible; j++) {
    x.kept[j] = j < p.sinks || j >= at.row - p.near;
    kept += x.kept[j];
    if (!x.kept[j]) x.order[free++] = j;
  }
  if (p.quota) {
    const int64_t quota = p.quota[b * p.quota_step[0] + list * p.quota_step[1]];
    const int64_t taken = std::min(std::max<int64_t>(quota, 0), free);
    best_first(x.order, free, taken, by_peak);
    for (int64_t n = 0; n < taken; n++) x.kept[x.order[n]] = 1;
    kept += taken;
    x.order += taken;
    free -= taken;
  }
  int64_t wanted = kept;
  const float threshold = p.threshold[b * p.threshold_step];
  for (int64_t n = 0; n < free; n++) wanted += new_mass[x.order[n]] / total >= threshold;
  if (p.least) {
    wanted = std::max<int64_t>(wanted, p.least[b * p.least_step[0] + list * p.least_step[1]]);
  }
  const int64_t chosen = std::min(wanted - kept, free);
  best_first(x.order, free, chosen, by_mass);
  for (int64_t n = 0; n < chosen; n++) x.kept[x.order[n]] = 1;
  int32_t* indices = p.indices + task * p.width;
  int64_t slot = 0;
  for (int64_t j = 0; j < visible && slot < p.width; j++) {
    if (x.kept[j]) indices[slot++] = int32_t(j);
  }
  p.counts[task] = int32_t(slot);
  std::fill(indices + slot, indices + p.width, 0);
}

// Takes heads that belong together until none are left.
void list_all(const Newest& p, std::atomic<int64_t>& next, std::atomic<int>& status) {
  const int64_t heads = together(p), group = p.heads / p.kv_heads;
  const int64_t lists = heads * p.lists / p.heads;
  const int64_t logits = group * (p.capacity + kLanes), sums = lists * p.blocks;
  std::vector<float> numbers;
  std::vector<int64_t> order;
  std::vector<unsigned char> kept;
  try {
    numbers.resize(group * p.head_dim + p.rank + logits + 2 * sums);
    order.resize(p.blocks);
    kept.resize(p.blocks);
  } catch (const std::bad_alloc&) {
    status = 2;
    return;
  }
  Room x;
  x.folded = numbers.data();
  x.shorter = x.folded + group * p.head_dim;
  x.logits = x.shorter + p.rank;
  x.mass = x.logits + logits;
  x.peak = x.mass + sums;
  x.order = order.data();
  x.kept = kept.data();
  const int64_t tasks = p.heads / heads;
  for (int64_t task; (task = next++) < p.batch * tasks;) {
    const int64_t b = task / tasks, first = task % tasks * heads;
    const int64_t first_list = first * p.lists / p.heads;
    const Place at = place_of(p, b);
    std::fill(x.mass, x.mass + 2 * sums, 0.0f);
    for (int64_t h = first; at.sees && h < first + heads; h += group) {
      rate_heads(p, at, b, h / group, first_list, x);
    }
    for (int64_t n = 0; n < lists; n++) {
      list_blocks(p, at, b, first_list + n, x.mass + n * p.blocks, x.peak + n * p.blocks, x);
    }
  }
}

}  // namespace

// 0: done. 2: out of memory.
extern "C" int list_newest(const Newest* problem) {
  std::atomic<int64_t> next(0);
  std::atomic<int> status(0);
  const Newest& p = *problem;
  const int64_t tasks = p.batch * (p.heads / together(p));
  // PyTorch's threads wait busily for a while; to start another among them takes a millisecond,
  // as long as 2^21 numbers to read.
  const int64_t worth = p.batch * p.kv_heads * p.blocks * p.block_size * p.head_dim >> 21;
  on_threads(std::min({p.threads, tasks, worth}), [&] { list_all(p, next, status); });
  return status;
}
