/* A device runtime that only keeps time: copies and events on one bus, with a clock of its own.
 *
 *   the clock     the real time that the caller has spent outside of this library, plus what is simulated here
 *   an expert     before its first copy the host has written all of it: that takes its bytes / write rate
 *   a copy        the call itself, and the bus is busy for a gap and bytes / bus rate, behind what it was given before
 *   waiting       moves the clock to the event, and adds the time to wake up
 *
 * Nothing is copied and nobody waits, so thousands of experts take milliseconds and the scheduler has no chance to
 * disturb. For one thread: the functions of the CUDA runtime that the pipeline uses, on one stream. */
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

enum { SUCCESS = 0, NOT_READY = 600 };

/* Seconds, and bytes per second. */
static struct {
  double bus, write, call, gap, wake;
  double expert; /* bytes */
  double scale;  /* simulated bytes of each byte that is copied */
} parameters;

static double simulated, outside_since, bus_free, bus_busy;
static long copies;
static int written; /* the expert that is being copied */

struct event {
  double reached;
};

static double real(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

/* The time now; real time inside of this library does not count. */
static double enter(void) {
  simulated += real() - outside_since;
  return simulated;
}

static int leave(int status) {
  outside_since = real();
  return status;
}

static int called(void) {
  simulated += parameters.call;
  return leave(SUCCESS);
}

void bus_begin(double bus, double write, double call, double gap, double wake, double expert, double scale) {
  parameters.bus = bus;
  parameters.write = write;
  parameters.call = call;
  parameters.gap = gap;
  parameters.wake = wake;
  parameters.expert = expert;
  parameters.scale = scale;
  simulated = bus_free = bus_busy = 0;
  copies = written = 0;
  outside_since = real();
}

/* Seconds since bus_begin until all is copied; what the bus was busy of them; and the host's own part. */
void bus_end(double* seconds, double* busy, double* host, long* count) {
  const double now = enter();
  *host = now;
  *seconds = now > bus_free ? now : bus_free;
  *busy = bus_busy;
  *count = copies;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  (void)to, (void)from, (void)kind, (void)stream;
  enter();
  const double size = parameters.scale * bytes;
  if (!written) simulated += parameters.expert / parameters.write;
  written = 1;
  simulated += parameters.call;
  const double begin = simulated > bus_free ? simulated : bus_free;
  bus_free = begin + parameters.gap + size / parameters.bus;
  bus_busy += size / parameters.bus;
  ++copies;
  return leave(SUCCESS);
}

int cudaEventCreateWithFlags(struct event** event, unsigned flags) {
  (void)flags;
  *event = calloc(1, sizeof(**event));
  return SUCCESS;
}

int cudaEventDestroy(struct event* event) {
  free(event);
  return SUCCESS;
}

int cudaEventRecord(struct event* event, void* stream) {
  (void)stream;
  enter();
  event->reached = bus_free;
  written = 0;
  return called();
}

int cudaEventQuery(struct event* event) {
  const double now = enter();
  (void)called();
  return event->reached > now ? NOT_READY : SUCCESS;
}

int cudaEventSynchronize(struct event* event) {
  const double now = enter();
  if (event->reached > now) simulated = event->reached + parameters.wake;
  return called();
}

int cudaStreamWaitEvent(void* stream, struct event* event, unsigned flags) {
  (void)stream, (void)event, (void)flags;
  enter();
  return called();
}

int cudaGetDevice(int* number) { return *number = 0; }
int cudaSetDevice(int number) { return number; }
int cudaGetLastError(void) { return SUCCESS; }
int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* context) {
  (void)stream;
  function(context);
  return SUCCESS;
}
int cudaStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  return *status = 0;
}
