/* A device runtime without a device, for tests: the functions of the CUDA runtime (or HIP) that kt_kernel looks up, and
 * those that a test needs to play the part of torch, with the semantics of the real ones.
 *
 *   stream       a queue with a thread of its own; handle 0 is the default stream of the calling thread's device
 *   capture      records instead of running; ends in a graph, whose executable copies replay it
 *   user object  destroyed on the runtime's own thread when no graph, executable graph or launch in flight holds it
 *   events       order streams among each other (not inside a capture)
 *   memory       operations of a stream that write a word or wait until one has reached a value
 *
 * A callback that calls the runtime, which the real one forbids, ends the process. Memory is ordinary memory: the
 * device of a pointer is not checked. fake_* is what no runtime has: hold a stream back, let its calls fail, wait.
 * A function that fails is also the thread's last error.
 *
 *   -DFAKE_PREFIX=hip       the names of HIP instead of CUDA's
 *   -DFAKE_VERSION=13000    the interface of CUDA 13 instead of 12's
 *   -DFAKE_PLAIN            a runtime that knows of no graph what it is and what it owns */
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef FAKE_PREFIX
#define FAKE_PREFIX cuda
#endif
#ifndef FAKE_VERSION
#define FAKE_VERSION 12090
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define RUNTIME(name) JOIN(FAKE_PREFIX, name)

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  NOT_READY = 600,
  NOT_SUPPORTED = 801,
  UNSUPPORTED_IN_CAPTURE = 900
};
enum { MODE_GLOBAL, MODE_THREAD, MODE_RELAXED };
enum { DEVICES = 2 };

typedef void (*host_function)(void*);

struct event {
  int recorded, completed; /* how often */
};

struct object {
  host_function destroy;
  void* pointer;
  int references;
  struct object* next; /* to be destroyed */
};

/* One piece of work of a stream. */
struct work {
  enum { CALL, COPY, RECORD, WAIT, WRITE_VALUE, WAIT_VALUE, END_OF_LAUNCH } kind;
  host_function function; /* CALL */
  void* context;          /* CALL: its argument; RECORD, WAIT: the event; END_OF_LAUNCH: the executable graph */
  void* to;               /* COPY; WRITE_VALUE, WAIT_VALUE: the word */
  const void* from;
  size_t bytes;
  int count;      /* RECORD, WAIT: which recording of the event */
  unsigned value; /* WRITE_VALUE, WAIT_VALUE */
  struct work* next;
};

struct list {
  struct work *first, *last;
};

struct reference {
  struct object* object;
  int count;
};

/* Both kinds: what was captured and what can be launched. */
struct graph {
  struct list work;
  struct reference references[4096];
  int reference_count;
  int launches; /* in flight */
  int destroyed;
};

struct stream {
  int device, held, status, mode, destroyed;
  int running; /* a piece of work */
  struct list queued;
  struct graph* capturing;
  unsigned long long capture;
};

/* One lock for everything; callbacks run without it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct stream* default_streams[DEVICES];
static struct object *dying, *last_dying;
static int destroying;
static int global_captures, host_functions_enqueued, memory_operations_enqueued;
static unsigned long long captures;
/* How operations on memory behave, see fake_memory_operations. */
static enum { WORK, REFUSED, NOT_CAPTURED, NEVER_PASS, PASS_AT_ONCE, NEVER_ARRIVE } memory_operations;
static size_t lockable = (size_t)-1; /* bytes that HostRegister may lock */
static __thread int device, inside_callback, capture_mode, last_error;

static void* zeroed(size_t bytes) {
  void* memory = calloc(1, bytes);
  if (memory == NULL) abort();
  return memory;
}

static void enter(void) {
  if (inside_callback) {
    fputs("fake device runtime: a callback called the runtime\n", stderr);
    abort();
  }
  pthread_mutex_lock(&lock);
}

/* What a function returns; an error is remembered, as the real one does. */
static int result(int status) {
  if (status != SUCCESS) last_error = status;
  return status;
}

static int leave(int status) {
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  return result(status);
}

static void call(host_function function, void* context) {
  pthread_mutex_unlock(&lock);
  inside_callback = 1;
  function(context);
  inside_callback = 0;
  pthread_mutex_lock(&lock);
}

