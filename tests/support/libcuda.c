/* A libcuda.so.1 whose GPU is the memory of the host: what cuda-python needs to run edgeprune's calls without a GPU. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
typedef struct timespec Event;
static int allocations;
static int busy; /* contexts pushed and not popped */
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuInit(unsigned f) { return (int)f; }
int cuDeviceGet(int *d, int n) { *d = n; return n ? 101 : 0; }
int cuDeviceGetName(char *s, int n, int d) { (void)d; strncpy(s, "Orin", n); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { (void)d; *v = a == 75 ? 8 : a == 76 ? 7 : a == 16 ? 8 : a == 18; return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { (void)d; *n = (size_t)7 << 30; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = &busy; return 0; }
int cuCtxPushCurrent_v2(void *c) { (void)c; busy++; return 0; }
int cuCtxPopCurrent_v2(void **c) { *c = &busy; busy--; return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = 100 + allocations; *t = 1000 + busy; return 0; }
int cuMemAlloc_v2(uintptr_t *p, size_t n) { if (n > 1 << 20) return 2; *p = (uintptr_t)malloc(n); allocations++; return 0; }
int cuMemFree_v2(uintptr_t p) { free((void *)p); allocations--; return 0; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { (void)f; *p = malloc(n); allocations++; return 0; }
int cuMemFreeHost(void *p) { free(p); allocations--; return 0; }
int cuMemcpyHtoDAsync_v2(uintptr_t d, const void *s, size_t n, void *q) { (void)q; memcpy((void *)d, s, n); return 0; }
int cuMemcpyDtoHAsync_v2(void *d, uintptr_t s, size_t n, void *q) { (void)q; memcpy(d, (void *)s, n); return 0; }
int cuStreamCreate(void **q, unsigned f) { (void)f; *q = malloc(1); allocations++; return 0; }
int cuStreamSynchronize(void *q) { return q ? 0 : 400; }
int cuStreamDestroy_v2(void *q) { free(q); allocations--; return 0; }
int cuEventCreate(void **e, unsigned f) { (void)f; *e = malloc(sizeof(Event)); allocations++; return 0; }
int cuEventRecord(void *e, void *q) { (void)q; return clock_gettime(CLOCK_MONOTONIC, e); }
int cuEventSynchronize(void *e) { return e ? 0 : 400; }
int cuEventDestroy_v2(void *e) { free(e); allocations--; return 0; }
int cuEventElapsedTime(float *ms, void *a, void *b) {
    Event *from = a, *to = b;
    *ms = 1e3f * (to->tv_sec - from->tv_sec) + 1e-6f * (to->tv_nsec - from->tv_nsec);
    return 0;
}
int cuEventElapsedTime_v2(float *ms, void *a, void *b) { return cuEventElapsedTime(ms, a, b); }
static int lookup(const char *name, void **f) {
    char newer[128];
    strncpy(newer, name, 100);
    newer[100] = 0;
    strcat(newer, "_v2");
    *f = dlsym(RTLD_DEFAULT, newer);
    if (!*f) *f = dlsym(RTLD_DEFAULT, name);
    return 0;
}
int cuGetProcAddress(const char *s, void **f, int v, uint64_t flags) { (void)v; (void)flags; return lookup(s, f); }
int cuGetProcAddress_v2(const char *s, void **f, int v, uint64_t flags, int *found) {
    (void)v; (void)flags;
    lookup(s, f);
    if (found) *found = *f ? 0 : 1;
    return 0;
}
