/* Head poses from an edgehp artifact, for C and whatever can call C. docs/cpp.md is the manual. */
#ifndef EDGEHP_H
#define EDGEHP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An artifact that was checked and whose engine is open. One thread at a time may use it. */
typedef struct edgehp_head_pose edgehp_head_pose;

/* What went wrong; the numbers are the exit codes of the command edgehp. */
typedef enum {
    EDGEHP_OK = 0,
    EDGEHP_DATA = 1,          /* a file or value that is not what it should be */
    EDGEHP_USAGE = 2,         /* an argument that cannot be right */
    EDGEHP_INCOMPATIBLE = 4,  /* an artifact that does not belong here, or was altered */
    EDGEHP_ENVIRONMENT = 5    /* a driver or runtime that is missing or failed */
} edgehp_status;

typedef enum { EDGEHP_RGB, EDGEHP_BGR, EDGEHP_GREY } edgehp_pixels;

/* A picture in the caller's memory, 8 bits a channel; `stride` is bytes from row to row. */
typedef struct {
    const uint8_t *data;
    int width, height;
    size_t stride;
    edgehp_pixels pixels;
} edgehp_image;

/* A face in pixels of the picture; corners may lie outside it. */
typedef struct {
    double x_min, y_min, x_max, y_max;
} edgehp_box;

/* Pitch, yaw and roll in degrees: +pitch nose up, +yaw nose to the image's left, +roll clockwise.
   `spread` is the network's own doubt in degrees, and `confidence` the same as 0..1; a network
   without bins gives neither: both are NaN. `out_of_range` is 1 where the head may be turned
   further than the angles say. */
typedef struct {
    float angles[3];
    float spread[3];
    float confidence;
    int has_spread;
    int out_of_range;
    int usable; /* 1 where edgehp calls the pose "ok"; otherwise do not use the angles */
} edgehp_pose;

/* Check the artifact in the directory `artifact` (manifest, device, every byte), open its engine
   and run its golden vectors. `threads` of the processor; 0 leaves it to the runtime. NULL on
   failure: edgehp_last_error() says why. */
edgehp_head_pose *edgehp_open(const char *artifact, int threads);

/* The poses of `count` faces of one picture, in their order, into `poses`. A NULL `boxes` with a
   count of 1 takes the whole picture as the face. */
edgehp_status edgehp_infer(edgehp_head_pose *opened, const edgehp_image *image,
                           const edgehp_box *boxes, int count, edgehp_pose *poses);

/* Free it; NULL is allowed. */
void edgehp_close(edgehp_head_pose *opened);

/* What failed last in this thread, and its kind; valid until the next call in this thread. */
const char *edgehp_last_error(void);
edgehp_status edgehp_last_status(void);

#ifdef __cplusplus
}
#endif
#endif
