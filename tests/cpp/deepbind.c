/* The address sanitizer ends a process that loads a library with RTLD_DEEPBIND, as oneTBB does
   inside OpenVINO; without the flag it loads as well. */
#define _GNU_SOURCE
#include <dlfcn.h>

void *dlopen(const char *name, int flags) {
    void *(*loader)(const char *, int);
    *(void **)&loader = dlsym(RTLD_NEXT, "dlopen");
    return loader(name, flags & ~RTLD_DEEPBIND);
}