static void start(void* (*body)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, body, argument) != 0) abort();
  pthread_detach(thread);
}

/* ---- user objects ---- */

static void* destroy_objects(void* unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (dying == NULL) pthread_cond_wait(&changed, &lock);
    struct object* object = dying;
    dying = object->next;
    destroying = 1;
    call(object->destroy, object->pointer);
    free(object);
    destroying = 0;
    pthread_cond_broadcast(&changed);
  }
  return NULL; /* never */
}

static void release(struct object* object, int count) {
  static int started;
  object->references -= count;
  if (object->references > 0) return;
  if (!started) start(destroy_objects, NULL);
  started = 1;
  object->next = NULL;
  if (dying == NULL) {
    dying = object;
  } else {
    last_dying->next = object;
  }
  last_dying = object;
  pthread_cond_broadcast(&changed);
}

void fake_wait_for_destructors(void) {
  enter();
  while (dying != NULL || destroying) pthread_cond_wait(&changed, &lock);
  leave(SUCCESS);
}

/* ---- streams ---- */

static void append(struct list* list, struct work work) {
  struct work* copy = zeroed(sizeof(*copy));
  *copy = work;
  copy->next = NULL;
  if (list->first == NULL) {
    list->first = copy;
  } else {
    list->last->next = copy;
  }
  list->last = copy;
}

static void empty(struct list* list) {
  while (list->first != NULL) {
    struct work* work = list->first;
    list->first = work->next;
    free(work);
  }
}

static void free_when_unused(struct graph* graph) {
  if (!graph->destroyed || graph->launches > 0) return;
  for (int i = 0; i < graph->reference_count; ++i) release(graph->references[i].object, graph->references[i].count);
  empty(&graph->work);
  free(graph);
}

/* Without the lock, as others go on; the CPU tells nobody when it changes a word. */
static void wait_for_value(const struct work* work) {
  const unsigned* word = work->to;
  pthread_mutex_unlock(&lock);
  while (memory_operations == NEVER_PASS || (int)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - work->value) < 0) {
    if (memory_operations == PASS_AT_ONCE) break;
    usleep(10);
  }
  pthread_mutex_lock(&lock);
}

static void perform(struct work* work) {
  struct event* event = work->context;
  struct graph* graph = work->context;
  switch (work->kind) {
    case CALL:
      call(work->function, work->context);
      break;
    case COPY:
      pthread_mutex_unlock(&lock);
      memcpy(work->to, work->from, work->bytes);
      pthread_mutex_lock(&lock);
      break;
    case RECORD:
      if (event->completed < work->count) event->completed = work->count;
      break;
    case WAIT:
      while (event->completed < work->count) pthread_cond_wait(&changed, &lock);
      break;
    case WRITE_VALUE:
      __atomic_store_n((unsigned*)work->to, work->value, __ATOMIC_RELEASE);
      break;
    case WAIT_VALUE:
      wait_for_value(work);
      break;
    case END_OF_LAUNCH:
      --graph->launches;
      free_when_unused(graph);
      break;
  }
}

static void* run(void* argument) {
  struct stream* stream = argument;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (stream->held || stream->queued.first == NULL) {
      if (stream->destroyed && stream->queued.first == NULL) {
        free(stream);
        pthread_mutex_unlock(&lock);
        return NULL;
      }
      pthread_cond_wait(&changed, &lock);
    }
    struct work* work = stream->queued.first;
    stream->queued.first = work->next;
    stream->running = 1;
    perform(work);
    free(work);
    stream->running = 0;
    pthread_cond_broadcast(&changed);
  }
}

static struct stream* make_stream(int of_device) {
  struct stream* stream = zeroed(sizeof(*stream));
  stream->device = of_device;
  start(run, stream);
  return stream;
}

static struct stream* found(struct stream* stream) {
  if (stream != NULL) return stream;
  if (default_streams[device] == NULL) default_streams[device] = make_stream(device);
  return default_streams[device];
}

int RUNTIME(StreamIsCapturing)(struct stream* handle, int* capturing);

