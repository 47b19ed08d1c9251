// What a careless or hostile caller may pass. Nothing here claims memory that is not there: shapes grow only where a
// second tensor contradicts them, or beyond every limit.
#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz_problem.h"

namespace fuzz {
namespace {

bool is(const Argument& argument, std::initializer_list<const char*> names) {
  for (const char* name : names)
    if (argument.tensor->name == name) return true;
  return false;
}

int32_t garbage(Random& r, int32_t value) {
  return r.one_of<int32_t>({INT32_MIN, INT32_MAX, INT32_MIN + 1, -1, 0, 1, static_cast<int32_t>(value + 1u),
                            static_cast<int32_t>(value - 1u), static_cast<int32_t>(r.next()),
                            static_cast<int32_t>(r.range(-20, 200))});
}

void spoil_indices(Problem& p, Random& r, std::string& what) {
  std::vector<Tensor*> tables;
  for (const Argument& a : p.arguments)
    if (a.tensor->view.dtype == STROBE_INT32 && a.tensor->view.data) tables.push_back(a.tensor);
  if (tables.empty()) return;
  Tensor& t = *tables[static_cast<size_t>(r.range(0, i64(tables.size()) - 1))];
  const double share = r.one_of<double>({0.1, 0.5, 1});
  for_each_element(t.view, [&](i64, i64 at) {
    if (r.chance(share)) t.set_int(at, garbage(r, t.get_int(at)));
  });
  what += " values of " + t.name + ";";
}

bool spoil_scalar(Problem& p, Random& r, std::string& what) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  strobe_args& a = p.args;
  what += " a scalar;";
  switch (r.range(0, 13)) {
    case 0:
      a.keep_first = r.one_of<i64>({-1, INT64_MIN});
      return true;
    case 1:
      a.window_left = r.one_of<i64>({-2, INT64_MIN});
      return true;
    case 2:
      a.window_right = r.one_of<i64>({-2, INT64_MIN});
      return true;
    case 3:
      a.softcap = r.one_of<double>({nan, -1, inf, 1e300});
      return true;
    case 4:
      a.dropout_p = r.one_of<double>({nan, -0.1, 1, 2, inf});
      return true;
    case 5:
      a.has_softmax_scale = 1;
      a.softmax_scale = r.one_of<double>({nan, inf, -inf, 1e300});
      return true;
    case 6:
      a.max_seqlen_q = r.one_of<i64>({-2, INT64_MIN});
      return true;
    case 7:
      a.max_seqlen_k = r.one_of<i64>({-2, INT64_MIN});
      return true;
    case 8:
      a.backend = r.one_of<const char*>({"", "gpu", "cpu "});
      return true;
    case 9:
      a.struct_size = static_cast<size_t>(r.one_of<i64>({0, 8, i64(sizeof a) - 1, -1}));
      return true;
    case 10:
      a.softcap = 3;
      a.dropout_p = 0.5;
      return true;
    case 11:
      a.window_left = a.window_right = INT64_MAX;
      return false;
    case 12:
      a.keep_first = INT64_MAX;
      return false;
    default:
      a.max_seqlen_q = a.max_seqlen_k = INT64_MAX;
      return false;
  }
}

bool spoil_pointer(Problem& p, Random& r, std::string& what) {
  const Argument& a = p.arguments[static_cast<size_t>(r.range(0, i64(p.arguments.size()) - 1))];
  *a.slot = nullptr;
  what += " no " + a.tensor->name + ";";
  return is(a, {"q", "k", "v", "out", "dout", "dq", "dk", "dv"});
}

bool spoil_descriptor(Problem& p, Random& r, bool alone, std::vector<const Tensor*>& done, std::string& what) {
  const Argument& a = p.arguments[static_cast<size_t>(r.range(0, i64(p.arguments.size()) - 1))];
  if (std::count(done.begin(), done.end(), a.tensor)) return false;
  done.push_back(a.tensor);
  strobe_tensor& t = a.tensor->view;
  what += " the descriptor of " + a.tensor->name + ";";
  // cu_seqlens_k beside seqused_k and pages is not looked at.
  const bool looked_at = *a.slot == &t && !is(a, {"cu_seqlens_k"});
  const size_t dim = static_cast<size_t>(r.range(0, t.ndim > 0 ? t.ndim - 1 : 0));
  bool elements = true;
  for (int i = 0; i < t.ndim; ++i) elements &= t.shape[i] != 0;
  switch (r.range(0, 6)) {
    case 0:
      t.ndim = r.one_of<int32_t>({-1, 0, 9, 100, INT32_MIN, INT32_MAX});
      return looked_at;
    case 1: {
      const i64 given = t.shape[dim];
      t.shape[dim] = r.one_of<i64>({-1, INT64_MIN, INT64_MAX, i64(1) << 41});
      if (r.chance(0.5) && given > 0) t.shape[dim] = given - 1;
      if (alone && r.chance(0.3) && !is(a, {"cu_seqlens_q", "cu_seqlens_k"})) t.shape[dim] = given + 1;
      return false;
    }
    case 2:
      t.stride[dim] = r.one_of<i64>({0, -1, INT64_MIN, INT64_MAX, t.stride[dim] - 1});
      return false;
    case 3:
      t.dtype = r.one_of<int32_t>({0, -1, STROBE_INT64, STROBE_OTHER, 99});
      return looked_at;
    case 4:
      t.device = r.one_of<int32_t>({STROBE_CUDA, STROBE_OTHER_DEVICE, 0, -1});
      return looked_at;
    case 5:
      t.data = nullptr;
      return looked_at && elements;
    default:
      t.data = static_cast<char*>(t.data) + 1;
      return false;
  }
}

// An index table that lies in the memory that the call writes: its values would change while they are used.
bool spoil_overlap(Problem& p, Random& r, std::string& what) {
  Tensor* out = p.find(p.kind == Kind::kBackward ? p.backward.dq : p.args.out);
  std::vector<Tensor*> tables;
  for (const Argument& a : p.arguments)
    if (a.tensor->view.dtype == STROBE_INT32 && a.tensor->view.ndim == 1 && a.tensor->view.shape[0] && *a.slot &&
        !is(a, {"cu_seqlens_k"}))
      tables.push_back(a.tensor);
  if (!out || out->view.dtype != STROBE_FLOAT32 || tables.empty()) return false;
  Tensor& t = *tables[static_cast<size_t>(r.range(0, i64(tables.size()) - 1))];
  const strobe_tensor& o = out->view;
  if (o.ndim < 3 || t.view.shape[0] > o.shape[o.ndim - 1] || !o.data) return false;
  for (int i = 0; i < o.ndim; ++i)
    if (o.shape[i] == 0) return false;
  for (i64 i = 0; i < t.view.shape[0]; ++i) out->set_int(i, t.get_int(i));
  t.view.data = out->view.data;
  what += " " + t.name + " inside of " + out->name + ";";
  return true;
}

}  // namespace

bool spoil(Problem& p, Random& r, std::string& what) {
  if (r.chance(0.03) && spoil_overlap(p, r, what)) return true;
  const i64 count = r.chance(0.6) ? 1 : r.range(2, 4);
  i64 left = count;
  while (left > 0 && r.chance(0.4)) spoil_indices(p, r, what), --left;  // before their descriptors
  bool refused = false;
  std::vector<const Tensor*> done;
  for (; left > 0; --left) {
    const double kind = r.uniform();
    if (kind < 0.25)
      refused |= spoil_scalar(p, r, what);
    else if (kind < 0.4)
      refused |= spoil_pointer(p, r, what);
    else
      refused |= spoil_descriptor(p, r, count == 1, done, what);
  }
  // Of several faults one may undo another.
  return refused && count == 1;
}

}  // namespace fuzz
