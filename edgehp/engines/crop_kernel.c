/* Cuts a face out of a frame and resizes it: one pixel of the network's input a call.
 *
 * NVRTC compiles this for the GPU; the tests compile it for the processor and compare it with
 * edgehp.crop, which says what is computed: area averaging as cv2.INTER_AREA where the crop is
 * larger than the input, else bilinear as cv2.INTER_LINEAR with its fixed-point weights. Positions
 * are fractions with the input's side as denominator, so that they are exact.
 */
#ifdef __CUDACC__
#define DEVICE static __device__ __forceinline__
#else
#include <math.h>
#define DEVICE static inline
#endif

enum { RGB, BGR, GREY, NV12 };

/* As edgehp.engines.gpu_crop writes it. Buffers begin with one of these for each crop. */
typedef struct Cut {
    int form;
    int pixels, pitch;  /* offset of the frame's part in the buffer, and bytes a row */
    int chroma;         /* offset of the chroma rows of NV12, of the same pitch */
    int x, y;           /* the crop's corner in the part; outside of it the border is repeated */
    int width, height;  /* of the crop */
    int right, bottom;  /* last column and row of the part */
    int area;           /* 1: area averaging, 0: bilinear */
    int reserved;
} Cut;

DEVICE int clamp(int value, int most) { return value < 0 ? 0 : value > most ? most : value; }

/* The color at column x and row y of the crop. */
DEVICE void color_at(const unsigned char *buffer, const Cut *cut, int x, int y, int *rgb) {
    const unsigned char *row;
    x = clamp(x + cut->x, cut->right);
    y = clamp(y + cut->y, cut->bottom);
    row = buffer + cut->pixels + (long long)y * cut->pitch;
    if (cut->form == GREY) {
        rgb[0] = rgb[1] = rgb[2] = row[x];
    } else if (cut->form == NV12) {
        /* ITU-R BT.601, limited range, coefficients times 2^20, as cv2.COLOR_YUV2RGB_NV12. */
        const unsigned char *uv = buffer + cut->chroma + (long long)(y >> 1) * cut->pitch + (x & ~1);
        int luma = (row[x] < 16 ? 0 : row[x] - 16) * 1220542 + (1 << 19);
        int u = uv[0] - 128, v = uv[1] - 128;
        rgb[0] = clamp((luma + 1673527 * v) >> 20, 255);
        rgb[1] = clamp((luma - 852492 * v - 409993 * u) >> 20, 255);
        rgb[2] = clamp((luma + 2116026 * u) >> 20, 255);
    } else {
        int first = cut->form == BGR ? 2 : 0;
        row += 3 * x;
        rgb[0] = row[first];
        rgb[1] = row[1];
        rgb[2] = row[2 - first];
    }
}

/* The mean over the part of the crop that the pixel covers; borders count by their share. */
DEVICE void average(const unsigned char *buffer, const Cut *cut, int size, int column, int line,
                    unsigned char *out) {
    unsigned long long sum[3] = {0, 0, 0};
    int left = column * cut->width, right = left + cut->width;
    int top = line * cut->height, bottom = top + cut->height;
    float whole = (float)cut->width * (float)cut->height;
    for (int y = top / size; y * size < bottom; y++) {
        unsigned int row[3] = {0, 0, 0};
        int high = bottom < (y + 1) * size ? bottom : (y + 1) * size;
        int tall = high - (top > y * size ? top : y * size);
        for (int x = left / size; x * size < right; x++) {
            int rgb[3], end = right < (x + 1) * size ? right : (x + 1) * size;
            int wide = end - (left > x * size ? left : x * size);
            color_at(buffer, cut, x, y, rgb);
            for (int c = 0; c < 3; c++) row[c] += (unsigned int)(wide * rgb[c]);
        }
        for (int c = 0; c < 3; c++) sum[c] += (unsigned long long)row[c] * (unsigned int)tall;
    }
    for (int c = 0; c < 3; c++) {
        float mean = (float)sum[c] / whole;
        /* OpenCV rounds halves up where it averages 2x2 pixels, and to even elsewhere. */
        int half = cut->width == 2 * size && cut->height == 2 * size;
        out[c] = (unsigned char)(half ? (int)(mean + 0.5f) : (int)rintf(mean));
    }
}

/* Where the pixel's center lies: the pixel before it, and the weight of the next in 1/2048. */
DEVICE int place(int index, int size, int side, int *weight) {
    int at = (2 * index + 1) * side - size, first = at < 0 ? -1 : at / (2 * size);
    if (first < 0 || first >= side - 1) {
        *weight = 0;
        return first < 0 ? 0 : side - 1;
    }
    *weight = (2048 * (at - first * 2 * size) + size) / (2 * size);
    return first;
}

DEVICE void interpolate(const unsigned char *buffer, const Cut *cut, int size, int column,
                        int line, unsigned char *out) {
    int across, down;
    int x = place(column, size, cut->width, &across), y = place(line, size, cut->height, &down);
    int a[3], b[3], c[3], d[3];
    color_at(buffer, cut, x, y, a);
    color_at(buffer, cut, x + (across > 0), y, b);
    color_at(buffer, cut, x, y + (down > 0), c);
    color_at(buffer, cut, x + (across > 0), y + (down > 0), d);
    for (int i = 0; i < 3; i++) {
        int upper = a[i] * (2048 - across) + b[i] * across;
        int lower = c[i] * (2048 - across) + d[i] * across;
        int sum = (((2048 - down) * (upper >> 4)) >> 16) + ((down * (lower >> 4)) >> 16);
        out[i] = (unsigned char)((sum + 2) >> 2);
    }
}

DEVICE void pixel(const unsigned char *buffer, unsigned char *crops, int size, int crop,
                  int column, int line) {
    const Cut *cut = (const Cut *)buffer + crop;
    unsigned char *out = crops + (((long long)crop * size + line) * size + column) * 3;
    if (cut->area) average(buffer, cut, size, column, line, out);
    else interpolate(buffer, cut, size, column, line, out);
}

#ifdef __CUDACC__
extern "C" __global__ void edgehp_crop(const unsigned char *buffer, unsigned char *crops,
                                       int size) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int line = blockIdx.y * blockDim.y + threadIdx.y;
    if (column < size && line < size) pixel(buffer, crops, size, blockIdx.z, column, line);
}
#else
/* As the kernel with `count` blocks in depth. */
void edgehp_crop(const unsigned char *buffer, unsigned char *crops, int size, int count);
void edgehp_crop(const unsigned char *buffer, unsigned char *crops, int size, int count) {
    for (int crop = 0; crop < count; crop++)
        for (int line = 0; line < size; line++)
            for (int column = 0; column < size; column++)
                pixel(buffer, crops, size, crop, column, line);
}
#endif