static int enqueue(struct stream* handle, struct work work) {
  enter();
  struct stream* stream = found(handle);
  if (stream->status != SUCCESS) return leave(stream->status);
  const int orders_streams = work.kind == RECORD || work.kind == WAIT;
  if (stream->capturing && orders_streams) return leave(NOT_SUPPORTED);
  if (work.kind == RECORD) work.count = ++((struct event*)work.context)->recorded;
  if (work.kind == WAIT) work.count = ((struct event*)work.context)->recorded;
  append(stream->capturing ? &stream->capturing->work : &stream->queued, work);
  return leave(SUCCESS);
}

int RUNTIME(RuntimeGetVersion)(int* version) {
  *version = FAKE_VERSION;
  return SUCCESS;
}

int RUNTIME(GetLastError)(void) {
  const int error = last_error;
  last_error = SUCCESS;
  return error;
}

int RUNTIME(SetDevice)(int number) {
  if (number < 0 || number >= DEVICES) return result(INVALID_DEVICE);
  device = number;
  return SUCCESS;
}

int RUNTIME(GetDevice)(int* number) {
  *number = device;
  return SUCCESS;
}

int RUNTIME(StreamCreate)(struct stream** stream) {
  enter();
  *stream = make_stream(device);
  return leave(SUCCESS);
}

int RUNTIME(StreamCreateWithFlags)(struct stream** stream, unsigned flags) {
  (void)flags;
  return RUNTIME(StreamCreate)(stream);
}

/* Ends when it has done what it was given. */
int RUNTIME(StreamDestroy)(struct stream* stream) {
  enter();
  stream->destroyed = 1;
  return leave(SUCCESS);
}

int RUNTIME(StreamSynchronize)(struct stream* handle) {
  enter();
  struct stream* stream = found(handle);
  if (stream->capturing) return leave(UNSUPPORTED_IN_CAPTURE);
  while (stream->queued.first != NULL || stream->running) pthread_cond_wait(&changed, &lock);
  return leave(SUCCESS);
}

int RUNTIME(LaunchHostFunc)(struct stream* stream, host_function function, void* context) {
  __atomic_add_fetch(&host_functions_enqueued, 1, __ATOMIC_RELAXED);
  return enqueue(stream, (struct work){.kind = CALL, .function = function, .context = context});
}

