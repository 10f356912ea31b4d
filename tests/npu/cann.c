/* The part of CANN's runtime that torch_npu needs to start and to copy memory, on a machine without CANN.

Device memory is host memory, and a copy is memcpy. Streams and events are numbers, and all their work counts as done.
Every other function fails (see stub.py), so that no kernel seems to work. Signatures are those that torch_npu calls. */
#define _DEFAULT_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int current_device;
static long last_handle;

static int allocate(void **p, size_t n) { return posix_memalign(p, 512, n ? n : 512) ? 207001 : 0; }
static int new_handle(void **handle) { *handle = (void *)(last_handle += 16); return 0; }

/* devices */
int aclrtGetDeviceCount(unsigned *count) {
    const char *n = getenv("CANN_STUB_DEVICES");
    *count = n ? atoi(n) : 8;
    return 0;
}
int aclrtSetDevice(int device) { current_device = device; return 0; }
int aclrtGetDevice(int *device) { *device = current_device; return 0; }
int aclrtGetCurrentContext(void **context) { *context = (void *)16; return 0; }
int aclrtDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return "no CANN on this machine: tests/npu/cann.c replaces it"; }
void aclAppLog(void) {}

/* memory: 64 GiB, all free */
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)64 << 30; return 0; }
int aclrtMalloc(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtMallocHost(void **p, size_t n) { return allocate(p, n); }
int aclrtFree(void *p) { free(p); return 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtMemset(void *p, size_t room, int value, size_t n) { memset(p, value, n); return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    memmove(to, from, n);
    return 0;
}

/* expandable segments: a reserved address range is usable memory, and a mapped physical block is only a number */
int aclrtReserveMemAddress(void **p, size_t n, size_t alignment, void *wish, uint64_t flags) {
    *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *p == MAP_FAILED ? 207001 : 0;
}
int aclrtMallocPhysical(void **p, size_t n, const void *kind, uint64_t flags) { return new_handle(p); }

/* streams and events */
int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) { return new_handle(stream); }
int aclrtCreateEventWithFlag(void **event, unsigned flag) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { return new_handle(event); }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }     /* recorded */
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return 0; } /* complete */
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return 0; }         /* complete */
int aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return 0; }

/* functions that succeed without doing anything */
#define NOTHING(name) int name(void) { return 0; }
NOTHING(aclInit) NOTHING(aclFinalize) NOTHING(aclmdlInitDump) NOTHING(aclmdlFinalizeDump)
NOTHING(aclrtReleaseMemAddress) NOTHING(aclrtFreePhysical) NOTHING(aclrtMapMem) NOTHING(aclrtUnmapMem)
NOTHING(aclrtResetDevice) NOTHING(aclrtSetCurrentContext) NOTHING(aclrtProcessReport)
NOTHING(aclrtSynchronizeDevice) NOTHING(aclrtSynchronizeDeviceWithTimeout)
NOTHING(aclrtSynchronizeStream) NOTHING(aclrtSynchronizeStreamWithTimeout) NOTHING(aclrtSynchronizeEvent)
NOTHING(aclrtDestroyStream) NOTHING(aclrtDestroyStreamForce) NOTHING(aclrtStreamWaitEvent)
NOTHING(aclrtRecordEvent) NOTHING(aclrtResetEvent) NOTHING(aclrtDestroyEvent)
NOTHING(aclrtSetDeviceSatMode) NOTHING(aclSetCompileopt) NOTHING(aclrtSetSysParamOpt) NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtSetOpExecuteTimeOut) NOTHING(aclrtSetOpWaitTimeout) NOTHING(aclGetDeviceCapability)
NOTHING(aclDestroyDataBuffer) NOTHING(aclDestroyTensorDesc) NOTHING(aclopDestroyAttr) NOTHING(aclGetTensorDescDimV2)
NOTHING(MsprofRegisterCallback) NOTHING(MsprofGetHashId) NOTHING(MsprofSysCycleTime) NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo) NOTHING(MsprofReportAdditionalInfo) NOTHING(rtGetC2cCtrlAddr)
