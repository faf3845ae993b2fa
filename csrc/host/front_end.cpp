// Rows of a picture are resized across into a ring just large enough for the taps of one output row, resized
// down into one row of the canvas, and written from there to their places in the patches: no picture is
// stored between. Threads share jobs, or bands of canvas rows where there are few jobs.
#include "front_end.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>

#include "patches.h"
#include "stages.h"

namespace mmkernels {

namespace {

void run_bytes(const Job& job, const Picture& picture, const Output& out, int64_t begin, int64_t end) {
  const int64_t wide = 3 * canvas_width(job);
  Bytes fill(wide, static_cast<uint8_t>(job.fill)), canvas = fill;
  Resized resized(job, picture);
  std::vector<Whole> whole;
  if (job.whole_w) whole.emplace_back(job, out);
  for (int64_t y = begin; y < end; ++y) {
    const bool inside = y >= job.top && y < job.top + job.height;
    if (inside) resized.row(y - job.top, canvas.data() + 3 * job.left);
    const uint8_t* row = inside ? canvas.data() : fill.data();
    if (y < job.rows * job.view_h) put_bytes(job, out, row, y);
    for (Whole& view : whole) view.push(row, y);
  }
}

// Without rounding the order of the axes is free: down first reads the picture where it lies.
void run_reals(const Job& job, const Picture& picture, const Output& out, int64_t begin, int64_t end) {
  const int64_t wide = job.x1 - job.x0;
  const Axis across = Axis::widened(wide, job.width, Filter(job.filter));
  const Axis down = Axis::widened(job.y1 - job.y0, job.height, Filter(job.filter));
  std::vector<float> row(3 * wide), made(3 * job.width);
  std::vector<const uint8_t*> rows(down.reach());
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t tap = 0; tap < down.end(y) - down.first(y); ++tap)
      rows[tap] = picture.pixels + 3 * ((job.y0 + down.first(y) + tap) * picture.width + job.x0);
    const Taps taps = down.taps();
    const RealDown pass{rows.data(), taps.real + y * taps.groups * 4,
                        static_cast<int>(down.end(y) - down.first(y)), row.data(),
                        static_cast<int>(3 * wide)};
    MMKERNELS_CALL(real_down, pass);
    const RealAcross next{row.data(), made.data(), static_cast<int>(job.width), across.taps()};
    MMKERNELS_CALL(real_across, next);
    put_reals(job, out, false, made.data(), y);
  }
}

}  // namespace

const char* why_not(const std::vector<Job>& jobs, const std::vector<Picture>& pictures, const Output& out) {
  for (const Job& j : jobs) {
    if (j.image < 0 || j.image >= static_cast<int64_t>(pictures.size())) return "jobs: no such picture";
    const Picture& picture = pictures[j.image];
    if (j.x0 < 0 || j.y0 < 0 || j.x0 >= j.x1 || j.y0 >= j.y1 || j.x1 > picture.width || j.y1 > picture.height)
      return "jobs: a box leaves its picture";
    const int64_t canvas_w = j.columns * j.view_w, canvas_h = j.rows * j.view_h;
    if (j.columns < 1 || j.rows < 1 || j.view_w < 1 || j.view_h < 1) return "jobs: a canvas without views";
    if (j.width < 1 || j.height < 1 || j.left < 0 || j.top < 0 || j.filter < 0 || j.filter > 1 ||
        j.patch < 1 || j.fill < 0 || j.fill > 255)
      return "jobs: a number out of its range";
    if (j.real && (j.width != canvas_w || j.height != canvas_h || j.whole_w))
      return "jobs: without rounding the picture fills its canvas";
    if (j.whole_w < 0 || (j.whole_w > 0) != (j.whole_h > 0)) return "jobs: a view of the whole has no size";
    const int64_t made = j.columns * j.rows * (j.view_w / j.patch) * (j.view_h / j.patch);
    const int64_t whole = (j.whole_w / j.patch) * (j.whole_h / j.patch);
    if (j.first < 0 || j.first + made > out.count || j.whole_first < 0 || j.whole_first + whole > out.count)
      return "jobs: rows beyond the output";
  }
  return "";
}

void front_end(const std::vector<Job>& jobs, const std::vector<Picture>& pictures, const Output& out,
               int threads) {
  struct Unit {
    const Job* job;
    int64_t begin, end;
  };
  std::vector<Unit> units;
  const int64_t bands = jobs.empty() || threads < 2 ? 1 : std::max<int64_t>(1, 3 * threads / jobs.size());
  for (const Job& job : jobs) {
    const int64_t high = canvas_height(job), parts = job.whole_w ? 1 : std::min(bands, high);
    for (int64_t part = 0; part < parts; ++part)
      units.push_back({&job, high * part / parts, high * (part + 1) / parts});
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    try {
      for (size_t at = next++; at < units.size(); at = next++) {
        const Unit& unit = units[at];
        const Picture& picture = pictures[unit.job->image];
        (unit.job->real ? run_reals : run_bytes)(*unit.job, picture, out, unit.begin, unit.end);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> pool;
  const int64_t helpers = std::min<int64_t>(threads, units.size()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  if (failed) throw std::bad_alloc();
}

}  // namespace mmkernels