int RUNTIME(MemcpyAsync)(void* to, const void* from, size_t bytes, int kind, struct stream* stream) {
  (void)kind;
  return enqueue(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}

int RUNTIME(EventCreate)(struct event** event) {
  *event = zeroed(sizeof(**event));
  return SUCCESS;
}

int RUNTIME(EventCreateWithFlags)(struct event** event, unsigned flags) {
  (void)flags;
  return RUNTIME(EventCreate)(event);
}

/* Work that still refers to the event runs on, so it is not freed. */
int RUNTIME(EventDestroy)(struct event* event) { return event == NULL ? INVALID_VALUE : SUCCESS; }

int RUNTIME(EventQuery)(struct event* event) {
  enter();
  return leave(event->completed < event->recorded ? NOT_READY : SUCCESS);
}

int RUNTIME(EventSynchronize)(struct event* event) {
  enter();
  const int recorded = event->recorded;
  while (event->completed < recorded) pthread_cond_wait(&changed, &lock);
  return leave(SUCCESS);
}

int RUNTIME(EventRecord)(struct event* event, struct stream* stream) {
  return enqueue(stream, (struct work){.kind = RECORD, .context = event});
}

int RUNTIME(StreamWaitEvent)(struct stream* stream, struct event* event, unsigned flags) {
  (void)flags;
  return enqueue(stream, (struct work){.kind = WAIT, .context = event});
}

/* Page-locked memory; making it is one of the calls that a capture forbids. */
int RUNTIME(MallocHost)(void** memory, size_t bytes) {
  enter();
  if (global_captures > 0 && capture_mode != MODE_RELAXED) return leave(UNSUPPORTED_IN_CAPTURE);
  if (posix_memalign(memory, 4096, bytes) != 0) abort();
  memset(*memory, 0, bytes);
  return leave(SUCCESS);
}

int RUNTIME(HostAlloc)(void** memory, size_t bytes, unsigned flags) {
  (void)flags;
  return RUNTIME(MallocHost)(memory, bytes);
}

/* HIP's name for it. */
int RUNTIME(HostMalloc)(void** memory, size_t bytes, unsigned flags) {
  return RUNTIME(HostAlloc)(memory, bytes, flags);
}

int RUNTIME(HostGetDevicePointer)(void** on_device, void* memory, unsigned flags) {
  (void)flags;
  *on_device = memory;
  return SUCCESS;
}

/* ---- operations on memory: the driver's in CUDA, the runtime's in HIP ---- */

/* 0 they work, 1 every call is refused, 2 refused in a capture, 3 waits never pass, 4 waits pass at once, 5 what is
 * written does not arrive. */
void fake_memory_operations(int behaviour) {
  enter();
  memory_operations = behaviour;
  leave(SUCCESS);
}

static int memory_operation(struct stream* stream, struct work work) {
  int capturing = 0;
  RUNTIME(StreamIsCapturing)(stream, &capturing);
  if (memory_operations == REFUSED) return NOT_SUPPORTED;
  if (memory_operations == NOT_CAPTURED && capturing) return UNSUPPORTED_IN_CAPTURE;
  if (memory_operations == NEVER_ARRIVE && work.kind == WRITE_VALUE) return SUCCESS;
  __atomic_add_fetch(&memory_operations_enqueued, 1, __ATOMIC_RELAXED);
  return enqueue(stream, work);
}

int hipStreamWriteValue32(struct stream* stream, void* word, unsigned value, unsigned flags) {
  if (flags != 0) return INVALID_VALUE;
  return memory_operation(stream, (struct work){.kind = WRITE_VALUE, .to = word, .value = value});
}

int hipStreamWaitValue32(struct stream* stream, void* word, unsigned value, unsigned flags, unsigned mask) {
  if (flags != 0 || mask != ~0u) return INVALID_VALUE; /* reached, of the whole word */
  return memory_operation(stream, (struct work){.kind = WAIT_VALUE, .to = word, .value = value});
}

int cuStreamWriteValue32_v2(struct stream* stream, unsigned long long word, unsigned value, unsigned flags) {
  return hipStreamWriteValue32(stream, (void*)(size_t)word, value, flags);
}

int cuStreamWaitValue32_v2(struct stream* stream, unsigned long long word, unsigned value, unsigned flags) {
  return hipStreamWaitValue32(stream, (void*)(size_t)word, value, flags, ~0u);
}

/* So far, captured or not; memory operations of both kinds. */
int fake_host_functions_enqueued(void) { return __atomic_load_n(&host_functions_enqueued, __ATOMIC_RELAXED); }

int fake_memory_operations_enqueued(void) { return __atomic_load_n(&memory_operations_enqueued, __ATOMIC_RELAXED); }

int RUNTIME(ThreadExchangeStreamCaptureMode)(int* mode) {
  const int before = capture_mode;
  if (*mode < MODE_GLOBAL || *mode > MODE_RELAXED) return result(INVALID_VALUE);
  capture_mode = *mode;
  *mode = before;
  return SUCCESS;
}

int RUNTIME(HostRegister)(void* memory, size_t bytes, unsigned flags) {
  (void)memory, (void)flags;
  return result(bytes <= lockable ? SUCCESS : OUT_OF_MEMORY);
}

void fake_lockable(size_t bytes) { lockable = bytes; }

static void set(struct stream* handle, size_t field, int value) {
  enter();
  *(int*)((char*)found(handle) + field) = value;
  leave(SUCCESS);
}

void fake_stream_hold(struct stream* stream, int held) { set(stream, offsetof(struct stream, held), held); }
void fake_stream_fail(struct stream* stream, int status) { set(stream, offsetof(struct stream, status), status); }

/* ---- capture and graphs ---- */

int RUNTIME(StreamBeginCapture)(struct stream* stream, int mode) {
  enter();
  if (stream == NULL || stream->capturing) return leave(INVALID_VALUE);
  stream->capturing = zeroed(sizeof(struct graph));
  stream->capture = ++captures;
  stream->mode = mode;
  if (mode == MODE_GLOBAL) ++global_captures;
  return leave(SUCCESS);
}

int RUNTIME(StreamEndCapture)(struct stream* stream, struct graph** graph) {
  enter();
  if (stream == NULL || !stream->capturing) return leave(INVALID_VALUE);
  *graph = stream->capturing;
  stream->capturing = NULL;
  if (stream->mode == MODE_GLOBAL) --global_captures;
  return leave(SUCCESS);
}

int RUNTIME(StreamIsCapturing)(struct stream* handle, int* capturing) {
  enter();
  *capturing = found(handle)->capturing != NULL;
  return leave(SUCCESS);
}

int RUNTIME(GraphInstantiate)(struct graph** executable, struct graph* graph, unsigned long long flags) {
  (void)flags;
  enter();
  struct graph* copy = zeroed(sizeof(*copy));
  for (struct work* work = graph->work.first; work != NULL; work = work->next) append(&copy->work, *work);
  memcpy(copy->references, graph->references, sizeof(graph->references));
  copy->reference_count = graph->reference_count;
  for (int i = 0; i < copy->reference_count; ++i) copy->references[i].object->references += copy->references[i].count;
  *executable = copy;
  return leave(SUCCESS);
}

int RUNTIME(GraphInstantiateWithFlags)(struct graph** executable, struct graph* graph, unsigned long long flags) {
  return RUNTIME(GraphInstantiate)(executable, graph, flags);
}

int RUNTIME(GraphLaunch)(struct graph* executable, struct stream* handle) {
  enter();
  struct stream* stream = found(handle);
  ++executable->launches;
  for (struct work* work = executable->work.first; work != NULL; work = work->next) append(&stream->queued, *work);
  append(&stream->queued, (struct work){.kind = END_OF_LAUNCH, .context = executable});
  return leave(SUCCESS);
}

int RUNTIME(GraphDestroy)(struct graph* graph) {
  enter();
  graph->destroyed = 1;
  free_when_unused(graph);
  return leave(SUCCESS);
}

int RUNTIME(GraphExecDestroy)(struct graph* graph) { return RUNTIME(GraphDestroy)(graph); }

#ifndef FAKE_PLAIN

static int capture_info(struct stream* handle, int* status, unsigned long long* id, struct graph** graph) {
  enter();
  struct stream* stream = found(handle);
  *status = stream->capturing != NULL;
  if (id != NULL) *id = stream->capture;
  if (graph != NULL) *graph = stream->capturing;
  return leave(SUCCESS);
}

#if FAKE_VERSION >= 13000
int RUNTIME(StreamGetCaptureInfo)(struct stream* stream, int* status, unsigned long long* id, struct graph** graph,
                                  void** dependencies, void** edges, size_t* count) {
  if (dependencies != NULL || edges != NULL || count != NULL) return result(NOT_SUPPORTED);
  return capture_info(stream, status, id, graph);
}
#else
int RUNTIME(StreamGetCaptureInfo)(struct stream* stream, int* status, unsigned long long* id) {
  return capture_info(stream, status, id, NULL);
}

int RUNTIME(StreamGetCaptureInfo_v2)(struct stream* stream, int* status, unsigned long long* id, struct graph** graph,
                                     void** dependencies, size_t* count) {
  if (dependencies != NULL || count != NULL) return result(NOT_SUPPORTED);
  return capture_info(stream, status, id, graph);
}
#endif

int RUNTIME(UserObjectCreate)(struct object** object, void* pointer, host_function destroy, unsigned references,
                              unsigned flags) {
  if (references == 0 || flags != 1) return result(INVALID_VALUE);
  enter();
  *object = zeroed(sizeof(**object));
  **object = (struct object){.destroy = destroy, .pointer = pointer, .references = (int)references};
  return leave(SUCCESS);
}

int RUNTIME(GraphRetainUserObject)(struct graph* graph, struct object* object, unsigned count, unsigned flags) {
  enter();
  const int room = sizeof(graph->references) / sizeof(graph->references[0]);
  if (count == 0 || flags > 1 || graph->reference_count == room) return leave(INVALID_VALUE);
  graph->references[graph->reference_count++] = (struct reference){object, (int)count};
  if (flags == 0) object->references += (int)count; /* else the caller's references move to the graph */
  return leave(SUCCESS);
}

#endif
