// An NVTX tool: writes every range of every domain to the file that NVTX_RECORD names, as a profiler would receive them.
// The layouts are those of NVTX 3 (nvtxTypes.h); the process loads this by NVTX_INJECTION64_PATH.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Function)(void);
typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  uint64_t payload;
  int32_t message_type;
  const char* message;  // a registered string is its own text, see string()
} Event;
typedef struct {
  size_t size;
  int (*table)(int module, Function*** out, unsigned* count);
} Callbacks;
enum { kCallbacks = 1, kCore2 = 5, kPush = 4, kPop = 5, kString = 10, kCreate = 12 };

static FILE* out;

static int push(const char* domain, const Event* event) {
  fprintf(out, "%s: %s\n", domain, event->message);
  fflush(out);
  return 0;
}
static int pop(const char* domain) {
  fprintf(out, "%s: end\n", domain);
  fflush(out);
  return 0;
}
static const char* string(const char* domain, const char* text) { return (void)domain, strdup(text); }
static const char* create(const char* name) { return strdup(name); }

int InitializeInjectionNvtx2(const void* (*get)(uint32_t)) {
  const Callbacks* callbacks = get(kCallbacks);
  Function** table;
  unsigned count;
  if (!callbacks || !callbacks->table(kCore2, &table, &count) || count <= kCreate) return 0;
  out = fopen(getenv("NVTX_RECORD"), "w");
  *table[kPush] = (Function)push;
  *table[kPop] = (Function)pop;
  *table[kString] = (Function)string;
  *table[kCreate] = (Function)create;
  return out != NULL;
}
