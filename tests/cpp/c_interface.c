/* The least that a C program does: the head pose of a face that fills a picture (binary PPM). */
#include <stdio.h>
#include <stdlib.h>

#include "edgehp.h"

int main(int argc, char **argv) {
    edgehp_image image = {.pixels = EDGEHP_RGB};
    edgehp_pose pose;
    FILE *file;
    uint8_t *pixels;
    int i, faults = 0;

    if (argc < 3) {
        fprintf(stderr, "usage: %s ARTIFACT PICTURE.ppm...\n", argv[0]);
        return EDGEHP_USAGE;
    }
    edgehp_head_pose *opened = edgehp_open(argv[1], 0);
    if (opened == NULL) {
        fprintf(stderr, "%s\n", edgehp_last_error());
        return edgehp_last_status();
    }
    for (i = 2; i < argc; ++i) {
        file = fopen(argv[i], "rb");
        if (file == NULL || fscanf(file, "P6 %d %d 255", &image.width, &image.height) != 2 ||
            fgetc(file) == EOF || image.width < 1 || image.width > 10000 || image.height < 1 ||
            image.height > 10000) {
            fprintf(stderr, "%s: expected a binary PPM of 8 bits\n", argv[i]);
            return EDGEHP_DATA;
        }
        image.stride = 3 * (size_t)image.width;
        pixels = calloc((size_t)image.height, image.stride);
        if (pixels == NULL) return EDGEHP_ENVIRONMENT;
        if (fread(pixels, image.stride, (size_t)image.height, file) != (size_t)image.height)
            fprintf(stderr, "%s: truncated\n", argv[i]), ++faults;
        fclose(file);
        image.data = pixels;
        if (edgehp_infer(opened, &image, NULL, 1, &pose) != EDGEHP_OK)
            fprintf(stderr, "%s: %s\n", argv[i], edgehp_last_error()), ++faults;
        else
            printf("pitch %.5f yaw %.5f roll %.5f confidence %.4f\n", pose.angles[0],
                   pose.angles[1], pose.angles[2], pose.confidence);
        free(pixels);
    }
    edgehp_close(opened);
    return faults ? EDGEHP_DATA : EDGEHP_OK;
}
