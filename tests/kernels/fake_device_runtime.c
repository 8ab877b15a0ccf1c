/* A device runtime of two functions, for tests: streams are queues, one thread per stream runs their host functions.
 *
 * Exports what kt_kernel looks up (cudaLaunchHostFunc, cudaStreamIsCapturing) with the semantics of the CUDA runtime,
 * and fake_* for the test: hold a stream back, wait for it, capture into its graph and replay that, let a call fail.
 * A stream that captures records host functions instead of running them; a replay runs all of them again, in order. */
#include <pthread.h>
#include <stdlib.h>

typedef void (*host_function)(void*);

struct work {
  host_function function;
  void* context;
};

struct list {
  struct work* items;
  int count, capacity;
};

struct stream {
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  struct list queued, graph;
  int finished; /* of queued */
  int held, capturing, status;
};

static void append(struct list* list, struct work work) {
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? 2 * list->capacity : 16;
    list->items = realloc(list->items, list->capacity * sizeof(struct work));
    if (list->items == NULL) abort();
  }
  list->items[list->count++] = work;
}

static void* run(void* argument) {
  struct stream* stream = argument;
  pthread_mutex_lock(&stream->mutex);
  for (;;) {
    while (stream->held || stream->finished == stream->queued.count) {
      pthread_cond_wait(&stream->changed, &stream->mutex);
    }
    struct work work = stream->queued.items[stream->finished];
    pthread_mutex_unlock(&stream->mutex);
    work.function(work.context);
    pthread_mutex_lock(&stream->mutex);
    ++stream->finished;
    pthread_cond_broadcast(&stream->changed);
  }
}

void* fake_stream_create(void) {
  struct stream* stream = calloc(1, sizeof(*stream));
  if (stream == NULL) abort();
  pthread_mutex_init(&stream->mutex, NULL);
  pthread_cond_init(&stream->changed, NULL);
  if (pthread_create(&stream->thread, NULL, run, stream) != 0) abort();
  return stream;
}

static void set(struct stream* stream, int* field, int value) {
  pthread_mutex_lock(&stream->mutex);
  *field = value;
  pthread_cond_broadcast(&stream->changed);
  pthread_mutex_unlock(&stream->mutex);
}

void fake_stream_hold(struct stream* stream, int held) { set(stream, &stream->held, held); }
void fake_stream_capture(struct stream* stream, int capturing) { set(stream, &stream->capturing, capturing); }
void fake_stream_fail(struct stream* stream, int status) { set(stream, &stream->status, status); }

void fake_stream_replay(struct stream* stream) {
  pthread_mutex_lock(&stream->mutex);
  for (int i = 0; i < stream->graph.count; ++i) append(&stream->queued, stream->graph.items[i]);
  pthread_cond_broadcast(&stream->changed);
  pthread_mutex_unlock(&stream->mutex);
}

void fake_stream_wait(struct stream* stream) {
  pthread_mutex_lock(&stream->mutex);
  while (stream->finished < stream->queued.count) pthread_cond_wait(&stream->changed, &stream->mutex);
  pthread_mutex_unlock(&stream->mutex);
}

int cudaLaunchHostFunc(void* handle, host_function function, void* context) {
  struct stream* stream = handle;
  pthread_mutex_lock(&stream->mutex);
  const int status = stream->status;
  if (status == 0) append(stream->capturing ? &stream->graph : &stream->queued, (struct work){function, context});
  pthread_cond_broadcast(&stream->changed);
  pthread_mutex_unlock(&stream->mutex);
  return status;
}

int cudaStreamIsCapturing(void* handle, int* capturing) {
  struct stream* stream = handle;
  pthread_mutex_lock(&stream->mutex);
  *capturing = stream->capturing;
  pthread_mutex_unlock(&stream->mutex);
  return 0;
}
